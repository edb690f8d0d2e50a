"""Candidates of several images through the nodes: each keeps its own source."""

from __future__ import annotations

import pytest
import torch

from editkit.hosts.latent import reordered
from editkit.hosts.sockets import HeadlessVae
from editkit.pipelines.core.errors import ShapeError
from editkit.pipelines.evaluation.clip_ranking import Ranking
from editkit.tests.nodes.graph import call
from editkit.tests.nodes.toy_graph import encoded, model, sigmas, text
from editkit.tests.toy_codec import ToyCodec

IMAGES, COPIES = 2, 3


@pytest.fixture
def batch():
    """MODEL, sigmas, the clean LATENT of two images and six noised candidates."""
    host = model()
    image, latent = encoded(IMAGES)
    grid = sigmas(host)
    noised = call("NoiseLatent", model=host, latent=latent, sigmas=grid, seed=3, copies=COPIES)[0]
    return host, grid, image, latent, noised


def edited(batch, noised, source, mask=None):
    host, grid, _, latent, _ = batch
    mask = torch.zeros(1, *latent["samples"].shape[-2:]) if mask is None else mask
    return call(
        "BlendedDenoise",
        model=host,
        positive=text(1.0),
        negative=text(),
        sigmas=grid,
        latent=noised,
        source_latent=source,
        schedule=mask,
        seed=3,
    )[0]


def test_outside_of_every_candidate_is_its_own_source(batch):
    latent, noised = batch[3:]
    assert noised["editkit_source"] == [0, 1, 0, 1, 0, 1]
    wanted = latent["samples"].repeat(COPIES, 1, 1, 1)
    assert torch.equal(edited(batch, noised, latent)["samples"], wanted)
    assert torch.equal(edited(batch, noised, {"samples": wanted})["samples"], wanted)  # Repeat Latent Batch
    masks = torch.zeros(IMAGES, *wanted.shape[-2:])
    masks[1] = 1
    done = edited(batch, noised, latent, masks)["samples"]
    assert torch.equal(done[::2], wanted[::2])
    assert (done[1::2] != wanted[1::2]).any(dim=(1, 2, 3)).all()


def test_a_source_of_another_number_of_images_is_refused_by_name(batch):
    with pytest.raises(ShapeError, match="source_latent has 3 entries but latent has 6 candidates of 2 sources"):
        edited(batch, batch[4], {"samples": batch[3]["samples"][[0, 1, 0]]})


def test_a_batch_that_was_changed_since_is_refused_by_name(batch):
    latent, noised = batch[3:]
    part = {**noised, "samples": noised["samples"][1:3], "batch_index": [1, 2]}  # Latent From Batch
    twice = {**noised, "samples": noised["samples"].repeat(2, 1, 1, 1)}  # Repeat Latent Batch
    for changed in (part, twice):
        with pytest.raises(ShapeError, match="carries the sources of 6 candidates"):
            edited(batch, changed, latent)


def test_one_candidate_of_one_image_can_be_made_again(batch):
    host, grid, _, latent, _ = batch
    one = {"samples": latent["samples"][:1]}
    noised = call("NoiseLatent", model=host, latent=one, sigmas=grid, seed=3, copies=COPIES)[0]
    whole = edited(batch, noised, one, torch.ones(1, *latent["samples"].shape[-2:]))["samples"]
    part = {**noised, "samples": noised["samples"][2:], "batch_index": [2]}
    again = edited(batch, part, one, torch.ones(1, *latent["samples"].shape[-2:]))["samples"]
    assert torch.equal(again, whole[2:])


def test_sources_follow_their_candidates_through_ranking_and_tuning(batch):
    _, _, image, latent, noised = batch
    done = edited(batch, noised, latent)
    order = torch.tensor([5, 2, 0, 1, 4, 3])
    ranked = reordered(done, Ranking(order, order.float(), torch.zeros(6, 1, 1, 3), 6))
    assert ranked["editkit_source"] == [1, 0, 0, 1, 0, 1]
    mask = torch.zeros(IMAGES, *image.shape[1:3])
    given = {"vae": HeadlessVae(ToyCodec()), "latent": ranked, "source": image, "mask": mask, "steps": 0}
    tuned = call("TuneLatent", **given)[1]
    plain = {**given, "latent": {"samples": ranked["samples"]}, "source": image[[1, 0, 0, 1, 0, 1]], "mask": mask[:1]}
    assert torch.allclose(tuned, call("TuneLatent", **plain)[1])


@pytest.mark.parametrize("name", ["CompositeSource", "BlendPixels", "BlendPoisson"])
def test_every_edited_image_is_composited_over_its_own_source(batch, name):
    image, noised = batch[2], batch[4]
    decoded = image.repeat(COPIES, 1, 1, 1) * 0.5
    mask = torch.zeros(1, *image.shape[1:3])
    with pytest.raises(ShapeError, match="source has 2: connect latent"):
        call(name, edited=decoded, source=image, mask=mask)
    for order in ([0, 1, 2, 3, 4, 5], [3, 0, 5]):  # as noised, and as ranked
        latent = {
            "samples": noised["samples"][order],
            "editkit_images": IMAGES,
            "editkit_source": [n % 2 for n in order],
        }
        result = call(name, edited=decoded[order], source=image, mask=mask, latent=latent)[0]
        assert torch.equal(result, image[[n % 2 for n in order]])
    with pytest.raises(ShapeError, match="edited has 6 entries but latent has 3"):
        call(name, edited=decoded, source=image, mask=mask, latent=latent)
