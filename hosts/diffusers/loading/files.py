"""Reading the parts of a model folder in diffusers layout.

safetensors only, no network, and no code of the folder: every class is named by the caller, so a configuration cannot
name one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ....pipelines.core.errors import LoadError, out_of_memory

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")  # files that can run code when they are read


def read_json(path: Path) -> dict[str, Any]:
    """A configuration file. Raises LoadError where it is missing or holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LoadError(f"{path} cannot be read ({error}): is the folder complete?") from error
    if not isinstance(value, dict):
        raise LoadError(f"{path} holds no configuration: is the folder complete?")
    return value


def from_pretrained(cls: Any, folder: Path, part: str, dtype: torch.dtype) -> Any:
    """One network of a folder, frozen, in eval mode.

    Args:
        cls: the diffusers or transformers class.
        folder: path of the model folder.
        part: name of the subfolder.
        dtype: of the weights.
    Returns: the network, on the CPU.
    Raises: LoadError where a file is missing, or one of its weights; for a folder that has pickles only.
    Source: diffusers' folder layout.
    """
    where = folder / part
    read_json(where / "config.json")
    _refuse_pickles(where)
    try:
        model, found = cls.from_pretrained(
            str(where), torch_dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # a damaged folder makes the libraries raise errors of every kind
        if out_of_memory(error):
            raise
        raise LoadError(
            f"{where} cannot be loaded ({brief(error)}): safetensors files in diffusers layout are needed"
        ) from error
    check_complete(where, found.get("missing_keys", ()), found.get("mismatched_keys", ()))
    return model.eval().requires_grad_(False)


def _refuse_pickles(where: Path) -> None:
    files = [path for path in where.iterdir() if path.is_file()]
    pickles = sorted(path.name for path in files if path.suffix in PICKLES)
    if pickles and not any(path.suffix == ".safetensors" for path in files):
        raise LoadError(
            f"{where} has only {pickles[0]}, a pickle, which can run code: convert it to safetensors, or download the "
            "folder's safetensors files"
        )


def check_complete(where: Path, missing: Iterable[Any], mismatched: Iterable[Any]) -> None:
    """Refuse a checkpoint whose network would keep random initial weights."""
    lost = sorted(str(name) for name in missing)
    lost += sorted(str(entry[0] if isinstance(entry, tuple) else entry) for entry in mismatched)
    if lost:
        more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
        raise LoadError(
            f"{where} lacks {len(lost)} of its weights ({', '.join(lost[:5])}{more}): download the whole checkpoint again"
        )


def brief(error: BaseException) -> str:
    """The message in one line; libraries print paragraphs."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def load_vae(folder: Path, dtype: torch.dtype) -> Any:
    """The VAE of a folder; float32 where its config asks for it and `dtype` is float16."""
    from diffusers import AutoencoderKL

    force = read_json(folder / "vae" / "config.json").get("force_upcast", False) and dtype == torch.float16
    return from_pretrained(AutoencoderKL, folder, "vae", torch.float32 if force else dtype)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No warnings about the compact vocabulary, and no progress bars for small files."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    levels = diffusers_logging.get_verbosity(), transformers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(levels[0])
        transformers_logging.set_verbosity(levels[1])
