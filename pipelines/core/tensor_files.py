"""Files of learned embeddings: float32 tensors and JSON metadata in safetensors, which cannot hold code."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import LoadError


def write_tensors(path: Path, kind: str, tensors: Mapping[str, Tensor | None], about: dict[str, Any]) -> Path:
    """Write a safetensors file, creating its folders.

    Args:
        path: the file.
        kind: the format's name and version, which `read_tensors` checks.
        tensors: saved in float32; None is left out.
        about: metadata that JSON can hold.
    Returns: `path`.
    """
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    saved = {
        name: value.detach().float().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in tensors.items()
        if value is not None
    }
    save_file(saved, path, metadata={"format": kind, "embeddings": json.dumps(about)})
    return path


def read_tensors(path: Path, kinds: Sequence[str]) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """Read kind, tensors and metadata that `write_tensors` wrote. Raises LoadError unless the kind is one of `kinds`."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise LoadError(f"{path} does not exist: choose a file that EditKit saved")
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            kind = str(header.get("format"))
            if kind not in kinds:
                raise LoadError(
                    f"{path} holds no embeddings of EditKit: choose a file that 'Save Inversion Embeddings' wrote"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # a file is no dict
            if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
                raise LoadError(f"{path} contains NaN or infinity: make and save the embeddings again")
            return kind, tensors, json.loads(header["embeddings"])
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise LoadError(f"{path} cannot be read ({error}): choose a file that EditKit saved") from error


def incomplete(path: Path, error: Exception) -> LoadError:
    """The error for a file in which a tensor or a fact is missing."""
    return LoadError(f"{path} is incomplete ({error}): save the embeddings again")
