"""The bundled layout built natively predicts what diffusers predicts from the same files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

from editkit.hosts.bundled import expand_embedding
from editkit.hosts.comfyui.bundled import build_bundled
from editkit.hosts.host import codec_of, progress_bar, sampling_of, text_encoder_of
from editkit.pipelines.core.errors import LoadError
from editkit.tests.comfyui.host.tiny import latent, tokens


def test_unet_equals_diffusers(model, folder: Path) -> None:
    reference = UNet2DConditionModel.from_pretrained(folder / "unet").eval()
    x, t, context = latent(1, 2) * 0.18215, torch.tensor([10.0, 700.0]), tokens(2, 2)
    ours = model.model.diffusion_model(x, t, context=context)
    theirs = reference(x, t, context).sample
    assert theirs.abs().mean() > 0.05
    assert (ours - theirs).abs().max() <= 1e-4


def test_schedule_is_the_leading_grid_of_diffusers(model) -> None:
    sampling = sampling_of(model)
    for steps in (50, 30, 7, 1):
        scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
        scheduler.set_timesteps(steps)
        abar = scheduler.alphas_cumprod[scheduler.timesteps]
        expected = torch.cat([((1 - abar) / abar).sqrt(), torch.zeros(1)])
        torch.testing.assert_close(sampling.schedule(steps), expected, rtol=1e-4, atol=1e-6)
    assert len(sampling.schedule(50, 0.75)) == 39
    torch.testing.assert_close(sampling.schedule(50, 0.75), sampling.schedule(50)[12:])


def test_vae_equals_diffusers(vae, folder: Path) -> None:
    reference = AutoencoderKL.from_pretrained(folder / "vae").eval()
    image = torch.rand(2, 48, 64, 3)
    codec = codec_of(vae)
    posterior = reference.encode(image.movedim(-1, 1) * 2 - 1).latent_dist
    z = codec.encode(image)
    assert z.shape == (2, 4, 6, 8)
    assert (z - posterior.mean).abs().max() <= 1e-4
    noise = torch.randn_like(z)
    assert (codec.encode(image, noise=noise) - (posterior.mean + posterior.std * noise)).abs().max() <= 1e-4
    expected = reference.decode(z).sample.movedim(1, -1) / 2 + 0.5
    assert (codec.decode(z, clamp=False) - expected).abs().max() <= 1e-4
    assert (codec.decode(z) - expected.clamp(0, 1)).abs().max() <= 1e-4


def test_text_encoder_equals_transformers(clip, folder: Path) -> None:
    config = json.loads((folder / "text_encoder/config.json").read_text())
    weights = {key: value.float() for key, value in load_file(folder / "text_encoder/model.safetensors").items()}
    rows = next(key for key in weights if key.endswith("token_embedding.weight"))
    weights[rows] = expand_embedding(weights[rows], json.loads((folder / "text_encoder/token_ids.json").read_text()))
    reference = CLIPTextModel(CLIPTextConfig(**config)).eval()
    reference.load_state_dict(weights)
    encoder = text_encoder_of(clip)
    text = "a red circle on a striped gray background"
    ids = torch.tensor([[token.id for token in encoder.tokens(text)]])
    ours = encoder.encode(text).tokens
    assert ours.shape == (1, 77, 128)
    assert (ours - reference(ids).last_hidden_state).abs().max() <= 1e-4


def test_family_and_previews(model) -> None:
    assert sampling_of(model).family == "bundled"
    progress_bar(4, model)(1, 4, torch.zeros(1, 4, 4, 4))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_wrong_files_are_refused(folder: Path, tmp_path: Path, part: str) -> None:
    from safetensors.torch import save_file

    for source in folder.rglob("*"):
        if source.is_file():
            target = tmp_path / source.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    path = next((tmp_path / part).glob("*.safetensors"))
    weights = load_file(path)
    weights.pop(next(key for key in weights if not key.endswith("token_embedding.weight")))
    save_file(weights, path)
    with pytest.raises(LoadError, match="does not fit its config: 1 weights missing"):
        build_bundled(tmp_path)


def test_a_sampling_preview_has_the_colours_of_the_image() -> None:
    """The previewer of --preview-method latent2rgb, on the clean latent of an example image."""
    from latent_preview import Latent2RGBPreviewer

    from editkit.hosts.bundled.example_images import load_example
    from editkit.hosts.loading import load_bundled
    from editkit.pipelines.core.images import encode_image

    model, _, vae = load_bundled()
    image = load_example("red_circle").image
    scaled = sampling_of(model).scale_in(encode_image(codec_of(vae), image))
    layout = model.model.latent_format
    shown = Latent2RGBPreviewer(layout.latent_rgb_factors, layout.latent_rgb_factors_bias).decode_latent_to_preview(
        scaled
    )
    found = torch.from_numpy(np.array(shown)) / 255
    wanted = torch.nn.functional.interpolate(image.movedim(-1, 1), found.shape[:2], mode="area")[0].movedim(0, -1)
    assert (found - wanted).abs().mean() < 0.1
