"""Cross-attention maps of a prompt's words, as images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...hosts.host import open_denoiser, progress_bar, to_host
from ...hosts.latent import unnoised_samples
from ...hosts.trajectory import trajectory_in
from ...pipelines.attention.cross_attention_maps import LayerChoice, attention_maps
from ...pipelines.attention.map_drawing import (
    chosen_words,
    heat_over,
    map_images,
    normalised,
    picked_maps,
    spread_steps,
)
from ...pipelines.core.attention_sites import Place
from ...pipelines.core.errors import ParameterError
from ...pipelines.core.noise import image_seeds, noised_latents
from ...pipelines.core.shapes import check_image
from ...pipelines.core.sigmas import check_sigmas
from .._api import for_page, io, preview, schema, thumbnails
from .._inputs import attention_model_input, edit_input, fraction_input, seed_input, sigmas_input, trajectory_input
from .pairs import edit_in

PLACES: dict[str, tuple[Place, ...]] = {
    "all": ("down", "mid", "up"),
    "down": ("down",),
    "middle": ("mid",),
    "up": ("up",),
}
AUTOMATIC = 0


class AttentionMaps(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_AttentionMaps",
            display_name="Cross-Attention Heat Maps",
            category="EditKit/attention",
            description=(
                "One labelled heat map per word of a prompt: the cross-attention of the model, averaged over layers and "
                "sigmas. Shows where an edit will act, and helps to find blend words."
            ),
            search_aliases=["cross-attention", "heat map", "DAAM", "token map"],
            inputs=[
                attention_model_input(patched=False),
                edit_input(),
                io.Combo.Input(
                    "prompt",
                    options=["target", "source"],
                    default="source",
                    tooltip="Show the words of the source or of the target prompt.",
                ),
                io.String.Input(
                    "words",
                    default="",
                    tooltip="Words to show, comma-separated (cat#2 = the second cat, 'red circle' = a phrase). Empty = all.",
                ),
                io.Int.Input(
                    "levels",
                    display_name="number of sigmas",
                    default=10,
                    min=1,
                    max=1000,
                    tooltip="Number of sigmas to average, 1 to 1000. Each costs one model call.",
                ),
                fraction_input(
                    "start", 0.0, "First step to average, as a fraction of the steps, 0 (noisiest) to 1 (last)."
                ),
                fraction_input(
                    "end", 1.0, "Last step to average, as a fraction of the steps, 0 (noisiest) to 1 (last)."
                ),
                io.Combo.Input(
                    "layers",
                    options=list(PLACES),
                    default="all",
                    tooltip="Which blocks to average: input (down), middle, output (up), or all.",
                ),
                io.Int.Input(
                    "grid",
                    display_name="map resolution 1/n",
                    default=AUTOMATIC,
                    min=0,
                    max=16,
                    tooltip="Use maps of 1/n of the latent's resolution. 0 = automatic: 4 (16 x 16 for a 64 x 64 latent), or "
                    "less for small latents.",
                ),
                trajectory_input("Inversion of an image, for the maps of that image.", optional=True),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="Without a trajectory: a clean latent, which is noised to each sigma.",
                ),
                sigmas_input("Without a trajectory: the sigmas.", optional=True),
                # A new seed at every run would evaluate the model each time.
                seed_input(
                    "Without a trajectory: seed of the noise. Every image of the batch has its own noise.",
                    optional=True,
                    control=False,
                ),
                io.Image.Input(
                    "image", optional=True, tooltip="Image to draw the heat maps over, of any size, 0 to 1."
                ),
                io.String.Input(
                    "picked",
                    display_name="picked words",
                    optional=True,
                    default="",
                    tooltip="Words whose map is the picked mask, comma-separated as they are labelled. Empty = the first. After a "
                    "run, click words below.",
                ),
            ],
            outputs=[
                io.Image.Output("pictures", display_name="maps", tooltip="One labelled heat map per word and image."),
                io.Mask.Output(
                    "masks",
                    display_name="latent masks",
                    tooltip="The maps on the latent grid, each divided by its peak, 0 to 1.",
                ),
                io.Mask.Output(
                    "picked_mask",
                    display_name="picked mask",
                    tooltip="The map of the picked words, 0 to 1, at the size of image, or on the latent grid without one.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        edit,
        prompt,
        words,
        levels,
        start,
        end,
        layers,
        grid,
        trajectory=None,
        latent=None,
        sigmas=None,
        seed=0,
        image=None,
        picked="",
    ) -> io.NodeOutput:
        edit = edit_in(edit)
        context, own = (edit.source, edit.source_words) if prompt == "source" else (edit.target, edit.target_words)
        chosen = chosen_words(own, words, prompt)
        inverted = None if trajectory is None else trajectory_in(trajectory)
        if inverted is None and (latent is None or sigmas is None):
            raise ParameterError("connect trajectory (of a real image), or latent and sigmas")
        clean = unnoised_samples(latent, "latent") if inverted is None else inverted.source_latent
        sigma_grid = check_sigmas(sigmas) if inverted is None else inverted.sigmas[inverted.first :]
        steps = spread_steps(len(sigma_grid) - 1, levels, start, end)
        at = [float(sigma_grid[i]) for i in steps]
        with open_denoiser(model, clean.shape, [context], sigmas=sigma_grid) as denoiser:
            if inverted is None:
                latents = noised_latents(denoiser, clean, at, image_seeds(seed, len(clean), latent.get("batch_index")))
            else:
                inverted.check(denoiser)
                latents = [inverted.latents[i] for i in steps]
            maps = attention_maps(
                denoiser,
                list(zip(at, latents, strict=True)),
                context,
                [tokens for _, tokens in chosen],
                layers=LayerChoice((grid,) if grid else (), PLACES[layers]),
                progress=progress_bar(len(at), model),
            )
        under = None if image is None else check_image(image, "image")
        labels = [label for label, _ in chosen]
        images = map_images(maps, labels, under)
        masks = to_host(normalised(maps).flatten(0, 1))
        height, width = maps.shape[-2:] if under is None else under.shape[1:3]
        mask = to_host(picked_maps(maps, labels, picked, (height, width)))
        shown = for_page(preview(cls, images), "maps", lambda: _maps(maps, labels, under))
        return io.NodeOutput(images, masks, mask, ui=shown)


def _maps(maps: Tensor, labels: list[str], under: Tensor | None) -> dict[str, Any]:
    """What the page shows when the pointer is over a word: the first image's maps, one by one."""
    first = normalised(maps[0].cpu())
    heats = torch.stack([heat_over(heat, None if under is None else under[0].cpu()) for heat in first])
    return {"words": labels, "images": thumbnails(heats), "peaks": [float(heat.max()) for heat in maps[0]]}


NODES = [AttentionMaps]
