"""The errors that a user can cause. A message says what was given, what is needed and what to do."""

from __future__ import annotations


class EditError(ValueError):
    """Something about the inputs of an edit is wrong; the message names the socket and the way out."""


class ShapeError(EditError):
    """Batch sizes, heights, widths or channel counts that do not fit each other."""


class ParameterError(EditError):
    """A number, a choice or a text outside what a step accepts."""


class FamilyError(EditError):
    """A model family that cannot do what was asked (refused by name)."""


class MismatchError(EditError):
    """Things made for one model, grid or size used with another."""


class LoadError(EditError):
    """A file or folder that is missing, unsafe or not what its name says."""
