"""TextEncoder over transformers' CLIP text models, with character spans and prompts of any length.

A prompt longer than one window is cut into windows of 75 tokens, each with its own begin and end token, and the
embeddings are joined: the convention of ComfyUI and the web UIs. Weights such as "(word:1.2)" are read by ComfyUI's
encoder only; headless they are plain text.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...pipelines.core.protocols import Context, Token


class SpanTokenizer(Protocol):
    """Text to tokens, without the begin and end tokens of a window, which are `bos`, `eos` and `pad` here."""

    bos: int
    eos: int
    pad: int
    length: int

    def split(self, text: str) -> list[Token]: ...


class ClipBpe:
    """CLIP's byte-pair tokens from the vocabulary that open_clip ships, with character spans."""

    def __init__(self, length: int = 77, pad: int | None = None) -> None:
        self.bos = 49406
        self.eos = 49407
        self.length = length
        self.pad = self.eos if pad is None else pad

    def split(self, text: str) -> list[Token]:
        tokenizer = _simple_tokenizer()
        plain, places = _plain(text)
        tokens: list[Token] = []
        for match in tokenizer.pat.finditer(plain):
            word = "".join(tokenizer.byte_encoder[byte] for byte in match.group().encode("utf-8"))
            owners = [place for i in range(*match.span()) for place in [places[i]] * len(plain[i].encode("utf-8"))]
            tokens += _spans(tokenizer.bpe(word).split(" "), tokenizer.encoder, owners)
        return tokens


def _plain(text: str) -> tuple[str, list[int]]:
    """`text` composed and in lower case, as CLIP reads it, and the place in `text` of each of its characters."""
    kept = ""
    places = []
    start = 0
    while start < len(text):
        end = start + 1
        while end < len(text) and unicodedata.combining(text[end]):
            end += 1
        piece = unicodedata.normalize("NFC", text[start:end]).lower()
        kept += piece
        places += [start] * len(piece)
        start = end
    return kept, places


def _spans(pieces: Sequence[str], encoder: dict[str, int], owners: Sequence[int]) -> Iterator[Token]:
    """The pieces of a word with the characters they cover; `owners` has one entry per byte. Pieces may cut a character."""
    at = 0
    for piece in pieces:
        length = len(piece.removesuffix("</w>"))
        yield Token(encoder[piece], owners[at], owners[at + length - 1] + 1)
        at += length


@cache
def _simple_tokenizer() -> Any:
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


class TransformersTokenizer:
    """A fast CLIP tokenizer from a diffusers folder."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.bos = tokenizer.bos_token_id
        self.eos = tokenizer.eos_token_id
        self.pad = tokenizer.pad_token_id
        self.length = int(min(tokenizer.model_max_length, 77))

    def split(self, text: str) -> list[Token]:
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return [Token(i, a, b) for i, (a, b) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)]


@dataclass
class ClipTower:
    """One tokenizer with its text model.

    Attributes:
        layer: which hidden state is the embedding. None: the last, after the final norm; -2: the one before the last, as
            SDXL reads it.
        row_of_id: for a compact vocabulary, the stored row of every CLIP id.
        short: a prompt that fits this many tokens is padded to these instead of a whole window.
        pools: whether the end token's embedding is the pooled vector, where the model has no projection.
    """

    tokenizer: SpanTokenizer
    model: nn.Module
    layer: int | None = None
    row_of_id: Tensor | None = None
    short: int | None = None
    pools: bool = False

    def windows(self, text: str) -> list[list[Token]]:
        """Padded windows of `length` tokens. Special tokens have the span (-1, -1)."""
        tokenizer = self.tokenizer
        content = tokenizer.split(text)
        room = tokenizer.length - 2
        parts = [content[i : i + room] for i in range(0, len(content), room)] or [[]]
        begin, end, pad = (Token(i, -1, -1) for i in (tokenizer.bos, tokenizer.eos, tokenizer.pad))
        if self.short is not None and len(content) <= self.short - 2:
            room = self.short - 2
        return [[begin, *part, end, *[pad] * (room - len(part))] for part in parts]

    @torch.no_grad()
    def encode(self, text: str) -> tuple[Tensor, Tensor | None]:
        """Tokens [1, 77 k, D] and, for models with a projection, the pooled vector [1, P] of the first window."""
        ids = torch.tensor([[token.id for token in window] for window in self.windows(text)])
        device = next(self.model.parameters()).device
        if self.row_of_id is not None:
            ids = self.row_of_id.cpu()[ids]
        out = self.model(ids.to(device), output_hidden_states=self.layer is not None)
        hidden = out.last_hidden_state if self.layer is None else out.hidden_states[self.layer]
        pooled = out.pooler_output if self.pools else getattr(out, "text_embeds", None)
        return hidden.reshape(1, -1, hidden.shape[-1]).float(), None if pooled is None else pooled[:1].float()


class ClipTextEncoder:
    """One tower (SD 1.x, SD 2.x, bundled) or two (SDXL: embeddings side by side, pooled from the second)."""

    def __init__(self, towers: Sequence[ClipTower], *, zeros_for_empty: bool = False) -> None:
        """`zeros_for_empty`: an empty negative prompt is zeros (`force_zeros_for_empty_prompt` of SDXL folders)."""
        self.towers = list(towers)
        self._zeros_for_empty = zeros_for_empty

    def modules(self) -> list[nn.Module]:
        return [tower.model for tower in self.towers]

    def encode(self, text: str) -> Context:
        encoded = [tower.encode(text) for tower in self.towers]
        longest = max(tokens.shape[1] for tokens, _ in encoded)
        tokens = torch.cat([_extend(part, longest) for part, _ in encoded], dim=-1)
        return Context(tokens, encoded[-1][1] if len(encoded) > 1 or self.towers[0].pools else None, text)

    def encode_negative(self, text: str) -> Context:
        """See `TextEncoder.encode_negative`."""
        context = self.encode(text)
        if text or not self._zeros_for_empty:
            return context
        return replace(
            context,
            tokens=torch.zeros_like(context.tokens),
            pooled=None if context.pooled is None else torch.zeros_like(context.pooled),
        )

    def tokens(self, text: str) -> list[Token]:
        return [token for window in self.towers[0].windows(text) for token in window]


def _extend(tokens: Tensor, length: int) -> Tensor:
    """Repeat the last window up to `length` tokens: two towers may cut a text into different numbers of windows."""
    missing = length - tokens.shape[1]
    return tokens if missing == 0 else torch.cat([tokens, tokens[:, -missing:]], dim=1)
