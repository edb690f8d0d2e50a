"""Faults of a ComfyUI itself, each shown without EditKit: a test that meets one is skipped by its name."""

from __future__ import annotations

from functools import cache
from typing import Any

import comfy.hooks
import comfy.model_management as management
import comfy.ops
import comfy.samplers
import pytest
import torch
from comfy.k_diffusion.sampling import sample_sa_solver
from comfy.model_patcher import ModelPatcher


class TwoLayers(torch.nn.Module):
    """Two layers of ComfyUI whose weights are 0."""

    def __init__(self) -> None:
        super().__init__()
        self.device: Any = None  # set by ModelPatcher
        self.layer = comfy.ops.manual_cast.Linear(1, 1, bias=False).requires_grad_(False)
        self.other = comfy.ops.manual_cast.Linear(1, 1, bias=False).requires_grad_(False)
        torch.nn.init.zeros_(self.layer.weight)
        torch.nn.init.zeros_(self.other.weight)


def patcher() -> ModelPatcher:
    return ModelPatcher(TwoLayers(), management.get_torch_device(), management.unet_offload_device())


@cache
def clones_share_patches() -> bool:
    """A MODEL and a clone with a LoRA, loaded one after the other, get the weights of whichever was loaded first.

    The packaged fork notes for each clone, instead of for the weights that they share, which patches are in force.
    """
    plain = patcher()
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
def weight_hooks_stay() -> bool:
    """A prompt's weight hook stays in the model's weights from its second use on.

    The packaged fork forgets the weights that it saved when it takes the hook's weights from its cache.
    """
    model = patcher()
    hook = comfy.hooks.WeightHook()
    hook.weights, hook.need_weight_init = {"layer.weight": ("diff", (torch.ones(1, 1),))}, False
    group = comfy.hooks.HookGroup()
    group.add(hook)
    model.register_all_hook_patches(group, comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model))
    for hooks in (group, None, group, None):
        model.patch_hooks(hooks)
    return float(model.model.layer.weight) != 0


def skip_where_weight_hooks_stay() -> None:
    if weight_hooks_stay():
        pytest.skip("this ComfyUI leaves a prompt's weight hook in the model's weights from its second use on")


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
