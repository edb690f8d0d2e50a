"""Early elimination: with all kept it is the plain batch, with few kept it saves their calls (docs/methods.md, section 4)."""

from __future__ import annotations

import pytest
import torch

from editkit.pipelines.blended.elimination import Elimination, sample_eliminating
from editkit.pipelines.blended.pipeline import sample_blended
from editkit.pipelines.core.errors import ParameterError
from editkit.pipelines.core.guidance import EditPrompts
from editkit.pipelines.core.masks import constant_schedule
from editkit.tests.toys import ToyDenoiser, pointwise, prompt, random_latent

SEEDS = [3, 1, 4, 15, 9, 2]


def run(keep: int | None, score=lambda latents: latents.mean((1, 2, 3)), at: float = 0.3):
    """Latents of six candidates or of those kept, and the forward passes."""
    denoiser = ToyDenoiser(pointwise())
    mask = torch.zeros(1, 6, 5)
    mask[:, 2:, 1:4] = 1
    source, sigmas = random_latent(1, 4, 6, 5), denoiser.schedule(10)
    rest = (sigmas, constant_schedule(mask), EditPrompts(prompt(1.0), prompt(0.0), 4.0))
    if keep is None:
        result = sample_blended(denoiser, source.expand(6, -1, -1, -1), *rest, seeds=SEEDS)
    else:
        result = sample_eliminating(denoiser, source, *rest, Elimination(keep, at, score), seeds=SEEDS)
    return result, denoiser.forward_passes


def test_with_everything_kept_it_is_the_plain_batch_bit_for_bit():
    plain, passes = run(None)
    kept, same = run(6)
    more, _ = run(99)
    assert torch.equal(kept, plain) and torch.equal(more, plain) and same == passes == 2 * 6 * 10


def test_the_best_run_on_as_they_would_in_the_whole_batch():
    plain, _ = run(None)
    seen = []

    def score(latents):
        seen.append(latents)
        return torch.tensor([0.1, 0.9, 0.2, 0.9, 0.9, 0.0])

    kept, passes = run(2, score)
    assert torch.equal(kept, plain[[1, 3]])  # equal scores keep the first
    assert passes == 2 * (6 * 3 + 2 * 7)
    assert len(seen) == 1 and seen[0].shape == plain.shape
    assert torch.equal(seen[0][:, :, 0], plain[:, :, 0])  # the source outside the mask
    assert torch.equal(run(2, score)[0], kept)


def test_refusals():
    for keep, at in ((0, 0.3), (True, 0.3), (1, 0.0), (1, 1.0), (1, float("nan"))):
        with pytest.raises(ParameterError):
            Elimination(keep, at, torch.sum)
    with pytest.raises(ParameterError, match="needs 2 or more"):
        Elimination(1, 0.5, torch.sum).step(1)
    assert [Elimination(1, at, torch.sum).step(10) for at in (0.01, 0.3, 0.99)] == [1, 3, 9]
