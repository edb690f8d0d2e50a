"""Single-file safetensors checkpoints of SD 1.x, SD 2.x and SDXL, under the names of the original code (CompVis, sgm).

diffusers' single-file conversion renames the weights; the configurations of the families ship with the pack, so nobody is
asked. The networks are built without memory and take the file's weights, so a weight that the file lacks is noticed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ....pipelines.core.errors import FamilyError, LoadError
from ..denoiser import DiffusersDenoiser
from ..schedules import sigma_table
from ..text_encoder import ClipBpe, ClipTextEncoder, ClipTower
from ..vae import DiffusersCodec
from .files import brief, check_complete, quiet_transformers

CONFIGS = Path(__file__).parent / "configs"
UNET = "model.diffusion_model."
CLIP_L, CLIP_L_XL = "cond_stage_model.transformer.", "conditioner.embedders.0.transformer."
OPEN_CLIP, OPEN_CLIP_SGM = "cond_stage_model.model.", "conditioner.embedders.0.model."
OPEN_CLIP_XL = "conditioner.embedders.1.model."
OTHER_FAMILIES = {"joint_blocks.": "SD3", "double_blocks.": "Flux", "lora_": "LoRA", "control_model.": "ControlNet"}
V_PREDICTION_BIAS = "output_blocks.11.1.transformer_blocks.0.norm1.bias"

Weights = dict[str, Tensor]


def load_single_file(
    path: Path, device: torch.device | str, dtype: torch.dtype
) -> tuple[DiffusersDenoiser, DiffusersCodec, ClipTextEncoder]:
    """The networks of a checkpoint file of SD 1.x, SD 2.x or SDXL.

    Args:
        path: a safetensors file with U-Net, VAE and text encoder.
        device: of all networks.
        dtype: of all networks; float32 for SDXL's VAE, which overflows in float16.
    Returns: denoiser, codec and text encoder, in eval mode. No random number is drawn.
    Raises: LoadError (damaged or incomplete files), FamilyError (a family that this host cannot run).
    Source: diffusers' single-file loader; v prediction and zero terminal SNR are told as in ComfyUI.
    """
    weights = _read(path)
    family = _family(path, weights)
    scheduler = _scheduler(path, family, weights)
    config = json.loads((CONFIGS / f"{family}.json").read_text(encoding="utf-8"))
    with quiet_transformers():
        unet = _unet(path, config["unet"], weights, dtype)
        vae = _vae(path, config["vae"], weights, dtype)
        text = ClipTextEncoder(_towers(path, family, config["text"], weights, dtype))
    codec = DiffusersCodec(vae.to(device))
    for module in text.modules():
        module.to(device)
    denoiser = DiffusersDenoiser(
        unet=unet.to(device),
        table=sigma_table(scheduler),
        prediction=scheduler["prediction_type"],
        family=family,
        scaling_factor=float(codec.vae.config["scaling_factor"]),
        factor=codec.factor,
    )
    return denoiser, codec, text


def _read(path: Path) -> Weights:
    """The file's tensors, with the text encoder of SD 2.x and old SD 1.x files under its usual names."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(str(path))
    except (OSError, SafetensorError, ValueError) as error:
        raise LoadError(f"{path} cannot be read ({brief(error)}): is the file complete?") from error
    return {_usual_name(name): weight for name, weight in found.items()}


def _usual_name(name: str) -> str:
    if name.startswith(CLIP_L) and not name.startswith(f"{CLIP_L}text_model."):
        return name.replace(CLIP_L, f"{CLIP_L}text_model.")
    return name


def _family(path: Path, weights: Weights) -> str:
    """sd1, sd2 or sdxl. Raises FamilyError for any other file, by what it is."""
    first = weights.get(f"{UNET}input_blocks.0.0.weight")
    if first is None:
        kind = next((kind for mark, kind in OTHER_FAMILIES.items() if any(mark in name for name in weights)), None)
        raise FamilyError(
            f"{path.name} is {f'a {kind} file' if kind else 'no checkpoint'} and has no U-Net of SD 1.x, SD 2.x or SDXL: "
            "give a whole checkpoint of these; SD3 and Flux load from folders in diffusers layout"
        )
    if first.shape[1] != 4:
        raise FamilyError(
            f"{path.name} takes {first.shape[1]} latent channels (an inpainting or instruction model): use the base model"
        )

    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in weights)

    if not has("first_stage_model."):
        raise LoadError(f"{path.name} has no VAE: give a whole checkpoint with U-Net, VAE and text encoder")
    labelled = has(f"{UNET}label_emb.")
    marks = {"sdxl": labelled and has(CLIP_L_XL) and has(OPEN_CLIP_XL), "sd1": not labelled and has(CLIP_L)}
    marks["sd2"] = not labelled and (has(OPEN_CLIP) or has(OPEN_CLIP_SGM))
    family = next((name for name, fits in marks.items() if fits), None)
    if family is None:
        raise FamilyError(
            f"{path.name} has a U-Net {'with' if labelled else 'without'} added conditions, but no text encoder of "
            f"{'SDXL (a refiner, or unCLIP)' if labelled else 'SD 1.x or SD 2.x'}: give a whole checkpoint of SD 1.x, "
            "SD 2.x or SDXL"
        )
    return family


def _scheduler(path: Path, family: str, weights: Weights) -> dict[str, Any]:
    """The noise schedule and prediction type, told by marks in the file as ComfyUI does.

    Args:
        path: of the file, for messages.
        family: sd1, sd2 or sdxl.
        weights: of the file.
    Raises: FamilyError for EDM schedules, and for a zero terminal SNR without v prediction.
    """
    edm = next((name for name in weights if name.startswith("edm_")), None)
    if edm is not None:
        raise FamilyError(f"{path.name} has an EDM schedule ({edm}), which headless does not have: use ComfyUI")
    v = "v_pred" in weights
    if family == "sd2" and not v:
        bias = weights.get(UNET + V_PREDICTION_BIAS)
        v = bias is not None and float(bias.float().std(unbiased=False)) > 0.09
    zero = "ztsnr" in weights
    if zero and not v:
        raise FamilyError(f"{path.name} is marked ztsnr without v_pred: noise alone has no epsilon prediction")
    return {"prediction_type": "v_prediction" if v else "epsilon", "rescale_betas_zero_snr": zero}


def _unet(path: Path, config: dict[str, Any], weights: Weights, dtype: torch.dtype) -> Any:
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    return _filled(path, "U-Net", unet, lambda: convert_ldm_unet_checkpoint(dict(weights), config), dtype)


def _vae(path: Path, config: dict[str, Any], weights: Weights, dtype: torch.dtype) -> Any:
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    with torch.device("meta"):
        vae = AutoencoderKL.from_config(config)
    wide = torch.float32 if config.get("force_upcast") and dtype == torch.float16 else dtype
    return _filled(path, "VAE", vae, lambda: convert_ldm_vae_checkpoint(dict(weights), config), wide)


def _towers(
    path: Path, family: str, configs: list[dict[str, Any]], weights: Weights, dtype: torch.dtype
) -> list[ClipTower]:
    """One tower (SD 1.x, SD 2.x) or two (SDXL), with CLIP's vocabulary.

    Args:
        path: of the file, for messages.
        family: sd1, sd2 or sdxl.
        configs: of the towers.
        weights: of the file.
        dtype: of the towers.
    Raises: LoadError for incomplete weights.
    """
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    if family == "sd1":
        return [ClipTower(ClipBpe(), _clip(path, CLIPTextModel, configs[0], weights, dtype, CLIP_L))]
    if family == "sd2":
        prefix = OPEN_CLIP if any(name.startswith(OPEN_CLIP) for name in weights) else OPEN_CLIP_SGM
        return [ClipTower(ClipBpe(pad=0), _clip(path, CLIPTextModel, configs[0], weights, dtype, prefix))]
    first = _clip(path, CLIPTextModel, configs[0], weights, dtype, CLIP_L_XL)
    second = _clip(path, CLIPTextModelWithProjection, configs[1], weights, dtype, OPEN_CLIP_XL)
    return [ClipTower(ClipBpe(), first, -2), ClipTower(ClipBpe(pad=0), second, -2)]


def _clip(path: Path, cls: Any, config: dict[str, Any], weights: Weights, dtype: torch.dtype, prefix: str) -> Any:
    """A CLIP text model from the weights whose names begin with `prefix`.

    Args:
        path: of the file, for messages.
        cls: transformers' class.
        config: its configuration.
        weights: of the file.
        dtype: of the model.
        prefix: CLIP_L of OpenAI's layout, or OPEN_CLIP of open_clip's, or one of their variants.
    Raises: LoadError for incomplete weights.
    """
    from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint, convert_open_clip_checkpoint
    from transformers import CLIPTextConfig

    with torch.device("meta"):
        model = cls(CLIPTextConfig(**config))
    known = set(model.state_dict())

    def converted() -> Weights:
        if prefix in (CLIP_L, CLIP_L_XL):
            found = convert_ldm_clip_checkpoint({k: v for k, v in weights.items() if k.startswith(prefix)})
        else:
            found = convert_open_clip_checkpoint(model, weights, prefix=prefix)
        # newer transformers have no `text_model` level in a text model without projection
        return {k if k in known else k.removeprefix("text_model."): v for k, v in found.items()}

    return _filled(path, "text encoder", model, converted, dtype)


def _filled(path: Path, part: str, model: nn.Module, convert: Any, dtype: torch.dtype) -> nn.Module:
    """The network with the file's weights.

    Args:
        path: of the file, for messages.
        part: name of the network, for messages.
        model: the network without memory (device "meta").
        convert: gives the weights under the network's names; names that the network lacks are left out.
        dtype: of the weights.
    Raises: LoadError for weights that are missing or have another shape.
    """
    try:
        weights = convert()
        found = model.load_state_dict({k: v.to(dtype) for k, v in weights.items()}, strict=False, assign=True)
    except (KeyError, IndexError, AttributeError, RuntimeError) as error:
        raise LoadError(
            f"{path.name} has a {part} of another layout ({brief(error)}): is it a plain checkpoint?"
        ) from error
    check_complete(Path(f"{path} ({part})"), found.missing_keys, ())
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta and name == "position_ids":  # not in the file: 0, 1, 2, ...
                setattr(module, name, torch.arange(buffer.shape[-1]).expand(buffer.shape))
    return model.eval().requires_grad_(False)
