"""Guided reconstruction on a native MODEL: what it learns, what it leaves behind, and native samplers that use it."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable
from typing import Any

import comfy.model_management as management
import comfy.samplers
import comfy.utils
import pytest
import torch
from torch import Tensor

from editkit.hosts.bundled.example_images import load_example
from editkit.hosts.embeddings import embeddings_in, negative_in, prompts_to_open
from editkit.hosts.files import embedding_files
from editkit.hosts.host import open_denoiser, text_encoder_of, to_host
from editkit.hosts.latent import samples_of
from editkit.hosts.sockets import conditioning_of, context_of
from editkit.hosts.trajectory import trajectory_in
from editkit.pipelines.core.errors import LoadError, MismatchError
from editkit.pipelines.core.protocols import Context
from editkit.pipelines.inversion.ddim import invert, reconstruct
from editkit.pipelines.inversion.null_text import NullTextOptions, null_text
from editkit.tests.comfyui.host.stock_faults import skip_where_clones_share_patches
from editkit.tests.comfyui.host.test_model import WEIGHT, Control
from editkit.tests.comfyui.host.tiny import digest, same_weights
from editkit.tests.nodes.graph import call

CFG, STEPS, INNER = 7.5, 20, 5


class Scene:
    """One image inverted with the shipped model, natively."""

    def __init__(self) -> None:
        self.model, self.clip, self.vae = call("LoadModel", model="bundled")
        example = load_example("one_object")
        self.caption = example.caption
        self.latent = call("EncodeImage", image=example.image, vae=self.vae)[0]
        self.sigmas = call("EditSigmas", model=self.model, steps=STEPS, strength=1.0)[0]
        self.positive, self.empty = self.encode(self.caption), self.encode("")
        self.target = self.encode("a green star on a white background")
        self.trajectory, self.noised = self.inverted(self.model)
        self.embeddings, self.rebuilt, _, self.report = self.learned()

    def encode(self, text: str) -> list:
        return conditioning_of(text_encoder_of(self.clip).encode(text))

    def inverted(self, model: Any) -> tuple[Any, Any]:
        found = call("InvertDDIM", model=model, positive=self.positive, latent=self.latent, sigmas=self.sigmas)
        return found[0], found[1]

    def learned(self, **change: Any) -> tuple[Any, ...]:
        given = {
            "model": self.model, "trajectory": self.trajectory, "positive": self.positive, "negative": self.empty,
            "cfg": CFG, "inner_steps": INNER, "tolerance": 0.0, "tolerance_growth": 0.0,
        }  # fmt: skip
        return call("NullText", **{**given, **change})

    def proximal(self, **options: Any) -> Any:
        return call("NegativePrompt", model=self.model, trajectory=self.trajectory, positive=self.positive, **options)[
            0
        ]

    def looped(
        self, embeddings: Any, positive: list, model: Any = None, cfg: float = CFG, sampler: str = "euler"
    ) -> Tensor:
        """Our own guided loop, unscaled."""
        trajectory, learned = trajectory_in(self.trajectory), negative_in(embeddings)
        context = context_of(positive, "positive")
        opened = prompts_to_open(context, learned)
        with open_denoiser(model or self.model, trajectory.source.shape, opened, sigmas=trajectory.sigmas) as denoiser:
            z = reconstruct(denoiser, trajectory, context, negative=learned, guidance_scale=cfg, sampler=sampler)
            return denoiser.scale_out(z)

    def sampled(self, guider: Any, sampler: str = "euler", start: Any = None, sigmas: Any = None) -> Tensor:
        """A native sampler with a GUIDER, as SamplerCustomAdvanced with DisableNoise runs it."""
        latent = to_host(samples_of(start or self.noised))
        return guider.sample(
            torch.zeros_like(latent), latent, comfy.samplers.sampler_object(sampler),
            self.sigmas if sigmas is None else sigmas, disable_pbar=True, seed=0,
        )  # fmt: skip

    def guider(self, embeddings: Any, positive: list | None = None, model: Any = None, cfg: float = CFG) -> Any:
        return call(
            "EmbeddingsGuider", model=model or self.model, positive=positive or self.positive, embeddings=embeddings, cfg=cfg
        )[0]  # fmt: skip


@pytest.fixture(scope="module")
def scene():
    try:
        return Scene()
    except LoadError as error:
        pytest.skip(f"the bundled model is not there: {error}")


def off(a: Any, b: Any) -> float:
    """Largest difference of two latents, relative to the second's largest value."""
    a, b = (samples_of(x) if isinstance(x, dict) else x for x in (a, b))
    return float((a - b).abs().max() / b.abs().max())


def lost(a: Any, b: Any) -> float:
    """Root mean square difference of two latents, relative to the second's."""
    a, b = (samples_of(x) if isinstance(x, dict) else x for x in (a, b))
    return float((a - b).norm() / b.norm())


def test_native_and_headless_learn_the_same(scene) -> None:
    """From the same prompts; more and larger steps let rounding grow, as in any optimisation."""
    from editkit.hosts.diffusers.loading import load_bundled

    sigmas = call("EditSigmas", model=scene.model, steps=8, strength=1.0)[0]
    trajectory = call("InvertDDIM", model=scene.model, positive=scene.positive, latent=scene.latent, sigmas=sigmas)[0]
    learned, rebuilt, _, _ = scene.learned(trajectory=trajectory)
    with torch.inference_mode(False):
        denoiser = load_bundled().denoiser
        source, null = (Context(conditioning[0][0].clone()) for conditioning in (scene.positive, scene.empty))
        trajectory = invert(denoiser, scene.latent["samples"].clone(), source, sigmas.clone())
        options = NullTextOptions(CFG, INNER, tolerance=0.0, tolerance_growth=0.0)
        theirs = null_text(denoiser, trajectory, source, null, options=options)
    ours = embeddings_in(learned)
    assert off(ours.tokens, theirs.embeddings.tokens) <= 1e-3
    assert off(rebuilt, denoiser.scale_out(theirs.rebuilt)) <= 1e-3
    assert float((ours.tokens - null.tokens).abs().amax(dim=(1, 2, 3)).min()) > 1e-2  # every step learned


def test_the_reconstruction_is_what_the_loop_ends_at(scene) -> None:
    rebuilt = scene.looped(scene.embeddings, scene.positive)
    plain = scene.looped(scene.empty, scene.positive)
    assert off(rebuilt, scene.rebuilt["samples"]) <= 1e-4
    assert lost(rebuilt, scene.latent) < 0.8 * lost(plain, scene.latent)
    assert f"{STEPS * INNER} updates in {STEPS} steps" in scene.report


def test_only_the_embeddings_learn(scene) -> None:
    asked = []
    grad = torch.autograd.grad

    def watched(outputs: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
        asked.append([tuple(value.shape) for value in inputs])
        assert not any(weight.requires_grad for weight in scene.model.model.parameters())
        return grad(outputs, inputs, *rest, **named)

    before = digest(scene.model.model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd, "grad", watched)
        scene.learned(inner_steps=1)
    assert asked == [[(1, 77, 128)]] * STEPS
    assert same_weights(scene.model.model, before)
    assert all(weight.grad is None for weight in scene.model.model.parameters())


class Saved:
    """A tensor that autograd keeps; gone when autograd lets it go."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


def live_bytes() -> int:
    gc.collect()
    return sum(o.numel() * o.element_size() for o in gc.get_objects() if type(o) in (Tensor, torch.nn.Parameter))


@pytest.fixture
def at_update(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Calls something at an update of the progress, as a click on cancel comes."""

    def install(update: int, act: Callable[[], None]) -> None:
        calls = []
        monkeypatch.setattr(
            comfy.utils.ProgressBar,
            "update_absolute",
            lambda *_, **__: calls.append(1) or (act() if len(calls) == update else None),
        )

    yield install
    management.interrupt_current_processing(False)


@pytest.mark.parametrize("seed", range(2))
def test_a_cancel_leaves_nothing_behind(scene, at_update, seed: int) -> None:
    """At a random update: the MODEL is bit-identical, and neither tensors nor autograd's own are left."""
    skip_where_clones_share_patches()
    update = random.Random(seed).randrange(1, STEPS * INNER // 2)
    patched = scene.model.clone()
    shape = scene.model.model.state_dict()[WEIGHT].shape
    patched.add_patches({WEIGHT: ("diff", (torch.full(shape, 0.01),))})
    trajectory, _ = scene.inverted(patched)
    alive: weakref.WeakSet[Saved] = weakref.WeakSet()
    most = [0]

    def pack(value: Tensor) -> Saved:
        saved = Saved(value)
        alive.add(saved)
        most[0] = max(most[0], len(alive))
        return saved

    before, identities = digest(scene.model.model), [id(p) for p in scene.model.model.parameters()]
    bytes_before = live_bytes()
    at_update(update, lambda: management.interrupt_current_processing(True))
    cancelled = pytest.raises(management.InterruptProcessingException)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.value), cancelled:
        scene.learned(model=patched, trajectory=trajectory)
    del cancelled
    management.interrupt_current_processing(False)
    assert most[0] > 20 and not alive
    assert live_bytes() == bytes_before
    assert same_weights(scene.model.model, before)
    assert [id(p) for p in scene.model.model.parameters()] == identities
    patched.detach()
    again, _ = scene.inverted(scene.model)
    assert torch.equal(trajectory_in(again).latents, trajectory_in(scene.trajectory).latents)


def test_previews_are_made_while_it_learns(scene, monkeypatch: pytest.MonkeyPatch) -> None:
    import latent_preview

    decoder, shown = (
        torch.nn.Conv2d(4, 3, 1),
        [],
    )  # its weights are inference tensors that ask for gradients, as TAESD's

    class Previewer:
        def decode_latent_to_preview_image(self, preview_format: str, x0: Tensor) -> tuple:
            shown.append(decoder(x0).numpy().shape)
            return ("JPEG", None, 64)

    monkeypatch.setattr(latent_preview, "get_previewer", lambda *_: Previewer())
    scene.learned(inner_steps=1)
    assert shown == [(1, 3, 12, 12)] * STEPS


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_the_guider_repeats_our_loop(scene, sampler: str) -> None:
    for positive in (scene.positive, scene.target):
        expected = scene.looped(scene.embeddings, positive, sampler=sampler)
        assert off(scene.sampled(scene.guider(scene.embeddings, positive), sampler), expected) <= 1e-4
    assert lost(expected, scene.latent) > 0.2  # with another prompt it edits


@pytest.mark.parametrize("cfg", [1.0, CFG])
def test_the_guider_cuts_as_our_loop_does(scene, cfg: float) -> None:
    plain, cut = scene.proximal(), scene.proximal(prox="soft", quantile=0.5, pull=0.3)
    results = [scene.sampled(scene.guider(embeddings, scene.target, cfg=cfg)) for embeddings in (plain, cut)]
    for embeddings, result in zip((plain, cut), results, strict=True):
        assert off(result, scene.looped(embeddings, scene.target, cfg=cfg)) <= 1e-4
    assert lost(*results) > 1e-2


def test_the_users_sigmas_stay(scene) -> None:
    before = scene.sigmas.clone()
    assert torch.isfinite(scene.sampled(scene.guider(scene.embeddings), "uni_pc")).all()  # it writes into its sigmas
    assert torch.equal(scene.sigmas, before)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun", "dpm_2"])
def test_any_sampler_reconstructs_better_than_with_plain_guidance(scene, sampler: str) -> None:
    """heun and dpm_2 evaluate more than once per step, dpm_2 between the sigmas too."""
    plain = comfy.samplers.CFGGuider(scene.model)
    plain.set_conds(scene.positive, scene.empty)
    plain.set_cfg(CFG)
    ours = scene.sampled(scene.guider(scene.embeddings), sampler)
    assert lost(ours, scene.latent) < 0.75 * lost(scene.sampled(plain, sampler), scene.latent)


def test_the_guider_runs_parts_of_the_grid(scene) -> None:
    guider = scene.guider(scene.embeddings)
    whole = scene.sampled(guider)
    middle = scene.sampled(guider, sigmas=scene.sigmas[:8])
    end = scene.sampled(guider, sigmas=scene.sigmas[7:], start={"samples": middle})
    assert off(end, whole) <= 1e-5


def test_patches_and_controlnets_stay_in_force(scene) -> None:
    skip_where_clones_share_patches()
    patched = scene.model.clone()
    patched.set_model_sampler_post_cfg_function(lambda args: args["denoised"] * 0.9 + 0.1 * args["cond_denoised"])
    hooked = scene.sampled(scene.guider(scene.embeddings, model=patched))
    assert off(hooked, scene.looped(scene.embeddings, scene.positive, model=patched)) <= 1e-4
    assert off(hooked, scene.sampled(scene.guider(scene.embeddings))) > 1e-2
    control = [[scene.positive[0][0], {**scene.positive[0][1], "control": Control(), "control_apply_to_uncond": True}]]
    controlled = scene.sampled(scene.guider(scene.embeddings, control))
    assert off(controlled, scene.looped(scene.embeddings, control)) <= 1e-4
    assert off(controlled, scene.sampled(scene.guider(scene.embeddings))) > 1e-3


def test_what_does_not_belong_is_refused_by_name(scene) -> None:
    skip_where_clones_share_patches()
    patched = scene.model.clone()
    patched.add_patches({WEIGHT: ("diff", (torch.ones_like(scene.model.model.state_dict()[WEIGHT]),))})
    with pytest.raises(MismatchError, match="embeddings were made with another model"):
        scene.guider(scene.embeddings, model=patched)
    with pytest.raises(MismatchError, match="trajectory was made with another model"):
        scene.learned(model=patched)
    with pytest.raises(MismatchError, match="positive is not the prompt"):
        scene.learned(positive=scene.encode("a blue square on a white background"))
    other = call("EditSigmas", model=scene.model, steps=7, strength=1.0)[0]
    with pytest.raises(MismatchError, match="embeddings was made on 20 steps"):
        scene.sampled(scene.guider(scene.embeddings), sigmas=other)
    with pytest.raises(MismatchError, match="embeddings was made on 20 steps"):
        call(
            "BlendedDenoise", model=scene.model, positive=scene.positive, negative=scene.embeddings, sigmas=other,
            latent=call("NoiseLatent", model=scene.model, latent=scene.latent, sigmas=other)[0],
            source_latent=scene.latent, schedule=torch.ones(1, 12, 12),
        )  # fmt: skip


def test_embeddings_are_a_negative_of_the_blended_loop(scene) -> None:
    """With the trajectory's noisiest latent and a full mask, the blended loop is guided sampling."""
    edited = call(
        "BlendedDenoise", model=scene.model, positive=scene.positive, negative=scene.embeddings, cfg=CFG,
        sigmas=scene.sigmas, latent=scene.noised, source_latent=scene.latent, schedule=torch.ones(1, 12, 12),
    )[0]  # fmt: skip
    assert off(edited, scene.rebuilt["samples"]) <= 1e-4


def test_saved_and_loaded_bit_for_bit(scene, tmp_path, request, monkeypatch: pytest.MonkeyPatch) -> None:
    import folder_paths

    usual = folder_paths.get_output_directory()
    request.addfinalizer(lambda: folder_paths.set_output_directory(usual))
    folder_paths.set_output_directory(str(tmp_path))
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    names = [call("SaveEmbeddings", embeddings=scene.embeddings, filename_prefix="deep/null")[0] for _ in range(2)]
    assert names == [f"output/deep/null_{i:05d}.safetensors" for i in (1, 2)] == embedding_files()
    loaded = call("LoadEmbeddings", file=names[1])[0]
    before, after = embeddings_in(scene.embeddings), embeddings_in(loaded)
    assert torch.equal(before.tokens, after.tokens)
    assert torch.equal(scene.sampled(scene.guider(loaded)), scene.sampled(scene.guider(scene.embeddings)))
    assert off(scene.looped(loaded, scene.positive), scene.rebuilt["samples"]) <= 1e-4
    pulled = scene.proximal(prox="hard", pull=0.4)
    name = call("SaveEmbeddings", embeddings=pulled, filename_prefix="pulled")[0]
    again = call("LoadEmbeddings", file=name)[0]
    assert torch.equal(scene.sampled(scene.guider(again)), scene.sampled(scene.guider(pulled)))
    (tmp_path / "outside.safetensors").write_bytes(b"")
    with pytest.raises(LoadError, match="there is no file"):
        call("LoadEmbeddings", file="output/../outside.safetensors")
