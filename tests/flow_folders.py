"""Whole SD3 and Flux folders in diffusers layout: random networks of the published layout at reduced width."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, FluxTransformer2DModel, SD3Transformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from editkit.tests.model_folder import LETTERS, write_tokenizer
from editkit.tests.parity import tiny

CLIP_WIDTHS = {"l": 16, "g": 24}
T5_WIDTH = 48
T5_WORDS = ("<pad>", "</s>", "<unk>", "▁", *LETTERS, *(f"▁{letter}" for letter in LETTERS), "▁cat")


def sd3_transformer(layers: int = 3, *, dual: tuple[int, ...] = (), text: int = T5_WIDTH, pooled: int = 40) -> Any:
    """SD3's network with 2 heads of 64; with layers that attend to the image twice and norms, SD3.5's."""
    model = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=16, out_channels=16, num_layers=layers, attention_head_dim=64,
        num_attention_heads=2, joint_attention_dim=text, caption_projection_dim=128, pooled_projection_dim=pooled,
        pos_embed_max_size=24, dual_attention_layers=dual, qk_norm="rms_norm" if dual else None,
    )  # fmt: skip
    return tiny.randomise(model, std=0.04)


def flux_transformer(*, guidance: bool = True, text: int = T5_WIDTH, pooled: int = CLIP_WIDTHS["l"]) -> Any:
    """Flux's network with 2 double and 2 single blocks, 2 heads of 24."""
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=24, num_attention_heads=2,
        joint_attention_dim=text, pooled_projection_dim=pooled, guidance_embeds=guidance, axes_dims_rope=(4, 10, 10),
    )  # fmt: skip
    return tiny.randomise(model, std=0.04)


def vae(scale: float, shift: float) -> Any:
    model = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=16, block_out_channels=(8, 8, 16, 16), layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=4,
        sample_size=32, scaling_factor=scale, shift_factor=shift, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    return tiny.randomise(model, 1)


def write_clip(folder: Path, number: int, width: int, *, projection: bool) -> None:
    """A CLIP text encoder of two layers and a tokenizer of letters; `number` is 1 or the number in the folder's name."""
    name = "" if number == 1 else f"_{number}"
    config = CLIPTextConfig(
        vocab_size=2 * len(LETTERS) + 2, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=77, bos_token_id=52, eos_token_id=53, projection_dim=width,
    )  # fmt: skip
    model = (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)
    tiny.randomise(model, number).save_pretrained(folder / f"text_encoder{name}")
    write_tokenizer(folder / f"tokenizer{name}")


def write_t5(folder: Path, number: int, width: int = T5_WIDTH) -> None:
    """A T5 encoder of one layer and a tokenizer of letters."""
    config = T5Config(vocab_size=len(T5_WORDS), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
                      feed_forward_proj="gated-gelu", tie_word_embeddings=False)  # fmt: skip
    tiny.randomise(T5EncoderModel(config), 9).save_pretrained(folder / f"text_encoder_{number}")
    write_t5_tokenizer(folder / f"tokenizer_{number}")


def write_t5_tokenizer(folder: Path) -> None:
    scores = [(word, 0.0 if word[0] == "<" else float(len(word)) - 10) for word in T5_WORDS]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    tokenizer.post_processor = processors.TemplateProcessing(single=["$A", "</s>"], special_tokens=[("</s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "extra_ids": 0}
    config |= {"additional_special_tokens": [], "tokenizer_class": "T5Tokenizer", "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_flow_scheduler(folder: Path, **fields: object) -> None:
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, **fields}
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))


def write_sd3_folder(folder: Path, *, t5: bool = True, dual: tuple[int, ...] = ()) -> Path:
    """An SD3 folder; without T5 where `t5` is False; SD3.5's network where layers are `dual`."""
    sd3_transformer(dual=dual).save_pretrained(folder / "transformer")
    vae(1.5305, 0.0609).save_pretrained(folder / "vae")
    write_clip(folder, 1, CLIP_WIDTHS["l"], projection=True)
    write_clip(folder, 2, CLIP_WIDTHS["g"], projection=True)
    if t5:
        write_t5(folder, 3)
    write_flow_scheduler(folder, shift=3.0)
    return folder


def write_flux_folder(folder: Path, *, guidance: bool = True) -> Path:
    """A Flux folder: guidance-distilled (dev) or not (schnell)."""
    flux_transformer(guidance=guidance).save_pretrained(folder / "transformer")
    vae(0.3611, 0.1159).save_pretrained(folder / "vae")
    write_clip(folder, 1, CLIP_WIDTHS["l"], projection=False)
    write_t5(folder, 2)
    shift = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15} if guidance else {}
    write_flow_scheduler(folder, **shift)
    return folder
