"""Files of embeddings, and of what a model learned: written below the host's output folder.

Embeddings are read from there and from its models; nowhere else.

Without ComfyUI a file is written below the folder of the run and read from any path, as models are.
"""

from __future__ import annotations

from pathlib import Path

from ..pipelines.core.errors import LoadError, ParameterError
from .sockets import in_comfyui

FOLDER = "editkit_embeddings"  # below the output folder, and below ComfyUI's models folder
LORAS = "loras"  # below the output folder
OUTPUT, MODELS = "output", "models"
_headless_output = Path()


def set_headless_output(folder: Path) -> None:
    """Where files go without ComfyUI; at first the current folder."""
    global _headless_output
    _headless_output = folder


def embedding_files() -> list[str]:
    """Files that 'Load embeddings' offers: "output/..." for what was saved, "models/..." for what was put there."""
    if not in_comfyui():
        return []
    found = [(kind, root, path) for kind, root in _roots() for path in root.glob("**/*.safetensors")]
    return sorted(f"{kind}/{path.relative_to(root).as_posix()}" for kind, root, path in found)


def embedding_path(name: str) -> Path:
    """The file behind a name from `embedding_files`, or a path (headless). Raises LoadError where there is none."""
    if not in_comfyui():
        return Path(name)
    kind, _, rest = name.partition("/")
    for found, root in _roots():
        path = (root / rest).resolve()
        if found == kind and path.is_relative_to(root.resolve()) and path.suffix == ".safetensors" and path.is_file():
            return path
    raise LoadError(
        f"there is no file {name!r}: save embeddings first, or put the file below models/{FOLDER}, and refresh the page"
    )


def new_embedding_path(name: str) -> Path:
    """A file that does not exist yet, numbered, for the name that was asked for. Raises ParameterError if it leaves the folder."""
    return _numbered(FOLDER, name)


def new_lora_path(name: str) -> Path:
    """The same below the output folder's loras, where the host's own trainer saves."""
    return _numbered(LORAS, name)


def _numbered(folder: str, name: str) -> Path:
    root = _output() / folder
    stem = (root / name.strip()).resolve()
    if not name.strip() or stem == root.resolve() or not stem.is_relative_to(root.resolve()):
        raise ParameterError(
            f"filename_prefix is {name!r}: give a file name, with folders if you like, inside output/{folder}"
        )
    numbers = [path.stem.rpartition("_")[2] for path in stem.parent.glob(f"{stem.name}_*.safetensors")]
    last = max((int(number) for number in numbers if number.isdigit()), default=0)
    return stem.with_name(f"{stem.name}_{last + 1:05d}.safetensors")


def embedding_name(path: Path) -> str:
    """What 'Load embeddings' calls a file of `new_embedding_path`."""
    return f"{OUTPUT}/{path.relative_to((_output() / FOLDER).resolve()).as_posix()}" if in_comfyui() else str(path)


def _roots() -> list[tuple[str, Path]]:
    import folder_paths

    known = folder_paths.folder_names_and_paths
    registered = known[FOLDER][0] if FOLDER in known else []
    roots = [(MODELS, Path(root)) for root in [*registered, Path(folder_paths.models_dir) / FOLDER]]
    return [(kind, root) for kind, root in [(OUTPUT, _output() / FOLDER), *dict.fromkeys(roots)] if root.is_dir()]


def _output() -> Path:
    if not in_comfyui():
        return _headless_output
    import folder_paths

    return Path(folder_paths.get_output_directory())
