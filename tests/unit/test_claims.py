"""How the tables of claims compare methods: two columns, and no sum that lets one pay for the other."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from editkit.headless.claims import thin_masks
from editkit.headless.claims import trials as t
from editkit.headless.claims.backgrounds import (
    DECODER,
    PLAIN,
    Edit,
    Method,
    background_claims,
    background_table,
    comparison,
    print_table,
)
from editkit.pipelines.evaluation.metrics import PSNR_CAP
from editkit.tests.toy_codec import ToyCodec, box, smooth_image


def method(name: str, psnr: float, seam: float) -> Method:
    spread = torch.tensor([-0.5, 0.5], dtype=torch.float64)
    outside = torch.full_like(spread, psnr) if psnr == PSNR_CAP else psnr + spread
    return Method(name, outside, seam / 255 + 1e-4 * spread, torch.ones_like(spread))


@pytest.mark.parametrize(
    "psnr, seam, passed",
    [(40.0, 0.1, True), (48.0, 0.3, True), (PSNR_CAP, 90.0, True), (48.0, 0.1, False), (PSNR_CAP, 0.1, False)],
)
def test_a_background_method_is_beaten_only_in_both_columns(psnr, seam, passed):
    """Neither the dB of an exact paste nor the seam of a smooth latent outweighs the other column."""
    claim = comparison(method(DECODER, 45.0, 0.2), method("rival", psnr, seam))
    assert claim.passed == passed
    assert "dB" in claim.text or psnr == PSNR_CAP
    assert "seam" in claim.text


def test_the_background_table_has_two_columns_and_no_sum(capsys):
    table = [method(PLAIN, 38.0, 0.15), method(DECODER, 48.0, 0.1), method("pixels", PSNR_CAP, 0.7)]
    print_table(table)
    head, plain, tuned, pixels = capsys.readouterr().out.splitlines()
    assert "outside dB" in head and "seam /255" in head and "sum" not in head
    assert plain.endswith("tuned decoder") and tuned.endswith("  -")
    assert "exact" in pixels
    assert all(claim.passed for claim in background_claims(table))


def test_every_background_method_is_measured_on_the_same_edits():
    codec = ToyCodec()
    source, mask = smooth_image(1, 16, 16), box(1, 16, 16, (4, 12), (4, 12))
    denoiser = SimpleNamespace(channels=3, scale_in=lambda z: z * 0.5)
    edit = Edit(codec.encode(1 - source), source, mask)
    table = background_table(SimpleNamespace(codec=codec, denoiser=denoiser), [edit, edit])
    assert [len(found.psnr) for found in table] == [2] * 6
    assert [found.name for found in table if found.exact] == ["poisson", "pixels"]
    assert table[1].psnr.mean() > table[0].psnr.mean()


def test_thin_masks_are_compared_with_the_mask_dilated_throughout():
    mask = torch.zeros(1, 12, 12)
    mask[:, 5, 3:9] = 1
    masks = thin_masks.SCHEDULES[thin_masks.BASELINE](mask).masks
    assert len(masks) == 1 and masks.sum() == 3 * 8  # one latent pixel more on every side, at every step
    assert thin_masks.SCHEDULES[thin_masks.PUBLISHED](mask).masks[-1].sum() == 6


def test_thin_masks_are_measured_on_fresh_strokes_below_a_ceiling():
    chosen_on = {t.thin_stroke(i).prompt + str(t.thin_stroke(i).mask.sum()) for i in range(16)}
    fresh = [t.thin_stroke(thin_masks.FRESH + i) for i in range(16)]
    assert not chosen_on & {trial.prompt + str(trial.mask.sum()) for trial in fresh}
    hits = thin_masks.verdicts(t.targets_of(fresh), fresh)
    assert 0.6 <= sum(hits) / len(hits) < 1.01
    assert not any(thin_masks.verdicts(t.images_of(fresh)[0], fresh))
