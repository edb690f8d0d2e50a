"""Common mistakes are refused, or warned of, at the first node that can know."""

from __future__ import annotations

import logging

import pytest
import torch

from editkit.pipelines.blended.decoder_tuning import Tuning
from editkit.pipelines.core.errors import EditError, ParameterError, ShapeError
from editkit.pipelines.core.guidance import warn_of_equal_prompts
from editkit.pipelines.core.shapes import check_edit_mask, check_mask_of_grid
from editkit.tests.nodes.graph import call, classes
from editkit.tests.nodes.toy_graph import encoded, model, sigmas, text
from editkit.tests.toys import prompt


def edit_of(latent, host, **options):
    """The blended edit of a latent inside its left half."""
    mask = torch.zeros(1, *latent["samples"].shape[-2:])
    mask[..., :2] = 1
    grid = sigmas(host)
    noised = call("NoiseLatent", model=host, latent=latent, sigmas=grid, seed=0)[0]
    given = {"start": noised, "positive": text(1.0), "negative": text(0.0), "schedule": mask, **options}
    start = given.pop("start")
    return call("BlendedDenoise", model=host, sigmas=grid, source_latent=latent, latent=start, **given)[0]


def test_an_unpainted_mask_is_refused_with_the_reason():
    latent = encoded()[1]
    with pytest.raises(ParameterError, match=r"mask is empty.*Load Image gives an empty mask of 64 x 64.*paint"):
        call("LatentMask", mask=torch.zeros(1, 64, 64), latent=latent)


def test_an_empty_mask_of_the_right_size_is_refused():
    image, latent = encoded()
    with pytest.raises(ParameterError, match="mask is empty, so nothing would be edited: paint"):
        call("LatentMask", mask=torch.zeros(image.shape[:3]), latent=latent)


def test_a_mask_of_another_size_is_refused_by_both_sizes():
    latent = encoded(height=24, width=20)[1]
    with pytest.raises(ShapeError, match="mask is 64 x 80 pixels but the image is 20 x 24"):
        call("LatentMask", mask=torch.ones(1, 80, 64), latent=latent)


def test_a_mask_that_fits_no_factor_of_a_plain_latent_is_refused():
    latent = {"samples": torch.zeros(1, 4, 12, 12)}
    with pytest.raises(ShapeError, match="mask is 64 x 80 pixels, which does not fit the latent of 12 x 12"):
        call("LatentMask", mask=torch.ones(1, 80, 64), latent=latent)
    for height, width in ((96, 96), (97, 103), (89, 90), (12, 12), (192, 192)):
        check_mask_of_grid(torch.ones(1, height, width), (12, 12), None)


def test_one_empty_mask_among_others_and_a_full_mask_warn(caplog):
    masks = torch.zeros(2, 4, 4)
    masks[0, 0, 0] = 1
    with caplog.at_level(logging.WARNING):
        check_edit_mask(masks)
        assert "mask 1 of the batch is empty" in caplog.text
        check_edit_mask(torch.ones(1, 4, 4))
        assert "mask covers the whole image: nothing is kept" in caplog.text


def test_a_good_mask_does_not_warn(caplog):
    image, latent = encoded()
    mask = torch.zeros(image.shape[:3])
    mask[:, :8] = 1
    with caplog.at_level(logging.WARNING):
        call("LatentMask", mask=mask, latent=latent)
    assert not caplog.records


def test_the_prompt_left_empty_warns(caplog):
    host, latent = model(), encoded()[1]
    with caplog.at_level(logging.WARNING):
        edit_of(latent, host)
        assert not caplog.records
        edit_of(latent, host, positive=text(0.0))
    assert "positive and negative are the same prompt: guidance has no effect" in caplog.text


@pytest.mark.parametrize("cfg", [0.5, -1.0, float("nan")])
def test_a_linked_cfg_below_one_is_refused(cfg):
    with pytest.raises(ParameterError, match=r"cfg is .*: give 1 \(no guidance\) or more"):
        edit_of(encoded()[1], model(), cfg=cfg)


def test_a_clean_start_names_the_node_that_is_missing():
    latent = encoded()[1]
    with pytest.raises(EditError, match=r"sigma 0 but .*connect the output of 'Noise Latent to Sigma'"):
        edit_of(latent, model(), start=latent)


def test_an_empty_target_prompt_is_refused_and_equal_prompts_warn(caplog):
    clip = call("LoadModel", model="bundled")[1]
    words = {"clip": clip, "source_text": "a red circle on a sky background"}
    with pytest.raises(ParameterError, match="target_text is empty"):
        call("AlignPrompts", **words, target_text=" ")
    with caplog.at_level(logging.WARNING):
        call("AlignPrompts", **words, target_text=words["source_text"], weights="red: 2")
        assert not caplog.records
        call("AlignPrompts", **words, target_text=words["source_text"])
    assert "source_text and target_text are the same prompt" in caplog.text


def test_equal_prompts_of_diffedit_warn_before_sampling(caplog):
    host, latent = model(), encoded()[1]
    given = {"latent": latent, "source": text(1.0), "target": text(1.0)}
    with caplog.at_level(logging.WARNING):
        call("DiffEditMask", model=host, maps=2, **given)
    assert caplog.records[0].getMessage().startswith("source and target are the same prompt")


def test_prompts_that_differ_do_not_warn(caplog):
    warn_of_equal_prompts(prompt(1.0), prompt(2.0), "change one")
    assert not caplog.records


def test_a_full_mask_is_reported_without_nan():
    classes()
    from editkit.nodes.blended.background import _report

    nothing = float("nan")
    tuning = Tuning(torch.zeros(1, 2, 2, 3), [], [], [], nothing, nothing, 3, False)
    assert _report("decoder", tuning).endswith("the mask covers the whole image, so nothing outside it is compared")


def test_the_noised_latent_carries_its_seed():
    """A page that draws a new seed for every node cannot set the noise of the background apart from that of the edit."""
    host, latent = model(), encoded()[1]
    grid = sigmas(host)
    noised = call("NoiseLatent", model=host, latent=latent, sigmas=grid, seed=5)[0]
    first, second = (edit_of(latent, host, start=noised, seed=seed, end_step=3) for seed in (5, 6))
    assert torch.equal(first["samples"], second["samples"])
    assert "editkit_seed" not in edit_of(latent, host, start=noised)
    noised.pop("editkit_seed")
    assert not torch.equal(edit_of(latent, host, start=noised, seed=6, end_step=3)["samples"], first["samples"])
