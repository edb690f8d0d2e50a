"""DiffEdit: a mask from two prompts, and the masked decode of an inverted image (Couairon et al. 2022).

mask   where the predictions of the two prompts differ
edit   the masked decode, and the whole method (docs/methods.md, section 6)
"""

from .edit import diffedit

__all__ = ["diffedit"]
