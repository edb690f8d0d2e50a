"""The `editkit` command: edit an image, run a workflow once or for a manifest, run the demo, print claims.

Exit codes: 0 success, 1 failure (the message names the cause) or a missed claim, 2 wrong arguments, 130 cancelled.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..pipelines.core.errors import EditError, ParameterError
from .arguments import (
    LARGEST_SEED,
    check_device,
    check_edit,
    check_input,
    check_output,
    check_range,
    warn_of_photograph,
)
from .batch.command import add_batch
from .edit_folder import write_result

if TYPE_CHECKING:
    from torch import Tensor

    from ..pipelines.blended.pipeline import EditSettings
    from ..pipelines.core.protocols import Ranker


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = build_parser().parse_args(arguments)
    logging.basicConfig(level=logging.DEBUG if options.verbose else logging.WARNING, format="%(levelname)s %(message)s")
    try:
        return options.run(options)
    except EditError as error:
        print(f"editkit: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("editkit: cancelled", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """Every command with its options; each sets `run`, which takes the options and returns the exit code."""
    parser = argparse.ArgumentParser(prog="editkit", description="Text-driven image editing with diffusion models.")
    parser.add_argument("--verbose", action="store_true", help="show debug messages")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _edit_arguments(commands.add_parser("edit", help="edit an image under a mask (Blended Latent Diffusion)"))
    run = commands.add_parser("run", help="run an API-format workflow, here or on a ComfyUI server")
    run.add_argument("workflow", type=Path, help="an API-format JSON file, for example workflows/api/blended_edit.json")
    run.add_argument("--input", type=Path, help="folder that Load Image reads (default: the workflow's folder)")
    run.add_argument("--output", type=Path, default=Path("output"), help="folder for saved images (default: output)")
    run.add_argument("--server", help="address of a running ComfyUI, for example http://127.0.0.1:8188")
    run.set_defaults(run=run_command)
    demo = commands.add_parser("demo", help="a blended edit on the bundled model, with a comparison sheet")
    demo.add_argument("--output", type=Path, default=Path("output/demo"), help="folder (default: output/demo)")
    demo.add_argument("--seed", type=int, default=0)
    demo.set_defaults(run=demo_command)
    _claims_arguments(commands)
    add_batch(commands)
    return parser


def _claims_arguments(commands: Any) -> None:
    from .claims.registry import listing

    claims = commands.add_parser(
        "claims",
        help="measure the claims of each method on the bundled model",
        description="Measure the claims of each method on the bundled model. Exit code 1 if a claim is missed.",
        epilog=listing(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    claims.add_argument("names", nargs="+", metavar="NAME", help="one or more of the tables below")
    claims.add_argument("--trials", type=int, help="trials of each claim (default: the table's own number)")
    claims.set_defaults(run=claims_command)


def _edit_arguments(parser: argparse.ArgumentParser) -> None:
    from ..pipelines.blended.pipeline import EditSettings

    default = EditSettings()
    parser.add_argument("--image", type=Path, required=True, help="the image, any size")
    parser.add_argument("--mask", type=Path, required=True, help="bright (or transparent) = edit, same size")
    parser.add_argument("--prompt", required=True, help="what the image should show")
    parser.add_argument("--negative", default="", help="negative prompt")
    _model_arguments(parser)
    parser.add_argument("--output", type=Path, default=Path("output/edit"), help="folder (default: output/edit)")
    parser.add_argument("--steps", type=int, default=default.steps, help="steps of a full schedule (%(default)s)")
    parser.add_argument(
        "--strength", type=float, default=default.strength, help="fraction of the steps that run, 0-1 (%(default)s)"
    )
    parser.add_argument(
        "--cfg", type=float, default=default.guidance_scale, help="guidance scale; 1 = none (%(default)s)"
    )
    parser.add_argument(
        "--candidates", type=int, default=default.candidates, help="results to draw and rank (%(default)s)"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=default.seed,
        help="the first candidate's seed; the others' are mixed from it (%(default)s)",
    )
    parser.add_argument("--mask-mode", default=default.mask_mode, help="max, area, nearest or bilinear (%(default)s)")
    parser.add_argument(
        "--kernels",
        default="1",
        help="sizes of the progressive dilation in latent pixels; for thin masks 7,5,3,1 (%(default)s = none)",
    )
    parser.add_argument(
        "--stages",
        default=default.stage_spacing,
        help="stages of the dilation: equal steps, equal log-sigma or published (%(default)s)",
    )
    _tuning_arguments(parser, default)
    parser.add_argument(
        "--feather", type=int, default=default.feather_px, help="soft edge inside the mask, px (%(default)s)"
    )
    _window_arguments(parser, default)
    _keep_arguments(parser, default)
    _ranker_arguments(parser)
    parser.set_defaults(run=edit_command)


def _tuning_arguments(parser: argparse.ArgumentParser, default: EditSettings) -> None:
    parser.add_argument(
        "--tune-steps", type=int, default=default.tune_steps, help="decoder iterations; 0 = off (%(default)s)"
    )
    parser.add_argument(
        "--tune-lr", type=float, default=default.tune_lr, help="the decoder's learning rate (%(default)s)"
    )
    parser.add_argument(
        "--tune-method",
        choices=("published", "fast"),
        default=default.tune_method,
        help="fast: about a sixth of the time and half the memory (%(default)s)",
    )


def _window_arguments(parser: argparse.ArgumentParser, default: EditSettings) -> None:
    parser.add_argument(
        "--window",
        type=int,
        default=default.window,
        help="edit only a window around the mask, at least this many pixels a side; 0 = the whole image (%(default)s)",
    )
    parser.add_argument(
        "--context",
        type=int,
        default=default.context_px,
        help="pixels around the mask that the window contains (%(default)s)",
    )


def _keep_arguments(parser: argparse.ArgumentParser, default: EditSettings) -> None:
    parser.add_argument(
        "--keep", type=int, default=default.keep, help="candidates that run to the end; 0 = all (%(default)s)"
    )
    parser.add_argument(
        "--keep-at",
        type=float,
        default=default.keep_at,
        help="fraction of the steps after which --keep chooses them (%(default)s)",
    )


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        type=Path,
        help="folder in diffusers layout (SD 1.x, SD 2.x, SDXL, SD3, Flux), or safetensors checkpoint file of SD 1.x, SD 2.x or "
        "SDXL (default: the bundled model)",
    )
    parser.add_argument("--device", help="for example cuda or cpu (default: the GPU if there is one)")
    parser.add_argument("--half", action="store_true", help="run the network and the text encoders in float16")


def _ranker_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rank-text", help="text to rank by (default: the prompt)")
    parser.add_argument(
        "--ranker", type=Path, help="local open_clip weights, safetensors (default: the bundled ranker)"
    )
    parser.add_argument("--ranker-architecture", default="ViT-B-16", help="architecture of --ranker (%(default)s)")


class Bar:
    """A progress bar on standard error, quiet when that is not a terminal."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.begun = time.monotonic()
        self.live = sys.stderr.isatty()

    def __call__(self, done: int, total: int, preview: Tensor | None = None) -> None:
        if self.live:
            filled = 24 * done // total
            end = "\n" if done == total else ""
            spent = time.monotonic() - self.begun
            bar = "#" * filled + "." * (24 - filled)
            print(f"\r{self.label:<10} [{bar}] {done}/{total} {spent:.0f} s", end=end, file=sys.stderr, flush=True)
        elif done == total:
            print(f"{self.label}: {total} steps in {time.monotonic() - self.begun:.1f} s", file=sys.stderr)


def _load(options: argparse.Namespace) -> tuple[Any, Ranker | None]:
    """Model and ranker of `editkit edit`; one candidate needs no ranker."""
    import torch

    from ..hosts.bundled import BUNDLED, BUNDLED_MODELS
    from ..hosts.diffusers.loading import load_bundled, load_model
    from ..hosts.diffusers.open_clip_ranker import load_bundled_ranker, load_open_clip

    device = check_device(options.device)
    dtype = torch.float16 if options.half else torch.float32
    own = options.model is not None and str(options.model) not in BUNDLED_MODELS
    if own:
        model = load_model(options.model, device, dtype)
    else:
        model = load_bundled(device, dtype, str(options.model or BUNDLED))
    if options.candidates == 1:
        return model, None
    if options.ranker:
        return model, load_open_clip(options.ranker_architecture, options.ranker, device=device)
    if own:
        message = "editkit: the bundled ranker knows only images of the bundled model; candidates are not ranked"
        print(message, file=sys.stderr)
        return model, None
    return model, load_bundled_ranker(device=device)


def edit_command(options: argparse.Namespace) -> int:
    """`editkit edit`: one blended edit, written to a folder. Every argument is checked first. Raises EditError."""
    from ..hosts.bundled import BUNDLED_MODELS
    from ..hosts.bundled.example_images import load_image, load_mask
    from ..pipelines.blended.pipeline import blended_edit
    from ..pipelines.core.shapes import check_edit_mask, check_mask_of_image

    settings = check_edit(options)
    image, mask = load_image(options.image), load_mask(options.mask)
    check_mask_of_image(mask, (image.shape[1], image.shape[2]), "--mask")
    check_edit_mask(mask, "--mask")
    if options.model is None or str(options.model) in BUNDLED_MODELS:
        warn_of_photograph(image)
    check_output(options.output)
    model, ranker = _load(options)
    result = blended_edit(
        model.denoiser,
        model.codec,
        model.text,
        image,
        mask,
        options.prompt,
        ranker=ranker,
        rank_text=options.rank_text,
        negative=options.negative,
        settings=settings,
        stage=Bar,
    )
    about = {
        "prompt": options.prompt,
        "negative": options.negative,
        "image": str(options.image),
        "mask": str(options.mask),
        "rank_text": options.rank_text or options.prompt,
        "ranker": _ranker_name(options, ranker),
        **_about(model, str(options.model) if options.model else "bundled", settings),
    }
    print("\n".join(write_result(result, image, mask, options.output, about)))
    return 0


def _ranker_name(options: argparse.Namespace, ranker: Ranker | None) -> str | None:
    if ranker is None:
        return None
    return f"{options.ranker_architecture} {options.ranker}" if options.ranker else "bundled"


def _about(model: Any, name: str, settings: EditSettings) -> dict[str, Any]:
    """The model and the settings of an edit, for its report."""
    return {
        "model": name,
        "model_fingerprint": model.denoiser.fingerprint,
        "device": str(model.denoiser.device),
        "dtype": str(model.denoiser.dtype),
        "settings": asdict(settings),
    }


def demo_command(options: argparse.Namespace) -> int:
    """`editkit demo`: a blended edit of a shipped image with the bundled model and ranker."""
    from ..hosts.bundled.example_images import load_example
    from ..hosts.diffusers.loading import load_bundled
    from ..hosts.diffusers.open_clip_ranker import load_bundled_ranker
    from ..pipelines.blended.pipeline import EditSettings, best_device, blended_edit

    check_range(options.seed, "--seed", 0, LARGEST_SEED)
    check_output(options.output)
    begun, device = time.monotonic(), best_device()
    example = load_example("empty_side")
    model = load_bundled(device)
    settings = EditSettings(candidates=6, seed=options.seed)
    print(f"source: {example.caption}\nprompt: {example.prompt}")
    result = blended_edit(
        model.denoiser,
        model.codec,
        model.text,
        example.image,
        example.mask,
        example.prompt,
        ranker=load_bundled_ranker(device=device),
        rank_text=example.new_words,
        settings=settings,
        stage=Bar,
    )
    about = {"prompt": example.prompt, "rank_text": example.new_words, **_about(model, "bundled", settings)}
    print("\n".join(write_result(result, example.image, example.mask, options.output, about)))
    print(f"done in {time.monotonic() - begun:.0f} s")
    return 0


def claims_command(options: argparse.Namespace) -> int:
    """`editkit claims`: print tables; exit code 1 if a claim is missed. Raises ParameterError for an unknown name."""
    from .claims.registry import TABLES, print_tables

    unknown = [name for name in options.names if name not in TABLES]
    if unknown:
        raise ParameterError(f"there is no table {unknown[0]!r}: choose from {', '.join(TABLES)}")
    if options.trials is not None:
        check_range(options.trials, "--trials", 1)
    return 0 if print_tables(options.names, options.trials) else 1


def run_command(options: argparse.Namespace) -> int:
    """`editkit run`: run a workflow here or on a server and print the files it saved. Raises LoadError for a bad file."""
    from .runner import read_workflow

    workflow = read_workflow(options.workflow)
    check_input(options.input)
    check_output(options.output)
    if options.server:
        from .server_client import run_on_server

        saved = run_on_server(
            options.server, workflow, options.input or options.workflow.parent, options.output, Bar("server")
        )
    else:
        saved = _run_here(workflow, options)
    for path in saved:
        print(path)
    return 0


def _run_here(workflow: Any, options: argparse.Namespace) -> list[Path]:
    """Run a workflow in this process, on the nodes themselves."""
    from .run import Run
    from .runner import load_host, run_workflow

    load_host()

    def on_node(done: int, total: int, name: str) -> None:
        if name:
            print(f"[{done + 1}/{total}] {name}", file=sys.stderr)

    run = Run(options.input or options.workflow.parent, options.output, on_node, lambda: Bar("steps"))
    run_workflow(workflow, run)
    for texts in run.texts.values():
        print("\n".join(texts))
    return run.saved


if __name__ == "__main__":
    sys.exit(main())
