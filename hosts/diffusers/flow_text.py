"""TextEncoders of flow transformers: SD3's CLIP-L, CLIP-G and T5, and Flux's CLIP-L and T5.

The tokens are laid out as ComfyUI's encoders lay them out, so that both hosts give the network the same sequence: T5 reads
the whole prompt in one piece, padded with 0 to a smallest length, and no padding is masked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...pipelines.core.protocols import Context, Token
from .text_encoder import ClipTower

SD3_T5_LENGTH = 77  # smallest number of T5 tokens, as in ComfyUI
FLUX_T5_LENGTH = 256


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
