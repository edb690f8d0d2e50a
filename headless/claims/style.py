"""What StyleDiffusion can do on the bundled model: reconstructions beside null-text's, and edits beside word swap's.

`editkit claims style` prints it. Scenes have one object; the source prompt is the scene's caption, and an edit gives the
object another colour (even trials) or another shape (odd trials). All runs take 30 steps, guidance 7.5 and the preset
"even"; the published preset is printed beside it. The oracle reads the results.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...pipelines.attention.prompts.align import align_prompts
from ...pipelines.core.protocols import Context
from ...pipelines.core.trajectory import Trajectory, context_digest
from ...pipelines.evaluation.metrics import psnr
from ...pipelines.inversion.ddim import invert, reconstruct
from ...pipelines.inversion.null_text import NullTextOptions, null_text
from ...pipelines.stylediffusion.edit import StyleEditOptions, style_edit
from ...pipelines.stylediffusion.inversion import PRESETS, StyleOptions, StyleResult, image_features, style_invert
from ...pipelines.stylediffusion.value_embeddings import ValueEmbeddings
from . import trials as t
from .claim import Claim, print_claims
from .diffedit import Scenes, interval, scenes

STEPS = 30
SCALE = 7.5
BATCH = 16
OPTIONS = PRESETS["even"]
RECONSTRUCTED = 16  # scenes that are also inverted without the attention loss, and with the published settings


@dataclass(frozen=True)
class Learned:
    """A batch of scenes, their trajectories and their value embeddings."""

    work: Scenes
    trajectory: Trajectory
    style: StyleResult


def learn(model: Any, encoder: Any, trials: Sequence[t.Trial]) -> Learned:
    work = scenes(model, trials)
    trajectory = invert(model.denoiser, work.latent, work.source, model.denoiser.schedule(STEPS))
    return Learned(work, trajectory, _learn(model, encoder, work, trajectory, OPTIONS))


def _learn(model: Any, encoder: Any, work: Scenes, trajectory: Trajectory, options: StyleOptions) -> StyleResult:
    features = image_features(encoder, work.images, work.source.tokens.shape[2])
    return style_invert(model.denoiser, trajectory, work.source, work.null, features, seeds=work.seeds, options=options)


def images(model: Any, z: Tensor) -> Tensor:
    return model.codec.decode(model.denoiser.scale_out(z)).cpu()


# --------------------------------------------------------------------------------------------------- reconstructions
def reconstruction_claims(model: Any, encoder: Any, learned: Learned) -> list[Claim]:
    """Prints PSNR against the decoded source latent (what inversions lose, without the VAE) and against the image."""
    work = learned.work
    trajectory = learned.trajectory
    denoiser = model.denoiser
    bare = _learn(model, encoder, work, trajectory, replace(OPTIONS, attention_weight=0.0))
    published = _learn(model, encoder, work, trajectory, PRESETS["published"])
    rebuilt = {
        "guidance 1": reconstruct(denoiser, trajectory, work.source),
        "no learning": reconstruct(denoiser, trajectory, work.source, negative=work.null, guidance_scale=SCALE),
        "null-text": null_text(denoiser, trajectory, work.source, work.null, options=NullTextOptions(SCALE)).rebuilt,
        "StyleDiffusion": learned.style.rebuilt,
        "  without L_att": bare.rebuilt,
        "  published preset": published.rebuilt,
    }
    source, found = images(model, trajectory.source), {}
    print(f"{'reconstruction':<20} {'to latent dB':>12} {'to image dB':>13}   ({len(work.trials)} scenes)")
    print(f"{'VAE alone':<20} {'':>12} {float(psnr(source, work.images).mean()):13.2f}")
    for name, z in rebuilt.items():
        found[name] = psnr(images(model, z), source)
        shown = float(psnr(images(model, z), work.images).mean())
        print(f"{name:<20} {float(found[name].mean()):12.2f} {shown:13.2f}")
    return [_psnr_claim(found["StyleDiffusion"] - found["null-text"]), _maps_claim(learned.style, bare)]


def _psnr_claim(gain: Tensor) -> Claim:
    mean, low, high = interval(gain)
    text = f"{mean:+.2f} dB (95 % interval {low:+.2f} to {high:+.2f}), wanted at least -0.5"
    return Claim("reconstruction over null-text", mean, text, mean >= -0.5)


def _maps_claim(style: StyleResult, bare: StyleResult) -> Claim:
    with_loss, without = style.map_distance.mean(0), bare.map_distance.mean(0)
    mean, low, high = interval(without / with_loss)
    text = (
        f"{float(without.mean()):.2e} without, {float(with_loss.mean()):.2e} with: {mean:.2f} times"
        f" (95 % interval {low:.2f} to {high:.2f}), wanted above 1"
    )
    return Claim("distance of the cross-attention maps", mean, text, low > 1)


# ------------------------------------------------------------------------------------------------------------- edits
@dataclass(frozen=True)
class Outcomes:
    """Per trial: overlap of the object's mask before and after, and whether the object is what the prompt says."""

    overlap: Tensor
    right: Tensor


def outcomes(edited: Tensor, trials: Sequence[t.Trial]) -> Outcomes:
    pairs = list(zip(edited, trials, strict=True))
    overlap = torch.tensor([t.object_overlap(*pair) for pair in pairs])
    return Outcomes(overlap, torch.tensor([float(t.object_right(*pair)) for pair in pairs]))


def style_edits(model: Any, learned: Learned, options: StyleEditOptions | None = None) -> Tensor:
    """Edited images, one pair of prompts at a time."""
    edited = []
    for index, trial in enumerate(learned.work.trials):
        edit = align_prompts(model.text, trial.before.caption, trial.target.caption)
        embeddings = picked(learned.style.embeddings, index, edit.source)
        edited.append(style_edit(model.denoiser, embeddings, edit, learned.work.null, options=options).edited)
    return images(model, torch.cat(edited))


def picked(embeddings: ValueEmbeddings, index: int, source: Context) -> ValueEmbeddings:
    """Those of one image of a batch."""
    one, trajectory = slice(index, index + 1), embeddings.trajectory
    trajectory = replace(
        trajectory,
        latents=trajectory.latents[:, one],
        source_latent=trajectory.source_latent[one],
        prompt=context_digest(source),
    )
    scale = None if embeddings.scale is None else embeddings.scale[:, one]
    return replace(embeddings, base=source, scale=scale, shift=embeddings.shift[:, one], trajectory=trajectory)


def word_swap(model: Any, learned: Learned) -> Tensor:
    work = learned.work
    z = reconstruct(model.denoiser, learned.trajectory, work.target, negative=work.null, guidance_scale=SCALE)
    return images(model, z)


def edit_claims(model: Any, parts: Sequence[Learned]) -> list[Claim]:
    """Prints the share of right edits and the overlap, for both methods and both kinds of edit."""
    trials = [trial for part in parts for trial in part.work.trials]
    ours = outcomes(torch.cat([style_edits(model, part) for part in parts]), trials)
    swap = outcomes(torch.cat([word_swap(model, part) for part in parts]), trials)
    print(f"{'edit':<18} {'right':>7} {'mask IoU':>9} {'colour':>14} {'shape':>14}   ({len(trials)} pairs)")
    for name, found in (("StyleDiffusion", ours), ("DDIM word swap", swap)):
        kinds = [f"{float(found.right[k::2].mean()):.0%} {float(found.overlap[k::2].mean()):.3f}" for k in (0, 1)]
        print(
            f"{name:<18} {float(found.right.mean()):7.1%} {float(found.overlap.mean()):9.3f} {kinds[0]:>14} {kinds[1]:>14}"
        )
    mean, low, high = interval(ours.overlap - swap.overlap)
    kept = f"{mean:+.3f} IoU (95 % interval {low:+.3f} to {high:+.3f}), wanted above 0"
    match = float(ours.right.mean() - swap.right.mean())
    return [
        Claim("structure over word swap", mean, kept, low > 0),
        Claim("target match over word swap", match, f"{100 * match:+.1f} points, wanted 0 or more", match >= 0),
    ]


def main(count: int = 32) -> bool:
    """Everything, printed; True if every claim holds."""
    from ...hosts.diffusers.loading import load_bundled
    from ...hosts.diffusers.open_clip_ranker import load_bundled_ranker
    from ...pipelines.blended.pipeline import best_device

    device, begun = best_device(), time.monotonic()
    model, encoder = load_bundled(device), load_bundled_ranker(device)
    trials = [(t.recolour, t.reshape)[i % 2](i) for i in range(count)]
    first = min(count, RECONSTRUCTED)
    borders = [0, first, *range(first + BATCH, count, BATCH), count]
    parts = [learn(model, encoder, trials[a:b]) for a, b in zip(borders, borders[1:], strict=False) if a < b]
    claims = reconstruction_claims(model, encoder, parts[0]) + edit_claims(model, parts)
    print(f"     ({time.monotonic() - begun:.0f} s)")
    return print_claims(claims)
