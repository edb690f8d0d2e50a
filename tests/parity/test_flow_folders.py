"""SD3 and Flux folders against diffusers' own pipelines: the same network calls and the same Euler steps."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, StableDiffusion3Pipeline
from torch import Tensor

from editkit.hosts.diffusers.flux_denoiser import DEFAULT_GUIDANCE, pack, places, unpack
from editkit.hosts.diffusers.loading import LoadedModel, load_folder
from editkit.hosts.diffusers.schedules import flow_table
from editkit.hosts.sockets import conditioning_of, context_of
from editkit.pipelines.blended.pipeline import EditSettings, blended_edit
from editkit.pipelines.core.errors import EditError, FamilyError, LoadError, ParameterError
from editkit.pipelines.core.guidance import EditPrompts
from editkit.pipelines.core.samplers import predictor, sample
from editkit.tests.flow_folders import write_flow_scheduler, write_flux_folder, write_sd3_folder
from editkit.tests.toys import random_latent


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("flow")
    return {
        "sd3": write_sd3_folder(root / "sd3"),
        "sd3.5": write_sd3_folder(root / "sd35", dual=(0, 1)),
        "no t5": write_sd3_folder(root / "short", t5=False),
        "flux dev": write_flux_folder(root / "dev"),
        "flux schnell": write_flux_folder(root / "schnell", guidance=False),
    }


@pytest.fixture(scope="module")
def models(folders) -> dict[str, LoadedModel]:
    return {name: load_folder(folder) for name, folder in folders.items()}


NAMES = ("sd3", "sd3.5", "no t5", "flux dev", "flux schnell")
every = pytest.mark.parametrize("name", NAMES)


def diffusers_latents(model: LoadedModel, folder: Path, context: Any, z: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """What the pipeline of diffusers makes of the latents z, and its sigmas."""
    flux = hasattr(model.denoiser.transformer, "single_transformer_blocks")
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(str(folder / "scheduler"))
    parts = {"transformer": model.denoiser.transformer, "scheduler": scheduler, "vae": model.codec.vae}
    texts = {"text_encoder": None, "tokenizer": None, "text_encoder_2": None, "tokenizer_2": None}
    more = {"height": z.shape[-2] * 8, "width": z.shape[-1] * 8, "num_inference_steps": steps, "output_type": "latent"}
    prompt = {"prompt_embeds": context.tokens, "pooled_prompt_embeds": context.pooled}
    if flux:
        pipe = FluxPipeline(**parts, **texts)
        pipe.set_progress_bar_config(disable=True)
        found = pipe(**prompt, **more, latents=pack(z), guidance_scale=context.guidance or DEFAULT_GUIDANCE).images
        return unpack(found, z.shape[-2] // 2, z.shape[-1] // 2), scheduler.sigmas
    pipe = StableDiffusion3Pipeline(**parts, **texts, text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe(**prompt, **more, latents=z.clone(), guidance_scale=1.0).images, scheduler.sigmas


@every
def test_two_steps_are_those_of_the_pipeline(name, models, folders) -> None:
    model, z = models[name], random_latent(1, 16, 8, 12)
    context = model.text.encode("a cat sat")
    context = replace(context, guidance=2.0) if name == "flux dev" else context
    expected, sigmas = diffusers_latents(model, folders[name], context, z, 2)
    made = sample("euler", predictor(model.denoiser, EditPrompts(context, None, 1.0)), z, sigmas)
    assert (made - expected).abs().max() <= 1e-5
    assert (made - z).abs().max() > 0.1


@every
def test_a_batch_is_its_images_one_by_one(name, models) -> None:
    model, z = models[name], random_latent(2, 16, 7, 9)  # sides that the patches do not divide
    contexts = [model.text.encode("a cat sat"), model.text.encode("")]
    both = model.denoiser.denoise(z, torch.tensor([0.3, 0.8]), contexts)
    for row, sigma in enumerate((0.3, 0.8)):
        for number, context in enumerate(contexts):
            one = model.denoiser.denoise(z[row : row + 1], sigma, [context])
            assert (one[0, 0] - both[number, row]).abs().max() <= 1e-5
    assert (both[0] - both[1]).abs().max() > 1e-4


@every
def test_the_vae_shifts_and_scales(name, models) -> None:
    model = models[name]
    config = model.codec.vae.config
    latent = random_latent(1, 16, 4, 4)
    z = model.denoiser.scale_in(latent)
    assert torch.allclose(z, (latent - config["shift_factor"]) * config["scaling_factor"])
    assert torch.allclose(model.denoiser.scale_out(z), latent, atol=1e-6)
    with pytest.raises(EditError, match="16, height"):
        model.denoiser.scale_in(latent[:, :4])


# ------------------------------------------------------------------------------------------------------------- packing
def test_patches_are_those_of_flux_and_come_back() -> None:
    z = random_latent(2, 16, 6, 10)
    theirs = FluxPipeline._pack_latents(z, 2, 16, 6, 10)
    assert torch.equal(pack(z), theirs)
    assert torch.equal(unpack(theirs, 3, 5), z)
    assert torch.equal(places(3, 5), FluxPipeline._prepare_latent_image_ids(2, 3, 5, "cpu", torch.float32))


# ------------------------------------------------------------------------------------------------------------ guidance
def test_a_guidance_value_reaches_the_distilled_model_alone(models) -> None:
    z, model, plain = random_latent(2, 16, 8, 8), models["flux dev"], models["flux schnell"]
    context = model.text.encode("a cat")
    values = [None, DEFAULT_GUIDANCE, 1.0]
    default, same, low = model.denoiser.denoise(z, 0.5, [replace(context, guidance=value) for value in values])
    assert torch.allclose(default, same, atol=1e-6) and (default - low).abs().max() > 1e-3
    default, low = plain.denoiser.denoise(z, 0.5, [context, replace(context, guidance=1.0)])
    assert torch.allclose(default, low, atol=1e-6)


def test_a_conditioning_carries_guidance_as_comfyui_writes_it(models) -> None:
    context = models["flux dev"].text.encode("a cat")
    carried = context_of(conditioning_of(replace(context, guidance=2.5)), "positive")
    assert carried.guidance == 2.5
    learned = replace(carried.with_tokens(carried.tokens + 1), guidance=4.0)
    assert conditioning_of(learned)[0][1]["guidance"] == 4.0
    assert conditioning_of(replace(carried, guidance=4.0))[0][1]["guidance"] == 4.0
    assert conditioning_of(carried) is carried.host
    with pytest.raises(ParameterError, match="positive has guidance 'high'"):
        context_of([[context.tokens, {"guidance": "high"}]], "positive")


def test_the_stock_node_writes_the_guidance(models) -> None:
    from editkit.headless.stock_nodes import STOCK_NODES

    context = models["flux dev"].text.encode("a cat")
    (made,) = STOCK_NODES["FluxGuidance"](None, conditioning=conditioning_of(context), guidance=2.0)
    assert context_of(made, "positive").guidance == 2.0


def test_an_edit_runs_without_a_negative(models) -> None:
    """At guidance scale 1 each step calls the network for the prompt alone."""
    model, image, mask = models["flux dev"], torch.rand(1, 32, 48, 3), torch.zeros(1, 32, 48)
    mask[:, :, 24:] = 1
    calls = []
    handle = model.denoiser.network.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    settings = EditSettings(steps=4, strength=1.0, guidance_scale=1.0, candidates=1, tune_steps=2)
    try:
        result = blended_edit(
            model.denoiser, model.codec, model.text, image, mask, "a cat", ranker=None, settings=settings
        )
    finally:
        handle.remove()
    assert calls == [1] * 4
    assert torch.isfinite(result.image).all() and result.image.shape == image.shape
    assert len(result.losses) == 2 and (result.tuned - result.candidates).abs().max() > 1e-5


# ---------------------------------------------------------------------------------------------------------------- text
def test_tokens_are_laid_out_as_in_comfyui(models) -> None:
    for name, clip, t5 in (("sd3", 77, 77), ("no t5", 77, 0), ("flux dev", 0, 256)):
        text, prompt = models[name].text, "a cat, sat"
        tokens, context = text.tokens(prompt), text.encode(prompt)
        assert len(tokens) == clip + t5 == context.tokens.shape[1]
        assert context.pooled.shape == (1, 40 if clip else 16)
        words = {prompt[token.start : token.end] for token in tokens[clip:] if token.start >= 0}
        assert not t5 or {"a", "cat", ","} <= words
    assert len(models["sd3"].text.tokens("ab " * 60)) == 2 * 77 + 2 * 60 + 1


def test_clip_is_filled_up_with_zeros(models) -> None:
    tokens = models["sd3"].text.encode("a cat").tokens
    assert torch.equal(tokens[:, :77], models["no t5"].text.encode("a cat").tokens)
    assert (tokens[:, :77, 40:] == 0).all() and tokens[:, 77:].abs().min() > 0


# -------------------------------------------------------------------------------------------------------------- refusals
def change(folder: Path, part: str, **fields: object) -> None:
    path = folder / part
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("change_it", "error", "match"),
    [
        (lambda f: change(f, "transformer/config.json", _class_name="Lumina2Transformer2DModel"), FamilyError, "Lumina2"),
        (lambda f: change(f, "transformer/config.json", in_channels=32, out_channels=16), EditError, "transformer"),
        (lambda f: change(f, "text_encoder_3/config.json", d_model=32), EditError, "text_encoder_3|width 32"),
        (lambda f: (f / "tokenizer_3/tokenizer.json").unlink(), LoadError, "tokenizer_3 has no tokenizer.json"),
        (lambda f: (f / "text_encoder_2/model.safetensors").rename(f / "text_encoder_2/pytorch_model.bin"), LoadError,
         "pytorch_model.bin, a pickle"),
        (lambda f: (f / "scheduler/scheduler_config.json").unlink(), LoadError, "scheduler_config.json"),
        (lambda f: write_flow_scheduler(f, shift_terminal=0.02), FamilyError, "shift_terminal"),
        (lambda f: write_flow_scheduler(f, invert_sigmas=True), FamilyError, "invert_sigmas"),
        (lambda f: write_flow_scheduler(f, shift="much"), LoadError, "scheduler"),
        (lambda f: write_flow_scheduler(f, _class_name="DDIMScheduler"), FamilyError, "DDIMScheduler"),
    ],
)  # fmt: skip
def test_what_cannot_be_loaded_is_refused_by_name(change_it, error, match, folders, tmp_path) -> None:
    folder = Path(shutil.copytree(folders["sd3"], tmp_path / "model"))
    change_it(folder)
    with pytest.raises(error, match=match):
        load_folder(folder)


def test_a_prompt_without_its_pooled_vector_is_refused(models) -> None:
    for name in ("sd3", "flux dev"):
        context = replace(models[name].text.encode("a cat"), pooled=None)
        with pytest.raises(FamilyError, match="pooled"):
            models[name].denoiser.denoise(random_latent(1, 16, 4, 4), 0.5, [context])


# ------------------------------------------------------------------------------------------------------------- schedules
def test_a_shift_by_image_size_is_taken_at_the_largest() -> None:
    table = flow_table({"use_dynamic_shifting": True, "shift": 3.0, "max_shift": 1.15})
    times = torch.arange(1, 10001, dtype=torch.float64) / 10000
    expected = torch.e**1.15 / (torch.e**1.15 + (1 / times - 1))
    assert (table - expected).abs().max() <= 1e-6
    assert len(flow_table({"shift": 3.0})) == 1000
