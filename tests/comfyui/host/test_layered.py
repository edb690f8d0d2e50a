"""LayerDiffusion natively: what learns, what stays, files that the host's own loaders read, and alternation in any sampler."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import comfy.lora
import comfy.model_management as management
import comfy.samplers
import comfy.sd
import comfy.utils
import pytest
import torch
from comfy_extras.nodes_train import LoraModelLoader
from safetensors.torch import save_file
from torch import Tensor

import nodes as stock_nodes
from editkit.hosts.comfyui import finetune as _host_tune
from editkit.hosts.comfyui.bundled import build_bundled
from editkit.hosts.comfyui.guiders import IterativeGuider
from editkit.hosts.host import iterative_guider, open_denoiser, progress_bar, sampling_of, tunable, tuned_model
from editkit.hosts.sockets import conditioning_of, context_of
from editkit.pipelines.core.errors import MismatchError, ParameterError
from editkit.pipelines.core.progress import silent
from editkit.pipelines.core.tune_plan import TunePlan
from editkit.pipelines.imagic import imagic
from editkit.pipelines.layerdiffusion.embeddings import EmbeddingOptions, layered_embeddings
from editkit.pipelines.layerdiffusion.finetune import TuneOptions, layered_tune
from editkit.pipelines.layerdiffusion.iterative_guidance import IterativeGuidance, takes_object
from editkit.tests.comfyui.host.stock_faults import skip_where_clones_share_patches, skip_where_sa_solver_breaks
from editkit.tests.comfyui.host.tiny import cond, digest, latent, same_weights

LORA, FULL = TunePlan("lora", rank=3), TunePlan()
MASK = torch.zeros(1, 12, 10)
MASK[:, 3:8, 2:7] = 1
STEPS = 3


@pytest.fixture(scope="module")
def model(bundled):
    return bundled[0]


@pytest.fixture(autouse=True)
def _nothing_loaded():
    """A MODEL with patches changes shared weights while it is loaded, and the host gives them back later."""
    management.unload_all_models()


@pytest.fixture(scope="module")
def headless(folder: Path):
    """The same weights through diffusers."""
    from diffusers import UNet2DConditionModel

    from editkit.hosts.diffusers.denoiser import DiffusersDenoiser
    from editkit.tests.toys import sd_table

    with torch.inference_mode(False):
        unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
        return DiffusersDenoiser(unet.eval().requires_grad_(False), sd_table(), "epsilon", "bundled", 0.18215, 8)


def contexts() -> list:
    return [context_of(cond(seed), "positive") for seed in (1, 2)]


def embed(model, progress=silent, **options):
    pair = contexts()
    chosen = EmbeddingOptions(**{"steps": STEPS, "lr": 0.05, **options})
    with open_denoiser(model, (1, 4, 12, 10), pair, learning=True) as denoiser:
        return layered_embeddings(denoiser, latent(1), *pair, MASK, seeds=[5], options=chosen, progress=progress)


def tune(model, plan=LORA, progress=silent, **options):
    context = contexts()[0]
    chosen = TuneOptions(**{"plan": plan, "steps": STEPS, "lr": 5e-3, **options})
    return layered_tune(
        tunable(model, [context]),
        latent(1),
        latent(2),
        context,
        MASK,
        seeds=[5],
        options=chosen,
        progress=progress,
    )


def predict(model, sigma: float = 2.0) -> Tensor:
    context = contexts()[0]
    with open_denoiser(model, (1, 4, 12, 10), [context]) as denoiser:
        return denoiser.denoise(latent(3) * 0.18215, sigma, [context])[0]


def test_stage_1_learns_what_headless_learns(model, headless):
    before = digest(model.model)
    native, pair = embed(model), contexts()
    free = layered_embeddings(
        headless, latent(1), *pair, MASK, seeds=[5], options=EmbeddingOptions(steps=STEPS, lr=0.05)
    )
    assert native.losses == pytest.approx(free.losses, rel=1e-3)
    assert (native.mixed.tokens - pair[0].tokens).abs().max() > 0.01
    torch.testing.assert_close(native.mixed.tokens.cpu(), free.mixed.tokens, atol=1e-3, rtol=1e-3)
    assert same_weights(model.model, before)
    assert torch.equal(embed(model, low_memory=True).mixed.tokens, native.mixed.tokens)


def test_the_node_shows_the_loss_curve(model, monkeypatch):
    shown = []
    monkeypatch.setattr(
        comfy.utils.ProgressBar, "update_absolute", lambda bar, value, total=None, preview=None: shown.append(preview)
    )
    embed(model, progress_bar(STEPS))
    assert [preview is not None for preview in shown] == [False] * (STEPS - 1) + [True]
    kind, image, size = shown[-1]
    assert kind == "JPEG" and image.size == (480, 240) and size == 512


@pytest.mark.parametrize("plan", [LORA, FULL], ids=["lora", "full"])
def test_stage_2_learns_what_headless_learns(model, headless, plan):
    before = digest(model.model)
    native = tune(model, plan)
    free = layered_tune(
        headless,
        latent(1),
        latent(2),
        contexts()[0],
        MASK,
        seeds=[5],
        options=TuneOptions(plan=plan, steps=STEPS, lr=5e-3),
    )
    assert native.object_losses == pytest.approx(free.object_losses, rel=1e-3)
    assert native.background_losses == pytest.approx(free.background_losses, rel=1e-3)
    assert set(native.changes) == set(free.changes)  # one layout, one set of names: files suit both hosts
    assert same_weights(model.model, before)
    skip_where_clones_share_patches()
    tuned = tuned_model(model, native.changes)
    with torch.no_grad():
        expected = headless.with_changes(native.changes).denoise(latent(3) * 0.18215, 2.0, [contexts()[0]])[0]
    moved = (predict(tuned) - predict(model)).abs().max()
    assert moved > 0.01
    torch.testing.assert_close(predict(tuned).cpu(), expected, atol=1e-3, rtol=1e-3)
    management.unload_all_models()
    assert same_weights(model.model, before)


@pytest.mark.parametrize("plan", [LORA, FULL], ids=["lora", "full"])
def test_saved_changes_load_with_the_hosts_own_nodes(model, plan, tmp_path, monkeypatch):
    skip_where_clones_share_patches()
    found = tune(model, plan)
    tuned = predict(tuned_model(model, found.changes))
    save_file(found.changes, tmp_path / "tuned.safetensors")
    loaded = comfy.utils.load_torch_file(str(tmp_path / "tuned.safetensors"), safe_load=True)
    monkeypatch.setattr(stock_nodes.folder_paths, "get_full_path_or_raise", lambda kind, name: str(tmp_path / name))
    by_loader = stock_nodes.LoraLoaderModelOnly().load_lora_model_only(model, "tuned.safetensors", 1.0)[0]
    by_socket = LoraModelLoader().load_lora_model(model, loaded, 1.0)[0]
    assert torch.equal(predict(by_loader), tuned)
    assert torch.equal(predict(by_socket), tuned)
    half = predict(LoraModelLoader().load_lora_model(model, loaded, 0.5)[0])
    assert not torch.equal(half, tuned) and not torch.equal(half, predict(model))


def test_a_lora_in_force_is_part_of_what_learns(model):
    """The copy starts from the patched weights, and its changes go on top of the patches."""
    first = tune(model, lr=0.05).changes
    patched = tuned_model(model, first)
    plain, onto = tune(model), tune(patched)
    assert plain.object_losses[0] != pytest.approx(onto.object_losses[0], rel=1e-3)
    both = tuned_model(patched, onto.changes)
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    key = names["lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_v"]
    assert len(both.patches[key]) == 2 and len(patched.patches[key]) == 1 and key not in model.patches


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_bfloat16_arithmetic_learns_nearly_the_same(model, kind):
    exact, rough = (tune(model, TunePlan(kind, 3, compute_dtype=dtype)) for dtype in (None, torch.bfloat16))
    assert rough.object_losses[0] == pytest.approx(exact.object_losses[0], rel=0.05)
    assert rough.object_losses[0] != exact.object_losses[0]
    assert {change.dtype for change in rough.changes.values()} == {torch.float32}
    found = embed(model, compute_dtype=torch.bfloat16)
    assert found.losses[0] == pytest.approx(embed(model).losses[0], rel=0.05)


def test_float16_weights_learn_in_float32(folder: Path):
    """What a user's checkpoint usually is: smaller changes than float16 can show are kept, and its weights stay."""
    half = build_bundled(folder)[0]
    half.model.diffusion_model.to(torch.float16)
    half.model.diffusion_model.dtype = torch.float16
    before = digest(half.model)
    found = tune(half, FULL, lr=1e-6)
    largest = max(float(change.abs().max()) for change in found.changes.values())
    assert 1e-6 < largest <= 3.1e-6  # three steps of Adam
    assert found.object_losses == pytest.approx(tune(half, LORA, lr=1e-6).object_losses, rel=1e-2)
    assert {value.dtype for value in half.model.diffusion_model.parameters()} == {torch.float16}
    assert same_weights(half.model, before)
    embedded = embed(half, steps=2)
    assert torch.isfinite(embedded.mixed.tokens).all() and same_weights(half.model, before)


def test_changes_of_another_model_are_refused(model):
    with pytest.raises(MismatchError, match="another model"):
        tuned_model(model, {"lora_unet_elsewhere.diff": torch.zeros(1)})


def test_imagic_on_a_native_model(model):
    pair = contexts()
    opened = open_denoiser(model, (1, 4, 12, 10), pair[:1], learning=True)
    found = imagic(
        opened, tunable(model, pair[:1]), latent(1), pair[0], eta=0.6, seeds=[1],
        embeddings=EmbeddingOptions(steps=2, region="none"), tuning=TuneOptions(plan=LORA, steps=2, background_weight=0.0),
    )  # fmt: skip
    fitted = found.embeddings.object.tokens.cpu()
    torch.testing.assert_close(found.context.tokens.cpu(), 0.6 * pair[0].tokens + 0.4 * fitted)
    assert conditioning_of(found.context)[0][0] is found.context.tokens


# ------------------------------------------------------------------------------------------------------------------ faults
class Cancelled(Exception):
    pass


@pytest.mark.parametrize("stage", ["embeddings", "lora", "full"])
@pytest.mark.parametrize("error", [Cancelled(), management.InterruptProcessingException(), torch.OutOfMemoryError("oom")],
                         ids=lambda error: type(error).__name__)  # fmt: skip
def test_a_fault_leaves_the_model_as_it_was(model, stage, error, monkeypatch):
    before, options = digest(model.model), repr(model.model_options)
    tensors = {name: id(value) for name, value in model.model.named_parameters()}
    copies, real = [], _host_tune.Learner

    def learner(*args):
        made = real(*args)
        copies.extend(weakref.ref(value) for value in made.network.parameters())
        return made

    monkeypatch.setattr(_host_tune, "Learner", learner)

    def progress(done, total, preview=None):
        if done == 2:
            raise error

    with pytest.raises(type(error)) as caught:
        embed(model, progress, low_memory=True) if stage == "embeddings" else tune(
            model, LORA if stage == "lora" else FULL, progress, low_memory=True
        )
    assert caught.value is error
    error.__traceback__ = None
    del caught
    gc.collect()
    assert same_weights(model.model, before)
    assert {name: id(value) for name, value in model.model.named_parameters()} == tensors
    assert repr(model.model_options) == options
    assert not any("forward" in vars(part) for part in model.model.modules())
    assert not any(getattr(part, "weight_function", None) for part in model.model.modules())
    assert all(copy() is None for copy in copies), "the copy is still in memory"
    assert stage == "embeddings" or copies
    assert [loaded.model for loaded in management.current_loaded_models] == [model]


# ---------------------------------------------------------------------------------------------------- iterative guidance
class Recorder(IterativeGuider):
    """Notes the sigma and the condition of every evaluation."""

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        self.notes = getattr(self, "notes", [])
        for kind in ("object", "positive"):
            for part in self.conds[kind]:
                part["kind"] = kind
        real = comfy.samplers.sampling_function

        def spy(model, x, sigma, uncond, cond, *rest, **named):
            self.notes.append((float(timestep[0]), cond[0]["kind"]))
            return real(model, x, sigma, uncond, cond, *rest, **named)

        comfy.samplers.sampling_function = spy
        try:
            return super().predict_noise(x, timestep, model_options, seed)
        finally:
            comfy.samplers.sampling_function = real


def recorded(model, name: str, sigmas: Tensor, grid: Tensor | None = None) -> tuple[list, Tensor]:
    pair = contexts()
    guidance = IterativeGuidance(pair[0], pair[1], sigmas if grid is None else grid)
    guider = Recorder(model, guidance, context_of(cond(4), "negative"), 3.0)
    sampler = comfy.samplers.sampler_object(name)
    noise, empty = torch.randn(1, 4, 12, 10, generator=torch.Generator().manual_seed(1)), torch.zeros(1, 4, 12, 10)
    return guider, guider.sample(noise, empty, sampler, sigmas, disable_pbar=True, seed=7)


WANTED = {
    "euler": [1] * 6, "dpmpp_2m": [1] * 6, "ddim": [1] * 6, "heun": [2] * 5 + [1], "dpm_2": [2] * 5 + [1],
    "dpmpp_sde": [2] * 5 + [1], "dpmpp_2s_ancestral": [2] * 5 + [1], "heunpp2": [3] * 4 + [2, 1],
}  # fmt: skip


@pytest.mark.parametrize("name", WANTED)
def test_conditions_alternate_by_step_however_often_a_sampler_looks(model, name):
    sigmas = sampling_of(model).schedule(6)
    guider, out = recorded(model, name, sigmas)
    expected = [
        "object" if takes_object(step, 6) else "positive" for step in range(6) for _ in range(WANTED[name][step])
    ]
    assert [kind for _, kind in guider.notes] == expected
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("name", comfy.samplers.SAMPLER_NAMES)
def test_every_sampler_of_the_host_runs_and_alternates(model, name):
    """Every evaluation inside a step has the step's condition, its first one too."""
    sigmas = sampling_of(model).schedule(5)
    skip_where_sa_solver_breaks(name)
    state = torch.get_rng_state()
    guider, out = recorded(model, name, sigmas)
    assert torch.isfinite(out).all()
    grid = sigmas.tolist()
    for sigma, kind in guider.notes:
        between = [step for step in range(5) if grid[step] * (1 - 1e-5) > sigma > grid[step + 1] * (1 + 1e-5)]
        if between and name not in ("dpm_fast", "dpm_adaptive"):
            assert kind == ("object" if takes_object(between[0], 5) else "positive")
    assert {kind for _, kind in guider.notes} == {"object", "positive"}
    if name in ("euler", "heun", "dpmpp_2m", "lms"):
        assert torch.equal(torch.get_rng_state(), state)


def test_the_rehearsal_changes_no_result(model):
    """Equal conditions: the host's own guider gives the same bits, random samplers included."""
    sigmas = sampling_of(model).schedule(4)
    for name in ("euler", "dpmpp_sde", "euler_ancestral", "heun"):
        same, negative = contexts()[0], context_of(cond(4), "negative")
        ours = IterativeGuider(model, IterativeGuidance(same, same, sigmas), negative, 3.0)
        plain = comfy.samplers.CFGGuider(model)
        plain.set_conds(cond(1), cond(4))
        plain.set_cfg(3.0)
        results = []
        for guider in (ours, plain):
            torch.manual_seed(3)
            noise = torch.randn(1, 4, 12, 10, generator=torch.Generator().manual_seed(1))
            empty, sampler = torch.zeros(1, 4, 12, 10), comfy.samplers.sampler_object(name)
            results.append(guider.sample(noise, empty, sampler, sigmas, disable_pbar=True, seed=7))
        assert torch.equal(*results), name


def test_attention_edits_and_alternation_do_not_mix(model):
    from editkit.hosts.comfyui.patch_keys import ATTENTION_KEY, OUTER_SAMPLE

    edited = model.clone()
    edited.add_wrapper_with_key(OUTER_SAMPLE, ATTENTION_KEY, lambda executor, *rest, **named: executor(*rest, **named))
    guidance = IterativeGuidance(*contexts(), sampling_of(model).schedule(4))
    with pytest.raises(ParameterError):
        iterative_guider(edited, guidance, contexts()[0], 3.0)
    assert isinstance(iterative_guider(model, guidance, contexts()[0], 3.0), comfy.samplers.CFGGuider)


def test_a_part_of_the_grid_counts_from_its_end_and_another_is_refused(model):
    sigmas = sampling_of(model).schedule(6)
    whole, _ = recorded(model, "euler", sigmas)
    tail, _ = recorded(model, "euler", sigmas[3:], grid=sigmas)
    head, _ = recorded(model, "heun", sigmas[:4], grid=sigmas)
    assert tail.notes == whole.notes[3:]
    assert [kind for _, kind in head.notes] == [kind for _, kind in whole.notes[:3] for _ in range(2)]
    with pytest.raises(MismatchError, match="alternating guider"):
        recorded(model, "euler", sampling_of(model).schedule(7), grid=sigmas)


def test_equal_to_the_headless_loop(model, headless):
    from editkit.pipelines.core.guidance import EditPrompts
    from editkit.pipelines.core.samplers import predictor, sample

    sigmas, pair = headless.schedule(6), contexts()
    _, native = recorded(model, "euler", sigmas)
    prompts = EditPrompts(IterativeGuidance(*pair, sigmas), context_of(cond(4), "negative"), 3.0)
    noise = torch.randn(1, 4, 12, 10, generator=torch.Generator().manual_seed(1))
    z = headless.noise(torch.zeros_like(noise), noise, float(sigmas[0]))
    free = headless.scale_out(sample("euler", predictor(headless, prompts), z, sigmas))
    torch.testing.assert_close(native.cpu(), free, atol=2e-2, rtol=1e-3)
