"""Writes web/docs/images/NAME.jpg, what README and help pages show of each method: `python -m editkit.docs.method_images`.

Runs the workflows and puts source, masks and results side by side.
"""

from __future__ import annotations

import sys
from pathlib import Path

from ..workflows.thumbnails import strip, tiles_of

IMAGES = Path(__file__).parent.parent / "web" / "docs" / "images"
NAMES = (
    "blended_edit", "thin_mask", "diffedit", "null_text_reconstruction", "p2p_replace", "p2plus_real_image", "masactrl",
    "plug_and_play", "style_inversion_edit", "style_transfer", "layered_edit", "imagic", "sdedit", "differential_diffusion",
)  # fmt: skip
MARGIN, HEIGHT, QUALITY = 4, 150, 88  # pixels, pixels, JPEG's own scale


def main() -> int:
    """Crop every strip to what is not white, and scale it to one height."""
    from PIL import Image, ImageChops

    IMAGES.mkdir(exist_ok=True)
    for name in NAMES:
        image = strip(tiles_of(name)).convert("RGB")
        different = ImageChops.difference(image, Image.new("RGB", image.size, "white")).convert("L")
        left, top, right, bottom = different.point(lambda value: 255 * (value > 24)).getbbox()
        size = image.size
        box = (max(left - MARGIN, 0), max(top - MARGIN, 0), min(right + MARGIN, size[0]), min(bottom + MARGIN, size[1]))
        image = image.crop(box)
        image = image.resize((round(image.width * HEIGHT / image.height), HEIGHT), Image.Resampling.LANCZOS)
        image.save(IMAGES / f"{name}.jpg", quality=QUALITY, optimize=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
