"""Faults of a ComfyUI itself, each shown without EditKit: a test that meets one is skipped by its name."""

from __future__ import annotations

from functools import cache
from typing import Any

import comfy.model_management as management
import comfy.ops
import comfy.samplers
import pytest
import torch
from comfy.k_diffusion.sampling import sample_sa_solver
from comfy.model_patcher import ModelPatcher


class OneLayer(torch.nn.Module):
    """One layer of ComfyUI whose weight is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.device: Any = None  # set by ModelPatcher
        self.layer = comfy.ops.manual_cast.Linear(1, 1, bias=False).requires_grad_(False)
        torch.nn.init.zeros_(self.layer.weight)


@cache
def clones_share_patches() -> bool:
    """A MODEL and a clone with a LoRA, loaded one after the other, get the weights of whichever was loaded first.

    The packaged fork notes for each clone, instead of for the weights that they share, which patches are in force.
    """
    plain = ModelPatcher(OneLayer(), management.get_torch_device(), management.unet_offload_device())
    patched = plain.clone()
    patched.add_patches({"layer.weight": ("diff", (torch.ones(1, 1),))})
    weights = []
    for model in (plain, patched):
        management.load_models_gpu([model])
        weights.append(float(plain.model.layer.weight))
    management.unload_all_models()
    return weights != [0, 1]


def skip_where_clones_share_patches() -> None:
    if clones_share_patches():
        pytest.skip("this ComfyUI computes a MODEL and its clone with a LoRA with the weights of the one loaded first")


@cache
def sa_solver_breaks() -> bool:
    """The packaged fork calls `torch.float(0.0)`, which is no function."""
    flow = type("Sampling", (), {"sigma_min": 0.1, "sigma_max": 1.0, "percent_to_sigma": lambda self, part: 1 - part})()

    class Model:
        inner_model = type(
            "Inner", (), {"model_patcher": type("P", (), {"get_model_object": lambda self, name: flow})()}
        )()

        def __call__(self, x: torch.Tensor, sigma: torch.Tensor, **named: Any) -> torch.Tensor:
            return x

    try:
        sample_sa_solver(Model(), torch.zeros(1, 4, 2, 2), torch.tensor([1.0, 0.5, 0.0]), {"seed": 1}, disable=True)
    except TypeError as error:
        return "torch.dtype" in str(error)
    return False


def skip_where_sa_solver_breaks(name: str) -> None:
    if name.startswith("sa_solver") and sa_solver_breaks():
        pytest.skip("sa_solver of this ComfyUI calls torch.float(0.0), which is no function")
