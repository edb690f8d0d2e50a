"""Models from files: natively inside ComfyUI, over diffusers elsewhere. safetensors only; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..pipelines.core.errors import LoadError
from .bundled import tiny_folder
from .sockets import HeadlessClip, HeadlessModel, HeadlessVae, in_comfyui

RANKER_FOLDERS = ("clip_vision", "editkit_rankers")  # below ComfyUI's models folder
PARTS = ("unet", "vae", "text_encoder")


def load_bundled() -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE of the bundled model."""
    if in_comfyui():
        from .comfyui.bundled import build

        return build(tiny_folder())
    from .diffusers.loading import load_bundled as load

    return _headless(load)


def load_diffusers_folder(name: str) -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE of a folder in diffusers layout: a name from `diffusers_folders`, or a path without ComfyUI.

    Raises: LoadError for a folder that is missing, incomplete or holds pickles.
    """
    if not in_comfyui():
        from .diffusers.loading import load_folder

        return _headless(lambda: load_folder(name))
    folder = next((path for path in _below("diffusers") if path.name == name or _relative(path) == name), None)
    if folder is None:
        raise LoadError(f"models/diffusers has no folder {name!r}: put the model there and refresh the page")
    for part in PARTS:
        files = [
            file.name for file in (folder / part).glob("*") if file.suffix in (".safetensors", ".bin", ".pt", ".ckpt")
        ]
        if not any(file.endswith(".safetensors") for file in files):
            raise LoadError(
                f"{name}/{part} has no safetensors file ({', '.join(files) or 'no weights'}): pickles are not read"
            )
    import comfy.diffusers_load
    import folder_paths

    embeddings = folder_paths.get_folder_paths("embeddings")
    return comfy.diffusers_load.load_diffusers(
        str(folder), output_vae=True, output_clip=True, embedding_directory=embeddings
    )


def _headless(load: Callable[[], Any]) -> tuple[HeadlessModel, HeadlessClip, HeadlessVae]:
    """Loaded outside inference mode, whatever the caller is in: autograd may save the weights."""
    with torch.inference_mode(False):
        loaded = load()
    return HeadlessModel(loaded.denoiser), HeadlessClip(loaded.text), HeadlessVae(loaded.codec)


def diffusers_folders() -> list[str]:
    """Model folders below models/diffusers, by their path there; none without ComfyUI."""
    return sorted({_relative(path) for path in _below("diffusers")}) if in_comfyui() else []


def _below(kind: str) -> list[Path]:
    import folder_paths

    roots = [Path(root) for root in folder_paths.get_folder_paths(kind)]
    return [path.parent for root in roots if root.is_dir() for path in root.glob("**/model_index.json")]


def _relative(path: Path) -> str:
    import folder_paths

    roots = [Path(root) for root in folder_paths.get_folder_paths("diffusers")]
    return next((path.relative_to(root).as_posix() for root in roots if path.is_relative_to(root)), path.name)


def ranker_files() -> list[str]:
    """safetensors files below models/clip_vision and models/editkit_rankers, with their folder's name."""
    if not in_comfyui():
        return []
    return sorted(
        f"{kind}/{path.relative_to(root).as_posix()}"
        for kind, root in _ranker_roots()
        for path in root.glob("**/*.safetensors")
    )


def _ranker_roots() -> list[tuple[str, Path]]:
    import folder_paths

    known = folder_paths.folder_names_and_paths
    roots = [(kind, Path(root)) for kind in RANKER_FOLDERS for root in (known[kind][0] if kind in known else [])]
    roots.append(("editkit_rankers", Path(folder_paths.models_dir) / "editkit_rankers"))
    return [(kind, root) for kind, root in dict.fromkeys(roots) if root.is_dir()]


def ranker_path(name: str) -> Path:
    """The file behind a name from `ranker_files`, or a path (headless). Raises LoadError where there is none."""
    if not in_comfyui():
        return Path(name)
    kind, _, rest = name.partition("/")
    for found, root in _ranker_roots():
        path = (root / rest).resolve()
        if found == kind and path.is_relative_to(root.resolve()) and path.is_file():
            return path
    raise LoadError(f"models has no ranker file {name!r}: put it below models/editkit_rankers and refresh the page")


def load_bundled_ranker() -> Any:
    """The ranker that ships with the pack."""
    from .diffusers.open_clip_ranker import load_bundled_ranker as load

    return _managed(load())


def load_ranker_file(architecture: str, name: str) -> Any:
    """A ranker of one of open_clip's architectures with a weight file: from `ranker_files`, or a path (headless)."""
    from .diffusers.open_clip_ranker import load_open_clip

    return _managed(load_open_clip(architecture, ranker_path(name)))


def _managed(ranker: Any) -> Any:
    if not in_comfyui():
        return ranker
    from .comfyui.memory import ManagedRanker

    return ManagedRanker(ranker)
