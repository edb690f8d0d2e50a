"""`python -m editkit.training STAGE`: rebuild, export and measure the bundled model.

    scenes     a contact sheet of training images       vae        the autoencoder
    latents    encode the training images               unet       the U-Net and its text encoder
    ranker     the image-text ranker                       flow       the flow transformer, over the shipped text encoder
    export     write hosts/bundled, if better
    evaluate   the acceptance table of the shipped files  examples   draw the images that ship with the workflows

Stages before `export` resume from the work folder; each is a function of its seed and step count.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

WORK = Path("output") / "training"
STEPS = {"vae": 5000, "latents": 30_000, "unet": 6500, "flow": 16_000, "ranker": 1800, "scenes": 24}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one stage; 0 on success, 1 when `evaluate` finds a limit missed or `export` refuses."""
    options = parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if options.stage not in ("evaluate", "examples"):
        options.folder.mkdir(parents=True, exist_ok=True)
    return STAGES[options.stage](options)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    plain = argparse.RawDescriptionHelpFormatter
    root = argparse.ArgumentParser("editkit.training", description=__doc__, formatter_class=plain)
    stages = root.add_subparsers(dest="stage", required=True)
    for name in STAGES:
        stage = stages.add_parser(name)
        if name == "evaluate":
            stage.add_argument("--folder", type=Path, help="holds tiny/ and ranker/ (default: the shipped files)")
            stage.add_argument("--write", action="store_true", help="write metrics.json into the folder")
        elif name != "examples":
            stage.add_argument("--folder", type=Path, default=WORK, help=f"work folder (default: {WORK})")
        if name in STEPS:
            what = {"latents": "images to encode", "scenes": "images to show"}.get(name, "optimiser steps in all")
            stage.add_argument("--steps", type=int, default=STEPS[name], help=f"{what} (default: {STEPS[name]})")
        if name in ("vae", "unet", "flow", "ranker", "scenes"):
            stage.add_argument("--seed", type=int, default=0, help="default: 0")
        if name in ("unet", "flow"):
            stage.add_argument("--device", default="cpu", help="default: cpu")
        if name in ("export", "evaluate"):
            stage.add_argument("--quick", action="store_true", help="an eighth of the trials")
        if name == "export":
            stage.add_argument("--force", action="store_true", help="install even if not better than what is there")
    return root


def _scenes(options: argparse.Namespace) -> int:
    import numpy as np
    from PIL import Image

    from ..hosts.bundled.scenes import render, sample_scene, scene_rng

    images = [render(sample_scene(scene_rng(options.seed * 100_000 + i))) for i in range(options.steps)]
    columns = min(8, len(images))
    images += [np.ones_like(images[0])] * (-len(images) % columns)
    rows = [np.concatenate(images[i : i + columns], axis=1) for i in range(0, len(images), columns)]
    path = options.folder / "scenes.png"
    Image.fromarray((np.concatenate(rows) * 255).round().astype(np.uint8)).save(path)
    logging.info("wrote %s", path)
    return 0


def _vae(options: argparse.Namespace) -> int:
    from . import vae

    vae.train(options.folder, options.steps, seed=options.seed)
    return 0


def _latents(options: argparse.Namespace) -> int:
    from . import unet

    unet.cache_latents(options.folder, options.steps)
    return 0


def _unet(options: argparse.Namespace) -> int:
    from . import unet

    unet.train(options.folder, options.steps, seed=options.seed, device=options.device)
    return 0


def _flow(options: argparse.Namespace) -> int:
    from . import flow

    flow.train(options.folder, options.steps, seed=options.seed, device=options.device)
    return 0


def _ranker(options: argparse.Namespace) -> int:
    from . import ranker

    ranker.train(options.folder, options.steps, seed=options.seed)
    return 0


def _export(options: argparse.Namespace) -> int:
    from .export import ExportError, export

    try:
        export(options.folder, force=options.force, quick=options.quick, show=logging.info)
    except ExportError as error:
        logging.error("not exported: %s", error)
        return 1
    return 0


def _examples(_: argparse.Namespace) -> int:
    from ..hosts.bundled.example_images import FOLDER
    from .examples import write_examples

    FOLDER.mkdir(parents=True, exist_ok=True)
    write_examples(FOLDER)
    logging.info("wrote %s", FOLDER)
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from ..hosts.bundled import FOLDER
    from .evaluate import evaluate, write_metrics

    folder = options.folder or FOLDER
    metrics = evaluate(folder, quick=options.quick, show=lambda text: print(text, flush=True))
    if options.write:
        write_metrics(folder, metrics)
    return 0 if metrics["passed"] else 1


STAGES: dict[str, Callable[[argparse.Namespace], int]] = {
    "scenes": _scenes,
    "vae": _vae,
    "latents": _latents,
    "unet": _unet,
    "flow": _flow,
    "ranker": _ranker,
    "export": _export,
    "evaluate": _evaluate,
    "examples": _examples,
}

if __name__ == "__main__":
    raise SystemExit(main())
