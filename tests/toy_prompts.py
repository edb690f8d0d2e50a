"""A text encoder whose embedding tells the token and its place in the window, over CLIP's tokens or made-up ones."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from editkit.hosts.diffusers.text_encoder import ClipBpe, ClipTower, SpanTokenizer
from editkit.pipelines.core.protocols import Context, Token


class PieceTokenizer:
    """Words and single signs are tokens, numbered as they come; words of `pieces` are cut into theirs."""

    bos, eos, pad = 0, 1, 1

    def __init__(self, pieces: Mapping[str, tuple[str, ...]] | None = None, length: int = 77) -> None:
        self.pieces, self.length, self.ids = pieces or {}, length, dict[str, int]()

    def split(self, text: str) -> list[Token]:
        tokens = []
        for match in re.finditer(r"\w+|[^\w\s]", text):
            start = match.start()
            for piece in self.pieces.get(match.group(), (match.group(),)):
                number = self.ids.setdefault(piece.lower(), len(self.ids) + 2)
                tokens.append(Token(number, start, start + len(piece)))
                start += len(piece)
        return tokens


class ToyTextEncoder:
    """A `TextEncoder`; the embedding [1, 77 k, 2] is (id, place in its window)."""

    def __init__(self, tokenizer: SpanTokenizer | None = None) -> None:
        self._tower = ClipTower(tokenizer or ClipBpe(), torch.nn.Identity())
        self.encoded = 0

    def tokens(self, text: str) -> list[Token]:
        return [token for window in self._tower.windows(text) for token in window]

    def encode_negative(self, text: str) -> Context:
        return self.encode(text)

    def encode(self, text: str) -> Context:
        self.encoded += 1
        rows = [
            [float(token.id), float(place)] for w in self._tower.windows(text) for place, token in enumerate(w)
        ]  # fmt: skip
        return Context(torch.tensor([rows]), text=text)
