"""The maths of EditKit and its headless API: torch only, no ComfyUI and no diffusers.

Everything a script needs can be imported from here (`docs/python.md` has an example of every method); models come from
`editkit.hosts.diffusers`. A name loads its module when it is first used, so importing this package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .core.lazy import lazy_names

if TYPE_CHECKING:
    from .attention.cross_attention_maps import LayerChoice, attention_maps
    from .attention.local_blend import LocalBlendOptions
    from .attention.masactrl import MasaCtrl, MasaCtrlOptions
    from .attention.p2p import P2PControl, P2POptions
    from .attention.pair_loop import PairPrompts, PairResult, attention_edit, pair_edit
    from .attention.plug_and_play import PlugAndPlay, PlugAndPlayOptions
    from .attention.prompts.align import align_prompts
    from .attention.prompts.prompt_edit import PromptEdit
    from .blended.blending import BlendOptions, blended_denoise, unscale_over_source
    from .blended.composite import blend_pixels, composite_source
    from .blended.decoder_tuning import DecoderSettings, LatentSettings, tune_decoder, tune_latent
    from .blended.pipeline import EditResult, EditSettings, best_device, blended_edit, edit_latents
    from .blended.pixel_blending import PixelBlending
    from .blended.poisson import blend_poisson
    from .blended.window import EditWindow, edit_window
    from .core.errors import EditError, FamilyError, LoadError, MismatchError, ParameterError, ShapeError
    from .core.guidance import EditPrompts
    from .core.masks import MaskSchedule, constant_schedule, dilate, dilation_schedule, downsample, release_schedule
    from .core.noise import image_seeds, seeded_noise, start_latent
    from .core.progress import Progress
    from .core.protocols import Context, Denoiser, ImageEncoder, LatentCodec, Ranker, TextEncoder, TunableDenoiser
    from .core.samplers import predictor, sample
    from .core.shapes import crop_to, pad_to_factor
    from .core.trajectory import Trajectory
    from .core.tune_plan import TunePlan
    from .diffedit.edit import DiffEditResult, DiffEditSettings, diffedit, masked_decode
    from .diffedit.mask import DiffEditMask, MaskNegatives, MaskRule, diffedit_mask, strength_sigma
    from .evaluation.clip_ranking import Ranking, rank_by_text, text_scores
    from .evaluation.drawing import save_image, sheet
    from .evaluation.metrics import clip_score, largest_change_outside, psnr, psnr_outside, ssim
    from .evaluation.report import Measures, measure_edit
    from .imagic import Imagic, imagic
    from .inversion.ddim import InversionOptions, invert, reconstruct, reconstruction_quality
    from .inversion.flow import FlowInversionOptions, SourceGuidance, invert_flow, sample_inverted
    from .inversion.flow_edit import FlowEditOptions, flow_edit
    from .inversion.negative_embeddings import Embeddings, load_embeddings, save_embeddings
    from .inversion.negative_prompt import negative_prompt
    from .inversion.null_text import NullTextOptions, NullTextResult, null_text
    from .inversion.proximal import Proximal
    from .inversion.regularisation import Regularisation
    from .layerdiffusion.embeddings import EmbeddingOptions, LayeredEmbeddings, layered_embeddings
    from .layerdiffusion.finetune import LayeredTuning, TuneOptions, layered_tune
    from .layerdiffusion.iterative_guidance import IterativeGuidance
    from .layerdiffusion.reference_background import object_latent_mask, reference_from_text
    from .learning.weight_deltas import load_changes, save_changes
    from .sdedit import sdedit
    from .stylediffusion.edit import NoisedStart, StyleEditOptions, style_edit, style_transfer
    from .stylediffusion.inversion import StyleOptions, StyleResult, image_features, style_invert
    from .stylediffusion.value_embeddings import ValueEmbeddings, save_value_embeddings

__all__ = [
    "BlendOptions",
    "Context",
    "DecoderSettings",
    "Denoiser",
    "DiffEditMask",
    "DiffEditResult",
    "DiffEditSettings",
    "EditError",
    "EditPrompts",
    "EditResult",
    "EditSettings",
    "EditWindow",
    "EmbeddingOptions",
    "Embeddings",
    "FamilyError",
    "FlowEditOptions",
    "FlowInversionOptions",
    "ImageEncoder",
    "Imagic",
    "InversionOptions",
    "IterativeGuidance",
    "LatentCodec",
    "LatentSettings",
    "LayerChoice",
    "LayeredEmbeddings",
    "LayeredTuning",
    "LoadError",
    "LocalBlendOptions",
    "MasaCtrl",
    "MasaCtrlOptions",
    "MaskNegatives",
    "MaskRule",
    "MaskSchedule",
    "Measures",
    "MismatchError",
    "NoisedStart",
    "NullTextOptions",
    "NullTextResult",
    "P2PControl",
    "P2POptions",
    "PairPrompts",
    "PairResult",
    "ParameterError",
    "PixelBlending",
    "PlugAndPlay",
    "PlugAndPlayOptions",
    "Progress",
    "PromptEdit",
    "Proximal",
    "Ranker",
    "Ranking",
    "Regularisation",
    "ShapeError",
    "SourceGuidance",
    "StyleEditOptions",
    "StyleOptions",
    "StyleResult",
    "TextEncoder",
    "Trajectory",
    "TunableDenoiser",
    "TuneOptions",
    "TunePlan",
    "ValueEmbeddings",
    "align_prompts",
    "attention_edit",
    "attention_maps",
    "best_device",
    "blend_pixels",
    "blend_poisson",
    "blended_denoise",
    "blended_edit",
    "clip_score",
    "composite_source",
    "constant_schedule",
    "crop_to",
    "diffedit",
    "diffedit_mask",
    "dilate",
    "dilation_schedule",
    "downsample",
    "edit_latents",
    "edit_window",
    "flow_edit",
    "image_features",
    "image_seeds",
    "imagic",
    "invert",
    "invert_flow",
    "largest_change_outside",
    "layered_embeddings",
    "layered_tune",
    "load_changes",
    "load_embeddings",
    "masked_decode",
    "measure_edit",
    "negative_prompt",
    "null_text",
    "object_latent_mask",
    "pad_to_factor",
    "pair_edit",
    "predictor",
    "psnr",
    "psnr_outside",
    "rank_by_text",
    "reconstruct",
    "reconstruction_quality",
    "reference_from_text",
    "release_schedule",
    "sample",
    "sample_inverted",
    "save_changes",
    "save_embeddings",
    "save_image",
    "save_value_embeddings",
    "sdedit",
    "seeded_noise",
    "sheet",
    "ssim",
    "start_latent",
    "strength_sigma",
    "style_edit",
    "style_invert",
    "style_transfer",
    "text_scores",
    "tune_decoder",
    "tune_latent",
    "unscale_over_source",
]

# Where each name is defined, for the loader; the imports above say the same to type checkers.
_HOMES = {
    ".attention.cross_attention_maps": "LayerChoice attention_maps",
    ".attention.local_blend": "LocalBlendOptions",
    ".attention.masactrl": "MasaCtrl MasaCtrlOptions",
    ".attention.p2p": "P2PControl P2POptions",
    ".attention.pair_loop": "PairPrompts PairResult attention_edit pair_edit",
    ".attention.plug_and_play": "PlugAndPlay PlugAndPlayOptions",
    ".attention.prompts.align": "align_prompts",
    ".attention.prompts.prompt_edit": "PromptEdit",
    ".blended.blending": "BlendOptions blended_denoise unscale_over_source",
    ".blended.composite": "blend_pixels composite_source",
    ".blended.decoder_tuning": "DecoderSettings LatentSettings tune_decoder tune_latent",
    ".blended.pipeline": "EditResult EditSettings best_device blended_edit edit_latents",
    ".blended.pixel_blending": "PixelBlending",
    ".blended.poisson": "blend_poisson",
    ".blended.window": "EditWindow edit_window",
    ".core.errors": "EditError FamilyError LoadError MismatchError ParameterError ShapeError",
    ".core.guidance": "EditPrompts",
    ".core.masks": "MaskSchedule constant_schedule dilate dilation_schedule downsample release_schedule",
    ".core.noise": "image_seeds seeded_noise start_latent",
    ".core.progress": "Progress",
    ".core.protocols": "Context Denoiser ImageEncoder LatentCodec Ranker TextEncoder TunableDenoiser",
    ".core.samplers": "predictor sample",
    ".core.shapes": "crop_to pad_to_factor",
    ".core.trajectory": "Trajectory",
    ".diffedit.edit": "DiffEditResult DiffEditSettings diffedit masked_decode",
    ".diffedit.mask": "DiffEditMask MaskNegatives MaskRule diffedit_mask strength_sigma",
    ".evaluation.clip_ranking": "Ranking rank_by_text text_scores",
    ".evaluation.drawing": "save_image sheet",
    ".evaluation.metrics": "clip_score largest_change_outside psnr psnr_outside ssim",
    ".evaluation.report": "Measures measure_edit",
    ".imagic": "Imagic imagic",
    ".inversion.ddim": "InversionOptions invert reconstruct reconstruction_quality",
    ".inversion.flow": "FlowInversionOptions SourceGuidance invert_flow sample_inverted",
    ".inversion.flow_edit": "FlowEditOptions flow_edit",
    ".inversion.negative_embeddings": "Embeddings load_embeddings save_embeddings",
    ".inversion.null_text": "NullTextOptions NullTextResult null_text",
    ".inversion.negative_prompt": "negative_prompt",
    ".inversion.proximal": "Proximal",
    ".inversion.regularisation": "Regularisation",
    ".layerdiffusion.embeddings": "EmbeddingOptions LayeredEmbeddings layered_embeddings",
    ".layerdiffusion.iterative_guidance": "IterativeGuidance",
    ".layerdiffusion.finetune": "LayeredTuning TuneOptions layered_tune",
    ".layerdiffusion.reference_background": "object_latent_mask reference_from_text",
    ".core.tune_plan": "TunePlan",
    ".learning.weight_deltas": "load_changes save_changes",
    ".sdedit": "sdedit",
    ".stylediffusion.edit": "NoisedStart StyleEditOptions style_edit style_transfer",
    ".stylediffusion.inversion": "StyleOptions StyleResult image_features style_invert",
    ".stylediffusion.value_embeddings": "ValueEmbeddings save_value_embeddings",
}

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
