"""Blended Latent Diffusion in one node: encode, blended loop, decode and composite."""

from __future__ import annotations

from torch import Tensor

from ...hosts.embeddings import negative_in, opened_for
from ...hosts.host import codec_of, open_denoiser, progress_bar, sampling_of, to_host
from ...hosts.latent import finished_out
from ...hosts.sockets import context_of
from ...pipelines.blended.composite import composite_source
from ...pipelines.blended.decoder_tuning import DecoderSettings, tune_decoder
from ...pipelines.blended.pipeline import EditSettings, latent_schedule, sample_blended
from ...pipelines.core.errors import ShapeError
from ...pipelines.core.guidance import EditPrompts
from ...pipelines.core.images import decode_image, encode_image
from ...pipelines.core.masks import parse_kernels
from ...pipelines.core.noise import image_seeds
from ...pipelines.core.protocols import LatentCodec
from ...pipelines.core.shapes import check_edit_mask, check_image, check_mask_of_image
from .._api import io, schema
from .._inputs import cfg_input, model_input, negative_input, seed_input, steps_input, strength_input


class BlendedEdit(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_BlendedEdit",
            display_name="Inpaint, Outpaint, Remove Object (BLD)",
            category="EditKit/sampling",
            description=(
                "A whole edit by Blended Latent Diffusion in one node: the prompt changes the image under the mask, and the image "
                "outside the mask stays exactly as it was."
            ),
            search_aliases=["blended latent diffusion", "inpaint", "generative fill", "replace object", "add object"],
            inputs=[
                model_input(),
                io.Conditioning.Input("positive", tooltip="What the whole image shows after the edit."),
                negative_input("The negative prompt, or the embeddings of an inversion. Unused at cfg 1."),
                io.Vae.Input("vae", tooltip="The VAE of the model."),
                io.Image.Input("image", tooltip="The image to edit, of any size, [1, H, W, 3], 0 to 1."),
                io.Mask.Input("mask", tooltip="Pixel mask, 1 = edit: the MASK of Load Image, painted on it."),
                seed_input("Seed of the noise. Every candidate has its own noise."),
                steps_input(),
                cfg_input(7.0),
                strength_input(
                    1.0,
                    0.01,
                    "Fraction of the steps that run, 0 to 1. 1 = a new object; lower values keep more of the image.",
                ),
                *_finer_inputs(),
            ],
            outputs=[
                io.Image.Output("edited", display_name="image", tooltip="The edited image, one per candidate."),
                io.Latent.Output("edited_latent", display_name="latent", tooltip="Clean latent of every candidate."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        positive,
        negative,
        vae,
        image,
        mask,
        seed,
        steps,
        cfg,
        strength,
        candidates=1,
        kernels="1",
        feather=4,
        tune_steps=0,
    ) -> io.NodeOutput:
        codec = codec_of(vae)
        image, mask = _one_image(image), check_edit_mask(mask, "mask")
        size = (image.shape[1], image.shape[2])
        check_mask_of_image(mask, size)
        source = encode_image(codec, image).expand(candidates, -1, -1, -1)
        masks = latent_schedule(mask, source, codec.factor, EditSettings(kernels=parse_kernels(kernels)))
        sigmas = sampling_of(model).schedule(steps, strength).cpu()
        prompt, negative_prompt = context_of(positive, "positive"), negative_in(negative)
        opened = opened_for(prompt, negative_prompt, cfg)
        with open_denoiser(model, tuple(source.shape), opened, sigmas=sigmas) as denoiser:
            latents = sample_blended(
                denoiser,
                source,
                sigmas,
                masks,
                EditPrompts(prompt, negative_prompt, cfg),
                seeds=image_seeds(seed, candidates),
                progress=progress_bar(len(sigmas) - 1, model),
            )
        decoded = _decoded(codec, latents, image, mask, tune_steps)
        whole, _ = composite_source(decoded, image, mask, feather_px=feather)
        sizes = {"editkit_size": size, "editkit_factor": codec.factor}
        return io.NodeOutput(to_host(whole), finished_out(latents, like=sizes))


def _finer_inputs() -> list:
    return [
        io.Int.Input(
            "candidates",
            default=1,
            min=1,
            max=64,
            optional=True,
            tooltip="How many results to make, 1 to 64. 'CLIP Rank' sorts them.",
        ),
        io.String.Input(
            "kernels",
            default="1",
            optional=True,
            tooltip="Dilation kernels of 'Progressive Dilation Mask Schedule', for example 7,5,3,1 for a thin mask. 1 = your mask "
            "at every step.",
        ),
        io.Int.Input(
            "feather",
            default=4,
            min=0,
            max=1024,
            optional=True,
            tooltip="Width of the soft edge inside the mask, in pixels. 0 = a hard edge.",
        ),
        io.Int.Input(
            "tune_steps",
            default=0,
            min=0,
            max=2000,
            optional=True,
            tooltip="Steps of the decoder fine-tune, 0 to 2000, which hides a visible border at the mask. 0 = none, 75 is usual.",
        ),
    ]


def _one_image(image: Tensor) -> Tensor:
    """IMAGE [1, H, W, 3]. Raises ShapeError for a batch."""
    image = check_image(image, "image")
    if len(image) != 1:
        raise ShapeError(f"image has {len(image)} images but this node edits one: choose one with ImageFromBatch")
    return image


def _decoded(codec: LatentCodec, latents: Tensor, image: Tensor, mask: Tensor, tune_steps: int) -> Tensor:
    """IMAGE [B, H, W, 3] of the latents, by the decoder or by a copy fine-tuned on the image outside the mask."""
    if not tune_steps:
        return decode_image(codec, latents, (image.shape[1], image.shape[2])).cpu()
    settings = DecoderSettings(steps=tune_steps)
    return tune_decoder(codec, latents, image, None, mask, settings=settings, progress=progress_bar(tune_steps)).image


NODES = [BlendedEdit]
