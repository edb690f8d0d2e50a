"""TextEncoders over transformers' CLIP and T5 models, with character spans and prompts of any length.

A prompt longer than one window is cut into windows of 75 tokens, each with its own begin and end token, and the
embeddings are joined: the convention of ComfyUI and the web UIs. Weights such as "(word:1.2)" are read by ComfyUI's
encoder only; headless they are plain text.

Flow transformers take T5's tokens too (SD3: after those of CLIP-L and CLIP-G; Flux: alone, with CLIP-L's pooled vector). They
are laid out as ComfyUI's encoders lay them out: T5 reads the whole prompt in one piece, padded with 0 to a smallest length,
and no padding is masked.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...pipelines.core.protocols import Context, Token

SD3_T5_LENGTH = 77  # smallest number of T5 tokens, as in ComfyUI
FLUX_T5_LENGTH = 256


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


class T5Pieces:
    """T5's SentencePiece tokens with character spans, from the fast tokenizer of a model folder."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.eos = int(tokenizer.eos_token_id)
        self.pad = int(tokenizer.pad_token_id)

    def split(self, text: str) -> list[Token]:
        """The tokens of `text` without the end token. A span leaves out the space before its word."""
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        spans = [_without_space(text, *span) for span in encoded["offset_mapping"]]
        return [Token(i, *span) for i, span in zip(encoded["input_ids"], spans, strict=True)]


def _without_space(text: str, start: int, end: int) -> tuple[int, int]:
    piece = text[start:end]
    return start + len(piece) - len(piece.lstrip()) if piece.strip() else start, end


@dataclass
class T5Tower:
    """A T5 encoder with its tokenizer.

    Attributes:
        pieces: the tokenizer.
        model: a T5EncoderModel.
        shortest: number of tokens that shorter prompts are padded to.
    """

    pieces: T5Pieces
    model: nn.Module
    shortest: int

    def tokens(self, text: str) -> list[Token]:
        """The padded sequence. Special tokens have the span (-1, -1)."""
        end, pad = Token(self.pieces.eos, -1, -1), Token(self.pieces.pad, -1, -1)
        found = [*self.pieces.split(text), end]
        return found + [pad] * (self.shortest - len(found))

    @torch.no_grad()
    def encode(self, text: str) -> Tensor:
        """Embeddings [1, T, D] in float32."""
        ids = torch.tensor([[token.id for token in self.tokens(text)]])
        device = next(self.model.parameters()).device
        return self.model(input_ids=ids.to(device)).last_hidden_state.float()


class Sd3TextEncoder:
    """CLIP-L and CLIP-G side by side, filled up with zeros to T5's width, then T5's tokens (Esser et al. 2024, section 4).

    The pooled vector is CLIP-L's without its projection beside CLIP-G's with it, as in ComfyUI. A model without T5 gets
    the tokens of CLIP alone.
    """

    def __init__(self, clip_l: ClipTower, clip_g: ClipTower, t5: T5Tower | None, width: int) -> None:
        """`width`: of the tokens that the transformer takes."""
        self.clip_l = clip_l
        self.clip_g = clip_g
        self.t5 = t5
        self._width = width

    def modules(self) -> list[nn.Module]:
        models = [self.clip_l.model, self.clip_g.model]
        return models if self.t5 is None else [*models, self.t5.model]

    def encode(self, text: str) -> Context:
        first, pooled_first = self.clip_l.encode(text)
        second, pooled_second = self.clip_g.encode(text)
        if pooled_first is None or pooled_second is None:
            raise TypeError("SD3's CLIP towers give pooled vectors")
        shorter = min(first.shape[1], second.shape[1])
        tokens = torch.cat([first[:, :shorter], second[:, :shorter]], dim=-1)
        tokens = F.pad(tokens, (0, self._width - tokens.shape[-1]))
        if self.t5 is not None:
            tokens = torch.cat([tokens, self.t5.encode(text)], dim=1)
        return Context(tokens, torch.cat([pooled_first, pooled_second], dim=-1), text)

    def encode_negative(self, text: str) -> Context:
        """See `TextEncoder.encode_negative`."""
        return self.encode(text)

    def tokens(self, text: str) -> list[Token]:
        """See `TextEncoder.tokens`: CLIP's windows, then T5's tokens. A word has tokens in both."""
        clip = [token for window in self.clip_l.windows(text) for token in window]
        return clip if self.t5 is None else clip + self.t5.tokens(text)


class FluxTextEncoder:
    """T5's tokens, with CLIP-L's pooled vector without a projection, as in ComfyUI."""

    def __init__(self, clip: ClipTower, t5: T5Tower) -> None:
        self.clip = clip
        self.t5 = t5

    def modules(self) -> list[nn.Module]:
        return [self.clip.model, self.t5.model]

    def encode(self, text: str) -> Context:
        return Context(self.t5.encode(text), self.clip.encode(text)[1], text)

    def encode_negative(self, text: str) -> Context:
        """See `TextEncoder.encode_negative`."""
        return self.encode(text)

    def tokens(self, text: str) -> list[Token]:
        return self.t5.tokens(text)
