"""A source prompt, a target prompt and their word alignment: what Prompt-to-Prompt acts on."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ...core.protocols import Context
from .words import Word


@dataclass(frozen=True)
class PromptEdit:
    """Two prompts, and which tokens of the target take their cross-attention maps from which tokens of the source.

    The names are those of the official code of Prompt-to-Prompt (Hertz et al. 2022, section 3.2). With M = `mapper`,
    a = `alphas` and c = `equalizer`, the edited map of target token n, inside its step range, is

        A_n = c_n (a_n (A_source M)_n + (1 - a_n) A_target,n)

    and A_target,n outside of it (docs/methods.md, sections 0.6 and 7).

    Attributes:
        source, target: the encoded prompts, tokens [1, T, D] each, with the same T.
        mapper: float32 [T, T] on the CPU, source tokens down, target tokens across: column n weighs the source maps that
            target token n receives.
        alphas: float32 [T], 1 = the token receives source maps, 0 = it keeps its own.
        equalizer: float32 [T], the factor of each target token's map (1 = unchanged).
        step_ranges: {target token: (first, last)} as fractions of the steps, 0 to 1, for tokens that do not follow the
            default range (0, tau_c).
        blend_source, blend_target: tokens of the words whose region may change (LocalBlend); none = no LocalBlend.
        keep_source, keep_target: tokens of the words whose region must stay (LocalBlend's subtracted words).
        report: the alignment in plain text, one line per run of words.
        source_words, target_words: the words of the prompts with their tokens, in order.
    """

    source: Context
    target: Context
    mapper: Tensor
    alphas: Tensor
    equalizer: Tensor
    step_ranges: dict[int, tuple[float, float]] = field(default_factory=dict)
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
