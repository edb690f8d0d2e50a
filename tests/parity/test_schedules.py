"""The sigmas of a diffusers folder are those of diffusers' own scheduler, or the setting is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler

from editkit.hosts.bundled import tiny_folder
from editkit.hosts.diffusers.loading import load_folder
from editkit.hosts.diffusers.schedules import OTHER_SIGMAS, sigma_table, timestep_spacing
from editkit.pipelines.core.errors import FamilyError
from editkit.pipelines.core.sigmas import spaced_sigmas

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def same_table(config: dict) -> torch.Tensor:
    """Our table, after comparing it with diffusers' alphas_cumprod to 1e-6 (and its sigmas to 1e-3 below 100)."""
    theirs = DDIMScheduler(**config).alphas_cumprod.double()
    ours = sigma_table(config).double()
    assert torch.isfinite(ours).all() and (ours[1:] > ours[:-1]).all()
    assert (1 / (1 + ours * ours) - theirs).abs().max() < 1e-6
    sigmas = ((1 - theirs) / theirs).sqrt()
    below = sigmas < 100
    assert (ours / sigmas - 1).abs()[below].max() < 1e-3
    return ours


@pytest.mark.parametrize("kind", ["scaled_linear", "linear"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_the_table_is_that_of_diffusers(kind, zero_snr):
    table = same_table({**SD, "beta_schedule": kind, "rescale_betas_zero_snr": zero_snr})
    assert bool(table[-1] > 4000) == zero_snr


def test_zero_terminal_snr_of_sd2_has_the_known_sigmas():
    table = same_table({**SD, "rescale_betas_zero_snr": True})
    assert float(table[980]) == pytest.approx(113.9, abs=0.1) and float(table[500]) == pytest.approx(1.77, abs=0.01)


def test_trained_betas_replace_the_schedule():
    betas = torch.linspace(0.0005, 0.02, 1000).tolist()
    assert not torch.allclose(same_table({**SD, "trained_betas": betas}), sigma_table(SD).double())
    for wrong in (betas[:10], "betas", [1.5] * 1000):
        with pytest.raises(FamilyError, match="trained_betas must be 1000 numbers"):
            sigma_table({**SD, "trained_betas": wrong})


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [4, 20, 30, 50, 250])
def test_the_grid_has_the_timesteps_of_diffusers(spacing, steps):
    scheduler = DDIMScheduler(**SD, timestep_spacing=spacing, steps_offset=1)
    scheduler.set_timesteps(steps)
    table = sigma_table(SD)
    grid = spaced_sigmas(table, steps, spacing=timestep_spacing({"timestep_spacing": spacing}))
    assert torch.equal(grid[:-1], table[scheduler.timesteps]) and grid[-1] == 0


@pytest.mark.parametrize("name", OTHER_SIGMAS)
def test_other_sigmas_are_refused_by_name(name):
    for default in (None, False):
        sigma_table({**SD, name: default})
    with pytest.raises(FamilyError, match=f"sets {name} to"):
        sigma_table({**SD, name: True})


def test_a_shift_of_a_flow_schedule_is_refused_by_name():
    assert torch.equal(sigma_table({**SD, "shift": 1.0}), sigma_table(SD))
    with pytest.raises(FamilyError, match=r"sets shift to 3\.0"):
        sigma_table({**SD, "shift": 3.0})


def test_an_unknown_spacing_is_refused_by_name():
    with pytest.raises(FamilyError, match="timestep_spacing 'karras'"):
        timestep_spacing({"timestep_spacing": "karras"})


def test_a_loaded_folder_has_the_sigmas_of_its_scheduler(tmp_path):
    folder = Path(shutil.copytree(tiny_folder(), tmp_path / "model"))
    file = folder / "scheduler" / "scheduler_config.json"
    config = {**json.loads(file.read_text()), "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    file.write_text(json.dumps(config))
    assert float(load_folder(folder).denoiser.schedule(50)[0]) > 4000
