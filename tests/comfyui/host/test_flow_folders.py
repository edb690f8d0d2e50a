"""SD3 and Flux of one set of weights through both hosts: the same predictions, grids, latents and text embeddings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.model_detection
import comfy.model_management as management
import comfy.model_patcher
import comfy.supported_models as supported
import comfy.text_encoders.flux
import comfy.text_encoders.sd3_clip
import pytest
import torch
from comfy.ldm.flux.model import FluxParams
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from editkit.hosts.comfyui.bundled.flow import native_weights, network_config
from editkit.hosts.diffusers.flow_denoiser import FlowDenoiser
from editkit.hosts.diffusers.flux_denoiser import FluxDenoiser
from editkit.hosts.diffusers.schedules import flow_table
from editkit.hosts.diffusers.text_encoder import (
    FLUX_T5_LENGTH,
    SD3_T5_LENGTH,
    ClipBpe,
    ClipTower,
    FluxTextEncoder,
    Sd3TextEncoder,
    T5Pieces,
    T5Tower,
)
from editkit.hosts.host import open_denoiser
from editkit.hosts.sockets import context_of
from editkit.pipelines.core.samplers import euler
from editkit.tests.comfyui.host.families import known
from editkit.tests.flow_folders import CLIP_WIDTHS, T5_WIDTH, flux_transformer, sd3_transformer
from editkit.tests.parity import tiny

SD3_SCALE = {"scaling_factor": 1.5305, "shift_factor": 0.0609}
FLUX_SCALE = {"scaling_factor": 0.3611, "shift_factor": 0.1159}
DYNAMIC = {"use_dynamic_shifting": True, "shift": 3.0, "max_shift": 1.15}
T5_FULL_WIDTH = 4096  # ComfyUI fills CLIP up to this width
T5_VOCABULARY = 8000  # the ids of frequent words


def native(config: Any, weights: dict[str, Tensor]) -> Any:
    """A MODEL of ComfyUI's config with these weights."""
    config.set_inference_dtype(torch.float32, None)
    offload = management.unet_offload_device()
    model = config.get_model({}, device=offload)
    result = model.diffusion_model.load_state_dict(weights, strict=False)
    assert not result.unexpected_keys and set(result.missing_keys) <= {"pos_embed"}, result
    model.eval().requires_grad_(False)
    return comfy.model_patcher.ModelPatcher(model, management.get_torch_device(), offload)


def sd3(dual: tuple[int, ...]) -> tuple[Any, FlowDenoiser]:
    transformer = sd3_transformer(dual=dual)
    config = network_config(transformer.config)
    weights = native_weights(transformer.state_dict(), config)
    if dual:
        config["x_block_self_attn_layers"] = list(dual)
    return native(supported.SD3(config), weights), FlowDenoiser(transformer, flow_table({"shift": 3.0}), **SD3_SCALE)


def flux(*, guidance: bool) -> tuple[Any, FluxDenoiser]:
    transformer = flux_transformer(guidance=guidance)
    config = {
        "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": CLIP_WIDTHS["l"],
        "context_in_dim": T5_WIDTH, "hidden_size": 48, "mlp_ratio": 4.0, "num_heads": 2, "depth": 2,
        "depth_single_blocks": 2, "axes_dim": [4, 10, 10], "theta": 10000, "patch_size": 2, "qkv_bias": True,
        "guidance_embed": guidance,
    }  # fmt: skip
    copies = {
        name: value.clone() for name, value in transformer.state_dict().items()
    }  # the conversion writes into them
    weights = comfy.model_detection.convert_diffusers_mmdit(copies)
    kind = supported.Flux if guidance else supported.FluxSchnell
    return native(kind(config | known(FluxParams, {"txt_ids_dims": []})), weights), FluxDenoiser(
        transformer, flow_table(DYNAMIC if guidance else {}), **FLUX_SCALE
    )


MODELS = {
    "sd3": lambda: sd3(()),
    "sd3.5": lambda: sd3((0, 1)),
    "flux dev": lambda: flux(guidance=True),
    "flux schnell": lambda: flux(guidance=False),
}


@pytest.fixture(scope="module", params=MODELS)
def both(request) -> tuple[str, Any, Any]:
    with torch.inference_mode(False):
        return request.param, *MODELS[request.param]()


def conditioning(name: str, seed: int, **extras: object) -> list:
    generator = torch.Generator().manual_seed(seed)
    pooled = 40 if name.startswith("sd3") else CLIP_WIDTHS["l"]
    tokens = torch.randn(1, 20, T5_WIDTH, generator=generator)
    return [[tokens, {"pooled_output": torch.randn(1, pooled, generator=generator), **extras}]]


@pytest.mark.parametrize("size", [(8, 12), (7, 9)])
def test_predictions(both, size) -> None:
    name, model, headless = both
    z = torch.randn(2, 16, *size, generator=torch.Generator().manual_seed(1))
    first = context_of(conditioning(name, 2, guidance=2.0), "positive")
    second = context_of(conditioning(name, 3), "negative")
    with open_denoiser(model, z.shape, [first, second]) as denoiser:
        for sigma in (0.05, 0.5, 1.0):
            ours = denoiser.denoise(z, sigma, [first, second])
            theirs = headless.denoise(z, sigma, [first, second])
            assert (ours - theirs).abs().max() <= 1e-4, sigma
            assert (theirs[0] - theirs[1]).abs().max() > 1e-3


def test_latents_of_a_run(both) -> None:
    name, model, headless = both
    z = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    context = context_of(conditioning(name, 2), "positive")
    made = []
    with open_denoiser(model, z.shape, [context]) as denoiser:
        for one in (denoiser, headless):
            grid = one.schedule(7, 0.7)
            made.append(euler(lambda x, sigma, one=one: one.denoise(x, float(sigma), [context])[0], z, grid))
        assert (denoiser.schedule(7) - headless.schedule(7)).abs().max() <= 1e-6
    assert (made[0] - made[1]).abs().max() <= 1e-4


def test_the_scale_of_latents(both) -> None:
    name, model, headless = both
    latent = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(4))
    with open_denoiser(model, latent.shape, [context_of(conditioning(name, 2), "positive")]) as denoiser:
        assert torch.allclose(denoiser.scale_in(latent), headless.scale_in(latent), atol=1e-6)
        assert torch.allclose(denoiser.scale_out(latent), headless.scale_out(latent), atol=1e-6)
        assert denoiser.channels == headless.channels


# ---------------------------------------------------------------------------------------------------------------- text
def tower(width: int) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    ids = {"vocab_size": 49408, "eos_token_id": 49407, "bos_token_id": 49406}
    return {**sizes, **ids, "max_position_embeddings": 77, "hidden_act": "quick_gelu", "projection_dim": width}


def t5_layout() -> dict[str, Any]:
    sizes = {"d_model": T5_FULL_WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return {**sizes, "vocab_size": T5_VOCABULARY}


def fill(module: Any, model: torch.nn.Module) -> None:
    """transformers' weights into ComfyUI's text model."""
    state = model.state_dict()
    if isinstance(model, (CLIPTextModel, CLIPTextModelWithProjection)):
        state = {
            name if name.startswith("text_projection") else f"text_model.{name.removeprefix('text_model.')}": value
            for name, value in state.items()
        }
        state.setdefault("text_projection.weight", torch.eye(model.config.hidden_size))
    result = module.load_state_dict(state, strict=False)
    assert not result.missing_keys and all("embed_tokens" in name for name in result.unexpected_keys), result


@pytest.fixture(scope="module")
def texts() -> dict[str, torch.nn.Module]:
    with torch.inference_mode(False):
        activation = {"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu_pytorch_tanh"}
        return {
            "l": tiny.randomise(CLIPTextModel(CLIPTextConfig(**tower(16))), 1),
            "g": tiny.randomise(CLIPTextModelWithProjection(CLIPTextConfig(**{**tower(24), "hidden_act": "gelu"})), 2),
            "t5": tiny.randomise(T5EncoderModel(T5Config(**t5_layout(), **activation, tie_word_embeddings=False)), 3),
        }


@pytest.fixture(scope="module")
def options() -> dict[str, Any]:
    """ComfyUI's text encoders at reduced width."""
    wide = {"clip_l_model_config": tower(16), "clip_g_model_config": {**tower(24), "hidden_act": "gelu"}}
    return {**wide, "t5xxl_model_config": t5_layout()}


def t5_pieces() -> T5Pieces:
    folder = Path(comfy.text_encoders.sd3_clip.__file__).parent / "t5_tokenizer"
    return T5Pieces(T5TokenizerFast.from_pretrained(str(folder), local_files_only=True))


PROMPTS = ("", "a red cat, on the table", "A house  by the water. " * 30)


def same(encoder: Any, tokenizer: Any, ours: Any) -> None:
    for prompt in PROMPTS:
        with torch.inference_mode(False), torch.no_grad():
            windows = tokenizer.tokenize_with_weights(prompt)
            assert max(entry[0] for window in windows["t5xxl"] for entry in window) < T5_VOCABULARY
            tokens, pooled = encoder.encode_token_weights(windows)[:2]
            found = ours.encode(prompt)
        assert tokens.shape == found.tokens.shape and (tokens - found.tokens).abs().max() <= 1e-4, prompt
        assert (pooled - found.pooled).abs().max() <= 1e-4
        assert len(ours.tokens(prompt)) == tokens.shape[1]


@pytest.mark.parametrize("t5", [True, False])
def test_text_of_sd3(texts, options, t5) -> None:
    encoder = comfy.text_encoders.sd3_clip.SD3ClipModel(t5=t5, dtype=torch.float32, dtype_t5=torch.float32,
                                                        model_options=options)  # fmt: skip
    fill(encoder.clip_l.transformer, texts["l"])
    fill(encoder.clip_g.transformer, texts["g"])
    tower_t5 = None
    if t5:
        fill(encoder.t5xxl.transformer, texts["t5"])
        tower_t5 = T5Tower(t5_pieces(), texts["t5"], SD3_T5_LENGTH)
    clip_l = ClipTower(ClipBpe(), texts["l"], -2, pools=True)
    clip_g = ClipTower(ClipBpe(pad=0), texts["g"], -2)
    ours = Sd3TextEncoder(clip_l, clip_g, tower_t5, T5_FULL_WIDTH)
    same(encoder, comfy.text_encoders.sd3_clip.SD3Tokenizer(), ours)


def test_text_of_flux(texts, options) -> None:
    encoder = comfy.text_encoders.flux.FluxClipModel(dtype=torch.float32, dtype_t5=torch.float32, model_options=options)
    fill(encoder.clip_l.transformer, texts["l"])
    fill(encoder.t5xxl.transformer, texts["t5"])
    ours = FluxTextEncoder(
        ClipTower(ClipBpe(), texts["l"], pools=True), T5Tower(t5_pieces(), texts["t5"], FLUX_T5_LENGTH)
    )
    same(encoder, comfy.text_encoders.flux.FluxTokenizer(), ours)


def test_guidance_of_a_conditioning_reaches_both_hosts() -> None:
    with torch.inference_mode(False):
        model, headless = flux(guidance=True)
    z = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    context = context_of(conditioning("flux dev", 2), "positive")
    strong = replace(context, guidance=8.0)
    with open_denoiser(model, z.shape, [context, strong]) as denoiser:
        ours = denoiser.denoise(z, 0.5, [context, strong])
    theirs = headless.denoise(z, 0.5, [context, strong])
    assert (ours - theirs).abs().max() <= 1e-4
    assert (ours[0] - ours[1]).abs().max() > 1e-3
