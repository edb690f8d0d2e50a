"""Guided reconstruction nodes: negatives under which guided sampling gives the picture back, and any sampler with them."""

from __future__ import annotations

from ...hosts import host as _host
from ...pipelines.evaluation.drawing import curve
from ...pipelines.inversion.null_text import NullTextOptions, NullTextResult, negative_prompt, null_text
from ...pipelines.inversion.proximal import SHRINK, TARGETS, Proximal
from .._api import EmbeddingsSocket, TrajectorySocket, io, schema, show_text

NO_PROX = "off"


def _model(tooltip: str) -> io.Model.Input:
    return io.Model.Input("model", tooltip=tooltip)


def _trajectory() -> TrajectorySocket.Input:
    return TrajectorySocket.Input(
        "trajectory", tooltip="The picture's inversion at cfg 1 with the same model, from 'Invert picture (DDIM)'."
    )


def _embeddings_output() -> EmbeddingsSocket.Output:
    return EmbeddingsSocket.Output(
        "embeddings",
        display_name="embeddings",
        tooltip="One negative per step: for every negative of EditKit's nodes, and for 'Guider with embeddings'.",
    )


class NullText(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_NullText",
            display_name="Null-text inversion",
            category="EditKit/inversion",
            description=(
                "Learns the empty prompt anew for every step, until guided sampling at this cfg retraces the inversion: the "
                "picture comes back, and another positive prompt then edits it. Only these embeddings learn; the model stays."
            ),
            search_aliases=["NTI", "null text optimisation", "real image editing", "reconstruction"],
            inputs=[
                _model("The model of the inversion; gradients pass through it, its weights do not change."),
                _trajectory(),
                io.Conditioning.Input("positive", tooltip="The prompt of the inversion: what the picture shows."),
                io.Conditioning.Input("negative", tooltip="An empty prompt: where the embeddings start."),
                io.Float.Input(
                    "cfg",
                    default=7.5,
                    min=1.0,
                    max=30.0,
                    step=0.1,
                    tooltip="Guidance scale to reconstruct, and later edit, at; 7.5 as published, 1 learns nothing.",
                ),
                io.Int.Input(
                    "inner_steps",
                    default=10,
                    min=0,
                    max=500,
                    tooltip="Most updates per sampling step; 10 as published. 0 keeps the negative as it is.",
                ),
                io.Float.Input(
                    "lr",
                    default=1e-2,
                    min=1e-6,
                    max=1.0,
                    step=1e-4,
                    round=1e-6,
                    tooltip="Adam's learning rate at the first step; it falls to half at the last. 0.01 as published.",
                ),
                io.Float.Input(
                    "tolerance",
                    default=1e-5,
                    min=0.0,
                    max=1.0,
                    step=1e-6,
                    round=1e-8,
                    optional=True,
                    tooltip="A step is done when its mean squared error is below this; 1e-5 as published, 0 never stops early.",
                ),
                io.Float.Input(
                    "tolerance_growth",
                    default=2e-5,
                    min=0.0,
                    max=1.0,
                    step=1e-6,
                    round=1e-8,
                    optional=True,
                    tooltip="How much the tolerance grows with every sampling step; 2e-5 as published.",
                ),
            ],
            outputs=[
                _embeddings_output(),
                io.Latent.Output(
                    "reconstruction",
                    display_name="reconstruction",
                    tooltip="Where guided sampling with them ends: the picture, at no further cost.",
                ),
                io.Image.Output(
                    "loss_curve", display_name="loss curve", tooltip="Loss of every sampling step, logarithmic."
                ),
                io.String.Output(
                    "report", display_name="report", tooltip="How many updates it took, and the losses left."
                ),
            ],
        )

    @classmethod
    def execute(
        cls, model, trajectory, positive, negative, cfg, inner_steps, lr, tolerance=1e-5, tolerance_growth=2e-5
    ) -> io.NodeOutput:
        options = NullTextOptions(cfg, inner_steps, lr, tolerance, tolerance_growth)
        path = _host.trajectory_in(trajectory)
        contexts = [_host.context(positive, "positive"), _host.context(negative, "negative")]
        updates = (len(path.latents) - 1) * max(1, inner_steps)
        with _host.open_denoiser(model, path.source.shape, contexts, sigmas=path.sigmas, learning=True) as denoiser:
            found = null_text(
                denoiser, path, *contexts, options=options, progress=_host.progress(updates, model)
            )  # fmt: skip
            rebuilt = denoiser.scale_out(found.rebuilt)
        text, plot = _report(found, inner_steps), curve(found.losses, "null-text inversion: loss of every step")
        latent = _host.finished_out(rebuilt, like=_host.trajectory_rest(trajectory))
        return io.NodeOutput(
            _host.embeddings_out(found.embeddings), latent, plot, text, ui=show_text(cls, plot, text)
        )  # fmt: skip


def _report(found: NullTextResult, inner: int) -> str:
    if not any(found.updates):
        return "null-text: nothing was learned (cfg is 1, or inner_steps 0): the negative stays as it is"
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
            display_name="Negative-prompt inversion (NPI, ProxNPI)",
            category="EditKit/inversion",
            description=(
                "The source prompt itself as negative: guidance then cancels for the source at any cfg, and nothing has to be "
                "learned. ProxNPI also cuts away small changes that guidance makes, and can pull the rest back to the source."
            ),
            search_aliases=["NPI", "ProxNPI", "proximal guidance", "ProxEdit", "real image editing"],
            inputs=[
                _model("The model of the inversion."),
                _trajectory(),
                io.Conditioning.Input("positive", tooltip="The prompt of the inversion: what the picture shows."),
                io.Combo.Input(
                    "prox",
                    options=[NO_PROX, *SHRINK],
                    default=NO_PROX,
                    tooltip="Cut small guidance away (ProxNPI). soft: everything shrinks by the cut, the published mode 'l0'. "
                    "hard: what is above stays. published l1: as its code, which shrinks twice.",
                ),
                io.Float.Input(
                    "quantile",
                    default=0.4,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the differences to cut, 0 to 1; 0.4 is what the published 0.7 comes to.",
                ),
                *_pull_inputs(),
                *_variants(),
            ],
            outputs=[_embeddings_output()],
        )

    @classmethod
    def execute(
        cls, model, trajectory, positive, prox, quantile, pull=0.0, pull_to="path", dilation=1, pull_below=1000.0,
        threshold=0.0, negative=None, interpolation=0.0, batch_quantile=False, mask_of_shrunk=False,
    ) -> io.NodeOutput:  # fmt: skip
        proximal = Proximal(
            mode=prox, quantile=quantile, threshold=threshold or None, batch_quantile=batch_quantile, pull=pull,
            pull_below=pull_below, pull_to=pull_to, dilation=dilation, mask_of_shrunk=mask_of_shrunk,
        ) if prox != NO_PROX else None  # fmt: skip
        found = negative_prompt(
            _host.levels(model), _host.trajectory_in(trajectory), _host.context(positive, "positive"),
            null=None if negative is None else _host.context(negative, "negative"),
            interpolation=interpolation, proximal=proximal,
        )  # fmt: skip
        return io.NodeOutput(_host.embeddings_out(found))


def _pull_inputs() -> list:
    """ProxNPI's way back to the source."""
    return [
        io.Float.Input(
            "pull",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.01,
            optional=True,
            tooltip="Share of the way back to the source, 0 to 1, where nothing is left of the guidance. Needs prox.",
        ),
        io.Combo.Input(
            "pull_to",
            options=list(reversed(TARGETS)),
            default="path",
            optional=True,
            tooltip="path: the inversion at the level that a step reaches. source: the clean picture.",
        ),
        io.Int.Input(
            "dilation",
            default=1,
            min=0,
            max=64,
            optional=True,
            tooltip="Latent cells by which what may change is grown before the rest is pulled; 1 or 2 as published.",
        ),
        io.Float.Input(
            "pull_below",
            default=1000.0,
            min=0.0,
            max=1000.0,
            step=0.01,
            optional=True,
            tooltip="Pull only below this noise level (sigma, 0 to 1000); timestep 400, as published, is 1.16. 1000 = always.",
        ),
    ]


def _variants() -> list:
    """Another cut, NPI's way towards the empty prompt, and what the published code does differently."""
    return [
        io.Float.Input(
            "threshold",
            default=0.0,
            min=0.0,
            max=100.0,
            step=0.01,
            optional=True,
            tooltip="A fixed cut in units of noise instead of the quantile; 0 = use the quantile.",
        ),
        io.Conditioning.Input(
            "negative", optional=True, tooltip="For interpolation: an empty prompt, as long as the positive."
        ),
        io.Float.Input(
            "interpolation",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.01,
            optional=True,
            tooltip="How far the negative lies from the source prompt (0) towards the empty one (1).",
        ),
        io.Boolean.Input(
            "batch_quantile",
            default=False,
            optional=True,
            tooltip="As published: one quantile over the whole batch and as many zeros; use 0.7 then.",
        ),
        io.Boolean.Input(
            "mask_of_shrunk",
            default=False,
            optional=True,
            tooltip="As published: what may change is told from the shrunk difference, so soft modes test twice the cut.",
        ),
    ]


class EmbeddingsGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_EmbeddingsGuider",
            display_name="Guider with embeddings",
            category="EditKit/inversion",
            description=(
                "Guides any native sampler (SamplerCustomAdvanced) with the negative of the step in force, found by its noise "
                "level. LoRA, ControlNet and hooks of model and positive act as usual."
            ),
            search_aliases=["CFGGuider", "null text", "NPI", "ProxNPI", "SamplerCustomAdvanced"],
            inputs=[
                _model("The model that the embeddings were made with; LoRA and other patches stay in force."),
                io.Conditioning.Input("positive", tooltip="The source prompt to reconstruct, or another to edit."),
                EmbeddingsSocket.Input("embeddings", tooltip="Of null-text or negative-prompt inversion."),
                io.Float.Input(
                    "cfg",
                    default=7.5,
                    min=1.0,
                    max=30.0,
                    step=0.1,
                    tooltip="Guidance scale; null-text embeddings reconstruct at the one they were learned for.",
                ),
            ],
            outputs=[
                io.Guider.Output(
                    "guider",
                    display_name="guider",
                    tooltip="For SamplerCustomAdvanced, on the sigmas of the inversion or a part of them.",
                )
            ],
        )

    @classmethod
    def execute(cls, model, positive, embeddings, cfg) -> io.NodeOutput:
        negatives = _host.embeddings_in(embeddings)
        return io.NodeOutput(_host.embeddings_guider(model, _host.context(positive, "positive"), negatives, cfg))


NODES = [NullText, NegativePrompt, EmbeddingsGuider]
