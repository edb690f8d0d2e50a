"""What a workflow must have made."""

from __future__ import annotations

import torch

from editkit.headless.run import Run
from editkit.hosts.bundled.example_images import load_example, load_image
from editkit.tests.workflows import shipped
from editkit.tests.workflows.shipped import Workflow


def check_composites(workflow: Workflow, run: Run) -> None:
    """Outside its mask every edit is its source, bit for bit, and inside it is not."""
    for node_id, node in workflow.items():
        if node["class_type"] == "EditKit_CompositeSource":
            image, change = run.results[node_id]
            assert change == 0
            source, mask = (run.results[node["inputs"][key][0]][node["inputs"][key][1]] for key in ("source", "mask"))
            outside = mask[..., None].expand_as(image) == 0
            assert torch.equal(image[outside], source.expand_as(image)[outside])
            assert not torch.equal(image, source), "nothing was edited"


def check_winner(workflow: Workflow, run: Run) -> None:
    """The winner is one of the candidates, and its latent came along."""
    node_id = next(i for i, n in workflow.items() if n["class_type"] == "EditKit_RankByText")
    image, latent, scores, order = run.results[node_id]
    candidates, latents = (run.results[workflow[node_id]["inputs"][key][0]][0] for key in ("images", "latent"))
    assert len(candidates) == shipped.FEW["EditKit_NoiseLatent", "copies"]
    assert len(image) == len(latent["samples"]) == len(scores.split()) == 1
    assert torch.equal(image[0], candidates[int(order)])
    assert torch.equal(latent["samples"][0], latents["samples"][int(order)])


def check_session(_: Workflow, run: Run) -> None:
    """Outside its own mask, every edit begins and ends with the image of the one before."""
    example = load_example("empty_side")
    right = example.mask[0].round().bool()
    before = example.image[0]
    for path, edited in zip(run.saved, (right, ~right, right), strict=True):
        after = load_image(path)[0]
        assert torch.equal(after[~edited], before[~edited])
        assert not torch.equal(after[edited], before[edited])
        before = after


ALSO = {"ranked_batch_tuned_winner": check_winner, "editing_session": check_session}


def check(name: str, workflow: Workflow, run: Run) -> None:
    """A workflow saves an image of its source's size for each of its Save Image nodes, below its own folder."""
    saving = [node for node in workflow.values() if node["class_type"] == "SaveImage"]
    assert len(run.saved) == len(saving) > 0
    for path in run.saved:
        assert path.is_relative_to(run.output_folder / "editkit")
        assert load_image(path).shape == (1, 96, 96, 3)
    check_composites(workflow, run)
    if name in ALSO:
        ALSO[name](workflow, run)
