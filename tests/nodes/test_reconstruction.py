"""Null-text and negative-prompt inversion as nodes, on the bundled model without a host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from editkit.hosts.bundled.example_images import load_example
from editkit.hosts.diffusers.host import headless_run
from editkit.hosts.embeddings import embeddings_in, negative_in
from editkit.hosts.host import sampling_of, text_encoder_of
from editkit.hosts.latent import samples_of
from editkit.hosts.sockets import HeadlessModel, conditioning_of, context_of
from editkit.hosts.trajectory import trajectory_in
from editkit.pipelines.core.errors import EditError, LoadError, MismatchError, ParameterError
from editkit.pipelines.inversion.ddim import reconstruct
from editkit.tests.nodes.graph import call

STEPS, CFG = 5, 4.0


class Scene:
    """One image inverted."""

    def __init__(self) -> None:
        self.model, self.clip, self.vae = call("LoadModel", model="bundled")
        example = load_example("one_object")
        self.caption = example.caption
        self.latent = call("EncodeImage", image=example.image, vae=self.vae)[0]
        self.sigmas = call("EditSigmas", model=self.model, steps=STEPS, strength=1.0)[0]
        self.positive, self.empty, self.target = map(self.encode, (self.caption, "", "a green star"))
        self.trajectory, self.noised = self.inverted()

    def encode(self, text: str) -> list:
        return conditioning_of(text_encoder_of(self.clip).encode(text))

    def inverted(self, **change: Any) -> tuple[Any, Any]:
        given = {"model": self.model, "positive": self.positive, "latent": self.latent, "sigmas": self.sigmas}
        found = call("InvertDDIM", **{**given, **change})
        return found[0], found[1]

    def learned(self, **change: Any) -> tuple[Any, ...]:
        given = {
            "model": self.model, "trajectory": self.trajectory, "positive": self.positive, "negative": self.empty,
            "cfg": CFG, "inner_steps": 2,
        }  # fmt: skip
        return call("NullText", **{**given, **change})

    def borrowed(self, **options: Any) -> Any:
        given = {"model": self.model, "trajectory": self.trajectory, "positive": self.positive}
        return call("NegativePrompt", **{**given, **options})[0]

    def sampled(self, negative: Any, positive: list | None = None, cfg: float = CFG) -> torch.Tensor:
        """Guided sampling from the trajectory, unscaled."""
        trajectory, sampling = trajectory_in(self.trajectory), sampling_of(self.model)
        context = context_of(positive or self.positive, "positive")
        z = reconstruct(sampling, trajectory, context, negative=negative_in(negative), guidance_scale=cfg)
        return sampling.scale_out(z)


@pytest.fixture(scope="module")
def scene() -> Scene:
    return Scene()


@pytest.fixture(scope="module")
def learned(scene: Scene) -> tuple[Any, ...]:
    return scene.learned()


def test_null_text_learns_and_says_so(scene, learned):
    embeddings, rebuilt, plot, report = learned
    found = embeddings_in(embeddings)
    assert found.tokens.shape == (STEPS, 1, 77, 128) and found.guidance_scale == CFG
    assert (found.tokens - scene.empty[0][0]).abs().amax(dim=(1, 2, 3)).min() > 1e-3
    assert plot.shape[0] == 1 and plot.shape[-1] == 3
    assert f"{2 * STEPS} updates in {STEPS} steps" in report
    assert torch.allclose(scene.sampled(embeddings), rebuilt["samples"], atol=1e-3)
    source = scene.latent["samples"]
    assert (rebuilt["samples"] - source).norm() < (scene.sampled(scene.empty) - source).norm()


def test_the_image_s_size_stays_with_the_reconstruction(scene):
    image = torch.rand(1, 45, 61, 3, generator=torch.Generator().manual_seed(0))
    latent = call("EncodeImage", image=image, vae=scene.vae)[0]
    trajectory, _ = scene.inverted(latent=latent)
    rebuilt = scene.learned(trajectory=trajectory, inner_steps=0)[1]
    assert call("DecodeLatent", latent=rebuilt, vae=scene.vae)[0].shape == image.shape


@pytest.mark.parametrize("change", [{"inner_steps": 0}, {"cfg": 1.0}])
def test_with_nothing_to_learn_the_negative_stays(scene, change):
    learned, _, _, report = scene.learned(**change)
    embeddings = embeddings_in(learned)
    assert "nothing was learned" in report
    assert torch.equal(embeddings.tokens, scene.empty[0][0].expand(STEPS, 1, -1, -1))


def test_a_large_tolerance_stops_at_once(scene):
    report = scene.learned(tolerance=10.0)[3]
    assert f"{STEPS} updates in {STEPS} steps" in report


def test_images_of_a_batch_do_not_influence_each_other(scene, learned):
    both = {"samples": torch.cat([scene.latent["samples"], scene.latent["samples"].flip(-1)])}
    trajectory, _ = scene.inverted(latent=both)
    together = embeddings_in(scene.learned(trajectory=trajectory)[0])
    alone = embeddings_in(learned[0])
    assert together.tokens.shape == (STEPS, 2, 77, 128)
    assert torch.allclose(together.tokens[:, :1], alone.tokens, atol=2e-3)


def test_a_borrowed_negative_makes_the_scale_irrelevant(scene):
    embeddings = scene.borrowed()
    plain = scene.sampled(embeddings, cfg=1.0)
    assert torch.allclose(scene.sampled(embeddings, cfg=9.0), plain, atol=1e-3)
    assert not torch.allclose(scene.sampled(embeddings, scene.target, 9.0), plain, atol=1)


@pytest.mark.parametrize(
    "change",
    [
        {"prox": "soft"}, {"prox": "published l1"}, {"quantile": 0.9}, {"pull": 0.5}, {"pull": 0.5, "pull_to": "source"},
        {"pull": 0.5, "dilation": 4}, {"pull": 0.5, "pull_below": 1.0}, {"threshold": 0.3}, {"batch_quantile": True},
        {"pull": 0.5, "prox": "soft", "mask_of_shrunk": True}, {"interpolation": 0.5},
    ],
)  # fmt: skip
def test_every_option_of_the_cut_acts(scene, change):
    def edited(**options):
        options = {"prox": "hard", "negative": scene.empty, **options}
        return scene.sampled(scene.borrowed(**options), scene.target)

    first = dict(list(change.items())[:-1])
    assert (edited(**change) - edited(**first)).abs().max() > 1e-2


def test_embeddings_stand_for_a_negative(scene, learned):
    """Under a full mask the blended loop is guided sampling."""
    edited = call(
        "BlendedDenoise", model=scene.model, positive=scene.positive, negative=learned[0], cfg=CFG, sigmas=scene.sigmas,
        latent=scene.noised, source_latent=scene.latent, schedule=torch.ones(1, 12, 12),
    )[0]  # fmt: skip
    assert torch.allclose(edited["samples"], learned[1]["samples"], atol=1e-3)


def test_what_does_not_belong_is_refused_by_name(scene, learned):
    other = call("EditSigmas", model=scene.model, steps=STEPS + 1, strength=1.0)[0]
    blended = {
        "model": scene.model, "positive": scene.positive, "negative": learned[0], "sigmas": other,
        "latent": call("NoiseLatent", model=scene.model, latent=scene.latent, sigmas=other)[0],
        "source_latent": scene.latent, "schedule": torch.ones(1, 12, 12),
    }  # fmt: skip
    with pytest.raises(MismatchError, match="embeddings was made on 5 steps"):
        call("BlendedDenoise", **blended)
    with pytest.raises(EditError, match="negative is a Tensor"):
        call("BlendedDenoise", **{**blended, "negative": torch.zeros(1)})
    with pytest.raises(EditError, match="embeddings is a list"):
        call("EmbeddingsGuider", model=scene.model, positive=scene.positive, embeddings=scene.empty, cfg=CFG)
    stranger = HeadlessModel(Stranger(scene.model.denoiser))
    for name, given in (("EmbeddingsGuider", {"embeddings": learned[0]}), ("NegativePrompt", {"prox": "off"})):
        with pytest.raises(MismatchError, match="made with another model"):
            inputs = {"trajectory": scene.trajectory} if name == "NegativePrompt" else {}
            call(name, model=stranger, positive=scene.positive, **given, **inputs)
    with pytest.raises(MismatchError, match="positive is not the prompt"):
        scene.learned(positive=scene.target)
    with pytest.raises(ParameterError, match="no negative prompt"):
        scene.borrowed(interpolation=0.5)


class Stranger:
    """Another model, by its name."""

    def __init__(self, denoiser: Any) -> None:
        self._denoiser, self.fingerprint = denoiser, "another"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._denoiser, name)


class Cancelled(Exception):
    pass


@pytest.mark.parametrize("update", [1, 4, 9])
def test_a_cancel_comes_through_and_leaves_the_model(scene, update):
    weights = scene.model.denoiser.unet
    before = {name: value.clone() for name, value in weights.state_dict().items()}
    seen = []

    def stop(done: int, total: int, preview: Any = None) -> None:
        seen.append((done, total))
        if len(seen) == update:
            raise Cancelled

    with headless_run(progress=stop), pytest.raises(Cancelled):
        scene.learned()
    assert len(seen) == update and seen[-1][0] <= seen[-1][1] == (2 + 1) * STEPS
    assert all(torch.equal(before[name], value) for name, value in weights.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in weights.parameters())


def test_saved_and_loaded_bit_for_bit(scene, learned, tmp_path: Path):
    with headless_run(output_folder=tmp_path):
        files = [call("SaveEmbeddings", embeddings=learned[0], filename_prefix="a/null")[0] for _ in range(2)]
        pulled = scene.borrowed(prox="soft", pull=0.4)
        files.append(call("SaveEmbeddings", embeddings=pulled, filename_prefix="null")[0])
        for wrong in ("../outside", "", " ", "/etc/outside", "."):
            with pytest.raises(ParameterError, match="filename_prefix"):
                call("SaveEmbeddings", embeddings=learned[0], filename_prefix=wrong)
    assert len(set(files)) == 3 and all(Path(file).is_relative_to(tmp_path / "editkit_embeddings") for file in files)
    for file, embeddings in ((files[1], learned[0]), (files[2], pulled)):
        loaded = call("LoadEmbeddings", file=file)[0]
        assert torch.equal(scene.sampled(loaded, scene.target), scene.sampled(embeddings, scene.target))
    with pytest.raises(LoadError, match="does not exist"):
        call("LoadEmbeddings", file=str(tmp_path / "nothing.safetensors"))


def test_a_guider_runs_in_a_workflow_without_a_host(scene, learned, tmp_path: Path):
    """Save, load and sample as API-format nodes: the reconstruction again."""
    from editkit.headless.run import Run
    from editkit.headless.runner import run_workflow

    with headless_run(output_folder=tmp_path):
        file = call("SaveEmbeddings", embeddings=learned[0], filename_prefix="null")[0]
    workflow = {
        "model": {"class_type": "EditKit_LoadModel", "inputs": {"model": "bundled"}},
        "image": {"class_type": "EditKit_LoadExample", "inputs": {"name": "one_object"}},
        "latent": {"class_type": "EditKit_EncodeImage", "inputs": {"image": ["image", 0], "vae": ["model", 2]}},
        "text": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["model", 1], "text": ["image", 2]}},
        "sigmas": {"class_type": "EditKit_EditSigmas", "inputs": {"model": ["model", 0], "steps": STEPS, "strength": 1.0}},
        "inverted": {
            "class_type": "EditKit_InvertDDIM",
            "inputs": {
                "model": ["model", 0], "positive": ["text", 0], "latent": ["latent", 0], "sigmas": ["sigmas", 0],
                "mode": "next", "iterations": 1, "damping": 1.0, "tolerance": 1e-5, "encoding_ratio": 1.0,
            },
        },
        "embeddings": {"class_type": "EditKit_LoadEmbeddings", "inputs": {"file": file}},
        "guider": {
            "class_type": "EditKit_EmbeddingsGuider",
            "inputs": {"model": ["model", 0], "positive": ["text", 0], "embeddings": ["embeddings", 0], "cfg": CFG},
        },
        "noise": {"class_type": "DisableNoise", "inputs": {}},
        "sampler": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
        "sampled": {
            "class_type": "SamplerCustomAdvanced",
            "inputs": {
                "noise": ["noise", 0], "guider": ["guider", 0], "sampler": ["sampler", 0], "sigmas": ["sigmas", 0],
                "latent_image": ["inverted", 1],
            },
        },
    }  # fmt: skip
    run = run_workflow(workflow, Run(tmp_path, tmp_path))
    result = run.results["sampled"][0]
    assert torch.allclose(samples_of(result), learned[1]["samples"], atol=1e-3)
