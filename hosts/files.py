"""Files of learned embeddings and LoRAs.

They are written below the host's output folder. Inside ComfyUI, embeddings are read from there and from the models
folder, and from nowhere else. Without ComfyUI they are read from any path.
"""

from __future__ import annotations

from pathlib import Path

from ..pipelines.core.errors import LoadError, ParameterError
from .host import in_comfyui, this_host

FOLDER = "editkit_embeddings"  # below the output folder, and below ComfyUI's models folder
LORAS = "loras"  # below the output folder
OUTPUT, MODELS = "output", "models"


def embedding_files() -> list[str]:
    """The files that 'Load Inversion Embeddings' offers: "output/..." was saved there, "models/..." was put there."""
    if not in_comfyui():
        return []
    found = [(kind, root, path) for kind, root in _roots() for path in root.glob("**/*.safetensors")]
    return sorted(f"{kind}/{path.relative_to(root).as_posix()}" for kind, root, path in found)


def embedding_path(name: str) -> Path:
    """The file of a name from `embedding_files`; headless, a path. Raises LoadError if there is no such file."""
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
    """A numbered file that does not exist yet. Raises ParameterError if `name` leaves the folder."""
    return _numbered(FOLDER, name)


def new_lora_path(name: str) -> Path:
    """A numbered LoRA file that does not exist yet, in the folder of ComfyUI's own trainer. Raises ParameterError."""
    return _numbered(LORAS, name)


def _numbered(folder: str, name: str) -> Path:
    root = this_host().output_folder() / folder
    stem = (root / name.strip()).resolve()
    if not name.strip() or stem == root.resolve() or not stem.is_relative_to(root.resolve()):
        raise ParameterError(
            f"filename_prefix is {name!r}: give a file name, with folders if you like, inside output/{folder}"
        )
    numbers = [path.stem.rpartition("_")[2] for path in stem.parent.glob(f"{stem.name}_*.safetensors")]
    last = max((int(number) for number in numbers if number.isdigit()), default=0)
    return stem.with_name(f"{stem.name}_{last + 1:05d}.safetensors")


def embedding_name(path: Path) -> str:
    """The name by which 'Load Inversion Embeddings' offers a file of `new_embedding_path`."""
    if not in_comfyui():
        return str(path)
    root = (this_host().output_folder() / FOLDER).resolve()
    return f"{OUTPUT}/{path.relative_to(root).as_posix()}"


def _roots() -> list[tuple[str, Path]]:
    """Existing folders of embeddings, with the name that their files begin with."""
    host = this_host()
    saved = host.output_folder() / FOLDER
    own = [(OUTPUT, saved)] if saved.is_dir() else []
    return own + [(MODELS, root) for root in host.model_folders(FOLDER)]
