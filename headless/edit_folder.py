"""The folder of a finished edit: every file whole, none left from an earlier run, and a report from which it can be repeated."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..pipelines.core.errors import ParameterError

if TYPE_CHECKING:
    from torch import Tensor

    from ..pipelines.blended.pipeline import EditResult

REPORT = "report.json"
CHUNK = "editkit"  # the text chunk of every PNG that holds the report
# What one run may write and the next may not.
OWN = re.compile(r"(candidate_\d+|loss)\.png")
PACKAGES = ("torch", "diffusers", "transformers", "numpy", "pillow")

Files = dict[str, Callable[..., object]]


def write_result(result: EditResult, image: Tensor, mask: Tensor, folder: Path, about: Mapping[str, Any]) -> list[str]:
    """Write source, mask, candidates, tuned winner, composite, comparison sheet and report.json.

    Every PNG carries the report too, in a text chunk.

    Args:
        result: the finished edit.
        image: the source [1, H, W, 3] in [0, 1].
        mask: [1, H, W], 1 = edit.
        folder: made if it does not exist. Images that an earlier edit listed in its report are replaced or removed.
        about: what the edit was made from; written into report.json.
    Returns: what changed, for the user, one line each.
    Raises: ParameterError where the folder cannot be written; the edit is then in a folder that the message names.
    """
    inside = float(((result.image - image).abs().mean(-1) * mask).sum() / mask.sum().clamp(min=1))
    files = _images(result, image, mask)
    report = {
        **about,
        "mean_change_inside": inside,
        "largest_change_outside": result.change_outside,
        "psnr_outside_plain_decode_db": result.psnr_plain,
        "psnr_outside_tuned_decoder_db": result.psnr_tuned,
        "scores": None if result.scores is None else result.scores.tolist(),
        "versions": versions(),
        "files": [*files, REPORT],
    }
    text = json.dumps(finite(report), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    files = {name: partial(write, texts={CHUNK: text}) for name, write in files.items()}
    files[REPORT] = lambda path: path.write_text(text, encoding="utf-8")
    try:
        _write(folder, files)
    except OSError as error:
        rescue = Path(tempfile.mkdtemp(prefix="editkit-"))
        _write(rescue, files)
        raise ParameterError(f"{folder} cannot be written ({error}): the finished edit is in {rescue}") from error
    return [
        f"inside the mask: changed by {inside:.3f} on average (of 1)",
        f"outside the mask: changed by {result.change_outside:g} at most in the result",
        f"outside the mask: {result.psnr_plain:.1f} dB from the plain decoder, {result.psnr_tuned:.1f} dB from the tuned one",
        f"images: {folder}",
    ]


def _images(result: EditResult, image: Tensor, mask: Tensor) -> Files:
    """Every image by its file name."""
    from ..pipelines.evaluation.drawing import curve, save_image, sheet

    images = {"source.png": image[0], "mask.png": mask[0]}
    tiles = [("source", image[0]), ("mask (white = edit)", mask[0])]
    for index, candidate in enumerate(result.candidates):
        images[f"candidate_{index + 1:02d}.png"] = candidate
        score = "" if result.scores is None else f"\nscore {result.scores[index]:.3f}"
        tiles.append((f"rank {index + 1}{score}", candidate))
    tiles += [
        (f"decoder tuned\noutside {result.psnr_tuned:.1f} dB", result.tuned[0]),
        (f"result\noutside changed by {result.change_outside:g}", result.image[0]),
    ]
    images |= {"tuned.png": result.tuned[0], "result.png": result.image[0], "sheet.png": sheet(tiles)[0]}
    if result.losses:
        images["loss.png"] = curve(result.losses, "decoder fine-tune: loss")[0]
    return {name: partial(save_image, value) for name, value in images.items()}


def _write(folder: Path, files: Files) -> None:
    """Write all files beside their places and move them there when all are complete, the report last. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", suffix=".part", dir=folder) as drafts:
        for name, write in files.items():
            write(Path(drafts) / name)
        with _locked(folder):
            earlier = _listed(folder)
            for name in files:
                (Path(drafts) / name).replace(folder / name)
            for name in earlier - set(files):
                (folder / name).unlink(missing_ok=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One edit at a time moves its files into a folder, so that two processes do not mix theirs.

    The lock is on the folder itself and ends with the process. Where the system or the file system has no such locks
    (Windows, some network drives), there is none.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _listed(folder: Path) -> set[str]:
    """The candidates and the curve that the folder's report says an earlier edit wrote; no other name is ever removed."""
    try:
        names = json.loads((folder / REPORT).read_text(encoding="utf-8"))["files"]
        return {name for name in names if isinstance(name, str) and OWN.fullmatch(name)}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return set()


def finite(value: Any) -> Any:
    """A value for JSON, which has no NaN and no infinity: they become null."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def versions() -> dict[str, str]:
    """EditKit's version, Python's, and those of the packages that compute."""
    package = sys.modules[__name__.partition(".headless")[0]]
    found = {"editkit": str(getattr(package, "__version__", "unknown")), "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
