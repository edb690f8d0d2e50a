"""The model card that ships beside the weights, written from the measured figures."""

from __future__ import annotations

from typing import Any

from ..hosts.bundled.scenes import BACKGROUND_COLOURS, OBJECT_COLOURS, PATTERNS, SHAPES
from .evaluate import HEADER, line
from .measures import Row

TEMPLATE = """# The bundled models

Two very small text-to-image latent diffusion models, a U-Net and a flow transformer, and a very small image-text
ranker. They know one toy world, so that every example, workflow and test of EditKit can be run, and checked, without a
download.

| part | what | file size |
|---|---|---|
{sizes}

All weights are float16 safetensors. The U-Net predicts noise on Stable Diffusion's schedule (scaled linear, 1000
steps); the autoencoder has factor 8 and 4 channels; self- and cross-attention sit at full, half and quarter latent
resolution. The flow transformer is a rectified flow with shift 2 over the same autoencoder and text encoder; prompts are
padded to 24 tokens for it.
Both text towers speak CLIP's token ids and store only the {rows} embedding rows that the grammar uses; other words are
read as the mean row (`hosts/bundled/__init__.py`).

## What it can draw
Images of {size} x {size} pixels (other sizes run, untrained), one to two flat shapes on a background:
- shapes: {shapes}
- object colours: {colours}
- backgrounds: {backgrounds}; patterns: {patterns}

Prompts look like `a red circle on a pink background` and `a green star left of a blue ring on a striped white
background`; `hosts/bundled/scenes.py` is the grammar. The empty prompt is the unconditional one.

## How it was made
`python -m editkit.training` with the stages `vae`, `latents`, `unet`, `ranker`, `flow` and `export`, on images rendered
by `hosts/bundled/scenes.py`; no other data and no other weights. Every step is a function of seed and step number, so a
stopped run can be resumed. Optimiser steps taken: {steps}.

## Figures
Printed by `{command}` from the files in this folder, on held-out scenes that no stage has
seen. The verdicts are those of the oracle in `hosts/bundled/oracle.py`, which knows the renderer and no weights. Floors are
the acceptance limits.

```
{table}
```

## Limits
It draws only its grammar. A prompt that names one of two objects asks for an image with that
object alone. Blur and slightly round corners come from the autoencoder. The ranker was trained on the same grammar, sharp
and blurred, whole and masked; on photographs its scores mean nothing. Figures are of one training run with one seed.

## Licence
As EditKit, GPL-3.0-or-later. The training images are made by this repository's own code.
"""


def card(metrics: dict[str, Any], *, sizes: dict[str, int], steps: dict[str, int], rows: int) -> str:
    """The text of MODEL_CARD.md.

    Args:
        metrics: as `evaluate.evaluate` returns it.
        sizes: bytes per part.
        steps: optimiser steps per stage.
        rows: stored embedding rows.
    """
    names = {
        "unet": "U-Net, text-conditioned",
        "transformer": "flow transformer in SD3's layout, text-conditioned",
        "vae": "autoencoder",
        "text_encoder": "text encoder",
        "ranker": "image-text ranker, in open_clip's format",
    }
    table = [line(Row(**{key: value for key, value in row.items() if key != "passed"})) for row in metrics["rows"]]
    return TEMPLATE.format(
        sizes="\n".join(f"| {part} | {names[part]} | {size / 1e6:.2f} MB |" for part, size in sizes.items()),
        rows=rows,
        size=metrics["size"],
        shapes=", ".join(SHAPES),
        colours=", ".join(OBJECT_COLOURS),
        backgrounds=", ".join(BACKGROUND_COLOURS),
        patterns=", ".join(PATTERNS),
        steps=", ".join(f"{stage} {count}" for stage, count in steps.items()),
        command=metrics["command"],
        table="\n".join([HEADER, *table]),
    )
