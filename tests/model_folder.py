"""A whole model folder in diffusers layout: random networks, small enough to be written and read in a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import CLIPTextConfig, CLIPTextModel

from editkit.tests.parity import tiny

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SPECIAL = ("<|startoftext|>", "<|endoftext|>")


def write_model_folder(folder: Path, width: int = 16, **scheduler: Any) -> Path:
    """U-Net, VAE, text encoder of `width`, a tokenizer of single letters, and a scheduler."""
    tiny.unet(width).save_pretrained(folder / "unet")
    tiny.vae().save_pretrained(folder / "vae")
    config = CLIPTextConfig(
        vocab_size=2 * len(LETTERS) + 2, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=77, bos_token_id=52, eos_token_id=53,
    )  # fmt: skip
    tiny.randomise(CLIPTextModel(config)).save_pretrained(folder / "text_encoder")
    write_tokenizer(folder / "tokenizer")
    tiny.write_scheduler(folder, **scheduler)
    return folder


def write_tokenizer(folder: Path, **fields: object) -> None:
    """CLIP's files with a vocabulary of letters, inside a word and at its end; `fields` go into the configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), *SPECIAL]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    config = {
        "bos_token": SPECIAL[0],
        "eos_token": SPECIAL[1],
        "unk_token": SPECIAL[1],
        "pad_token": SPECIAL[1],
        "model_max_length": 77,
        "tokenizer_class": "CLIPTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **fields}))
