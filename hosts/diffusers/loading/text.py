"""The text encoders of a model folder in diffusers layout, and the bundled one with its compact vocabulary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ....pipelines.core.errors import FamilyError, LoadError
from ..text_encoder import (
    FLUX_T5_LENGTH,
    SD3_T5_LENGTH,
    ClipBpe,
    ClipTextEncoder,
    ClipTower,
    FluxTextEncoder,
    Sd3TextEncoder,
    T5Pieces,
    T5Tower,
    TransformersTokenizer,
)
from .files import brief, from_pretrained, read_json


def load_text(folder: Path, dtype: torch.dtype) -> ClipTextEncoder:
    """The text encoder of an SD 1.x, SD 2.x, SDXL or bundled folder. Raises LoadError."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    compact = folder / "text_encoder" / "token_ids.json"
    if compact.exists():
        return ClipTextEncoder([compact_tower(folder, compact, dtype)])
    two = (folder / "text_encoder_2").is_dir()
    layer = -2 if two else None
    towers = [
        ClipTower(
            load_tokenizer(folder, "tokenizer"), from_pretrained(CLIPTextModel, folder, "text_encoder", dtype), layer
        )
    ]
    if two:
        second = from_pretrained(CLIPTextModelWithProjection, folder, "text_encoder_2", dtype)
        towers.append(ClipTower(load_tokenizer(folder, "tokenizer_2"), second, layer))
    return ClipTextEncoder(towers, zeros_for_empty=two and zeros_for_empty_prompt(folder))


def load_sd3_text(folder: Path, dtype: torch.dtype, width: int) -> Sd3TextEncoder:
    """The text encoders of an SD3 folder: CLIP-L, CLIP-G and, where the folder has it, T5.

    Args:
        folder: path of the model folder.
        dtype: of the weights.
        width: of the tokens that the transformer takes.
    Raises: LoadError, FamilyError.
    Source: Esser et al. 2024, section 4; ComfyUI's layout of the tokens.
    """
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    models = [
        from_pretrained(cls, folder, part, dtype)  # CLIP-L's projection is not used, so it is left out
        for cls, part in ((CLIPTextModel, "text_encoder"), (CLIPTextModelWithProjection, "text_encoder_2"))
    ]
    clip_l = ClipTower(load_tokenizer(folder, "tokenizer"), models[0], -2, pools=True)
    clip_g = ClipTower(load_tokenizer(folder, "tokenizer_2"), models[1], -2)
    t5 = _t5_tower(folder, 3, dtype, SD3_T5_LENGTH) if (folder / "text_encoder_3").is_dir() else None
    given = sum(int(model.config.hidden_size) for model in models)
    if given > width:
        raise FamilyError(
            f"{folder.name}: the CLIP encoders give embeddings of width {given} but the transformer takes {width}: use "
            "the text encoders that the model was trained with"
        )
    _check_t5(folder, t5, width)
    return Sd3TextEncoder(clip_l, clip_g, t5, width)


def load_flux_text(folder: Path, dtype: torch.dtype, width: int) -> FluxTextEncoder:
    """The text encoders of a Flux folder, T5 and CLIP-L. Arguments and errors as in `load_sd3_text`."""
    from transformers import CLIPTextModel

    model = from_pretrained(CLIPTextModel, folder, "text_encoder", dtype)
    t5 = _t5_tower(folder, 2, dtype, FLUX_T5_LENGTH)
    _check_t5(folder, t5, width)
    return FluxTextEncoder(ClipTower(load_tokenizer(folder, "tokenizer"), model, pools=True), t5)


def _t5_tower(folder: Path, number: int, dtype: torch.dtype, shortest: int) -> T5Tower:
    from transformers import T5EncoderModel

    model = from_pretrained(T5EncoderModel, folder, f"text_encoder_{number}", dtype)
    return T5Tower(load_t5_tokenizer(folder, f"tokenizer_{number}"), model, shortest)


def _check_t5(folder: Path, t5: T5Tower | None, width: int) -> None:
    config: Any = None if t5 is None else t5.model.config
    if config is not None and int(config.d_model) != width:
        raise FamilyError(
            f"{folder.name}: T5 gives embeddings of width {config.d_model} but the transformer takes {width}: use the "
            "text encoders that the model was trained with"
        )


def load_t5_tokenizer(folder: Path, part: str) -> T5Pieces:
    """T5's tokenizer from the folder's tokenizer.json. Raises LoadError."""
    from transformers import T5TokenizerFast

    if not (folder / part / "tokenizer.json").is_file():
        raise LoadError(
            f"{folder / part} has no tokenizer.json, which T5's tokens are read from: download the whole folder"
        )
    try:
        return T5Pieces(
            T5TokenizerFast.from_pretrained(str(folder / part), local_files_only=True, trust_remote_code=False)
        )
    except Exception as error:  # the tokenizer's parser raises nothing more special
        raise LoadError(
            f"{folder / part} cannot be loaded ({brief(error)}): the folder needs the files of a T5 tokenizer"
        ) from error


def zeros_for_empty_prompt(folder: Path) -> bool:
    """Whether model_index.json of an SDXL folder asks for zeros in place of an empty negative prompt."""
    index = folder / "model_index.json"
    return index.is_file() and bool(read_json(index).get("force_zeros_for_empty_prompt", False))


def load_tokenizer(folder: Path, part: str) -> TransformersTokenizer:
    """CLIP's tokenizer with the folder's vocabulary. The class is named, so that the folder cannot bring its own."""
    from transformers import CLIPTokenizerFast

    try:
        return TransformersTokenizer(
            CLIPTokenizerFast.from_pretrained(str(folder / part), local_files_only=True, trust_remote_code=False)
        )
    except Exception as error:  # the tokenizer's parser raises nothing more special
        raise LoadError(
            f"{folder / part} cannot be loaded ({brief(error)}): the folder needs the files of a CLIP tokenizer"
        ) from error


def compact_tower(folder: Path, compact: Path, dtype: torch.dtype) -> ClipTower:
    """The bundled text encoder stores the embeddings of its grammar's words only; every other word gets their mean."""
    from safetensors.torch import load_file
    from transformers import CLIPTextConfig, CLIPTextModel

    from ...bundled import VOCABULARY, expand_embedding

    config = read_json(folder / "text_encoder" / "config.json")
    ids = json.loads(compact.read_text(encoding="utf-8"))
    state = {
        k.removeprefix("text_model."): v for k, v in load_file(folder / "text_encoder" / "model.safetensors").items()
    }
    name = "embeddings.token_embedding.weight"
    state[name] = expand_embedding(state[name], ids, VOCABULARY)
    model = CLIPTextModel(CLIPTextConfig(**{**config, "vocab_size": VOCABULARY}))
    target = getattr(model, "text_model", model)
    target.load_state_dict(state)
    return ClipTower(ClipBpe(), model.to(dtype).eval().requires_grad_(False))
