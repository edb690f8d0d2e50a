"""Files of learned embeddings: float32 tensors and JSON facts in safetensors, which can hold no code."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import LoadError


def write_tensors(path: Path, kind: str, tensors: Mapping[str, Tensor | None], about: dict[str, Any]) -> Path:
    """A safetensors file of float32 tensors (None is left out) and facts that JSON can hold; folders are made."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    whole = torch.contiguous_format
    given = {name: value for name, value in tensors.items() if value is not None}
    held = {name: value.detach().float().cpu().clone(memory_format=whole) for name, value in given.items()}
    save_file(held, path, metadata={"format": kind, "embeddings": json.dumps(about)})
    return path


def read_tensors(path: Path, kinds: Sequence[str]) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """What `write_tensors` wrote: its kind, one of `kinds`, its tensors and facts. Raises LoadError for any other file."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise LoadError(f"{path} does not exist: choose a file that EditKit saved")
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            kind = str(header.get("format"))
            if kind not in kinds:
                raise LoadError(f"{path} holds no embeddings of EditKit: choose a file that its save node wrote")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # a file is no dict
            return kind, tensors, json.loads(header["embeddings"])
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise LoadError(f"{path} cannot be read ({error}): choose a file that EditKit saved") from error


def incomplete(path: Path, error: Exception) -> LoadError:
    return LoadError(f"{path} is incomplete ({error}): save the embeddings again")
