"""Ways to bring the background back, compared in two columns: dB outside the mask, and the seam along its edge (BLD, figure 4).

Neither column decides alone: a paste is exact outside and may show a seam, a tuned decoder hides the seam and comes close
outside. So no sum of both is formed. A method is out only where another is better in both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...pipelines.blended.composite import blend_pixels
from ...pipelines.blended.decoder_tuning import (
    DecoderSettings,
    LatentSettings,
    latent_scale,
    tune_decoder,
    tune_latent,
)
from ...pipelines.blended.poisson import blend_poisson
from ...pipelines.evaluation.metrics import PSNR_CAP, psnr_outside, seam_contrast
from .claim import Claim, paired

PLAIN = "plain decode"
DECODER = "tuned decoder"
LATENT = "tuned latent"
FASTER = "tuned decoder, 3e-4"  # three times the published rate


@dataclass(frozen=True)
class Edit:
    """One edited image, before its background is brought back.

    Attributes:
        latent: of the edit, unscaled [1, C, h, w].
        source: the image [1, H, W, 3] in [0, 1].
        mask: [1, H, W], 1 = edit.
        right: the verdict on an image [H, W, 3] inside the mask; None where nobody knows.
    """

    latent: Tensor
    source: Tensor
    mask: Tensor
    right: Callable[[Tensor], bool] | None = None


@dataclass(frozen=True)
class Method:
    """A way to bring the background back, edit by edit.

    Attributes:
        psnr: outside the mask, in dB [N]; `PSNR_CAP` where it is exact.
        seam: contrast along the mask's edge [N], 0 to 1.
        kept: 1 where the verdict inside the mask is right [N]; NaN where there is none.
    """

    name: str
    psnr: Tensor
    seam: Tensor
    kept: Tensor

    @property
    def exact(self) -> bool:
        """Whether nothing outside the mask differs from the source."""
        return bool((self.psnr >= PSNR_CAP).all())

    def better_in_both(self, other: Method) -> bool:
        """At least as good outside the mask and at its edge on average, and better in one of them."""
        psnr = float(self.psnr.mean() - other.psnr.mean())
        seam = float(other.seam.mean() - self.seam.mean())
        return min(psnr, seam) >= 0 and max(psnr, seam) > 0


def background_table(model: Any, edits: Iterable[Edit]) -> list[Method]:
    """Plain decode, tuned decoder, tuned latent, Poisson and pixel blending on the same edits, at their published settings;
    and the decoder at three times its rate.
    """
    rows: dict[str, list[tuple[float, float, float]]] = {}
    for edit in edits:
        for name, image in background_images(model, edit):
            outside = float(psnr_outside(image, edit.source, edit.mask))
            seam = float(seam_contrast(image, edit.source, edit.mask))
            kept = float("nan") if edit.right is None else float(edit.right(image[0]))
            rows.setdefault(name, []).append((outside, seam, kept))
    return [Method(name, *torch.tensor(found, dtype=torch.float64).unbind(1)) for name, found in rows.items()]


def background_images(model: Any, edit: Edit) -> Iterator[tuple[str, Tensor]]:
    """One edit with each background method: names with images [1, H, W, 3]."""
    plain = model.codec.decode(edit.latent)
    given = (model.codec, edit.latent, edit.source, None, edit.mask)
    yield PLAIN, plain
    yield DECODER, tune_decoder(*given, settings=DecoderSettings()).image
    yield FASTER, tune_decoder(*given, settings=DecoderSettings(lr=3e-4)).image
    yield LATENT, tune_latent(*given, settings=LatentSettings(latent_scale=latent_scale(model.denoiser))).image
    yield "poisson", blend_poisson(plain, edit.source, edit.mask)
    yield "pixels", blend_pixels(plain, edit.source, edit.mask)


def background_claims(table: Sequence[Method]) -> list[Claim]:
    """The decoder restores the background, keeps the edit, and no other method is better in both columns."""
    by_name = {method.name: method for method in table}
    plain, tuned = by_name.pop(PLAIN), by_name.pop(DECODER)
    by_name.pop(FASTER, None)  # its own method at another rate
    before, after = float(plain.psnr.mean()), float(tuned.psnr.mean())
    kept = [float(method.kept.mean()) for method in (plain, tuned)]
    return [
        Claim(
            "decoder fine-tune outside",
            after - before,
            f"{before:.1f} to {after:.1f} dB: {after - before:+.1f} dB, wanted +5",
            after - before >= 5,
        ),
        Claim("edit kept by the fine-tune", kept[1], f"{kept[1]:.1%} right, {kept[0]:.1%} before", kept[1] >= kept[0]),
        *(comparison(tuned, rival) for rival in by_name.values()),
    ]


def comparison(tuned: Method, rival: Method) -> Claim:
    """The tuned decoder against a rival in both columns; missed where the rival is better in both."""
    seam = float((tuned.seam - rival.seam).mean()) * 255
    text = f"{difference(tuned, rival)}; wanted not worse in both"
    return Claim(f"fine-tune against {rival.name}", seam, text, not rival.better_in_both(tuned))


def difference(method: Method, rival: Method) -> str:
    """Both columns of a method minus a rival's, paired over the edits, with 95 % intervals."""
    outside = "the rival is exact outside" if rival.exact else f"outside {paired(method.psnr - rival.psnr)} dB"
    return f"{outside}, seam {paired((method.seam - rival.seam) * 255, 3)} /255"


def print_table(table: Sequence[Method]) -> None:
    """Both columns of every method, and the methods that are better in both."""
    print(f"{'background method':<20} {'outside dB':>10} {'seam /255':>10} {'edit kept':>10}  better in both")
    for method in table:
        psnr, seam, kept = (float(value.mean()) for value in (method.psnr, method.seam, method.kept))
        outside = "exact" if method.exact else f"{psnr:.2f}"
        verdict = "-" if kept != kept else f"{kept:.1%}"
        better = ", ".join(other.name for other in table if other.better_in_both(method)) or "-"
        print(f"{method.name:<20} {outside:>10} {seam * 255:10.3f} {verdict:>10}  {better}", flush=True)
