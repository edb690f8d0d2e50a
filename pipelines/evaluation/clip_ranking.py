"""CLIP ranking: sort images by the agreement of their masked region with a text (BLD, section 4.4).

As published, the ranker gets the image times the mask, black outside and uncropped (docs/methods.md, section 4).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import EditError, ParameterError, ShapeError
from ..core.protocols import Ranker
from ..core.shapes import check_image, check_mask, match_batch, same_size

log = logging.getLogger("editkit")

REGIONS = ("masked", "crop", "blur", "keep")
BEST = -1  # pick no image by hand
CROP_MARGIN = 0.1  # on every side, as a fraction of the longer side of the mask's bounding box
BLUR_SIGMA = 1 / 24  # standard deviation of the blur, as a fraction of the longer side of the image


@dataclass(frozen=True)
class Ranking:
    """The ranked images, best first.

    Attributes:
        order: indices of the kept images in the input, long [n].
        scores: their cosine similarities with the text, in -1 to 1, float32 [n].
        images: the images themselves, [n, H, W, 3].
        count: how many images were ranked.
        all_scores: the scores of all images in the order of the input, float32 [count]; empty where they are not known.
    """

    order: Tensor
    scores: Tensor
    images: Tensor
    count: int
    all_scores: Tensor = field(default_factory=lambda: torch.zeros(0))

    def apply(self, batch: Tensor) -> Tensor:
        """Sort another batch of the ranked images (latents, masks) alike. Raises ShapeError for another batch size."""
        if batch.shape[0] != self.count:
            raise ShapeError(
                f"{self.count} images were ranked but the other batch has {batch.shape[0]}: pass the batch they"
                " came from"
            )
        return batch[self.order.to(batch.device)]


def rank_by_text(
    images: Tensor,
    text: str,
    ranker: Ranker,
    *,
    mask: Tensor | None = None,
    region: str = "masked",
    keep: int = 0,
    chunk: int = 16,
    pick: int = BEST,
) -> Ranking:
    """Sort a batch by the cosine similarity of each image's embedding and the text's (docs/methods.md, section 4).

    Args:
        images: IMAGE [B, H, W, 3] in [0, 1].
        text: the prompt, unchanged (no template, as published).
        ranker: embeds images and text.
        mask: MASK [1 or B, H, W], 1 = edit; a pixel belongs to it from 0.5. None scores whole images.
        region: "masked" = black outside the mask, uncropped (as published); "crop" = the mask's bounding box with a
            margin, for small masks; "blur" = blurred outside; "keep" = the whole image, without regard to the mask.
        keep: how many of the best to keep, at most; 0 = all.
        chunk: images per call of the ranker, at least 1.
        pick: index, from 0, of the image that comes first whatever its score; -1 = the best.
    Returns: equal scores, as those of identical images, keep the order of the input. If every mask is empty, all images
        keep it, with a warning.
    Raises: ShapeError, ParameterError; EditError if the ranker returns NaN.
    """
    images = check_image(images, "images")
    _check(text, region, keep, chunk)
    _check_pick(pick, len(images))
    inside = None if mask is None or region == "keep" else _inside(mask, images)
    views = [_square(view) for view in _views(images, inside, region)]
    scores = _scores(views, text, ranker, chunk).to(images.device)
    if inside is not None and not inside.any():
        log.warning("the mask is empty: the images keep their order")
        order = torch.arange(len(images), device=images.device)
    else:
        order = torch.sort(scores, descending=True, stable=True).indices
    if pick != BEST:
        order = torch.cat([order[order == pick], order[order != pick]])
    order = order[: keep or None]
    return Ranking(order, scores[order], images[order], len(images), scores)


def text_scores(images: Tensor, text: str, ranker: Ranker, *, chunk: int = 16) -> Tensor:
    """Cosine similarity of each whole image and a text (docs/methods.md, section 4).

    Args:
        images: IMAGE [B, H, W, 3] in [0, 1].
        text: unchanged, without a template.
        ranker: embeds images and text.
        chunk: images per call of the ranker, at least 1.
    Returns: scores from -1 to 1, float32 [B], on the device of `images`.
    Raises: ShapeError for anything but an IMAGE; ParameterError for an empty text or a chunk below 1; EditError if the
        ranker returns NaN.
    """
    images = check_image(images, "images")
    _check(text, "keep", 0, chunk)
    return _scores([_square(view) for view in images], text, ranker, chunk).to(images.device)


def _check(text: str, region: str, keep: int, chunk: int) -> None:
    if not isinstance(text, str) or not text.strip():
        raise ParameterError("text is empty: say what the masked region should show")
    if region not in REGIONS:
        raise ParameterError(f"region is {region!r}: choose one of {', '.join(REGIONS)}")
    if keep < 0:
        raise ParameterError(f"keep is {keep}: give how many images to keep, or 0 for all")
    if chunk < 1:
        raise ParameterError(f"chunk is {chunk}: give at least 1 image")


def _check_pick(pick: int, count: int) -> None:
    if not BEST <= pick < count:
        raise ParameterError(
            f"pick is {pick} but there are {count} images: give the number of one, from 0, or {BEST} for the best"
        )


def _inside(mask: Tensor, images: Tensor) -> Tensor:
    mask = check_mask(mask, "mask").to(images.device)
    same_size(mask, images, "mask", "images")
    return match_batch(mask >= 0.5, len(images), "mask", "images")


# -------------------------------------------------------------------------------------------- inputs of the ranker
def _views(images: Tensor, inside: Tensor | None, region: str) -> list[Tensor]:
    """One view [h, w, 3] per image; only crops differ in size."""
    if inside is None:
        return list(images)
    if region == "masked":
        return list(torch.where(inside[..., None], images, 0.0))
    if region == "blur":
        return list(torch.where(inside[..., None], images, blur(images, BLUR_SIGMA * max(images.shape[1:3]))))
    return [_crop(image, where) for image, where in zip(images, inside, strict=True)]


def _crop(image: Tensor, inside: Tensor) -> Tensor:
    """The mask's bounding box with a margin, as square as the image allows; black if the mask is empty."""
    if not inside.any():
        return torch.zeros_like(image)
    spans = [inside.any(1).nonzero(), inside.any(0).nonzero()]
    boxes = [(int(span.min()), int(span.max()) + 1) for span in spans]
    longest = max(end - begin for begin, end in boxes)
    side = longest + 2 * round(CROP_MARGIN * longest)
    rows, columns = (_widen(box, side, length) for box, length in zip(boxes, image.shape[:2], strict=True))
    return image[rows, columns]


def _widen(box: tuple[int, int], side: int, length: int) -> slice:
    """`side` pixels centred on a span, moved into 0..length; fewer where the image is smaller."""
    side = min(side, length)
    begin = (box[0] + box[1] - side) // 2
    begin = min(max(begin, 0), length - side)
    return slice(begin, begin + side)


def _square(image: Tensor) -> Tensor:
    """Pad with black to a square, so that the ranker neither crops nor squeezes the image."""
    height, width = image.shape[:2]
    side = max(height, width)
    above = (side - height) // 2
    left = (side - width) // 2
    return F.pad(image, (0, 0, left, side - width - left, above, side - height - above))


def blur(images: Tensor, sigma_px: float) -> Tensor:
    """Gaussian blur of IMAGEs [B, H, W, 3], edges repeated."""
    radius = max(1, round(3 * sigma_px))
    offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    kernel = torch.softmax(-(offsets**2) / (2 * max(sigma_px, 0.1) ** 2), 0)
    planes = images.movedim(-1, 1).flatten(0, 1)[:, None]
    planes = F.pad(planes, (radius,) * 4, mode="replicate")
    planes = F.conv2d(F.conv2d(planes, kernel[None, None, None]), kernel[None, None, :, None])
    return planes[:, 0].unflatten(0, (images.shape[0], 3)).movedim(1, -1)


# --------------------------------------------------------------------------------------------------------- scores
def _scores(views: list[Tensor], text: str, ranker: Ranker, chunk: int) -> Tensor:
    """Cosine similarities, float32 [B]. Identical views are scored once, so that a tie does not depend on the chunks."""
    with torch.no_grad():
        target = F.normalize(ranker.embed_texts([text])[0].float(), dim=0)
        first = _first_equal(views)
        scores: dict[int, Tensor] = {}
        for group in _groups(first, views, chunk):
            images = torch.stack([views[i] for i in group]).to(ranker.device)
            vectors = F.normalize(ranker.embed_images(images).float(), dim=-1)
            scores.update(zip(group, vectors @ target, strict=True))
    values = torch.stack([scores[i] for i in first])
    if not torch.isfinite(values).all():
        raise EditError("the ranker returned NaN: run it in float32")
    return values


def _groups(first: list[int], views: list[Tensor], chunk: int) -> list[list[int]]:
    """Indices of the distinct views in chunks: views of one size, at most `chunk` of them."""
    by_size: dict[torch.Size, list[int]] = {}
    for i in dict.fromkeys(first):
        by_size.setdefault(views[i].shape, []).append(i)
    return [group[k : k + chunk] for group in by_size.values() for k in range(0, len(group), chunk)]


def _first_equal(views: list[Tensor]) -> list[int]:
    """For each view, the index of the first view identical to it."""
    distinct: list[int] = []
    first = []
    for i, view in enumerate(views):
        match = next((j for j in distinct if torch.equal(views[j], view)), i)
        if match == i:
            distinct.append(i)
        first.append(match)
    return first
