"""Errors that a user can cause. A message names the input, what was given, what is needed and what to do."""

from __future__ import annotations


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out: Python's, the GPU's, or the plain RuntimeError of torch's CPU allocator."""
    said = str(error)
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "allocate memory" in said
        or "not enough memory" in said
    )


class EditError(ValueError):
    """An input of an edit is wrong; the message names the socket and the remedy."""


class ShapeError(EditError):
    """Batch sizes, heights, widths or channel counts that do not fit each other."""


class ParameterError(EditError):
    """A number, a choice or a text outside the accepted range."""


class FamilyError(EditError):
    """A model family that does not support the method."""


class MismatchError(EditError):
    """An input that was made for another model, grid, size or prompt."""


class LoadError(EditError):
    """A file or folder that is missing, unsafe or of another kind than expected."""
