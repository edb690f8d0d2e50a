"""Prompt-to-Prompt and P2Plus: for native samplers, and the whole edit in one node."""

from __future__ import annotations

from ...hosts import host as _host
from ...pipelines.attention.local_blend import LocalBlendOptions
from ...pipelines.attention.p2p import P2PControl, P2POptions
from ...pipelines.attention.pair_loop import attention_edit
from ...pipelines.core.errors import ParameterError
from ...pipelines.core.noise import image_seeds, seeded_noise
from ...pipelines.core.sigmas import check_sigmas
from .._api import EmbeddingsSocket, TrajectorySocket, io, schema
from .pairs import MAX_SEED, edit_in, edit_input, fraction_input, model_input, pair_inputs, pair_outputs, patched

AUTOMATIC = 0


def p2p_inputs(cross: float = 0.8, own: float = 0.4) -> list:
    """The gates of P2Plus, with defaults of tau_c and tau_s."""
    return [
        fraction_input(
            "tau_c",
            cross,
            "Part of the run in which words look where the source's words looked, 0 to 1 (cross-attention).",
        ),
        fraction_input(
            "tau_s",
            own,
            "Part of the run that keeps the source's layout, 0 to 1 (self-attention). Lower = freer shapes.",
        ),
        fraction_input(
            "tau_u",
            0.0,
            "Part of the run in which the unconditional branch has the source's layout too, 0 to 1: P2Plus. 0.5 for large "
            "changes of shape, 0 = Prompt-to-Prompt. No effect at cfg 1.",
        ),
    ]


def blend_inputs() -> list:
    """LocalBlend, and the layers; words are named in 'Align prompts'."""
    return [
        _count(
            "self_divisor", 2, 1, 16,
            "tau_s and tau_u act in layers whose grid is at most 1 / this of the latent's side: 2 as published (32 x 32 of "
            "64 x 64), 1 = every layer.",
        ),
        _share("blend_start", 0.2, "LocalBlend: part of the run before it begins, 0 to 1; 1 = never. It needs blend words."),
        _share(
            "blend_threshold", 0.3,
            "LocalBlend: the picture may change where the blend words' map exceeds this share of its maximum, 0 to 1.",
        ),
        _share(
            "keep_threshold", 0.3,
            "LocalBlend: it must stay where the keep words' map exceeds this share of its maximum, 0 to 1.",
        ),
        _count(
            "blend_pool", 3, 1, 15,
            "LocalBlend: side of the square that grows the map, in its cells, odd; 3 as published, 1 = as it is.",
        ),
        io.Boolean.Input(
            "blend_smooth", default=False, optional=True,
            tooltip="LocalBlend: enlarge the map smoothly instead of cell by cell (as published).",
        ),
        _count(
            "blend_divisor", AUTOMATIC, 0, 16,
            "LocalBlend: read maps of layers whose grid is 1 / this of the latent's side; 0 = 4 as published, less for small "
            "latents.",
        ),
    ]  # fmt: skip


def _share(name: str, default: float, tooltip: str) -> io.Float.Input:
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.05, optional=True, tooltip=tooltip)


def _count(name: str, default: int, low: int, high: int, tooltip: str) -> io.Int.Input:
    return io.Int.Input(name, default=default, min=low, max=high, optional=True, tooltip=tooltip)


def p2p_options(
    tau_c, tau_s, tau_u, self_divisor, blend_start, blend_threshold, keep_threshold, blend_pool, blend_smooth, blend_divisor
) -> P2POptions:  # fmt: skip
    """What the widgets of `p2p_inputs` and `blend_inputs` say."""
    blend = LocalBlendOptions(
        blend_start, blend_threshold, keep_threshold, blend_pool, blend_smooth, blend_divisor or None
    )
    return P2POptions(tau_c, tau_s, tau_u, self_divisor, blend)


class P2Plus(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_P2Plus",
            display_name="Edit by prompt, any sampler (P2P, P2Plus)",
            category="EditKit/attention",
            description=(
                "Patches a model so that KSampler and SamplerCustomAdvanced draw pairs: a picture of the source prompt and, "
                "with the same composition, one of the target prompt. Give the sampler a latent batch of 2 and the "
                "conditioning from here as positive."
            ),
            search_aliases=["prompt-to-prompt", "p2p", "attention control", "word swap", "cross attention"],
            inputs=[model_input(), edit_input(), *p2p_inputs(), *pair_inputs(), *blend_inputs()],
            outputs=pair_outputs(),
        )

    @classmethod
    def execute(
        cls, model, edit, tau_c, tau_s, tau_u, sigmas=None, trajectory=None, share_noise=True, self_divisor=2,
        blend_start=0.2, blend_threshold=0.3, keep_threshold=0.3, blend_pool=3, blend_smooth=False, blend_divisor=AUTOMATIC,
    ) -> io.NodeOutput:  # fmt: skip
        edit = edit_in(edit)
        options = p2p_options(
            tau_c, tau_s, tau_u, self_divisor, blend_start, blend_threshold, keep_threshold, blend_pool, blend_smooth,
            blend_divisor,
        )  # fmt: skip
        return io.NodeOutput(
            *patched(
                model, edit.source, edit.target, lambda grid: P2PControl(edit, grid, options), tokens=edit.token_count,
                sigmas=sigmas, trajectory=trajectory, share_noise=share_noise,
            )
        )  # fmt: skip


class P2PlusEdit(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_P2PlusEdit",
            display_name="Edit by prompt (P2P, P2Plus)",
            category="EditKit/attention",
            description=(
                "The whole edit in one node. With the trajectory of an inverted picture, that picture is edited, and the "
                "source costs a row only while it is looked at; without one, source and target are drawn from the same noise."
            ),
            search_aliases=["prompt-to-prompt", "p2p", "edit real image", "null-text", "attention control"],
            inputs=[
                model_input(patched=False),
                edit_input(),
                io.MultiType.Input(
                    "negative",
                    types=[io.Conditioning, EmbeddingsSocket],
                    tooltip="What to move away from; or the embeddings of 'Null-text inversion' or 'Negative-prompt "
                    "inversion', which keep a real picture. Not evaluated at cfg 1.",
                ),
                io.Float.Input(
                    "cfg",
                    default=7.5,
                    min=1.0,
                    max=30.0,
                    step=0.1,
                    tooltip="Guidance scale; 7.5 as published, about 4 for the bundled model, 1 = none.",
                ),
                *p2p_inputs(),
                TrajectorySocket.Input(
                    "trajectory", optional=True, tooltip="A real picture's inversion, made with the source prompt."
                ),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="Without a trajectory: gives the size and number of pictures (Empty Latent Image), or a clean "
                    "picture to start from with part of the noise.",
                ),
                io.Sigmas.Input(
                    "sigmas", optional=True, tooltip="Without a trajectory: the noise levels, from noisy to 0."
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=True,
                    optional=True,
                    tooltip="Without a trajectory: the seed of the noise; image b of the batch uses seed + b.",
                ),
                *blend_inputs(),
            ],
            outputs=[
                io.Latent.Output(
                    "source_latent",
                    display_name="source",
                    tooltip="The source: the inverted picture itself, or what the source prompt gives from the noise.",
                ),
                io.Latent.Output("edited_latent", display_name="edited", tooltip="The edited picture's clean latent."),
            ],
        )

    @classmethod
    def execute(
        cls, model, edit, negative, cfg, tau_c, tau_s, tau_u, trajectory=None, latent=None, sigmas=None, seed=0,
        self_divisor=2, blend_start=0.2, blend_threshold=0.3, keep_threshold=0.3, blend_pool=3, blend_smooth=False,
        blend_divisor=AUTOMATIC,
    ) -> io.NodeOutput:  # fmt: skip
        edit, against = edit_in(edit), _host.negative_in(negative)
        options = p2p_options(
            tau_c, tau_s, tau_u, self_divisor, blend_start, blend_threshold, keep_threshold, blend_pool, blend_smooth,
            blend_divisor,
        )  # fmt: skip
        path = None if trajectory is None else _host.trajectory_in(trajectory)
        like = _host.trajectory_rest(trajectory) if path else latent
        levels, clean = _start(path, latent, sigmas)
        shape, contexts = (2 * len(clean), *clean.shape[1:]), _host.prompts_to_open(edit.target, against, edit.source)
        with _host.open_denoiser(model, shape, contexts, sigmas=levels) as denoiser:
            start = path or _noised(denoiser, clean, levels, latent, seed)
            result = attention_edit(
                denoiser, edit, against, start, sigmas=levels, guidance_scale=cfg, options=options,
                progress=_host.progress(len(levels) - 1, model),
            )  # fmt: skip
            source = clean if path else denoiser.scale_out(result.source)
            edited = denoiser.scale_out(result.edited)
        return io.NodeOutput(_host.finished_out(source, like=like), _host.finished_out(edited, like=like))


def _noised(denoiser, clean, levels, latent, seed: int):
    """The clean latent at the first level, each image with a noise of its own."""
    noise = seeded_noise(clean.shape[1:], image_seeds(seed, len(clean), latent.get("batch_index")), denoiser.device)
    return denoiser.noise(denoiser.scale_in(clean), noise, float(levels[0]))


def _start(path, latent, sigmas) -> tuple:
    """The grid, down to 0, and the clean latent that gives size and batch."""
    if path is not None:
        if latent is not None:
            raise ParameterError("trajectory and latent are both connected: a trajectory brings its own latents")
        levels, clean = path.sigmas if sigmas is None else check_sigmas(sigmas), path.source_latent
    elif latent is None or sigmas is None:
        raise ParameterError("connect trajectory (a real picture), or latent and sigmas (from noise)")
    else:
        levels, clean = check_sigmas(sigmas), _host.unnoised_samples(latent, "latent")
    if levels[-1] != 0:
        raise ParameterError(f"sigmas end at {float(levels[-1]):.4g}: this node gives finished pictures; end them at 0")
    return levels, clean


NODES = [P2Plus, P2PlusEdit]
