"""Files that nodes write and read: learned embeddings, LoRAs, images of headless runs.

They are written below the host's output folder, whole or not at all, and under a number that no file has. Inside ComfyUI,
embeddings are read from there and from the models folder, and from nowhere else. Without ComfyUI they are read from any
path.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from safetensors import SafetensorError

from ..pipelines.core.errors import LoadError, ParameterError
from .host import in_comfyui, this_host

FOLDER = "editkit_embeddings"  # below the output folder, and below ComfyUI's models folder
LORAS = "loras"  # below the output folder
OUTPUT, MODELS = "output", "models"
LONGEST_NAME = 200  # bytes of a file name; file systems take 255, of which a number and a suffix need some
UNFINISHED = ".part"  # suffix of a file that is being written

Write = Callable[[Path], object]


def embedding_files() -> list[str]:
    """The files that 'Load Inversion Embeddings' offers: "output/..." was saved there, "models/..." was put there."""
    if not in_comfyui():
        return []
    found = [(kind, root, path) for kind, root in _roots() for path in root.glob("**/[!.]*.safetensors")]
    return sorted(f"{kind}/{path.relative_to(root).as_posix()}" for kind, root, path in found)


def embedding_path(name: str) -> Path:
    """The file of a name from `embedding_files`; headless, a path. Raises LoadError if there is no such file."""
    if not in_comfyui():
        return headless_path(name)
    kind, _, rest = name.partition("/")
    for found, root in _roots():
        path = (root / rest).resolve()
        if found == kind and path.is_relative_to(root.resolve()) and path.suffix == ".safetensors" and path.is_file():
            return path
    raise LoadError(
        f"there is no file {name!r}: save embeddings first, or put the file below models/{FOLDER}, and refresh the page"
    )


def headless_path(name: str) -> Path:
    """The path that a headless workflow names. Raises LoadError for a name that no file can have."""
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, RuntimeError, TypeError, ValueError) as error:  # too long, the home of nobody, no text, a NUL
        raise LoadError(f"there can be no file {str(name)[:60]!r} ({str(error)[:80]}): give a path") from error
    return path


def save_embedding_file(name: str, write: Write) -> Path:
    """Write embeddings under a number that no file has. Raises ParameterError if `name` leaves the folder."""
    return _save(FOLDER, name, write)


def save_lora_file(name: str, write: Write) -> Path:
    """Write a LoRA under a number that no file has, in the folder of ComfyUI's own trainer. Raises ParameterError."""
    return _save(LORAS, name, write)


def _save(folder: str, name: str, write: Write) -> Path:
    root = this_host().output_folder() / folder
    if not name.strip():
        raise ParameterError(f"filename_prefix is empty: give a file name inside output/{folder}")
    stem = path_inside(root, name.strip())
    if stem == root.resolve():
        raise ParameterError(f"filename_prefix is {name!r}: give a file name inside output/{folder}, not a folder")
    return save_counted(stem.parent, stem.name, ".safetensors", write)


def path_inside(root: Path, name: str) -> Path:
    """The resolved path of `name` below `root`. Raises ParameterError for a name that leaves it or that no file can have."""
    try:
        path = (root / name).resolve()
        parts = [len(os.fsencode(part)) for part in Path(name).parts]
    except (ValueError, OSError, RuntimeError) as error:  # a NUL, half a surrogate pair, a circle of links
        raise ParameterError(
            f"filename_prefix is {name!r}, which no file can have ({error}): use plain letters"
        ) from error
    if "\0" in name or max(parts, default=0) > LONGEST_NAME:
        raise ParameterError(
            f"filename_prefix is {name[:40]!r}...: use no NUL, and at most {LONGEST_NAME} bytes for each name"
        )
    if not path.is_relative_to(root.resolve()):
        raise ParameterError(
            f"filename_prefix is {name!r}: give a file name, with folders if you like, that stays inside {root}"
        )
    return path


# ------------------------------------------------------------------------------------------------------------- writing
def save_counted(folder: Path, name: str, suffix: str, write: Write) -> Path:
    """Write a file as `name`_00001`suffix`, or under the next number after the largest that there is.

    The number is taken by creating the file, which fails where another process or thread was faster; the file itself
    replaces it when it is complete.

    Args:
        folder: made if it does not exist.
        name: first part of the file's name; may be empty.
        suffix: such as ".png".
        write: writes the file at the path that it is given.
    Returns: the file.
    Raises: ParameterError where the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with unfinished(folder, suffix) as draft:
            write(draft)
            target = _taken(folder, name, suffix)
            draft.replace(target)
        return target
    except (OSError, SafetensorError) as error:
        raise ParameterError(f"{folder} cannot be written ({error}): choose another folder or name") from error


def _taken(folder: Path, name: str, suffix: str) -> Path:
    """A new empty file with the next number."""
    pattern = re.compile(rf"{re.escape(name)}_([0-9]{{1,12}}){re.escape(suffix)}")
    with os.scandir(folder) as entries:
        numbers = [int(found[1]) for entry in entries if (found := pattern.fullmatch(entry.name))]
    number = max(numbers, default=0)
    while True:
        number += 1
        target = folder / f"{name}_{number:05d}{suffix}"
        try:
            target.touch(exist_ok=False)
            return target
        except FileExistsError:
            continue


def save_new(path: Path, write: Write) -> Path:
    """Write a file at `path`, or beside it as "name (2)" where there is a file or a link already. Raises OSError."""
    with unfinished(path.parent, path.suffix) as draft:
        write(draft)
        number, target = 1, path
        while True:
            try:
                target.touch(exist_ok=False)
                break
            except FileExistsError:
                number += 1
                target = path.with_name(f"{path.stem} ({number}){path.suffix}")
        draft.replace(target)
    return target


def save_whole(path: Path, write: Write) -> Path:
    """Write a file so that `path` has the old content or all of the new one. Folders are made. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with unfinished(path.parent, path.suffix) as draft:
        write(draft)
        draft.replace(path)
    return path


@contextmanager
def unfinished(folder: Path, suffix: str) -> Iterator[Path]:
    """A hidden name for a file that is being written, with the suffix by which writers choose a format; removed if left."""
    draft = folder / f".{uuid4().hex}{UNFINISHED}{suffix}"
    try:
        yield draft
    finally:
        draft.unlink(missing_ok=True)


def embedding_name(path: Path) -> str:
    """The name by which 'Load Inversion Embeddings' offers a file of `save_embedding_file`."""
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
