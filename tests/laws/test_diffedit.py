"""DiffEdit's mask, masked decode and the whole method on toys (T12; methods.md, 6)."""

from __future__ import annotations

import logging
import sys

import pytest
import torch

from editkit.pipelines.core.errors import MismatchError, ParameterError, ShapeError
from editkit.pipelines.core.guidance import EditPrompts
from editkit.pipelines.core.masks import constant_schedule, dilation_schedule
from editkit.pipelines.core.noise import seeded_noise
from editkit.pipelines.core.protocols import Context
from editkit.pipelines.diffedit.edit import DiffEditSettings, diffedit, masked_decode
from editkit.pipelines.diffedit.mask import MaskNegatives, MaskRule, diffedit_mask, strength_sigma
from editkit.pipelines.inversion.ddim import InversionOptions, invert
from editkit.tests.toys import ToyDenoiser, prompt, random_latent

B, C, H, W = 2, 4, 6, 5
EXACT = InversionOptions("implicit", iterations=80, tolerance=1e-10)


def box() -> torch.Tensor:
    mask = torch.zeros(1, H, W)
    mask[:, 2:4, 1:4] = 1
    return mask


def local(z, sigma, value):
    """The prompt's number acts in the box only, more where the noise is high; elsewhere it changes little."""
    return torch.tanh(z / (1 + sigma)) + value * (0.1 + box()[:, None]) * (1 + 0.2 * torch.tanh(z))


def curved(z, sigma, value):
    return z - sigma * (torch.sin(z) + value)


def found(denoiser, latent=None, source=0.0, target=1.0, seeds=(4, 5), **kwargs):
    latent = random_latent(len(seeds), C, H, W, seed=3) if latent is None else latent
    return diffedit_mask(denoiser, latent, prompt(source), prompt(target), seeds=list(seeds), **kwargs)


# the mask


class ByRow(ToyDenoiser):
    """Row b of a context acts on image b, in the box."""

    def denoise(self, z, sigma, contexts):
        self.forward_passes += len(contexts) * len(z)
        values = [c.tokens.mean(dim=(1, 2)).view(-1, 1, 1, 1) for c in contexts]
        assert all(len(v) in (1, len(z)) for v in values)
        assert all(c.pooled is None or len(c.pooled) == len(c.tokens) for c in contexts)
        return torch.stack([torch.tanh(z) + v * box()[:, None] * (1 + z.abs()) for v in values])


@pytest.mark.parametrize("flow", [False, True])
def test_the_mask_is_where_the_prompts_differ(flow):
    result = found(ToyDenoiser(local, flow=flow), sigma=0.5)
    assert torch.equal(result.mask, box().expand(B, H, W)) and result.empty == []
    assert (result.heat[:, 2:4, 1:4] > 0.5).all()


def test_rows_are_two_per_map_and_picture():
    for maps, batch in ((10, 1), (3, 2)):
        denoiser = ToyDenoiser(local)
        found(denoiser, seeds=range(batch), maps=maps)
        assert denoiser.forward_passes == 2 * maps * batch and denoiser.calls == 1


def test_guidance_and_parameterisation_do_not_change_the_mask():
    """Both prompts guided against one negative at 7.5, and differences of eps: proportional, so one mask (T12)."""

    def guided_eps(z, sigma, value):
        clean = local(z, sigma, -0.5) + 7.5 * (local(z, sigma, value) - local(z, sigma, -0.5))
        return (z - clean) / sigma

    plain, other = found(ToyDenoiser(local)), found(ToyDenoiser(guided_eps))
    assert torch.equal(plain.mask, other.mask) and torch.allclose(plain.heat, other.heat, atol=1e-4)


def test_negatives_of_the_mask_guide_each_prediction():
    """|s_n + w (s - s_n) - (t_n + w (t - t_n))|: here values s, t plus negatives, so w (t - s) + (1 - w) (t_n - s_n)."""

    def field(z, sigma, value):
        return value * (0.1 + box()[:, None]) + 0 * z

    for source_negative, target_negative, difference in ((-0.5, -0.5, 7.5), (0.0, 1.0, 1.0), (1.0, 0.0, 14.0)):
        negatives = MaskNegatives(prompt(source_negative), prompt(target_negative))
        denoiser = ToyDenoiser(field)
        calls = list(_differences_of(denoiser, negatives))
        assert denoiser.forward_passes == 4 * B * len(calls)
        for found_difference, _ in calls:
            assert torch.allclose(found_difference, difference * (0.1 + box()).expand(B, H, W), rtol=1e-5)


def _differences_of(denoiser, negatives):
    seen = []
    original = MaskRule()
    found(
        denoiser,
        maps=1,
        negatives=negatives,
        rule=lambda difference: seen.append((difference, 0)) or original(difference),
    )
    return seen


def test_equal_negatives_leave_the_mask_as_it_is_without_them():
    same = MaskNegatives(prompt(-0.5), prompt(-0.5))
    plain, guided = found(ToyDenoiser(local)), found(ToyDenoiser(local), negatives=same)
    assert torch.equal(plain.mask, guided.mask) and torch.allclose(plain.heat, guided.heat, atol=1e-5)
    with pytest.raises(ParameterError, match="guidance_scale of the mask is 0"):
        MaskNegatives(prompt(), prompt(), 0.0)


def test_chunks_do_not_change_the_mask():
    whole = found(ToyDenoiser(local), maps=5)
    for rows in (1, 2, 5, 7):
        denoiser = ToyDenoiser(local)
        part = found(denoiser, maps=5, max_batch=rows)
        assert torch.equal(part.heat, whole.heat) and denoiser.forward_passes == 20 and denoiser.calls > 1


def test_memory_that_runs_out_halves_the_chunk():
    class Small(ToyDenoiser):
        def denoise(self, z, sigma, contexts):
            if len(z) * len(contexts) > 9:
                raise torch.cuda.OutOfMemoryError("too much")
            return super().denoise(z, sigma, contexts)

    small = Small(local)
    assert torch.equal(found(small, maps=5).heat, found(ToyDenoiser(local), maps=5).heat) and small.calls == 3

    class None_(ToyDenoiser):
        def denoise(self, z, sigma, contexts):
            raise torch.cuda.OutOfMemoryError("too much")

    with pytest.raises(torch.cuda.OutOfMemoryError):
        found(None_(local))


def test_both_prompts_see_the_same_noise_and_maps_see_different_ones():
    seen = []
    denoiser = ToyDenoiser(lambda z, sigma, value: seen.append(z.clone()) or local(z, sigma, value))
    latent = random_latent(B, C, H, W, seed=3)
    found(denoiser, latent, maps=3, sigma=2.0)
    assert torch.equal(seen[0], seen[1])
    noises = ((seen[0].view(3, B, C, H, W) - latent) / 2).flatten(2)
    for j in range(3):
        assert torch.allclose(noises[j].view(B, C, H, W), seeded_noise((C, H, W), [4, 5], draw=j), atol=1e-6)
    assert (noises.std(dim=0) > 0.01).any() and not torch.allclose(noises[:, 0], noises[:, 1])


def test_the_order_of_the_noises_does_not_matter(monkeypatch):
    noisy = ToyDenoiser(lambda z, sigma, value: torch.tanh(z) + value * (0.1 + box()[:, None]) * (1 + z.abs()))
    first = found(noisy, maps=4)
    module = sys.modules["editkit.pipelines.diffedit.mask"]
    monkeypatch.setattr(
        module,
        "seeded_noise",
        lambda *args, draw, **kwargs: seeded_noise(*args, draw=3 - draw, **kwargs),
    )
    turned = found(noisy, maps=4)
    assert torch.equal(first.mask, turned.mask) and torch.allclose(first.heat, turned.heat, atol=1e-6)
    monkeypatch.setattr(module, "seeded_noise", lambda *a, **k: seeded_noise(*a))  # one for all maps
    assert not torch.allclose(first.heat, found(noisy, maps=4).heat, atol=1e-3)


def test_batch_equals_single_pictures():
    latent = random_latent(3, C, H, W, seed=6) * torch.tensor([0.1, 1.0, 4.0]).view(3, 1, 1, 1)
    together = found(ToyDenoiser(local), latent, seeds=(7, 8, 9))
    for i in range(3):
        alone = found(ToyDenoiser(local), latent[i : i + 1], seeds=(7 + i,))
        assert torch.equal(together.mask[i : i + 1], alone.mask)
        assert torch.allclose(together.heat[i : i + 1], alone.heat, atol=1e-6)


def test_one_context_row_per_picture_is_repeated_with_the_noises():
    """Row b of a context belongs to image b in every copy of the batch."""
    rows = Context(torch.stack([torch.zeros(2, 3), torch.ones(2, 3)]), pooled=torch.zeros(2, 4))
    latent = random_latent(B, C, H, W, seed=3)
    result = diffedit_mask(ByRow(local), latent, prompt(0.0), rows, seeds=[1, 2], maps=4)
    assert result.mask[0].sum() == 0 and torch.equal(result.mask[1:], box()) and result.empty == [0]


@pytest.mark.parametrize("noise", [0.0, 1e-7])
def test_equal_prompts_give_an_empty_mask_and_a_warning(caplog, noise):
    """Also where two rows of one call differ by rounding, as they do on real hardware."""
    count = iter(range(100))
    denoiser = ToyDenoiser(lambda z, sigma, value: z * (1 + noise * next(count)))
    with caplog.at_level(logging.WARNING, "editkit"):
        result = found(denoiser, target=0.0)
    assert result.mask.sum() == 0 and (result.heat == 0).all() and result.empty == [0, 1]
    assert "image 0, 1" in caplog.text


def test_strength_is_a_place_on_the_grid():
    denoiser = ToyDenoiser(local)
    assert strength_sigma(denoiser, 0.5) == float(denoiser.schedule(50)[25])
    by_strength, by_sigma = found(denoiser), found(denoiser, sigma=strength_sigma(denoiser, 0.5))
    assert torch.equal(by_strength.heat, by_sigma.heat)
    assert not torch.equal(by_strength.heat, found(denoiser, sigma=0.1).heat)


def test_impossible_masks_are_refused():
    with pytest.raises(ParameterError, match="maps"):
        found(ToyDenoiser(local), maps=0)
    with pytest.raises(ShapeError, match="seeds"):
        found(ToyDenoiser(local), random_latent(3, C, H, W))


# the decode


def inverted(denoiser, batch: int = B, steps: int = 10, options=None, context=None):
    latent = random_latent(batch, C, H, W, seed=3)
    sigmas = torch.linspace(2, 0, steps + 1)
    return invert(denoiser, latent, context or prompt(0.25), sigmas, options=options or InversionOptions("current"))


PROMPTS = EditPrompts(prompt(1.0), prompt(0.0), 3.0)


def test_masked_decode_by_hand():
    denoiser = ToyDenoiser(curved)
    path, mask = inverted(denoiser), box()[:, None]
    levels, z = path.sigmas.tolist(), path.latent(2)
    for i in range(2, 10):
        clean = curved(z, levels[i], 0.0) + 3 * (curved(z, levels[i], 1.0) - curved(z, levels[i], 0.0))
        z = z + (levels[i + 1] - levels[i]) * (z - clean) / levels[i]
        z = mask * z + (1 - mask) * path.latent(i + 1)
    denoiser.forward_passes = 0
    out = masked_decode(denoiser, path, constant_schedule(box()), PROMPTS, ratio=0.8)
    assert torch.allclose(out, z, atol=1e-5) and denoiser.forward_passes == 2 * 8 * B
    assert torch.equal(out[mask.expand_as(out) == 0], path.source[mask.expand_as(out) == 0])


def test_empty_mask_returns_the_source_bit_for_bit():
    denoiser = ToyDenoiser(curved)
    path = inverted(denoiser)
    assert torch.equal(masked_decode(denoiser, path, constant_schedule(box() * 0), PROMPTS), path.source)


def test_full_mask_with_the_prompt_of_the_inversion_reconstructs():
    denoiser = ToyDenoiser(curved)
    latent = random_latent(B, C, H, W, seed=3).double()
    path = invert(denoiser, latent, prompt(0.25), torch.linspace(2, 0, 11), options=EXACT)
    full = constant_schedule(torch.ones(1, H, W))
    out = masked_decode(denoiser, path, full, EditPrompts(prompt(0.25), None, 1.0))
    assert (out - latent).norm() < 1e-6 * latent.norm()


def test_legacy_offset_puts_back_the_level_before():
    denoiser = ToyDenoiser(curved)
    path = inverted(denoiser)
    out = masked_decode(denoiser, path, constant_schedule(box()), PROMPTS, legacy_offset=True)
    outside = (box()[:, None] == 0).expand_as(out)
    kept = path.latent(path.steps - 1) / (1 + float(path.sigmas[-2]) ** 2) ** 0.5
    assert torch.allclose(out[outside], kept[outside], rtol=1e-6, atol=1e-7)
    assert not torch.equal(path.latent(path.steps - 1), path.source)


def test_decode_takes_any_schedule():
    denoiser = ToyDenoiser(
        lambda z, sigma, value: curved(z + 0.1 * sigma * z.roll(1, -1), sigma, value)
    )  # neighbours matter
    path = inverted(denoiser)
    out = masked_decode(denoiser, path, dilation_schedule(box(), (3, 1)), PROMPTS)
    plain = masked_decode(denoiser, path, constant_schedule(box()), PROMPTS)
    assert not torch.equal(out, plain)
    outside = (box()[:, None] == 0).expand_as(out)
    assert torch.equal(out[outside], plain[outside])


def test_decode_refuses_what_does_not_fit():
    denoiser = ToyDenoiser(curved)
    path = inverted(denoiser)
    with pytest.raises(ShapeError, match="schedule is made for"):
        masked_decode(denoiser, path, constant_schedule(torch.ones(1, H, W + 1)), PROMPTS)
    short = invert(denoiser, path.source_latent, prompt(), path.sigmas, ratio=0.5, options=InversionOptions("current"))
    with pytest.raises(MismatchError, match="larger encoding ratio"):
        masked_decode(denoiser, short, constant_schedule(box()), PROMPTS, ratio=0.6)
    other = ToyDenoiser(curved)
    other.fingerprint = "other"
    with pytest.raises(MismatchError, match="another model"):
        masked_decode(other, path, constant_schedule(box()), PROMPTS)


def test_one_path_serves_several_masks():
    denoiser = ToyDenoiser(curved)
    path = inverted(denoiser, batch=1)
    masks = torch.cat([box(), 1 - box()])
    both = masked_decode(denoiser, path, constant_schedule(masks), PROMPTS)
    for i in range(2):
        assert torch.equal(both[i : i + 1], masked_decode(denoiser, path, constant_schedule(masks[i : i + 1]), PROMPTS))


# the whole method


def test_the_whole_method_costs_140_rows_and_leaves_the_outside():
    denoiser = ToyDenoiser(local, scale=0.18215)
    latent, seen = random_latent(1, C, H, W, seed=3), []
    result = diffedit(
        denoiser, latent, prompt(0.0), prompt(1.0), prompt(0.0), seeds=[4],
        progress=lambda done, total, preview=None: seen.append((done, total)),
    )  # fmt: skip
    assert denoiser.forward_passes == 20 + 40 + 80
    assert torch.equal(result.mask.mask, box())
    outside = (box()[:, None] == 0).expand_as(latent)
    assert torch.equal(result.latent[outside], latent[outside]) and (result.latent != latent)[~outside].all()
    assert seen == [(i + 1, 90) for i in range(90)]
    assert result.trajectory is not None and result.trajectory.first == 10


def test_the_whole_method_with_nothing_to_do_costs_only_the_mask():
    denoiser = ToyDenoiser(local)
    latent = random_latent(2, C, H, W, seed=3)
    result = diffedit(denoiser, latent, prompt(0.5), prompt(0.5), prompt(0.0), seeds=[4, 5])
    assert torch.equal(result.latent, latent) and result.trajectory is None and denoiser.forward_passes == 40


def test_in_a_batch_pictures_with_nothing_to_do_come_back_and_the_others_are_edited_as_alone():
    source = prompt(0.0)
    target = Context(torch.stack([torch.ones(2, 3), torch.zeros(2, 3), torch.full((2, 3), 2.0)]))
    latent = random_latent(3, C, H, W, seed=3)
    settings = DiffEditSettings(steps=10, guidance_scale=2.0)

    def edit(latent, target, seeds):
        return diffedit(ByRow(local, scale=0.5), latent, source, target, prompt(0.1), seeds=seeds, settings=settings)

    together = edit(latent, target, [4, 5, 6])
    assert together.mask.empty == [1] and torch.equal(together.latent[1], latent[1])
    for i in (0, 2):
        alone = edit(latent[i : i + 1], target.with_tokens(target.tokens[i : i + 1]), [4 + i])
        assert torch.equal(together.latent[i : i + 1], alone.latent)
        assert not torch.equal(together.latent[i], latent[i])


def test_settings_reach_their_steps():
    denoiser, latent = ToyDenoiser(local), random_latent(1, C, H, W, seed=3)
    rule, inversion = MaskRule(clip_ratio=5), InversionOptions("implicit", iterations=3, tolerance=1e-12)
    settings = DiffEditSettings(10, 0.5, 3, 0.3, 1.0, legacy_offset=True, rule=rule, inversion=inversion)
    result = diffedit(
        denoiser, latent, prompt(0.0), prompt(1.0), None, seeds=[4], settings=settings, inversion=prompt(0.2)
    )
    assert denoiser.forward_passes == 6 + 3 * 5 + 5
    mask = {"latent": latent, "seeds": (4,), "maps": 3, "sigma": strength_sigma(denoiser, 0.3)}
    assert torch.equal(result.mask.heat, found(denoiser, rule=rule, **mask).heat)
    assert not torch.equal(result.mask.heat, found(denoiser, **mask).heat)
    outside = (box()[:, None] == 0).expand_as(latent)
    kept = result.trajectory.latent(9) / (1 + float(result.trajectory.sigmas[9]) ** 2) ** 0.5
    assert torch.allclose(result.latent[outside], kept[outside], rtol=1e-6, atol=1e-7)
    with pytest.raises(MismatchError):
        result.trajectory.check_prompt(prompt(0.0), "positive")
    result.trajectory.check_prompt(prompt(0.2), "positive")
