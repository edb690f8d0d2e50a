"""A copy of a native MODEL that is fine-tuned, and a MODEL clone with the learned weights as patches.

The copy is made of the loaded weights, so it contains the LoRAs in force. It shares no weights with other MODELs; hooks,
wrappers and prompts act on it as on the user's MODEL.
"""

from __future__ import annotations

import copy
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import comfy.lora
import comfy.model_management as management
import comfy.sd
import comfy.utils
from torch import Tensor, nn

from ...pipelines.core.errors import FamilyError, MismatchError
from ...pipelines.core.protocols import Context
from ...pipelines.core.tune_plan import TunePlan
from ...pipelines.learning.weight_deltas import SUFFIXES, Learner, learning_need
from .denoiser import native_denoiser
from .gradients import network_blocks, refuse_learning
from .model_sampling import NativeModelSampling

NETWORK = "diffusion_model."
KOHYA = "lora_unet_"


class NativeTunable(NativeModelSampling):
    """See `TunableDenoiser`. It predicts through its clones only."""

    def __init__(self, model: Any, contexts: Sequence[Context]) -> None:
        """`contexts`: every prompt that a clone will see."""
        super().__init__(model)
        self._model, self._contexts = model, list(contexts)

    def model_clone(self, plan: TunePlan, shape: Sequence[int]) -> NativeClone:
        """See `TunableDenoiser.model_clone`."""
        return NativeClone(self._model, self._contexts, plan, tuple(shape))


class NativeClone:
    """See `DenoiserClone`. Make it in `learning_mode`."""

    def __init__(self, model: Any, contexts: list[Context], plan: TunePlan, shape: tuple[int, ...]) -> None:
        original = model.model.diffusion_model
        refuse_learning(model)
        if any(hasattr(part, "scale_weight") for part in original.modules()):
            raise FamilyError("model has scaled 8-bit weights, which cannot be copied to learn: load it in 16 bit")
        learning_need(original, plan).check(
            model.load_device,
            "a copy of the model that learns",
            lambda need: management.free_memory(need, model.load_device),
        )
        management.load_models_gpu([model], force_full_load=True)  # the copy contains the patches in force
        names = _layer_names(model.model)
        self._learner: Any = Learner(original, plan, lambda name: names.get(name, NETWORK + name), model.offload_device)
        self._patcher: Any = _patcher(model, self._learner.network)
        self._open = ExitStack()
        try:
            self.denoiser: Any = self._open.enter_context(native_denoiser(self._patcher, shape, contexts, None, True))
        except BaseException:
            self.release()
            raise

    @property
    def parameters(self) -> Sequence[Tensor]:
        return () if self._learner is None else self._learner.parameters

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return () if self._learner is None else network_blocks(self._learner.network)

    def changes(self) -> dict[str, Tensor]:
        """See `DenoiserClone.changes`."""
        return self._learner.changes()

    def release(self) -> None:
        """See `DenoiserClone.release`."""
        self._open.close()
        if self._patcher is not None:
            self._patcher.detach()
        self._patcher = self._learner = self.denoiser = None
        management.cleanup_models_gc()


def _patcher(model: Any, network: nn.Module) -> Any:
    """A MODEL like `model` with other weights, and without the weight patches, which these weights contain."""
    inner = copy.copy(model.model)
    inner._modules = {**inner._modules, "diffusion_model": network}
    inner.device = model.offload_device
    inner.manual_cast_dtype = None
    inner.current_patcher = None
    inner.current_weight_patches_uuid = None
    inner.model_loaded_weight_memory = 0
    inner.model_lowvram = False
    inner.lowvram_patch_counter = 0
    network.dtype = next(network.parameters()).dtype  # type: ignore[assignment]  # an attribute of ComfyUI's networks
    for part in network.modules():
        vars(part).pop("comfy_patched_weights", None)
    clone = model.clone()
    clone.model = inner
    clone.size = 0
    shares_weights_with = {"parent", "_parent"} & set(vars(clone))  # the name depends on the version
    vars(clone).update(dict.fromkeys(shares_weights_with))
    for table in ("patches", "backup", "object_patches_backup", "hook_backup"):
        setattr(clone, table, {})
    clone.patches_uuid = uuid.uuid4()
    clone.force_cast_weights = False
    return clone


def _layer_names(inner: Any) -> dict[str, str]:
    """LoRA files' names of the network's layers. Layers that are not listed go by ComfyUI's generic names."""
    known = comfy.utils.unet_to_diffusers(inner.model_config.unet_config)
    ends = {native: name for name, native in known.items() if native.endswith(".weight")}
    return {
        native[: -len(".weight")]: KOHYA + name[: -len(".weight")].replace(".", "_") for native, name in ends.items()
    }


def native_tuned_model(model: Any, changes: Mapping[str, Tensor]) -> Any:
    """See `tuned_model`: the same as loading `changes` with ComfyUI's LoRA loader."""
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    layers = {name.rsplit(suffix, 1)[0] for name in changes for suffix in SUFFIXES if name.endswith(suffix)}
    unknown = sorted(layers - set(names))
    if unknown:
        raise MismatchError(
            f"the learned weights were made for another model: {len(unknown)} layers have no place here ({unknown[0]})"
        )
    return comfy.sd.load_lora_for_models(model, None, dict(changes), 1.0, 0)[0]
