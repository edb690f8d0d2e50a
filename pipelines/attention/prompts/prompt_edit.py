"""What one prompt becomes in another: the word alignment that attention control acts on."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...core.protocols import Context
from .words import Word


@dataclass(frozen=True)
class PromptEdit:
    """A source prompt, a target prompt, and which of the target's tokens take their attention from where.

    The edited map of target token n is  gate_n scale_n (A_source mapper)_n + (1 - gate_n) scale_n A_target,n  while the
    token's time gate is open, and A_target,n after (methods.md, 0.6 and 7).

    Attributes:
        source, target: the encoded prompts, tokens [1, T, D] each, one token count.
        mapper: float32 [T, T] on the CPU; column n says which source tokens' maps serve target token n.
        gate: float32 [T], 1 = from the source, 0 = the target's own.
        scale: float32 [T], weight of each target token's map (1 = unchanged).
        windows: (first, last) part of the run, 0 to 1, in which a token's cross-attention is edited, for tokens that
            differ from the default (0, tau_c): {target token: (first, last)}.
        blend_source, blend_target: tokens of the words whose place may change (LocalBlend); empty = no LocalBlend.
        keep_source, keep_target: tokens of the words whose place must stay (LocalBlend's subtract words).
        report: which words were matched with which, one line each, for people.
        source_words, target_words: the words of the prompts with their tokens, in order.
    """

    source: Context
    target: Context
    mapper: Tensor
    gate: Tensor
    scale: Tensor
    windows: dict[int, tuple[float, float]]
    blend_source: tuple[int, ...] = ()
    blend_target: tuple[int, ...] = ()
    keep_source: tuple[int, ...] = ()
    keep_target: tuple[int, ...] = ()
    report: tuple[str, ...] = ()
    source_words: tuple[Word, ...] = ()
    target_words: tuple[Word, ...] = ()

    @property
    def token_count(self) -> int:
        return self.mapper.shape[1]
