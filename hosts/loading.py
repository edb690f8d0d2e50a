"""Models from files: natively inside ComfyUI, over diffusers without it. safetensors only; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..pipelines.core.errors import LoadError
from .bundled import BUNDLED, BUNDLED_MODELS
from .files import headless_path
from .host import in_comfyui, this_host

DIFFUSERS = "diffusers"  # below ComfyUI's models folder, as are the three below
CHECKPOINTS = "checkpoints"
RANKERS = "editkit_rankers"
AUTOMATIC = "automatic"
RANKER_FOLDERS = ("clip_vision", RANKERS)
SUBFOLDERS = ("unet", "vae", "text_encoder")
WEIGHTS = (".safetensors", ".bin", ".pt", ".ckpt")


def load_bundled(model: str = BUNDLED) -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE of a bundled model, one of `BUNDLED_MODELS`. Raises LoadError for missing files."""
    return this_host().load_bundled(model)


def load_diffusers_folder(name: str) -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE of a folder in diffusers layout: a name from `diffusers_folders`.

    Headless, a path; there it may also be a checkpoint file (`load_model`).
    Raises: LoadError for a folder that is missing, incomplete or holds pickles.
    """
    return this_host().load_diffusers_folder(_checked_folder(name) if in_comfyui() else headless_path(name))


def _checked_folder(name: str) -> Path:
    folders = _model_folders()
    folder = folders.get(name) or next((path for path in folders.values() if path.name == name), None)
    if folder is None:
        raise LoadError(f"models/diffusers has no folder {name!r}: put the model there and refresh the page")
    if (folder / "transformer").is_dir():
        raise LoadError(
            f"{name} is a flow transformer's folder: in ComfyUI load its parts with Load Diffusion Model, the CLIP loader of the "
            "family and Load VAE"
        )
    for part in SUBFOLDERS:
        files = [file.name for file in (folder / part).glob("*") if file.suffix in WEIGHTS]
        if not any(file.endswith(".safetensors") for file in files):
            raise LoadError(
                f"{name}/{part} has no safetensors file ({', '.join(files) or 'no weights'}): pickles are not read"
            )
    return folder


def diffusers_folders() -> list[str]:
    """Model folders below models/diffusers, by their path there; none without ComfyUI."""
    return sorted(_model_folders())


def _model_folders() -> dict[str, Path]:
    """Every folder with a model_index.json; of two with one name, the first."""
    found: dict[str, Path] = {}
    for root in this_host().model_folders(DIFFUSERS):
        for index in root.glob("**/model_index.json"):
            found.setdefault(index.parent.relative_to(root).as_posix(), index.parent)
    return found


def load_model(name: str) -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE of a bundled model, a checkpoint file or a folder in diffusers layout; headless, a path.

    Raises: LoadError for a file or folder that is missing or cannot be read.
    """
    if name in BUNDLED_MODELS:
        return load_bundled(name)
    if in_comfyui() and name.startswith(f"{CHECKPOINTS}/"):
        return this_host().load_checkpoint(_checkpoint_path(name))
    return load_diffusers_folder(name)


def checkpoint_files() -> list[str]:
    """safetensors files below models/checkpoints, with the name of that folder; none without ComfyUI."""
    return sorted(
        {
            f"{CHECKPOINTS}/{path.relative_to(root).as_posix()}"
            for root in this_host().model_folders(CHECKPOINTS)
            for path in root.glob("**/[!.]*.safetensors")
        }
    )


def _checkpoint_path(name: str) -> Path:
    for root in this_host().model_folders(CHECKPOINTS):
        path = (root / name.removeprefix(f"{CHECKPOINTS}/")).resolve()
        if path.is_relative_to(root.resolve()) and path.suffix == ".safetensors" and path.is_file():
            return path
    raise LoadError(f"models has no file {name!r}: put a safetensors file there and refresh the page")


def ranker_files() -> list[str]:
    """safetensors files below models/clip_vision and models/editkit_rankers, with the name of that folder."""
    return sorted(
        f"{kind}/{path.relative_to(root).as_posix()}"
        for kind, root in _ranker_roots()
        for path in root.glob("**/*.safetensors")
    )


def _ranker_roots() -> list[tuple[str, Path]]:
    return [(kind, root) for kind in RANKER_FOLDERS for root in this_host().model_folders(kind)]


def ranker_path(name: str) -> Path:
    """The file of a name from `ranker_files`; headless, a path. Raises LoadError if there is no such file."""
    if not in_comfyui():
        return headless_path(name)
    kind, _, rest = name.partition("/")
    for found, root in _ranker_roots():
        path = (root / rest).resolve()
        if found == kind and path.is_relative_to(root.resolve()) and path.is_file():
            return path
    raise LoadError(f"models has no ranker file {name!r}: put it below models/{RANKERS} and refresh the page")


def load_ranker(weights: str, architecture: str = AUTOMATIC) -> Any:
    """The bundled ranker, or a weight file with the architecture that it has or that is named.

    Args:
        weights: "bundled", a name from `ranker_files` (headless, a path), or "automatic": the first file below
            models/editkit_rankers, and the bundled ranker where there is none.
        architecture: open_clip's name, or "automatic": from the shapes in the file.
    Raises: LoadError, FamilyError.
    """
    if weights == AUTOMATIC:
        weights = next((name for name in ranker_files() if name.startswith(f"{RANKERS}/")), BUNDLED)
    return load_bundled_ranker() if weights == BUNDLED else load_ranker_file(architecture, weights)


def load_bundled_ranker() -> Any:
    """The ranker that ships with the pack."""
    from .diffusers.open_clip_ranker import load_bundled_ranker as load

    return this_host().managed_ranker(load())


def load_ranker_file(architecture: str, name: str) -> Any:
    """A ranker of one of open_clip's architectures, with a weight file: from `ranker_files`; headless, a path."""
    from .diffusers.open_clip_ranker import architecture_of, load_open_clip

    path = ranker_path(name)
    if architecture.strip() in ("", AUTOMATIC):
        architecture = architecture_of(path)
    return this_host().managed_ranker(load_open_clip(architecture, path))
