"""KV-Edit as a model patch, for any sampler."""

from __future__ import annotations

from ...hosts.sockets import prompt_pair
from ...hosts.trajectory import trajectory_in
from ...pipelines.attention.kv_edit import KVEdit as KVEditControl
from .._api import MaskScheduleSocket, io, schema
from .._inputs import attention_model_input
from ..blended.blending import as_schedule
from .pairs import pair_inputs, pair_outputs, pair_prompt_inputs, patched


class KVEdit(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_KVEdit",
            display_name="KV-Edit (Keep Background)",
            category="EditKit/attention",
            description=(
                "Keeps the background by construction: a model patch in which the target has the source's keys, values and "
                "latents outside the mask. Use a latent with batch size 2 and the conditioning from here as positive."
            ),
            search_aliases=["background preservation", "remove object", "Flux edit", "SD3 edit", "keys and values"],
            inputs=[
                attention_model_input(),
                *pair_prompt_inputs(),
                io.MultiType.Input(
                    "latent_mask",
                    types=[io.Mask, MaskScheduleSocket],
                    tooltip="A latent mask or a mask schedule, 1 = edit. At least 0.5 counts as 1.",
                ),
                *pair_inputs(),
            ],
            outputs=pair_outputs(),
        )

    @classmethod
    def execute(
        cls, model, source, target, latent_mask, sigmas=None, trajectory=None, share_noise=True
    ) -> io.NodeOutput:
        masks = as_schedule(latent_mask)
        if trajectory is not None:
            masks.expanded(masks.batch, *trajectory_in(trajectory).source_latent.shape[-2:])  # refuse another size now
        return io.NodeOutput(
            *patched(
                model,
                *prompt_pair(source, target),
                lambda grid: KVEditControl(grid, masks),
                sigmas=sigmas,
                trajectory=trajectory,
                share_noise=share_noise,
            )
        )


NODES = [KVEdit]
