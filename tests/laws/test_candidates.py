"""The order of candidates, and the source that belongs to each."""

from __future__ import annotations

import pytest
import torch

from editkit.pipelines.blended.candidates import noised_candidates, repeated_index
from editkit.pipelines.core.errors import ParameterError, ShapeError
from editkit.pipelines.core.masks import MaskSchedule
from editkit.pipelines.core.shapes import Sources, candidate_sources, checked_sources, with_sources
from editkit.tests.toys import ToyDenoiser, pointwise, random_latent

IMAGES = random_latent(2, 3, 4, 5, seed=1)


def test_candidates_are_in_the_order_of_repeat_latent_batch():
    found = noised_candidates(ToyDenoiser(pointwise()), IMAGES, 1e-6, seed=3, copies=3)
    assert found.sources == Sources([0, 1, 0, 1, 0, 1], images=2) and found.batch_index is None
    torch.testing.assert_close(found.z, IMAGES.repeat(3, 1, 1, 1), rtol=0, atol=1e-4)
    assert len({float(noise.sum()) for noise in found.z}) == 6


def test_a_batch_index_gives_the_noise_of_the_whole_batch():
    denoiser = ToyDenoiser(pointwise())
    same = IMAGES[:1].expand(8, -1, -1, -1)
    whole = noised_candidates(denoiser, same, 2.0, seed=3)
    part = noised_candidates(denoiser, same[:2], 2.0, seed=3, copies=2, batch_index=[3, 5])
    assert part.batch_index == [3, 5, 6, 8] == repeated_index([3, 5], 2)
    assert torch.equal(part.z[:3], whole.z[[3, 5, 6]])


def test_sources_are_given_to_their_candidates():
    sources = candidate_sources(2, 3)
    assert torch.equal(with_sources(IMAGES, sources, "source", "latent"), IMAGES.repeat(3, 1, 1, 1))
    assert torch.equal(with_sources(IMAGES, Sources([1, 0, 0, 1], 2), "source", "latent"), IMAGES[[1, 0, 0, 1]])
    kept = with_sources(IMAGES, Sources([1, 1], 2), "source", "latent")  # the best two are of one image
    assert torch.equal(kept, IMAGES[[1, 1]])
    repeated = IMAGES.repeat(3, 1, 1, 1)
    assert with_sources(repeated, sources, "source", "latent") is repeated
    assert len(with_sources(IMAGES[:1], sources, "source", "latent")) == 1
    assert with_sources(IMAGES, None, "source", "latent") is IMAGES
    schedule = MaskSchedule((IMAGES[None, :, :1] > 0).float())
    assert torch.equal(schedule.with_sources(sources).masks, schedule.masks.repeat(1, 3, 1, 1, 1))


def test_misfits_are_refused_by_name():
    with pytest.raises(ShapeError, match=r"mask has 3 entries but latent has 6 candidates of 2 sources"):
        with_sources(IMAGES[[0, 1, 1]], candidate_sources(2, 3), "mask", "latent")
    with pytest.raises(ShapeError, match="source has 4 entries"):  # reordered since: which copy is whose is not known
        with_sources(IMAGES.repeat(2, 1, 1, 1), Sources([1, 0, 0, 1], 2), "source", "latent")
    with pytest.raises(ShapeError, match=r"latent has 2 entries but carries the sources of 6"):
        checked_sources(candidate_sources(2, 3), 2, "latent")
    assert checked_sources(Sources([0] * 6, 1), 2, "latent") == Sources([0, 0], 1)
    with pytest.raises(ParameterError, match="copies is 0"):
        noised_candidates(ToyDenoiser(pointwise()), IMAGES, 1.0, seed=0, copies=0)
