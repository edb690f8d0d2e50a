"""The stock ComfyUI nodes that EditKit's workflows use, for runs without ComfyUI, over the same protocols."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..hosts.bundled.example_images import load_image as read_image
from ..hosts.bundled.example_images import load_transparency
from ..hosts.files import path_inside, save_counted
from ..hosts.host import codec_of, open_denoiser, progress_bar, text_encoder_of, to_host
from ..hosts.latent import finished_out, latent_in, latent_out, samples_of
from ..hosts.sockets import HeadlessGuider, HeadlessModel, conditioning_of, context_of
from ..pipelines.attention.pair_sampling import PairRun, paired_predictor, shared_noise
from ..pipelines.blended.blending import Background, unscale_over_source
from ..pipelines.blended.prediction import blended_predictor
from ..pipelines.core.errors import LoadError, ParameterError, ShapeError
from ..pipelines.core.guidance import EditPrompts, constant_positive
from ..pipelines.core.samplers import Predict, predictor, sample
from ..pipelines.core.shapes import check_image, check_latent, check_mask, match_batch
from ..pipelines.core.sigmas import check_sigmas, executed_steps
from ..pipelines.evaluation.drawing import save_image as write_image
from .run import Run

STOCK_NODES: dict[str, Any] = {}
EMPTY_CHANNELS = 4  # the stock node takes these for every model
EMPTY_FACTOR = 8
COLOURS = ("red", "green", "blue")


def stock_node(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as a stock node; its first parameter is the run."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        function.stock_node = True  # type: ignore[attr-defined]
        STOCK_NODES[name] = function
        return function

    return register


def _input_file(run: Run, name: str) -> Path:
    """A file of the input folder; a name may not leave it."""
    folder = run.input_folder.resolve()
    try:
        path = (folder / name.removesuffix(" [input]")).resolve()
        found = path.is_relative_to(folder) and path.is_file()
    except (OSError, ValueError, RuntimeError):  # a name that no file can have
        found = False
    if not found:
        raise LoadError(f"image {name!r} is not in {run.input_folder}: give its folder with --input")
    return path


@stock_node("LoadImage")
def load_image(run: Run, image: str) -> tuple[Any, ...]:
    path = _input_file(run, image)
    return read_image(path), load_transparency(path)


@stock_node("LoadImageMask")
def load_image_mask(run: Run, image: str, channel: str) -> tuple[Any, ...]:
    path = _input_file(run, image)
    if channel == "alpha":
        return (load_transparency(path),)
    if channel not in COLOURS:
        raise ParameterError(f"channel is {channel!r}: choose alpha, {', '.join(COLOURS)}")
    return (read_image(path)[..., COLOURS.index(channel)],)


@stock_node("SaveImage")
def save_image(run: Run, images: Any, filename_prefix: str = "editkit") -> tuple[Any, ...]:
    """Saved under the next free number, as in ComfyUI; a prefix without a name has a number only.

    Such prefixes are "", ".", "folder/" and "../output", which is the output folder itself.
    """
    path = path_inside(run.output_folder, filename_prefix)
    named = filename_prefix.rpartition("/")[2] not in ("", ".", "..") and path != run.output_folder.resolve()
    folder, name = (path.parent, path.name) if named else (path, "")
    for image in check_image(images, "images"):
        run.saved.append(save_counted(folder, name, ".png", partial(write_image, image)))
    return ()


@stock_node("PreviewImage")
def preview_image(run: Run, images: Any) -> tuple[Any, ...]:
    check_image(images, "images")
    return ()


@stock_node("PreviewAny")
def preview_any(run: Run, source: Any) -> tuple[Any, ...]:
    run.texts.setdefault("PreviewAny", []).append(str(source))
    return ()


@stock_node("MaskPreview")
def preview_mask(run: Run, mask: Any) -> tuple[Any, ...]:
    return ()


@stock_node("MaskToImage")
def mask_to_image(run: Run, mask: Any) -> tuple[Any, ...]:
    return (check_mask(mask, "mask")[..., None].expand(-1, -1, -1, 3),)


@stock_node("InvertMask")
def invert_mask(run: Run, mask: Any) -> tuple[Any, ...]:
    return (1 - check_mask(mask, "mask"),)


@stock_node("CLIPTextEncode")
def clip_text_encode(run: Run, clip: Any, text: str) -> tuple[Any, ...]:
    return (conditioning_of(text_encoder_of(clip).encode(text)),)


@stock_node("ConditioningZeroOut")
def conditioning_zero_out(run: Run, conditioning: Any) -> tuple[Any, ...]:
    """The negative of models that were trained with zeros for no prompt (SDXL)."""
    context_of(conditioning, "conditioning")
    return ([[tokens * 0, {**extras, **_zeroed(extras)}] for tokens, extras in conditioning],)


def _zeroed(extras: dict[str, Any]) -> dict[str, Any]:
    pooled = extras.get("pooled_output")
    return {} if pooled is None else {"pooled_output": pooled * 0}


@stock_node("VAEEncode")
def vae_encode(run: Run, pixels: Any, vae: Any) -> tuple[Any, ...]:
    codec, image = codec_of(vae), check_image(pixels, "pixels")
    if min(image.shape[1:3]) < codec.factor:
        raise ShapeError(f"pixels are {image.shape[2]} x {image.shape[1]}: give at least {codec.factor} on each side")
    height, width = (side // codec.factor * codec.factor for side in image.shape[1:3])
    top, left = (image.shape[1] - height) // 2, (image.shape[2] - width) // 2
    return ({"samples": codec.encode(image[:, top : top + height, left : left + width])},)


@stock_node("VAEDecode")
def vae_decode(run: Run, samples: dict, vae: Any) -> tuple[Any, ...]:
    codec = codec_of(vae)
    image = codec.decode(check_latent(samples_of(samples), "samples", codec.channels))
    return (check_image(to_host(image), "the decoded image"),)


@stock_node("RepeatLatentBatch")
def repeat_latent_batch(run: Run, samples: dict, amount: int) -> tuple[Any, ...]:
    values = check_latent(samples_of(samples), "samples")
    return ({**samples, "samples": values.repeat(amount, 1, 1, 1)},)


@stock_node("KSampler")
def ksampler(
    run: Run,
    model: Any,
    seed: int,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
    positive: Any,
    negative: Any,
    latent_image: dict,
    denoise: float = 1.0,
) -> tuple[Any, ...]:
    """KSampler on the ddim_uniform grid: the last `steps` of a grid of steps / denoise, as ComfyUI counts them."""
    if scheduler != "ddim_uniform":
        raise ParameterError(f"scheduler {scheduler!r} runs only in ComfyUI: headless has ddim_uniform")
    if not 0 < denoise <= 1:
        raise ParameterError(f"denoise is {denoise}: give a number above 0 and up to 1")
    samples = check_latent(samples_of(latent_image), "latent_image")
    prompts = EditPrompts(context_of(positive, "positive"), context_of(negative, "negative"), cfg)
    with open_denoiser(_unpatched(model), samples.shape, []) as denoiser:
        total = int(steps / denoise)
        sigmas = denoiser.schedule(total)[-(min(steps, executed_steps(total, 1.0)) + 1) :]
        z = _sample(model, denoiser, denoiser.scale_in(samples), sigmas, prompts, sampler_name, seed, samples)
        return (finished_out(z, like=latent_image),)


@stock_node("KSamplerSelect")
def ksampler_select(run: Run, sampler_name: str) -> tuple[Any, ...]:
    return (sampler_name,)


@stock_node("SamplerCustom")
def sampler_custom(
    run: Run,
    model: Any,
    add_noise: bool,
    noise_seed: int,
    cfg: float,
    positive: Any,
    negative: Any,
    sampler: str,
    sigmas: Any,
    latent_image: dict,
) -> tuple[Any, ...]:
    prompts = EditPrompts(context_of(positive, "positive"), context_of(negative, "negative"), cfg)
    return _custom(model, prompts, noise_seed if add_noise else None, sampler, sigmas, latent_image)


@stock_node("CFGGuider")
def cfg_guider(run: Run, model: Any, positive: Any, negative: Any, cfg: float) -> tuple[Any, ...]:
    prompts = EditPrompts(context_of(positive, "positive"), context_of(negative, "negative"), cfg)
    return (HeadlessGuider(model, prompts),)


@stock_node("FluxGuidance")
def flux_guidance(run: Run, conditioning: Any, guidance: float) -> tuple[Any, ...]:
    context_of(conditioning, "conditioning")
    return ([[text, {**extras, "guidance": guidance}] for text, extras in conditioning],)


@stock_node("EmptyLatentImage")
def empty_latent_image(run: Run, width: int, height: int, batch_size: int = 1) -> tuple[Any, ...]:
    return ({"samples": torch.zeros(batch_size, EMPTY_CHANNELS, height // EMPTY_FACTOR, width // EMPTY_FACTOR)},)


@stock_node("ImageFromBatch")
def image_from_batch(run: Run, image: Any, batch_index: int, length: int) -> tuple[Any, ...]:
    image = check_image(image, "image")
    first = min(batch_index, len(image) - 1)
    return (image[first : first + length].clone(),)


@stock_node("RandomNoise")
def random_noise(run: Run, noise_seed: int) -> tuple[Any, ...]:
    return (noise_seed,)


@stock_node("DisableNoise")
def disable_noise(run: Run) -> tuple[Any, ...]:
    return (None,)


@stock_node("SamplerCustomAdvanced")
def sampler_custom_advanced(
    run: Run, noise: int | None, guider: Any, sampler: str, sigmas: Any, latent_image: dict
) -> tuple[Any, ...]:
    if not isinstance(guider, HeadlessGuider):
        raise ParameterError(f"guider is a {type(guider).__name__}: headless has CFGGuider and EditKit's guiders")
    return _custom(guider.model, guider.prompts, noise, sampler, sigmas, latent_image)


def _custom(
    model: Any, prompts: EditPrompts, seed: int | None, sampler: str, sigmas: Any, latent_image: dict
) -> tuple[Any, ...]:
    """Sample one LATENT.

    Args:
        model: MODEL.
        prompts: positive, negative and guidance scale.
        seed: of the noise to add; None adds none and continues a LATENT whose sigma is the first of `sigmas`.
        sampler: name of the sampler.
        sigmas: grid [N + 1].
        latent_image: LATENT.
    """
    samples = check_latent(samples_of(latent_image), "latent_image")
    grid = check_sigmas(sigmas)
    with open_denoiser(_unpatched(model), samples.shape, []) as denoiser:
        prompts.check(denoiser, grid)
        if seed is not None:
            source = denoiser.scale_in(samples)
            out = _sample(model, denoiser, source, grid, prompts, sampler, seed, samples)
            done = finished_out(out, like=latent_image)
        else:
            _refuse_blend(model)
            z = latent_in(latent_image, denoiser, float(grid[0]))
            predict, pairs = _predictor(model, denoiser, prompts, z, grid)
            z = sample(sampler, predict, z.clone(), grid, progress_bar(len(grid) - 1, model))
            if pairs is not None and grid[-1] == 0:
                done = finished_out(pairs.finished(denoiser.scale_out(z)), like=latent_image)
            else:
                done = latent_out(z, denoiser, float(grid[-1]), like=latent_image)
        return done, done


def _unpatched(model: Any) -> Any:
    """The MODEL without its blending and its attention edit, which `_predictor` and `_sample` wrap around it."""
    return replace(model, blend=None, pairs=None) if isinstance(model, HeadlessModel) else model


def _predictor(
    model: Any, denoiser: Any, prompts: EditPrompts, latent: Any, sigmas: Any
) -> tuple[Predict, PairRun | None]:
    """The function that a sampler calls, with the attention edit of the MODEL if it has one."""
    plan = model.pairs
    if plan is None:
        return predictor(denoiser, prompts), None
    run = plan.check(denoiser, sigmas, latent, [constant_positive(prompts.positive, "an attention edit").tokens])
    return paired_predictor(denoiser, prompts, run), run


def _each_noise(model: Any, noise: Any) -> Any:
    """The noise of the batch; the two latents of a pair may share theirs."""
    plan = model.pairs
    return shared_noise(noise) if plan is not None and plan.share_noise else noise


def _refuse_blend(model: Any) -> None:
    if model.blend is not None:
        raise ParameterError(
            "a blended MODEL continues a noised LATENT only in ComfyUI: let the sampler add the noise here"
        )


def _sample(
    model: Any,
    denoiser: Any,
    source: Any,
    sigmas: Any,
    prompts: EditPrompts,
    sampler_name: str,
    seed: int,
    samples: Any,
) -> Any:
    """Sample, blended where the MODEL says so; the unscaled result."""
    seeds = [seed] * len(source)  # ComfyUI draws one noise for the whole batch from one seed, as PyTorch takes it
    noise = torch.randn(source.shape, generator=torch.Generator("cpu").manual_seed(seed)).to(source.device)
    predict, pairs = _predictor(model, denoiser, prompts, source, sigmas)
    wish = model.blend
    noise = _each_noise(model, noise)
    progress = progress_bar(len(sigmas) - 1, model)
    if wish is None:
        z = sample(sampler_name, predict, denoiser.noise(source, noise, float(sigmas[0])), sigmas, progress)
        return denoiser.scale_out(z) if pairs is None else pairs.finished(denoiser.scale_out(z))
    clean = (
        source
        if wish.source is None
        else match_batch(denoiser.scale_in(wish.source), len(source), "source_latent", "latent_image")
    )
    background = Background(denoiser, clean, seeds, noise=noise)
    schedule = wish.schedule.expanded(len(source), *source.shape[-2:]).to(source.device)
    grid = sigmas if wish.sigmas is None else wish.sigmas
    predict = blended_predictor(predict, background, schedule, grid)
    z = sample(sampler_name, predict, background.at(float(sigmas[0])), sigmas, progress)
    unscaled = samples if wish.source is None else wish.source
    return unscale_over_source(denoiser, z, unscaled, wish.schedule, grid)
