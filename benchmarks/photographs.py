"""Real photographs, edited with the bundled model, whose VAE was trained on none.

`python -m editkit.benchmarks photographs` prints, for whole photographs, the size, the change outside the mask and the
decoder's gain; and for their centres every background method at its published settings: dB outside, and the seam.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch

from ..headless.claims.backgrounds import Edit, background_table, difference, print_table
from ..pipelines.blended.pipeline import EditSettings, blended_edit, edit_latents
from ..pipelines.evaluation.metrics import seam_contrast

NAMES = ("astronaut", "coffee", "chelsea")  # scikit-image's own
PROMPT = "a red circle on a white background"
GAIN = 5.0
# The bundled VAE fits photographs badly, so its decoder is tuned at three times the published rate.
RATE = 3e-4
CENTRE = 128  # pixels, of the crop on which the background methods are compared


def photograph(name: str) -> torch.Tensor:
    """[1, H, W, 3] in [0, 1]."""
    from skimage import data

    return torch.from_numpy(getattr(data, name)()).float()[None] / 255


def drawn_mask(height: int, width: int) -> torch.Tensor:
    """A slanted ellipse, off the centre: no edge of it lies on the latent grid."""
    y = torch.linspace(-1, 1, height)[:, None] - 0.13
    x = torch.linspace(-1, 1, width)[None, :] + 0.21
    return (((x + 0.4 * y) / 0.45) ** 2 + ((y - 0.3 * x) / 0.35) ** 2 <= 1).float()[None]


def centres(model: Any, steps: int = 20) -> Iterator[Edit]:
    """The middle of each photograph with its edit, before the background is brought back."""
    for name in NAMES:
        image = photograph(name)
        top, left = ((side - CENTRE) // 2 for side in image.shape[1:3])
        image = image[:, top : top + CENTRE, left : left + CENTRE].contiguous()
        mask, settings = drawn_mask(CENTRE, CENTRE), EditSettings(steps=steps, candidates=1)
        latent = edit_latents(model.denoiser, model.codec, model.text, image, mask, PROMPT, settings=settings)
        yield Edit(latent, image, mask)


def main(tune_steps: int = 75) -> bool:
    """Print both tables; True if nothing outside changed and the decoder gained at least 5 dB on every photograph."""
    from ..hosts.diffusers.loading import load_bundled
    from ..pipelines.blended.pipeline import best_device

    model = load_bundled(best_device())
    good = _whole_photographs(model, tune_steps)
    print(f"\ncentres of {CENTRE} x {CENTRE} pixels, published settings:")
    table = background_table(model, centres(model))
    print_table(table)
    for rival in table[2:]:
        print(f"{table[1].name} minus {rival.name}: {difference(table[1], rival)}")
    return good


def _whole_photographs(model: Any, tune_steps: int) -> bool:
    good = True
    settings = EditSettings(steps=20, candidates=1, tune_steps=tune_steps, tune_lr=RATE)
    print(
        f"{'photograph':<11} {'in':>9} {'out':>9} {'changed':>8} {'plain dB':>9} {'tuned dB':>9} {'seam /255':>9} {'seconds':>8}"
    )
    for name in NAMES:
        image, begun = photograph(name), time.perf_counter()
        mask = drawn_mask(*image.shape[1:3])
        result = blended_edit(model.denoiser, model.codec, model.text, image, mask, PROMPT, settings=settings)
        sizes = [f"{shown.shape[2]}x{shown.shape[1]}" for shown in (image, result.image)]
        seconds, seam = time.perf_counter() - begun, float(seam_contrast(result.tuned, image, mask))
        print(
            f"{name:<11} {sizes[0]:>9} {sizes[1]:>9} {result.change_outside:8g} {result.psnr_plain:9.2f} "
            f"{result.psnr_tuned:9.2f} {255 * seam:9.3f} {seconds:8.0f}"
        )
        good &= sizes[0] == sizes[1] and result.change_outside == 0 and result.psnr_tuned - result.psnr_plain >= GAIN
    return good
