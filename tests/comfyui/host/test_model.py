"""A native MODEL as a Denoiser: what stock sampling predicts, we predict; and nothing of the user's changes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import comfy.controlnet
import comfy.hooks
import comfy.model_base
import comfy.samplers
import comfy.supported_models
import pytest
import torch
from torch import Tensor

from editkit.hosts.comfyui.bundled import unet as _host_native
from editkit.hosts.host import open_denoiser, progress_bar, sampling_of
from editkit.hosts.sockets import conditioning_of, context_of
from editkit.pipelines.core.errors import EditError, FamilyError, MismatchError, ParameterError, ShapeError
from editkit.pipelines.core.guidance import guided
from editkit.pipelines.core.protocols import Context, Denoiser
from editkit.pipelines.core.sigmas import euler_step
from editkit.tests.comfyui.host.stock_faults import skip_where_clones_share_patches, skip_where_weight_hooks_stay
from editkit.tests.comfyui.host.tiny import cond, digest, latent, same_weights, tokens

ModelType = comfy.model_base.ModelType
WEIGHT = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_v.weight"


@pytest.fixture(scope="module", params=["EPS", "V_PREDICTION", "FLOW"])
def any_model(request, folder: Path):
    with torch.inference_mode():
        return _host_native.build_bundled(folder, model_type=ModelType[request.param])[0]


def stock(
    model, sigmas: Tensor, noise: Tensor, source: Tensor, positive, negative, cfg: float, name: str = "euler"
) -> Tensor:
    """The host's own sampling, unscaled."""
    return comfy.samplers.sample(
        model, noise, positive, negative, cfg, model.load_device, comfy.samplers.sampler_object(name), sigmas,
        model.model_options, latent_image=source, disable_pbar=True, seed=3,
    )  # fmt: skip


def ours(model, sigmas: Tensor, noise: Tensor, source: Tensor, positive, negative, cfg: float) -> Tensor:
    """The same by our protocol and our Euler step."""
    contexts = [context_of(positive, "positive"), context_of(negative, "negative")]
    with open_denoiser(model, source.shape, contexts, sigmas=sigmas) as denoiser:
        grid = sigmas.tolist()
        z = denoiser.noise(denoiser.scale_in(source), noise, grid[0])
        for sigma, target in pairwise(grid):
            z = euler_step(z, guided(denoiser, z, sigma, *contexts, cfg), sigma, target)
        return denoiser.scale_out(z)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> bool:
    return float((a - b).abs().max() / b.abs().max()) <= tolerance


@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_loop_equals_stock_euler(any_model, cfg: float) -> None:
    sigmas = sampling_of(any_model).schedule(6, 0.9)
    arguments = (sigmas, torch.randn(2, 4, 12, 10), latent(1, 2), cond(2), cond(3), cfg)
    expected = stock(any_model, *arguments)
    assert expected.abs().max() > 1
    assert close(ours(any_model, *arguments), expected)


def test_denoiser_fits_the_protocol(any_model) -> None:
    with open_denoiser(any_model, (1, 4, 8, 8), [context_of(cond(1), "positive")]) as denoiser:
        assert isinstance(denoiser, Denoiser)
        assert denoiser.channels == 4
        assert denoiser.flow == (any_model.model.model_type == ModelType.FLOW)
        assert denoiser.family == ("flow" if denoiser.flow else "bundled")


def test_flow_schedule_starts_at_the_largest_sigma(folder: Path) -> None:
    sampling = sampling_of(_host_native.build_bundled(folder, model_type=ModelType.FLOW)[0])
    expected = comfy.samplers.simple_scheduler(sampling.sampling, 8)
    torch.testing.assert_close(sampling.schedule(8), expected, rtol=0, atol=2e-3)
    assert sampling.schedule(8)[0] == 1
    assert sampling.schedule(8)[-1] == 0


def test_many_contexts_in_one_call(model) -> None:
    contexts = [context_of(cond(seed), f"prompt{seed}") for seed in range(5)]
    z = torch.randn(2, 4, 8, 8)
    calls = []
    patched = model.clone()
    patched.set_model_unet_function_wrapper(
        lambda apply, args: calls.append(len(args["input"])) or apply(args["input"], args["timestep"], **args["c"])
    )
    with open_denoiser(patched, z.shape, contexts) as denoiser:
        together = denoiser.denoise(z, 2.5, contexts)
        assert calls == [10]
        assert together.shape == (5, 2, 4, 8, 8)
        assert together.dtype == torch.float32
        for i, context in enumerate(contexts):
            torch.testing.assert_close(
                denoiser.denoise(z, torch.tensor(2.5), [context])[0], together[i], atol=2e-5, rtol=1e-4
            )
        assert (together[0] - together[1]).abs().max() > 1e-3


def test_half_precision_state_stays_float32(folder: Path) -> None:
    model = _host_native.build_bundled(folder)[0]
    reference = model.model.diffusion_model
    context, z = context_of(cond(1), "positive"), torch.randn(1, 4, 8, 8)
    with open_denoiser(model, z.shape, [context]) as denoiser:
        full = denoiser.denoise(z, 1.0, [context])
    model.model.diffusion_model = reference.bfloat16()
    model.model.diffusion_model.dtype = torch.bfloat16
    with open_denoiser(model, z.shape, [context]) as denoiser:
        half = denoiser.denoise(z, 1.0, [context])
    assert half.dtype == torch.float32
    assert 0 < (half - full).abs().max() < 0.3


def test_one_row_of_context_per_image(model) -> None:
    z = torch.randn(2, 4, 8, 8)
    pair = context_of([[torch.cat([tokens(1), tokens(2)]), {}]], "positive")
    single = [context_of(cond(seed), "positive") for seed in (1, 2)]
    with open_denoiser(model, z.shape, [pair, *single]) as denoiser:
        both, first, second = denoiser.denoise(z, 1.0, [pair, *single])
    torch.testing.assert_close(both[0], first[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(both[1], second[1], atol=1e-5, rtol=1e-4)


def test_a_lora_like_patch_is_in_force_and_leaves_no_trace(model) -> None:
    skip_where_clones_share_patches()
    before = digest(model.model)
    patched = model.clone()
    patched.add_patches({WEIGHT: ("diff", (torch.randn_like(model.model.state_dict()[WEIGHT]),))}, 0.5)
    arguments = (
        sampling_of(model).schedule(4, 0.8),
        torch.randn(1, 4, 8, 8),
        latent(4, 1, 8, 8),
        cond(5),
        cond(6),
        3.0,
    )
    plain, changed = ours(model, *arguments), ours(patched, *arguments)
    assert not close(plain, changed, 1e-2)
    assert close(changed, stock(patched, *arguments))
    assert close(ours(model, *arguments), plain, 1e-6)
    assert sampling_of(model).fingerprint != sampling_of(patched).fingerprint
    assert sampling_of(model).fingerprint == sampling_of(model.clone()).fingerprint
    patched.detach()
    assert same_weights(model.model, before)


def test_areas_masks_and_guidance_hooks_act_as_in_stock_sampling(model) -> None:
    patched = model.clone()
    patched.set_model_sampler_post_cfg_function(lambda args: args["denoised"] * 0.9 + 0.1 * args["cond_denoised"])
    patched.set_model_sampler_pre_cfg_function(lambda args: [args["conds_out"][0] * 1.1, *args["conds_out"][1:]])
    mask = torch.zeros(1, 12, 10)
    mask[:, :6] = 1
    positive = [[tokens(1), {"mask": mask, "mask_strength": 1.0}], [tokens(2), {"area": (6, 6, 2, 2), "strength": 0.7}]]
    positive += cond(7)
    arguments = (sampling_of(model).schedule(3, 0.9), torch.randn(1, 4, 12, 10), latent(1), positive, cond(3), 3.0)
    expected = stock(patched, *arguments)
    assert not close(expected, stock(model, *arguments), 1e-3)
    assert close(ours(patched, *arguments), expected)


class Control(comfy.controlnet.ControlBase):
    """A ControlNet that adds a constant to the middle block."""

    def __init__(self) -> None:
        super().__init__()
        self.runs, self.cleanups = 0, 0

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        middle = torch.full((x_noisy.shape[0], 128, 1, 1), 0.5)
        return {"input": [], "middle": [middle], "output": []}

    def pre_run(self, model, percent_to_timestep_function):
        super().pre_run(model, percent_to_timestep_function)
        self.runs += 1

    def cleanup(self):
        self.cleanups += 1

    def get_models(self):
        return []


def test_controlnets_act_and_are_cleaned_up(model) -> None:
    control = Control()
    positive = [[tokens(1), {"control": control, "control_apply_to_uncond": True}]]
    arguments = (
        sampling_of(model).schedule(3, 0.9),
        torch.randn(1, 4, 8, 8),
        latent(1, 1, 8, 8),
        positive,
        cond(3),
        3.0,
    )
    result = ours(model, *arguments)
    assert (control.runs, control.cleanups) == (1, 1)
    assert close(result, stock(model, *arguments))
    assert not close(result, ours(model, *arguments[:3], cond(1), cond(3), 3.0), 1e-2)


def test_weight_hooks_of_a_prompt_act_on_it_alone(model) -> None:
    skip_where_weight_hooks_stay()
    before = digest(model.model)
    hook = comfy.hooks.WeightHook(strength_model=0.7, strength_clip=0.0)
    hook.weights, hook.need_weight_init = {WEIGHT: ("diff", (torch.randn_like(before[WEIGHT]),))}, False
    group = comfy.hooks.HookGroup()
    group.add(hook)
    positive = [[tokens(1), {"hooks": group}]]
    arguments = (
        sampling_of(model).schedule(3, 0.9),
        torch.randn(1, 4, 8, 8),
        latent(1, 1, 8, 8),
        positive,
        cond(3),
        3.0,
    )
    result = ours(model, *arguments)
    assert close(result, stock(model, *arguments))
    assert not close(result, ours(model, *arguments[:3], cond(1), cond(3), 3.0), 1e-3)
    assert same_weights(model.model, before)
    late = open_denoiser(model, (1, 4, 8, 8), [context_of(cond(1), "positive")])
    with late as denoiser, pytest.raises(MismatchError, match="hooks"):
        denoiser.denoise(torch.randn(1, 4, 8, 8), 1.0, [context_of(positive, "positive")])


def test_replaced_tokens_are_used(model) -> None:
    z, original = torch.randn(1, 4, 8, 8), context_of(cond(1), "positive")
    other = original.with_tokens(tokens(2))
    with open_denoiser(model, z.shape, [original]) as denoiser:
        late = denoiser.denoise(z, 1.0, [other])[0]
        direct = denoiser.denoise(z, 1.0, [context_of(cond(2), "positive")])[0]
        bare = denoiser.denoise(z, 1.0, [Context(tokens(2))])[0]
    assert torch.equal(late, direct)
    assert torch.equal(bare, direct)
    assert conditioning_of(original) is original.host
    assert torch.equal(conditioning_of(other)[0][0], tokens(2))


def test_prompts_that_need_loading_must_be_announced(model) -> None:
    late = context_of([[tokens(1), {"gligen": ("position", None, [])}]], "positive")
    opened = open_denoiser(model, (1, 4, 8, 8), [context_of(cond(1), "positive")])
    with opened as denoiser, pytest.raises(MismatchError, match="gligen"):
        denoiser.denoise(torch.randn(1, 4, 8, 8), 1.0, [late])


def test_caches_stay_bounded(model) -> None:
    z, start = torch.randn(1, 4, 8, 8), context_of(cond(1), "positive")
    with open_denoiser(model, z.shape, [start]) as denoiser:
        for seed in range(20):
            denoiser.denoise(z, 1.0, [start.with_tokens(tokens(seed))])
        assert len(denoiser._conditions._cached) <= 8


class Stop(Exception):
    """Stands for a cancel, a fault or running out of memory."""


def _predict(denoiser, context: Context, times: int) -> None:
    for _ in range(times):
        denoiser.denoise(torch.randn(1, 4, 8, 8), 1.0, [context])


@pytest.mark.parametrize("at", [0, 2])
def test_faults_leave_the_model_as_it_was(model, at: int) -> None:
    skip_where_clones_share_patches()
    before, options = digest(model.model), {**model.model_options}
    patched = model.clone()
    patched.add_patches({WEIGHT: ("diff", (torch.ones_like(model.model.state_dict()[WEIGHT]),))})
    calls = []

    def wrapper(apply, args):
        calls.append(1)
        if len(calls) > at:
            raise Stop
        return apply(args["input"], args["timestep"], **args["c"])

    patched.set_model_unet_function_wrapper(wrapper)
    context = context_of(cond(1), "positive")
    opened = open_denoiser(patched, (1, 4, 8, 8), [context])
    with pytest.raises(Stop), opened as denoiser:
        _predict(denoiser, context, at + 1)
    assert model.model.current_patcher is None
    with pytest.raises(RuntimeError, match="closed"):
        denoiser.denoise(torch.randn(1, 4, 8, 8), 1.0, [context])
    with open_denoiser(model, (1, 4, 8, 8), [context]) as again:  # loads the unpatched weights again
        again.denoise(torch.randn(1, 4, 8, 8), 1.0, [context])
    assert same_weights(model.model, before)
    assert model.model_options == options


def test_wrong_things_are_refused_by_name(model, folder: Path) -> None:
    with pytest.raises(EditError, match="source_prompt"):
        context_of([], "source_prompt")
    with pytest.raises(EditError, match="negative"):
        context_of([[None, {}]], "negative")
    two = context_of([*cond(1), *cond(2)], "positive").with_tokens(tokens(3))
    with pytest.raises(ParameterError, match="2 combined parts"):
        conditioning_of(two)
    context = context_of(cond(1), "positive")
    opened = open_denoiser(model, (1, 4, 8, 8), [context])
    with opened as denoiser, pytest.raises(ShapeError, match="16 channels"):
        denoiser.denoise(torch.randn(1, 16, 8, 8), 1.0, [context])
    video = _host_native.build_bundled(folder)[0]
    video.model.latent_format.latent_dimensions = 3
    with pytest.raises(FamilyError, match="video"):
        sampling_of(video)
    cascade = _host_native.build_bundled(folder)[0]
    cascade.model.model_type = ModelType.STABLE_CASCADE
    with pytest.raises(FamilyError, match="STABLE_CASCADE"):
        sampling_of(cascade)


@pytest.mark.parametrize(("width", "name"), [(768, "sd1"), (1024, "sd2"), (2048, "sdxl"), (320, "vp")])
def test_family_by_context_width(folder: Path, monkeypatch: pytest.MonkeyPatch, width: int, name: str) -> None:
    model = _host_native.build_bundled(folder)[0]
    monkeypatch.setattr(_host_native.BundledConfig, "editkit_family", None)
    monkeypatch.setitem(model.model.model_config.unet_config, "context_dim", width)
    assert sampling_of(model).family == name


def test_cancel_reaches_the_progress(model) -> None:
    import comfy.model_management as management

    report = progress_bar(3, model)
    report(1, 3)
    management.interrupt_current_processing(True)
    with pytest.raises(management.InterruptProcessingException):
        report(2, 3)
    management.interrupt_current_processing(False)


def test_prompts_and_latents_of_another_model_are_refused_by_name(model) -> None:
    other = Context(torch.zeros(1, 77, 768), socket="positive")
    with open_denoiser(model, (1, 4, 12, 10), [other]) as denoiser:
        with pytest.raises(ShapeError, match="positive has width 768 but this model takes 128"):
            denoiser.denoise(torch.zeros(1, 4, 12, 10), 1.0, [other])
        with pytest.raises(ShapeError, match=r"latent is \[1, 16, 12, 10\] but this model takes \[batch, 4"):
            denoiser.scale_in(torch.zeros(1, 16, 12, 10))
