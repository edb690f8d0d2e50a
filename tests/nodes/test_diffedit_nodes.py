"""DiffEdit's nodes on toys: the pipelines' own numbers, exact outsides, compositions and refusals by name."""

from __future__ import annotations

import logging

import pytest
import torch

from editkit.hosts.latent import finished_out
from editkit.hosts.sockets import HeadlessVae
from editkit.hosts.trajectory import trajectory_in
from editkit.pipelines.core.errors import EditError, MismatchError, ParameterError, ShapeError
from editkit.pipelines.core.guidance import EditPrompts
from editkit.pipelines.core.masks import constant_schedule
from editkit.pipelines.core.noise import image_seeds
from editkit.pipelines.diffedit.edit import masked_decode
from editkit.pipelines.diffedit.mask import MaskNegatives, MaskRule, diffedit_mask, mask_in_pixels, strength_sigma
from editkit.tests.nodes.graph import call
from editkit.tests.nodes.toy_graph import STEPS, encoded, inverted, model, sigmas, text
from editkit.tests.toy_codec import ToyCodec, box
from editkit.tests.toys import prompt

HEIGHT, WIDTH = 24, 20  # 6 x 5 latent pixels
LATENT_PIXELS = (HEIGHT // 4, WIDTH // 4)


def local(z, sigma, value):
    """The prompt's number acts in a box of the grid; elsewhere it changes little."""
    here = box(1, *z.shape[-2:], (2, 4), (1, 4))[:, None]
    return torch.tanh(z / (1 + sigma)) + value * (0.1 + here) * (1 + 0.2 * torch.tanh(z))


def found(host, latent, source=0.0, target=1.0, **options):
    return call("DiffEditMask", model=host, latent=latent, source=text(source), target=text(target), **options)


def decoded(host, trajectory, mask, **options):
    settings = {"cfg": 3.0, "encoding_ratio": 1.0, **options}
    return call(
        "MaskedDecode", model=host, positive=text(2.0), negative=text(0.0), trajectory=trajectory, latent_mask=mask,
        **settings,
    )[0]  # fmt: skip


@pytest.fixture
def latent_pixels():
    return box(1, *LATENT_PIXELS, (2, 4), (1, 4))


# the mask


def test_the_mask_is_the_pipelines():
    host, (_, latent) = model(local), encoded(2)
    mask, latent_mask, heat, soft = found(host, latent, maps=3, strength=0.4, threshold=0.3, seed=7, clip_ratio=2.0)
    denoiser = host.denoiser
    assert denoiser.forward_passes == 2 * 3 * 2
    wanted = diffedit_mask(
        denoiser, latent["samples"], prompt(0.0), prompt(1.0), seeds=image_seeds(7, 2), maps=3,
        sigma=strength_sigma(denoiser, 0.4), rule=MaskRule(2.0, 0.3),
    )  # fmt: skip
    assert torch.equal(latent_mask, wanted.mask) and torch.equal(soft, wanted.heat)
    assert 0 < latent_mask.mean() < 1
    assert torch.equal(mask, mask_in_pixels(wanted.mask, 4, HEIGHT, WIDTH))
    assert heat.shape == (2, HEIGHT, WIDTH, 3) and heat.min() >= 0 and heat.max() <= 1


def test_a_sigma_takes_the_place_of_the_strength():
    host, (_, latent) = model(local), encoded()
    sigma = strength_sigma(host.denoiser, 0.3)
    assert torch.equal(found(host, latent, strength=0.9, sigma=sigma)[3], found(host, latent, strength=0.3)[3])
    assert not torch.equal(found(host, latent, strength=0.9)[3], found(host, latent, strength=0.3)[3])


def test_negatives_of_the_mask_come_in_pairs():
    host, (_, latent) = model(local), encoded()
    given = {"source_negative": text(0.5), "target_negative": text(-1.0), "mask_cfg": 3.0}
    soft = found(host, latent, maps=2, seed=7, **given)[3]
    assert host.denoiser.forward_passes == 4 * 2
    wanted = diffedit_mask(
        host.denoiser, latent["samples"], prompt(0.0), prompt(1.0), seeds=[7], maps=2,
        negatives=MaskNegatives(prompt(0.5), prompt(-1.0), 3.0),
    )  # fmt: skip
    assert torch.equal(soft, wanted.heat)
    with pytest.raises(ParameterError, match="target_negative is not connected"):
        found(host, latent, source_negative=text(0.5))
    whole = {"model": host, "latent": latent, "source": text(0.0), "target": text(1.0), "negative": text(0.0)}
    latent_mask = call("DiffEdit", **whole, steps=STEPS, maps=2, seed=7, **given)[2]
    assert torch.equal(latent_mask, wanted.mask)


def test_equal_prompts_give_an_empty_mask_and_a_warning(caplog):
    host, (_, latent) = model(local), encoded(2)
    with caplog.at_level(logging.WARNING, "editkit"):
        mask, latent_mask, heat, _ = found(host, latent, source=1.0)
    assert mask.sum() == latent_mask.sum() == heat.sum() == 0
    assert any("nothing to change in image 0, 1" in record.message for record in caplog.records)


def test_a_mask_does_not_depend_on_its_batch_unless_it_shall():
    def strong(z, sigma, value):
        return local(z, sigma, value * (1 + 20 * z.mean(dim=(1, 2, 3), keepdim=True).abs()))

    host, (_, latent) = model(strong), encoded(2)
    both = found(host, latent, maps=2)[3]
    alone = found(host, finished_out(latent["samples"][1:], {"editkit_factor": 4, "batch_index": [1]}), maps=2)[3]
    assert torch.allclose(both[1:], alone, atol=1e-6)
    assert not torch.allclose(found(host, latent, maps=2, batch_mean=True)[3][1:], alone, atol=1e-3)


def test_islands_are_dropped_and_differences_smoothed():
    def speck(z, sigma, value):
        return local(z, sigma, value) + value * box(1, *z.shape[-2:], (0, 1), (4, 5))[:, None] * 1.5

    host, (_, latent) = model(speck), encoded()
    corner = (0, 0, -1)
    assert found(host, latent)[1][corner] == 1 and found(host, latent, smallest_island=2)[1][corner] == 0
    assert found(host, latent, smooth=3)[3][corner] < found(host, latent)[3][corner]
    with pytest.raises(ParameterError, match="smooth is 2"):
        found(host, latent, smooth=2)


@pytest.mark.parametrize("height, width", [(21, 19), (5, 40), (4, 4)])
def test_masks_have_the_images_own_size(height, width):
    host, (_, latent) = model(local), encoded(1, height, width)
    mask, latent_mask, heat, _ = found(host, latent, maps=1)
    assert mask.shape == (1, height, width) and heat.shape == (1, height, width, 3)
    assert latent_mask.shape[1:] == latent["samples"].shape[2:]


def test_a_foreign_latent_needs_the_vae_for_the_size():
    host, (_, latent) = model(local), encoded()
    foreign = {"samples": latent["samples"]}
    with pytest.raises(ParameterError, match="connect vae"):
        found(host, foreign)
    assert found(host, foreign, vae=HeadlessVae(ToyCodec()))[0].shape == (1, HEIGHT, WIDTH)
    assert host.denoiser.forward_passes == 20


@pytest.mark.parametrize("mode", ["max", "area", "nearest"])
@pytest.mark.parametrize("height, width", [(24, 20), (21, 19)])
def test_the_mask_goes_into_the_mask_nodes(mode, height, width):
    host, (_, latent) = model(local), encoded(2, height, width)
    mask, latent_mask, *_ = found(host, latent)
    latent_pixels, kept = call("LatentMask", mask=mask, latent=latent, mode=mode)
    assert torch.equal(latent_pixels, latent_mask) and kept == 1
    schedule = call("DilationSchedule", latent_mask=latent_pixels, kernels="3,1")[0]
    assert (
        torch.equal(schedule.at(9, torch.linspace(1, 0, 11))[:, 0], latent_mask)
        and schedule.at(0, torch.linspace(1, 0, 11)).sum() > latent_mask.sum()
    )


# the masked decode


def test_the_decode_is_the_pipelines_and_its_outside_is_the_source(latent_pixels):
    host, (_, latent) = model(local, scale=0.3), encoded(2)
    held = inverted(host, latent)[0]
    ours = decoded(host, held, latent_pixels, encoding_ratio=0.5)
    trajectory = trajectory_in(held)
    wanted = masked_decode(
        host.denoiser, trajectory, constant_schedule(latent_pixels), EditPrompts(prompt(2.0), prompt(), 3.0), ratio=0.5
    )  # fmt: skip
    outside = (latent_pixels[:, None] == 0).expand_as(wanted)
    assert torch.allclose(ours["samples"], wanted)
    assert torch.equal(ours["samples"][outside], latent["samples"][outside])
    assert (ours["samples"][~outside] - latent["samples"][~outside]).abs().min() > 1e-3


def test_the_decode_counts_its_rows(latent_pixels):
    host, (_, latent) = model(local), encoded()
    held = inverted(host, latent, encoding_ratio=0.5)[0]
    before = host.denoiser.forward_passes
    decoded(host, held, latent_pixels, encoding_ratio=0.5)
    assert host.denoiser.forward_passes - before == 2 * 3
    decoded(host, held, latent_pixels, encoding_ratio=0.5, cfg=1.0)
    assert host.denoiser.forward_passes - before == 3 * 3


def test_the_published_offset_ends_one_sigma_early(latent_pixels):
    host, (_, latent) = model(local), encoded()
    held = inverted(host, latent)[0]
    ours, outside = decoded(host, held, latent_pixels, legacy_offset=True)["samples"], (latent_pixels == 0)[0]
    trajectory = trajectory_in(held)
    kept = trajectory.latent(trajectory.steps - 1) / (1 + float(trajectory.sigmas[-2]) ** 2) ** 0.5
    assert torch.allclose(ours[..., outside], kept[..., outside], rtol=1e-6, atol=1e-7)
    assert not torch.equal(ours[..., outside], latent["samples"][..., outside])


def test_the_decode_keeps_the_images_own_size(latent_pixels):
    host, (_, latent) = model(local), encoded(1, 21, 19)
    edited = decoded(host, inverted(host, latent)[0], latent_pixels)
    assert call("DecodeLatent", latent=edited, vae=HeadlessVae(ToyCodec()))[0].shape == (1, 21, 19, 3)


def test_one_image_and_many_masks():
    host, (_, latent) = model(local), encoded()
    held, masks = (
        inverted(host, latent)[0],
        torch.cat([box(1, *LATENT_PIXELS, (0, 2), (0, 2)), torch.zeros(1, *LATENT_PIXELS)]),
    )
    edited = decoded(host, held, masks)["samples"]
    assert torch.equal(edited[1:], latent["samples"]) and not torch.equal(edited[:1], latent["samples"])
    assert torch.equal(edited[:1], decoded(host, held, masks[:1])["samples"])


def test_a_trajectory_of_something_else_is_refused(latent_pixels):
    host, (_, latent) = model(local), encoded()
    held = inverted(host, latent, encoding_ratio=0.5)[0]
    other = model(local)
    other.denoiser.fingerprint = "other"
    with pytest.raises(MismatchError, match="another model"):
        decoded(other, held, latent_pixels, encoding_ratio=0.5)
    with pytest.raises(MismatchError, match="larger encoding ratio"):
        decoded(host, held, latent_pixels, encoding_ratio=0.8)
    with pytest.raises(ShapeError, match="schedule is made for 4 x 4"):
        decoded(host, held, torch.ones(1, 4, 4), encoding_ratio=0.5)
    with pytest.raises(EditError, match="trajectory is a DeviceLatent: connect"):
        decoded(host, latent, latent_pixels)


# the whole method


def test_one_node_equals_the_three():
    host, (_, latent) = model(local, scale=0.3), encoded(2)
    edited, mask, latent_mask, heat = call(
        "DiffEdit", model=host, latent=latent, source=text(0.0), target=text(2.0), negative=text(0.0), cfg=3.0,
        steps=STEPS, encoding_ratio=0.5, maps=2, strength=0.4, threshold=0.4, seed=3, mode="current",
    )  # fmt: skip
    assert host.denoiser.forward_passes == 2 * (2 * 2 + 3 + 2 * 3)
    steps = found(host, latent, target=2.0, maps=2, strength=0.4, threshold=0.4, seed=3)
    assert all(torch.equal(a, b) for a, b in zip((mask, latent_mask, heat), steps[:3], strict=True))
    held = call(
        "InvertDDIM", model=host, positive=text(0.0), latent=latent, sigmas=sigmas(host), mode="current",
        encoding_ratio=0.5,
    )[0]  # fmt: skip
    assert torch.equal(edited["samples"], decoded(host, held, latent_mask, encoding_ratio=0.5)["samples"])


def test_equal_prompts_change_nothing():
    host, (_, latent) = model(local), encoded()
    edited, mask, *_ = call(
        "DiffEdit", model=host, latent=latent, source=text(1.0), target=text(1.0), negative=text(0.0), maps=2, steps=STEPS
    )  # fmt: skip
    assert torch.equal(edited["samples"], latent["samples"]) and mask.sum() == 0
    assert host.denoiser.forward_passes == 4


def test_another_prompt_may_invert():
    host, (_, latent) = model(local), encoded()
    common = dict(
        model=host, latent=latent, source=text(0.0), target=text(2.0), negative=text(0.0), cfg=1.0, maps=1, steps=STEPS
    )  # fmt: skip
    with_source, with_other = (call("DiffEdit", **common, **extra)[0] for extra in ({}, {"inversion": text(1.5)}))
    assert not torch.equal(with_source["samples"], with_other["samples"])
    assert torch.equal(
        with_source["samples"], call("DiffEdit", **common, inversion=text(0.0))[0]["samples"]
    )  # fmt: skip


# negatives that an inversion made


def test_embeddings_stand_in_for_the_negative(latent_pixels):
    host, (_, latent) = model(local), encoded()
    held, noised, *_ = inverted(host, latent)
    borrowed = call("NegativePrompt", model=host, trajectory=held, positive=text(1.0))[0]
    both = dict(model=host, positive=text(2.0), cfg=3.0)
    runs = {
        "MaskedDecode": dict(trajectory=held, latent_mask=latent_pixels, encoding_ratio=0.5, **both),
        "SDEdit": dict(latent=latent, steps=STEPS, strength=0.5, **both),
        "BlendedDenoise": dict(
            sigmas=sigmas(host), latent=noised, source_latent=latent, schedule=latent_pixels, trajectory=held, **both
        ),
        "DiffEdit": dict(
            model=host, latent=latent, source=text(0.0), target=text(2.0), cfg=3.0, steps=STEPS, encoding_ratio=0.5
        ),
    }
    for name, inputs in runs.items():
        ours, plain = (call(name, negative=negative, **inputs)[0]["samples"] for negative in (borrowed, text(1.0)))
        assert torch.equal(ours, plain), name
    with pytest.raises(MismatchError, match="embeddings was made on 6 steps"):
        call("SDEdit", negative=borrowed, **{**runs["SDEdit"], "steps": STEPS + 1})


# the blended loop along a trajectory


def along(host, latent, held, noised, mask, **options):
    settings = {"sigmas": sigmas(host), "cfg": 3.0, "latent": noised, "source_latent": latent, **options}
    return call(
        "BlendedDenoise", model=host, positive=text(2.0), negative=text(0.0), schedule=mask, trajectory=held, **settings
    )[0]  # fmt: skip


def test_the_blended_loop_follows_the_trajectory_and_draws_no_noise(latent_pixels):
    host, (_, latent) = model(local, scale=0.3), encoded(2)
    held, noised, *_ = inverted(host, latent)
    ours = along(host, latent, held, noised, latent_pixels)
    assert torch.equal(ours["samples"], decoded(host, held, latent_pixels)["samples"])
    assert torch.equal(ours["samples"], along(host, latent, held, noised, latent_pixels, seed=99)["samples"])
    half = along(host, latent, held, noised, latent_pixels, end_step=3)
    trajectory, outside = trajectory_in(held), (latent_pixels == 0)[0]
    assert torch.equal(half.z[..., outside], trajectory.latent(3)[..., outside])
    whole = along(host, latent, held, half, latent_pixels, start_step=3)
    assert torch.equal(whole["samples"], ours["samples"])


def test_a_grid_that_ends_above_0_ends_at_the_source_too(latent_pixels):
    host, (_, latent) = model(local), encoded()
    grid = sigmas(host)[:-1]
    held, noised, *_ = inverted(host, latent, grid=grid)
    ours, outside = along(host, latent, held, noised, latent_pixels, sigmas=grid), (latent_pixels == 0)[0]
    assert torch.equal(ours["samples"][..., outside], latent["samples"][..., outside])


def test_what_does_not_fit_the_trajectory_is_refused(latent_pixels):
    host, (_, latent) = model(local), encoded()
    held, noised, *_ = inverted(host, latent)
    with pytest.raises(ParameterError, match="trajectory, which draws no noise"):
        along(host, latent, held, noised, latent_pixels, background_noise="fresh")
    with pytest.raises(MismatchError, match="trajectory was made on 6 steps"):
        start = call("NoiseLatent", model=host, latent=latent, sigmas=sigmas(host, 5))[0]
        along(host, latent, held, start, latent_pixels, sigmas=sigmas(host, 5))
    other = encoded(seed=5)[1]
    with pytest.raises(MismatchError, match="another image than source_latent"):
        along(host, other, held, noised, latent_pixels)
    small = encoded(1, 16, 16)[1]
    with pytest.raises(MismatchError, match="another image than source_latent"):
        along(host, small, held, noised, latent_pixels)
    stranger = model(local)
    stranger.denoiser.fingerprint = "other"
    with pytest.raises(MismatchError, match="another model"):
        along(stranger, latent, held, {"samples": latent["samples"]}, latent_pixels)
    pair = encoded(2)[1]
    with pytest.raises(ShapeError, match="trajectory has 2, source_latent has 3"):
        along(host, encoded(3)[1], inverted(host, pair)[0], noised, latent_pixels)


# change by degrees


def test_a_soft_map_releases_cells_by_degrees():
    host, (_, latent) = model(local), encoded()
    soft = torch.linspace(0, 1, LATENT_PIXELS[1]).expand(1, *LATENT_PIXELS)
    schedule, strip = call("ReleaseSchedule", latent_mask=soft)
    free = [schedule.at(i, torch.linspace(1, 0, 5))[0, 0, 0].tolist() for i in range(4)]
    assert free == [[0, 0, 0, 0, 1], [0, 0, 0, 1, 1], [0, 0, 1, 1, 1], [0, 1, 1, 1, 1]]
    assert strip.shape == (1, 8 * (LATENT_PIXELS[0] + 1) + 8, 8 * 8 * (LATENT_PIXELS[1] + 1) + 8, 3)  # eight columns
    shown = [
        [float(strip[0, 12, 8 * (i * (LATENT_PIXELS[1] + 1) + c + 1) + 4, 0]) for c in range(LATENT_PIXELS[1])]
        for i in range(8)
    ]
    assert shown == [schedule.at(i, torch.linspace(1, 0, 9))[0, 0, 0].tolist() for i in range(8)]
    noised = call("NoiseLatent", model=host, latent=latent, sigmas=sigmas(host))[0]
    edited = call(
        "BlendedDenoise", model=host, positive=text(2.0), negative=text(), cfg=3.0, sigmas=sigmas(host), latent=noised,
        source_latent=latent, schedule=schedule,
    )[0]["samples"]  # fmt: skip
    assert torch.equal(edited[..., 0], latent["samples"][..., 0])
    assert not torch.allclose(edited[..., 1], latent["samples"][..., 1], atol=1e-3)


def test_the_soft_map_of_two_prompts_is_a_change_map():
    host, (_, latent) = model(local), encoded()
    soft = found(host, latent)[3]
    schedule = call("ReleaseSchedule", latent_mask=soft)[0]
    assert schedule.at(9, torch.linspace(1, 0, 11)).sum() > schedule.at(0, torch.linspace(1, 0, 11)).sum()
