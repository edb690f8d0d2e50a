"""Checkpoint files of SD 1.x, SD 2.x and SDXL: what they hold is loaded, and whatever is no such file is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from editkit.hosts.diffusers.loading import load_model, single_file
from editkit.pipelines.core.errors import FamilyError, LoadError
from editkit.tests import original_layout as original
from editkit.tests.toys import random_latent

FAMILIES = ("sd1", "sd2", "sdxl")
PROMPT = "A red cat, sitting"
MARK = torch.zeros(0)


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path_factory) -> None:
    """The shipped configurations at reduced width."""
    folder = tmp_path_factory.mktemp("configs")
    for family in FAMILIES:
        (folder / f"{family}.json").write_text(json.dumps(original.configs(family)))
    monkeypatch.setattr(single_file, "CONFIGS", folder)


@pytest.fixture(scope="module")
def made() -> dict:
    return {family: original.models(family) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_holds_the_networks_it_was_made_of(made, family, tmp_path) -> None:
    state = torch.random.get_rng_state()
    model = load_model(original.write(tmp_path / "model.safetensors", original.checkpoint(family, made[family])))
    assert torch.equal(torch.random.get_rng_state(), state)
    pairs = [(model.denoiser.unet, made[family]["unet"]), (model.codec.vae, made[family]["vae"])]
    pairs += list(zip(model.text.modules(), made[family]["text"], strict=True))
    for ours, theirs in pairs:
        found = ours.state_dict()
        assert all(torch.equal(found[name], value) for name, value in theirs.state_dict().items())
        assert not any(value.is_meta for value in [*ours.parameters(), *ours.buffers()])
    assert (model.denoiser.family, model.denoiser.prediction) == (family, "epsilon")
    context = model.text.encode(PROMPT)
    assert context.tokens.shape == (1, 77, 40 if family == "sdxl" else 16)
    denoised = model.denoiser.denoise(random_latent(1, 4, 8, 8), 2.0, [context])
    assert torch.isfinite(denoised).all() and torch.isfinite(model.codec.decode(denoised[0])).all()
    assert model.codec.vae.config["scaling_factor"] == (0.13025 if family == "sdxl" else 0.18215)
    pads = {tower.tokenizer.pad for tower in model.text.towers}
    assert pads == {"sd1": {49407}, "sd2": {0}, "sdxl": {49407, 0}}[family]


def test_the_loader_node_and_the_command_take_a_file(made, tmp_path) -> None:
    import numpy as np
    from PIL import Image

    from editkit.headless.cli import main
    from editkit.hosts.loading import load_diffusers_folder

    path = original.write(tmp_path / "model.safetensors", original.checkpoint("sd1", made["sd1"]))
    model, clip, vae = load_diffusers_folder(str(path))
    assert model.denoiser.family == "sd1" and clip.text_encoder.encode("cat").tokens.shape[-1] == 16
    assert vae.codec.channels == 4
    for name, value in (("image", 90), ("mask", 255)):
        Image.fromarray(np.full((32, 32, 3), value, np.uint8)).save(tmp_path / f"{name}.png")
    files = ["--image", str(tmp_path / "image.png"), "--mask", str(tmp_path / "mask.png"), "--model", str(path)]
    steps = ["--steps", "2", "--candidates", "1", "--tune-steps", "0", "--output", str(tmp_path / "out")]
    assert main(["edit", *files, "--prompt", "a cat", *steps]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["model"] == str(path)


def test_half_precision_keeps_a_vae_that_overflows(made, tmp_path) -> None:
    path = original.write(tmp_path / "model.safetensors", original.checkpoint("sdxl", made["sdxl"]))
    model = load_model(path, dtype=torch.float16)
    assert (model.denoiser.dtype, model.codec.dtype) == (torch.float16, torch.float32)


# ---------------------------------------------------------------------------------------------------- prediction and SNR
def test_marks_of_v_prediction_and_zero_snr_are_honoured(made, tmp_path) -> None:
    tables = {}
    for name, marks in (("plain", {}), ("v", {"v_pred": MARK}), ("zero", {"v_pred": MARK, "ztsnr": MARK})):
        path = original.write(tmp_path / f"{name}.safetensors", original.checkpoint("sdxl", made["sdxl"], **marks))
        denoiser = load_model(path).denoiser
        assert denoiser.prediction == ("v_prediction" if marks else "epsilon")
        tables[name] = denoiser.table
    assert torch.equal(tables["plain"], tables["v"]) and float(tables["plain"][-1]) < 15
    assert float(tables["zero"][-1]) > 4000


def test_an_sd2_file_says_v_prediction_by_a_bias(made, tmp_path) -> None:
    for spread, prediction in ((0.01, "epsilon"), (1.0, "v_prediction")):
        weights = original.checkpoint("sd2", made["sd2"])
        bias = {single_file.UNET + single_file.V_PREDICTION_BIAS: torch.linspace(-spread, spread, 8)}
        path = original.write(tmp_path / f"{prediction}.safetensors", {**weights, **bias})
        assert load_model(path).denoiser.prediction == prediction


# -------------------------------------------------------------------------------------------------------------- variants
def test_old_and_new_names_of_the_text_encoder(made, tmp_path) -> None:
    for family, old, new in (
        ("sd1", "cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."),
        ("sd2", "cond_stage_model.model.", "conditioner.embedders.0.model."),
    ):
        weights = {name.replace(old, new): value for name, value in original.checkpoint(family, made[family]).items()}
        model = load_model(original.write(tmp_path / f"{family}.safetensors", weights))
        assert model.denoiser.family == family
        assert torch.equal(model.text.modules()[0].state_dict()[next(iter(made[family]["text"][0].state_dict()))],
                           next(iter(made[family]["text"][0].state_dict().values())))  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- refusals
def without(weights: dict, prefix: str) -> dict:
    return {name: value for name, value in weights.items() if not name.startswith(prefix)}


FIRST = "model.diffusion_model.input_blocks.0.0.weight"
REFUSED = {
    "inpainting": ("sd1", lambda w: {**w, FIRST: torch.zeros(16, 9, 3, 3)}, FamilyError, "9 latent channels"),
    "SD3": ("sd1", lambda _: {"model.diffusion_model.joint_blocks.0.w": MARK}, FamilyError, "a SD3 file"),
    "Flux": ("sd1", lambda _: {"double_blocks.0.w": MARK}, FamilyError, "a Flux file"),
    "LoRA": ("sd1", lambda _: {"lora_unet_w.lora_up.weight": MARK}, FamilyError, "a LoRA file"),
    "no U-Net": ("sd1", lambda w: without(w, "model."), FamilyError, "has no U-Net"),
    "no VAE": ("sd1", lambda w: without(w, "first_stage_model."), LoadError, "has no VAE"),
    "no text": ("sd1", lambda w: without(w, "cond_stage_model."), FamilyError, "no text encoder of SD 1.x"),
    "refiner": ("sdxl", lambda w: without(w, "conditioner.embedders.0."), FamilyError, "no text encoder of SDXL"),
    "EDM": ("sdxl", lambda w: {**w, "edm_mean": MARK, "edm_std": MARK}, FamilyError, "EDM schedule"),
    "zero SNR of epsilon": ("sdxl", lambda w: {**w, "ztsnr": MARK}, FamilyError, "ztsnr without v_pred"),
    "another width": ("sd1", lambda w: {**w, FIRST: torch.zeros(24, 4, 3, 3)}, LoadError, "U-Net of another layout"),
    "a lost U-Net weight": ("sd1", lambda w: without(w, "model.diffusion_model.out.2.weight"), LoadError,
                            r"U-Net.*conv_out.weight"),
    "a lost VAE weight": ("sd1", lambda w: without(w, "first_stage_model.decoder.conv_in.weight"), LoadError,
                          r"VAE.*decoder.conv_in.weight"),
    "a lost text weight": ("sd1", lambda w: without(w, "cond_stage_model.transformer.text_model.final_layer_norm.bias"),
                           LoadError, r"text encoder.*final_layer_norm.bias"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_other_files_are_refused_by_name(made, name, tmp_path) -> None:
    family, change, error, match = REFUSED[name]
    path = original.write(tmp_path / "model.safetensors", change(original.checkpoint(family, made[family])))
    with pytest.raises(error, match=match) as refusal:
        load_model(path)
    assert "model.safetensors" in str(refusal.value)


@pytest.mark.parametrize("name", ["model.ckpt", "model.bin", "model.pt", "model.PTH"])
def test_pickles_are_refused_by_name(tmp_path, name) -> None:
    torch.save({}, tmp_path / name)
    with pytest.raises(LoadError, match=f"{name} is a pickle"):
        load_model(tmp_path / name)


def test_no_file_a_damaged_one_and_another_kind(tmp_path) -> None:
    with pytest.raises(LoadError, match="there is no"):
        load_model(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(LoadError, match=r"model\.safetensors cannot be read"):
        load_model(tmp_path / "model.safetensors")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(LoadError, match=r"model\.gguf is no safetensors file"):
        load_model(tmp_path / "model.gguf")


# ------------------------------------------------------------------------------------------- the shipped configurations
def test_the_shipped_configurations_have_the_published_sizes() -> None:
    """Numbers of parameters of the published models, built without memory."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    published = {
        "sd1": (859_520_964, [123_060_480]),
        "sd2": (865_910_724, [340_387_840]),
        "sdxl": (2_567_463_684, [123_060_480, 694_659_840]),
    }
    folder = Path(single_file.__file__).parent / "configs"
    for family, (unet, towers) in published.items():
        config = json.loads((folder / f"{family}.json").read_text())
        with torch.device("meta"):
            classes = (CLIPTextModel, CLIPTextModelWithProjection)
            text = [cls(CLIPTextConfig(**c)) for cls, c in zip(classes, config["text"], strict=False)]
            networks = [
                UNet2DConditionModel.from_config(config["unet"]),
                AutoencoderKL.from_config(config["vae"]),
                *text,
            ]
        assert [count(network) for network in networks] == [unet, 83_653_863, *towers], family


def count(network: torch.nn.Module) -> int:
    return sum(value.numel() for value in network.parameters())


def test_nobody_is_asked(made, tmp_path, monkeypatch) -> None:
    """A file loads where every connection and every download fails."""
    import socket

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for family in FAMILIES:
        path = tmp_path / f"{family}.safetensors"
        save_file({k: v.clone().contiguous() for k, v in original.checkpoint(family, made[family]).items()}, path)
        assert load_model(path).denoiser.family == family


def test_comfyui_refuses_a_flow_folder_by_name(tmp_path, monkeypatch) -> None:
    """ComfyUI's loader of folders knows U-Nets alone."""
    from editkit.hosts import loading

    (tmp_path / "transformer").mkdir()
    monkeypatch.setattr(loading, "in_comfyui", lambda: True)
    monkeypatch.setattr(loading, "_model_folders", lambda: {"sd3": tmp_path})
    with pytest.raises(LoadError, match=r"sd3 is a flow transformer's folder.*Load Diffusion Model"):
        loading.load_diffusers_folder("sd3")
