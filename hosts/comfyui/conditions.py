"""The prompts of an open MODEL, prepared as ComfyUI prepares them, for the shape of the run's latents.

All prompts of a run are prepared together, because ComfyUI lets the areas of one prompt act on the others and gives the
positive prompt's ControlNet to the negative. So each prompt gives the same prediction with the others and alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.model_base
import comfy.sampler_helpers as helpers
import comfy.samplers as samplers
import torch
from torch import Tensor

from ...pipelines.core.errors import MismatchError
from ...pipelines.core.protocols import Context
from ..sockets import conditioning_of

NAMES = ("positive", "negative")  # ComfyUI wires ControlNets and aesthetic scores by these keys
ANNOUNCED = ("hooks", "control", "gligen", "additional_models")  # these must be loaded before a run
TEXT = ("cross_attn", "pooled_output", "attention_mask")
CACHED = 8  # prepared prompts and shapes to keep

Parts = list[dict[str, Any]]


def name_of_prompt(index: int) -> str:
    """ComfyUI's key of prompt number `index` of those that the MODEL was opened with."""
    return NAMES[index] if index < len(NAMES) else f"context{index}"


def conditioning_for(inner: Any, context: Context) -> list:
    """The CONDITIONING of a context, with a mask of its tokens where the network `inner` counts them by it (Lumina 2).

    An embedding that was learned or joined may have another count than the prompt it comes from; one from a file has no mask.
    """
    fitted = []
    for text, extras in conditioning_of(context):
        mask = extras.get("attention_mask")
        wrong = isinstance(inner, comfy.model_base.Lumina2) if mask is None else mask.shape[-1] != text.shape[1]
        fresh = {"attention_mask": torch.ones(text.shape[:2], dtype=torch.long)} if wrong else {}
        fitted.append([text, {**extras, **fresh}])
    return fitted


class Conditions:
    """The conditions for `calc_cond_batch`, from the contexts of an open MODEL and from those that derive from them."""

    def __init__(self, inner: Any, device: torch.device, opened: list[tuple[Context, Parts]]) -> None:
        """`opened`: contexts with their converted CONDITIONING, hooks registered."""
        self._inner = inner
        self._device = device
        self._opened = opened
        self._prepared: dict[tuple, dict[str, Parts]] = {}
        self._cached: dict[tuple, tuple[Context, Parts]] = {}

    def of(self, contexts: Sequence[Context], z: Tensor) -> list[Parts]:
        """The conditions of every context for latents like `z`, on its device."""
        return [self._parts(context, z) for context in contexts]

    def _parts(self, context: Context, z: Tensor) -> Parts:
        for index, (opened, _) in enumerate(self._opened):
            if opened is context:
                return self._together(z)[name_of_prompt(index)]
        if context.tokens.requires_grad:  # while it is learned, every call brings another embedding
            return self._made(context, z)
        key = (id(context), *_key(z))
        if key not in self._cached:
            while len(self._cached) >= CACHED:
                del self._cached[next(iter(self._cached))]
            self._cached[key] = (context, self._made(context, z))  # keeping the context keeps its id unique
        return self._cached[key][1]

    def _made(self, context: Context, z: Tensor) -> Parts:
        fresh = helpers.convert_cond(conditioning_for(self._inner, context))
        for index, (opened, _) in enumerate(self._opened):
            if context.host is not None and opened.host is context.host:
                return self._with_text(index, fresh[0], z)
        late = sorted({key for part in fresh for key in ANNOUNCED if part.get(key) is not None})
        if late:
            raise MismatchError(
                f"a prompt with {', '.join(late)} came after the model was opened: open it with that prompt"
            )
        name = name_of_prompt(len(self._opened) + len(NAMES))
        return self._process({**self._copies(), name: fresh}, z)[name]

    def _with_text(self, index: int, fresh: dict[str, Any], z: Tensor) -> Parts:
        """The prepared prompt `index` with another embedding; ControlNets, areas and hooks stay as they were wired.

        ComfyUI may have made several parts out of one prompt, to cover the areas of other prompts.
        """
        name = name_of_prompt(index)
        text = {key: fresh[key] for key in TEXT if key in fresh}
        parts = [{**part, **text} for part in self._together(z)[name]]
        known = {"latent_image": torch.zeros_like(z), "denoise_mask": None, "seed": 0}  # as in `_process`
        return samplers.encode_model_conds(self._inner.extra_conds, parts, z, self._device, name, **known)

    def _together(self, z: Tensor) -> dict[str, Parts]:
        key = _key(z)
        if key not in self._prepared:
            while len(self._prepared) >= CACHED:
                del self._prepared[next(iter(self._prepared))]
            self._prepared[key] = self._process(self._copies(), z)
        return self._prepared[key]

    def _copies(self) -> dict[str, Parts]:
        return {name_of_prompt(i): [part.copy() for part in parts] for i, (_, parts) in enumerate(self._opened)}

    def _process(self, conds: dict[str, Parts], z: Tensor) -> dict[str, Parts]:
        return samplers.process_conds(self._inner, z, conds, self._device, torch.zeros_like(z), None, 0)


def _key(z: Tensor) -> tuple:
    """Of a prepared prompt. Autograd cannot use one that was prepared in inference mode."""
    return (*z.shape, torch.is_inference_mode_enabled())
