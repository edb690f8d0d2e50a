"""A native MODEL as a Denoiser.

Does what the host's own guider does around a run (load, hooks, conditions, clean-up), with the loop left to us. Patches
in force on the MODEL (LoRA, attention patches, wrappers, guidance hooks) and in the CONDITIONING (areas, ControlNets,
weight hooks) act as they do in KSampler.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import comfy.hooks
import comfy.model_patcher
import comfy.sampler_helpers as helpers
import comfy.samplers as samplers
import torch
from torch import Tensor

from ..pipelines.errors import MismatchError
from ..pipelines.protocols import Context
from ..pipelines.shapes import check_latent
from ._host_base import conditioning
from ._host_levels import NativeLevels, level_tensor

NAMES = ("positive", "negative")  # the host wires ControlNets and aesthetic scores by these keys
ANNOUNCED = ("hooks", "control", "gligen", "additional_models")  # what must be loaded before a run
CACHED_GROUPS = 8


@contextmanager
def native_denoiser(
    model: Any, shape: tuple[int, ...], contexts: list[Context], sigmas: Tensor | None
) -> Iterator[NativeDenoiser]:
    """See `_host.open_denoiser`."""
    levels = NativeLevels(model)
    options = comfy.model_patcher.create_model_options_clone(model.model_options)
    conds = {_name(i): helpers.convert_cond(conditioning(context)) for i, context in enumerate(contexts)}
    hook_mode, loaded, denoiser = model.hook_mode, [], None
    try:
        samplers.preprocess_conds_hooks(conds)
        if samplers.get_total_hook_groups_in_conds(conds) <= 1:
            model.hook_mode = comfy.hooks.EnumHookMode.MinVram
        helpers.prepare_model_patcher(model, conds, options)
        samplers.filter_registered_hooks_on_conds(conds, options)
        inner, conds, loaded = helpers.prepare_sampling(model, _memory_shape(shape, len(contexts)), conds, options)
        samplers.cast_to_load_options(options, device=model.load_device, dtype=model.model_dtype())
        grid = levels.sampling.sigmas.flip(0) if sigmas is None else sigmas
        options.setdefault("transformer_options", {})["sample_sigmas"] = grid.to(model.load_device)
        model.pre_run()
        denoiser = NativeDenoiser(levels, inner, options, [(c, conds[_name(i)]) for i, c in enumerate(contexts)])
        yield denoiser
    finally:
        if denoiser is not None:
            denoiser.close()
        model.cleanup()
        helpers.cleanup_models(conds, loaded)
        samplers.cast_to_load_options(options, device=model.offload_device)
        model.hook_mode = hook_mode
        model.restore_hook_patches()


def _name(index: int) -> str:
    return NAMES[index] if index < len(NAMES) else f"context{index}"


def _memory_shape(shape: tuple[int, ...], contexts: int) -> tuple[int, ...]:
    """The host reserves memory for twice the batch it is told (cond and uncond); we may evaluate more rows."""
    return (max(shape[0], -(-shape[0] * contexts // 2)), *shape[1:])


class NativeDenoiser(NativeLevels):
    """Valid inside `native_denoiser` only."""

    def __init__(
        self, levels: NativeLevels, inner: Any, options: dict, opened: list[tuple[Context, list[dict]]]
    ) -> None:
        self.__dict__.update(vars(levels))
        self._levels, self._inner, self._options, self._opened = levels, inner, options, opened
        self._groups: dict[tuple, tuple[list[Context], list[list[dict]]]] = {}
        self._last: list[list[dict]] = []

    def without_weights(self) -> NativeLevels:
        """The part that may outlive the run."""
        return self._levels

    def close(self) -> None:
        self._inner, self._opened, self._last = None, [], []
        self._groups.clear()

    @torch.no_grad()
    def denoise(self, z: Tensor, sigma: float | Tensor, contexts: Sequence[Context]) -> Tensor:
        """See `Denoiser.denoise`. One batch where contexts and memory allow; the host splits it otherwise."""
        z = check_latent(z, "latent", self.channels).to(self.device, torch.float32)
        level = level_tensor(sigma, z.device).expand(z.shape[0])
        self._last = conds = self._processed(list(contexts), z)
        replaced = self._options.get("sampler_calc_cond_batch_function")
        if replaced is not None:
            arguments = {
                "conds": conds,
                "input": z,
                "sigma": level,
                "model": self._inner,
                "model_options": self._options,
            }
            return torch.stack(list(replaced(arguments))).float()
        return torch.stack(samplers.calc_cond_batch(self._inner, conds, z, level, self._options)).float()

    @torch.no_grad()
    def combine(self, z: Tensor, sigma: float | Tensor, cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
        """See `Denoiser.combine`: the host's guidance, with the hooks that the MODEL carries around it."""
        level = level_tensor(sigma, z.device).expand(z.shape[0])
        conds = [*self._last[:2], None, None][:2]  # of the last `denoise`, whose predictions these are
        out = [cond, uncond]
        for hook in self._options.get("sampler_pre_cfg_function", []):
            arguments = {"conds": conds, "conds_out": out, "cond_scale": scale, "timestep": level, "input": z}
            out = hook({**arguments, "sigma": level, "model": self._inner, "model_options": self._options})
        return samplers.cfg_function(
            self._inner, out[0], out[1], scale, z, level, model_options=self._options, cond=conds[0], uncond=conds[1]
        )

    def _processed(self, contexts: list[Context], z: Tensor) -> list[list[dict]]:
        """Conditions of one evaluation, prepared together as the host does (areas of one act on all)."""
        if self._inner is None:
            raise RuntimeError("this denoiser is closed: open the MODEL again")
        key = (tuple(map(id, contexts)), tuple(z.shape))
        if key not in self._groups:
            conds = {_name(i): [part.copy() for part in self._base(context)] for i, context in enumerate(contexts)}
            done = samplers.process_conds(self._inner, z, conds, self.device, torch.zeros_like(z), None, 0)
            while len(self._groups) >= CACHED_GROUPS:
                del self._groups[next(iter(self._groups))]
            self._groups[key] = (
                contexts,
                [done[_name(i)] for i in range(len(contexts))],
            )  # contexts kept: ids stay taken
        return self._groups[key][1]

    def _base(self, context: Context) -> list[dict]:
        """The converted CONDITIONING of a context, with the hooks that were registered when the MODEL was opened."""
        fresh = helpers.convert_cond(conditioning(context))
        for opened, parts in self._opened:
            if opened is context:
                return parts
            if context.host is not None and opened.host is context.host:
                return [
                    {**parts[0], "cross_attn": fresh[0]["cross_attn"], "pooled_output": fresh[0].get("pooled_output")}
                ]
        late = sorted({key for part in fresh for key in ANNOUNCED if part.get(key) is not None})
        if late:
            raise MismatchError(
                f"a prompt with {', '.join(late)} came after the model was opened: open it with that prompt"
            )
        return fresh
