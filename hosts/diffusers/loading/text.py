"""The CLIP text encoders of a model folder in diffusers layout, and the bundled one with its compact vocabulary."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ....pipelines.core.errors import LoadError
from ..text_encoder import ClipBpe, ClipTextEncoder, ClipTower, TransformersTokenizer
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
