"""Null-text and negative-prompt inversion, and a guider that uses their embeddings."""

from __future__ import annotations

from ...hosts.embeddings import embeddings_in, embeddings_out
from ...hosts.host import embeddings_guider, open_denoiser, progress_bar, sampling_of
from ...hosts.latent import finished_out
from ...hosts.sockets import context_of
from ...hosts.trajectory import trajectory_in, trajectory_rest
from ...pipelines.evaluation.drawing import curve
from ...pipelines.inversion.negative_prompt import negative_prompt
from ...pipelines.inversion.null_text import NullTextOptions, NullTextResult, null_text
from ...pipelines.inversion.proximal import SHRINK, TARGETS, Proximal
from ...pipelines.learning.per_step import progress_units
from .._api import EmbeddingsSocket, io, reproduction_switch, schema, show_text
from .._inputs import (
    PATCHES_STAY,
    cfg_input,
    embeddings_input,
    loss_curve_output,
    model_input,
    report_output,
    tolerance_inputs,
    trajectory_input,
)

NO_PROX = "off"


def _trajectory():
    return trajectory_input("Inversion of the image at cfg 1 with the same model, from 'DDIM Inversion'.")


def _embeddings_output() -> EmbeddingsSocket.Output:
    return EmbeddingsSocket.Output(
        "embeddings",
        display_name="embeddings",
        tooltip="One negative per step, for the negative input of EditKit's nodes and 'Per-Step Negative Guider'.",
    )


class NullText(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_NullText",
            display_name="Null-Text Inversion",
            category="EditKit/inversion",
            description=(
                "Optimises the empty prompt for every step, so that guided sampling reconstructs the inverted image at this "
                "CFG scale. With another positive prompt the image is then edited. The model does not change."
            ),
            search_aliases=["NTI", "null text optimisation", "real image editing", "reconstruction"],
            inputs=[
                model_input("The model of the inversion. Its weights do not change."),
                _trajectory(),
                io.Conditioning.Input("positive", tooltip="The inversion prompt: what the image shows."),
                io.Conditioning.Input("negative", tooltip="An empty prompt. The embeddings start here."),
                cfg_input(7.5, "CFG scale of the reconstruction and of the later edit. At 1 nothing is learned."),
                io.Int.Input(
                    "inner_steps",
                    default=10,
                    min=0,
                    max=500,
                    tooltip="Most updates per sampling step, 0 to 500. 0 keeps the negative prompt.",
                ),
                io.Float.Input(
                    "lr",
                    default=1e-2,
                    min=1e-6,
                    max=1.0,
                    step=1e-4,
                    round=1e-6,
                    tooltip="Learning rate of Adam at the first step. It falls linearly to half at the last step.",
                ),
                *tolerance_inputs(),
                reproduction_switch(
                    io.Boolean,
                    "published_rate",
                    default=False,
                    optional=True,
                    tooltip="Lower the learning rate by a hundredth at every step whatever their number, as the published code "
                    "does: to 0.71 of it in 30 steps. At most 100 steps.",
                ),
            ],
            outputs=[
                _embeddings_output(),
                io.Latent.Output(
                    "reconstruction",
                    display_name="reconstruction",
                    tooltip="Result of guided sampling with the embeddings: the reconstructed image.",
                ),
                loss_curve_output("Loss of every sampling step, on a logarithmic axis."),
                report_output("Number of updates and the remaining loss."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        trajectory,
        positive,
        negative,
        cfg,
        inner_steps,
        lr,
        tolerance=1e-5,
        tolerance_growth=2e-5,
        published_rate=False,
    ) -> io.NodeOutput:
        options = NullTextOptions(cfg, inner_steps, lr, tolerance, tolerance_growth, published_rate)
        inverted = trajectory_in(trajectory)
        contexts = [context_of(positive, "positive"), context_of(negative, "negative")]
        progress = progress_bar(progress_units(options.updates, inverted), model)
        with open_denoiser(model, inverted.source.shape, contexts, sigmas=inverted.sigmas, learning=True) as denoiser:
            found = null_text(denoiser, inverted, *contexts, options=options, progress=progress)
            rebuilt = denoiser.scale_out(found.rebuilt)
        text, plot = _report(found, inner_steps), curve(found.losses, "null-text inversion: loss of every step")
        latent = finished_out(rebuilt, like=trajectory_rest(trajectory))
        return io.NodeOutput(embeddings_out(found.embeddings), latent, plot, text, ui=show_text(cls, plot, text))


def _report(found: NullTextResult, inner: int) -> str:
    if not any(found.updates):
        return "null-text: nothing was learned (cfg is 1 or inner_steps is 0): the negative prompt is unchanged"
    steps, worst = len(found.losses), max(found.losses)
    mean = sum(found.losses) / steps
    return (
        f"null-text: {sum(found.updates)} updates in {steps} steps (at most {inner} each); loss {mean:.2g} on average, "
        f"{worst:.2g} at most"
    )


class NegativePrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_NegativePrompt",
            display_name="Negative-Prompt Inversion (NPI, ProxNPI)",
            category="EditKit/inversion",
            description=(
                "Uses the source prompt as negative prompt. For the source, CFG then cancels out at any scale, and nothing has "
                "to be learned. ProxNPI also removes small guidance differences, so that less of the image changes."
            ),
            search_aliases=["NPI", "ProxNPI", "proximal guidance", "ProxEdit", "real image editing"],
            inputs=[
                model_input("The model of the inversion."),
                _trajectory(),
                io.Conditioning.Input("positive", tooltip="The inversion prompt: what the image shows."),
                io.Combo.Input(
                    "prox",
                    options=[NO_PROX, *SHRINK],
                    default=NO_PROX,
                    tooltip="Remove small guidance differences (ProxNPI). soft: shrink all by the threshold (named 'l0' in the "
                    "published code). hard: keep what exceeds the threshold. published l1: as in its code, which shrinks twice.",
                ),
                io.Float.Input(
                    "quantile",
                    default=0.4,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the guidance differences to remove, 0 to 1. It sets the threshold.",
                ),
                *_inversion_guidance_inputs(),
                *_variant_inputs(),
            ],
            outputs=[_embeddings_output()],
        )

    @classmethod
    def execute(
        cls,
        model,
        trajectory,
        positive,
        prox,
        quantile,
        pull=0.0,
        pull_to="path",
        dilation=1,
        pull_below=1000.0,
        threshold=0.0,
        negative=None,
        interpolation=0.0,
        batch_quantile=False,
        mask_of_shrunk=False,
    ) -> io.NodeOutput:
        proximal = (
            Proximal(
                mode=prox,
                quantile=quantile,
                threshold=threshold or None,
                batch_quantile=batch_quantile,
                inversion_guidance=pull,
                inversion_guidance_below=pull_below,
                inversion_guidance_target=pull_to,
                dilation=dilation,
                mask_of_shrunk=mask_of_shrunk,
            )
            if prox != NO_PROX
            else None
        )
        found = negative_prompt(
            sampling_of(model),
            trajectory_in(trajectory),
            context_of(positive, "positive"),
            null=None if negative is None else context_of(negative, "negative"),
            interpolation=interpolation,
            proximal=proximal,
        )
        return io.NodeOutput(embeddings_out(found))


def _inversion_guidance_inputs() -> list:
    """ProxNPI's inversion guidance (Han et al., section 3.3)."""
    return [
        io.Float.Input(
            "pull",
            display_name="inversion guidance",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.01,
            optional=True,
            tooltip="Moves regions without guidance back to the source, 0 (off) to 1 (fully). Needs prox.",
        ),
        io.Combo.Input(
            "pull_to",
            display_name="inversion guidance target",
            options=list(reversed(TARGETS)),
            default=TARGETS[-1],
            optional=True,
            tooltip="path: the trajectory at the sigma the step reaches. source: the clean source latent.",
        ),
        io.Int.Input(
            "dilation",
            default=1,
            min=0,
            max=64,
            optional=True,
            tooltip="Dilation of the edited region in latent pixels, 0 to 64, before inversion guidance is applied to the rest.",
        ),
        io.Float.Input(
            "pull_below",
            display_name="inversion guidance below sigma",
            default=1000.0,
            min=0.0,
            max=1000.0,
            step=0.01,
            optional=True,
            tooltip="Apply inversion guidance only below this sigma, 0 to 1000. The published timestep 400 is 1.16. 1000 = always.",
        ),
    ]


def _variant_inputs() -> list:
    """A fixed threshold, the interpolation of NPI, and what the published code does differently."""
    return [
        io.Float.Input(
            "threshold",
            default=0.0,
            min=0.0,
            max=100.0,
            step=0.01,
            optional=True,
            tooltip="A fixed threshold in units of predicted noise, instead of the quantile. 0 = use the quantile.",
        ),
        io.Conditioning.Input(
            "negative", optional=True, tooltip="For interpolation: an empty prompt with as many tokens as positive."
        ),
        io.Float.Input(
            "interpolation",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.01,
            optional=True,
            tooltip="Interpolates the negative from the source prompt (0) to the empty prompt (1).",
        ),
        reproduction_switch(
            io.Boolean,
            "batch_quantile",
            default=False,
            optional=True,
            tooltip="Take one quantile over source and target together, as the published code does. Use quantile 0.7 then.",
        ),
        reproduction_switch(
            io.Boolean,
            "mask_of_shrunk",
            default=False,
            optional=True,
            tooltip="Find the edited region from the shrunk difference, as the published code does.",
        ),
    ]


class EmbeddingsGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_EmbeddingsGuider",
            display_name="Per-Step Negative Guider",
            category="EditKit/inversion",
            description=(
                "A guider for SamplerCustomAdvanced with one negative per step: it picks the embeddings of an inversion by "
                "sigma. LoRA, ControlNet and hooks of model and positive stay active."
            ),
            search_aliases=["CFGGuider", "null text", "NPI", "ProxNPI", "SamplerCustomAdvanced"],
            inputs=[
                model_input(f"The model the embeddings were made with. {PATCHES_STAY}"),
                io.Conditioning.Input(
                    "positive", tooltip="The source prompt to reconstruct, or another prompt to edit."
                ),
                embeddings_input("From null-text or negative-prompt inversion."),
                cfg_input(7.5, "CFG scale. Null-text embeddings reconstruct at the scale they were learned for."),
            ],
            outputs=[
                io.Guider.Output(
                    "guider",
                    display_name="guider",
                    tooltip="For SamplerCustomAdvanced, on all or some of the sigmas of the inversion.",
                )
            ],
        )

    @classmethod
    def execute(cls, model, positive, embeddings, cfg) -> io.NodeOutput:
        negatives = embeddings_in(embeddings)
        return io.NodeOutput(embeddings_guider(model, context_of(positive, "positive"), negatives, cfg))


NODES = [NullText, NegativePrompt, EmbeddingsGuider]
