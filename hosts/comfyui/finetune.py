"""A copy of a native MODEL that learns, and a MODEL clone that carries what was learned as weight patches.

The copy is made of the loaded weights, so that LoRAs in force are part of it. It is a MODEL of its own, with weights that
nobody else has: hooks, wrappers and prompts act on it as on the user's.
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
from ...pipelines.learning.weight_deltas import SUFFIXES, Learner, TunePlan, learning_need
from .denoiser import native_denoiser
from .gradients import network_blocks
from .model_sampling import NativeModelSampling

NETWORK = "diffusion_model."
KOHYA = "lora_unet_"


class NativeTunable(NativeModelSampling):
    """See `TunableDenoiser`; predicts through its clones only."""

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
        if any(hasattr(part, "scale_weight") for part in original.modules()):
            raise FamilyError("model has scaled 8-bit weights, which cannot be copied to learn: load it in 16 bit")
        learning_need(original, plan).check(
            model.load_device,
            "a copy of the model that learns",
            lambda need: management.free_memory(need, model.load_device),
        )
        management.load_models_gpu([model], force_full_load=True)  # patches in force are part of the copy
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
    """A MODEL like `model` around other weights: everything but the weight patches, which the weights contain."""
    inner = copy.copy(model.model)
    inner._modules = {**inner._modules, "diffusion_model": network}
    inner.manual_cast_dtype, inner.current_patcher = None, None
    inner.device, inner.model_loaded_weight_memory = model.offload_device, 0
    inner.model_lowvram, inner.lowvram_patch_counter, inner.current_weight_patches_uuid = False, 0, None
    network.dtype = next(network.parameters()).dtype  # type: ignore[assignment]  # an attribute of the host's networks
    for part in network.modules():
        vars(part).pop("comfy_patched_weights", None)
    clone = model.clone()
    clone.model, clone.size = inner, 0
    own = {"parent", "_parent"} & set(vars(clone))  # as hosts call the MODEL that a clone shares its weights with
    vars(clone).update(dict.fromkeys(own))
    clone.patches, clone.backup, clone.object_patches_backup, clone.hook_backup = {}, {}, {}, {}
    clone.patches_uuid, clone.force_cast_weights = uuid.uuid4(), False
    return clone


def _layer_names(inner: Any) -> dict[str, str]:
    """The network's layers by the names that LoRA files of its family use; for others the host's generic names do."""
    known = comfy.utils.unet_to_diffusers(inner.model_config.unet_config)
    ends = {native: name for name, native in known.items() if native.endswith(".weight")}
    return {
        native[: -len(".weight")]: KOHYA + name[: -len(".weight")].replace(".", "_") for native, name in ends.items()
    }


def native_tuned_model(model: Any, changes: Mapping[str, Tensor]) -> Any:
    """See `tuned_model`: what the host's own LoRA loader makes of such a file."""
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    layers = {name.rsplit(suffix, 1)[0] for name in changes for suffix in SUFFIXES if name.endswith(suffix)}
    unknown = sorted(layers - set(names))
    if unknown:
        raise MismatchError(
            f"the learned weights were made for another model: {len(unknown)} layers have no place here ({unknown[0]})"
        )
    return comfy.sd.load_lora_for_models(model, None, dict(changes), 1.0, 0)[0]
