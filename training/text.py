"""CLIP's own token ids for the grammar, and a small text encoder on them.

The ids come from the vocabulary that open_clip ships, so any host's CLIP tokenizer feeds the bundled encoder. Only the
embedding rows that the grammar uses are trained and stored; a loader expands them (see `hosts/bundled/__init__.py`).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from ..hosts.bundled.scenes import BACKGROUND_COLOURS, OBJECT_COLOURS, PATTERNS, SHAPES

LENGTH = 77
BOS = 49406
EOS = 49407
VOCABULARY = 49408
WIDTH = 128
CONFIG = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": LENGTH,
    "hidden_act": "quick_gelu",
    "projection_dim": WIDTH,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
}
EXTRA_WORDS = (
    "a",
    "an",
    "on",
    "left",
    "right",
    "of",
    "the",
    "and",
    "with",
    "background",
    "small",
    "large",
    "dotted",
    ",",
    ".",
)


@cache
def _tokenizer() -> Any:
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


@cache
def encode_ids(text: str) -> tuple[int, ...]:
    """Ids of `text` without the ends."""
    return tuple(_tokenizer().encode(text))


def grammar_ids() -> list[int]:
    """Every id that a caption of the grammar can hold, ascending, the ends included."""
    words = (*OBJECT_COLOURS, *BACKGROUND_COLOURS, *PATTERNS, *SHAPES, *EXTRA_WORDS)
    return sorted({BOS, EOS, *(i for word in words for i in encode_ids(word))})


def pad_ids(texts: list[str]) -> Tensor:
    """[N, 77] as SD pads: begin, ids, then end tokens up to the length."""
    rows = []
    for text in texts:
        ids = [BOS, *encode_ids(text)][: LENGTH - 1]
        rows.append(ids + [EOS] * (LENGTH - len(ids)))
    return torch.tensor(rows)


class CompactTextModel(torch.nn.Module):
    """CLIP's text transformer on the grammar's rows only: `forward(ids)` takes CLIP ids and looks the rows up."""

    def __init__(self) -> None:
        super().__init__()
        ids = grammar_ids()
        self.model = CLIPTextModel(CLIPTextConfig(**{**CONFIG, "vocab_size": len(ids)}))
        table = torch.zeros(VOCABULARY, dtype=torch.long)
        table[torch.tensor(ids)] = torch.arange(len(ids))
        self.row_of_id: Tensor
        self.register_buffer("row_of_id", table, persistent=False)
        # every end token is the same row, so the pooled output needs the position of the first one
        self.model.config.eos_token_id = int(table[EOS])

    def forward(self, ids: Tensor) -> Tensor:
        """[N, 77] CLIP ids to [N, 77, WIDTH]."""
        return self.model(self.row_of_id[ids]).last_hidden_state
