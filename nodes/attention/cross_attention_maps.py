"""Where the words of a prompt look, as pictures."""

from __future__ import annotations

from ...hosts import host as _host
from ...pipelines.attention.cross_attention_maps import LayerChoice, attention_maps
from ...pipelines.attention.map_drawing import chosen_words, map_images, normalised, spread_steps
from ...pipelines.core.attention_sites import Place
from ...pipelines.core.errors import ParameterError
from ...pipelines.core.noise import image_seeds, seeded_noise
from ...pipelines.core.shapes import check_image
from ...pipelines.core.sigmas import check_sigmas
from .._api import TrajectorySocket, io, preview, schema
from .pairs import MAX_SEED, edit_in, edit_input, fraction_input, model_input

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
            display_name="Where the words look (attention maps)",
            category="EditKit/attention",
            description=(
                "One labelled heat map per word of a prompt: the part of the model's attention that goes to it, averaged over "
                "layers and noise levels. Shows why an edit goes where it goes, and finds good blend words."
            ),
            search_aliases=["cross-attention", "heat map", "DAAM", "token map"],
            inputs=[
                model_input(patched=False),
                edit_input(),
                io.Combo.Input(
                    "prompt",
                    options=["target", "source"],
                    default="source",
                    tooltip="Whose words: of source or target.",
                ),
                io.String.Input(
                    "words",
                    default="",
                    tooltip="Which words, with commas between them (cat#2 = the second cat, 'red circle' = a phrase); empty = all.",
                ),
                io.Int.Input(
                    "levels",
                    default=10,
                    min=1,
                    max=1000,
                    tooltip="How many noise levels are averaged; each costs one row.",
                ),
                fraction_input("start", 0.0, "First part of the run to look at, 0 (noisiest) to 1 (last step)."),
                fraction_input("end", 1.0, "Last part of the run to look at, 0 (noisiest) to 1 (last step)."),
                io.Combo.Input(
                    "layers",
                    options=list(PLACES),
                    default="all",
                    tooltip="Which layers are averaged: on the way down, in the middle, on the way up, or all.",
                ),
                io.Int.Input(
                    "grid",
                    default=AUTOMATIC,
                    min=0,
                    max=16,
                    tooltip="Layers whose grid is 1 / this of the latent's side; 0 = 4 (16 x 16 of 64 x 64), less for small "
                    "latents.",
                ),
                TrajectorySocket.Input(
                    "trajectory", optional=True, tooltip="A picture's inversion: the maps are of the picture itself."
                ),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="Without a trajectory: a clean latent, which is noised to each level.",
                ),
                io.Sigmas.Input("sigmas", optional=True, tooltip="Without a trajectory: the noise levels."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=False,  # a new seed at every run would evaluate the model each time
                    optional=True,
                    tooltip="Without a trajectory: the seed of the noise; image b of the batch uses seed + b.",
                ),
                io.Image.Input(
                    "image", optional=True, tooltip="The picture to lay the heat over, of any size, 0 to 1."
                ),
            ],
            outputs=[
                io.Image.Output(
                    "pictures", display_name="maps", tooltip="For each picture of the batch one labelled map per word."
                ),
                io.Mask.Output(
                    "masks",
                    display_name="latent masks",
                    tooltip="The same on the latent grid, each divided by its maximum: 1 = where the word looks most.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls, model, edit, prompt, words, levels, start, end, layers, grid, trajectory=None, latent=None, sigmas=None, seed=0,
        image=None,
    ) -> io.NodeOutput:  # fmt: skip
        edit = edit_in(edit)
        context, own = (edit.source, edit.source_words) if prompt == "source" else (edit.target, edit.target_words)
        chosen = chosen_words(own, words, prompt)
        path = None if trajectory is None else _host.trajectory_in(trajectory)
        if path is None and (latent is None or sigmas is None):
            raise ParameterError("connect trajectory (a real picture), or latent and sigmas")
        clean = _host.unnoised_samples(latent, "latent") if path is None else path.source_latent
        table = check_sigmas(sigmas) if path is None else path.sigmas[path.first :]
        steps = spread_steps(len(table) - 1, levels, start, end)
        with _host.open_denoiser(model, clean.shape, [context], sigmas=table) as denoiser:
            if path is None:
                seeds = image_seeds(seed, len(clean), latent.get("batch_index"))
                noise, source = seeded_noise(clean.shape[1:], seeds, denoiser.device), denoiser.scale_in(clean)
                states = [(float(table[i]), denoiser.noise(source, noise, float(table[i]))) for i in steps]
            else:
                path.check(denoiser)
                states = [(float(table[i]), path.latents[i]) for i in steps]
            maps = attention_maps(
                denoiser, states, context, [tokens for _, tokens in chosen],
                layers=LayerChoice((grid,) if grid else (), PLACES[layers]), progress=_host.progress(len(states), model),
            )  # fmt: skip
        under = None if image is None else check_image(image, "image")
        images = map_images(maps, [label for label, _ in chosen], under)
        masks = _host.to_host(normalised(maps).flatten(0, 1))
        return io.NodeOutput(images, masks, ui=preview(cls, images))


NODES = [AttentionMaps]
