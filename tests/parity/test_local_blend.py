"""LocalBlend with words to keep, against google/prompt-to-prompt's LocalBlend over its AttentionStore.

The store holds views of the maps, and AttentionControlEdit writes the edited maps into them. So the published LocalBlend
reads the target's maps as they were edited (`edited_maps`); ours reads the target's own.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from editkit.pipelines.attention.local_blend import LocalBlendOptions
from editkit.pipelines.attention.p2p import P2PControl, P2POptions
from editkit.pipelines.attention.pair_batch import interleave, pair_context, pair_rows
from editkit.pipelines.attention.pair_loop import attention_edit
from editkit.pipelines.attention.step_ranges import step_table
from editkit.pipelines.core.attention_sites import Controlled
from editkit.pipelines.core.sigmas import euler_step
from editkit.tests.parity import attention_nets as nets
from editkit.tests.toy_attention import ExplicitEdit, refine_edit, replace_edit
from editkit.tests.toys import random_latent

STEPS, SCALE, START, THRESHOLDS = 6, 4.0, 0.3, (0.85, 0.9)
BLEND, KEEP = ((2, 3), (2,)), ((5,), (5, 6))


class Store(ExplicitEdit):
    """Keeps what `_edited` made of the target's maps, and the source's maps, of the layers that LocalBlend reads."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.step_store: list = []

    def attend(self, q, k, v, site):
        if site.cross and all(2 * side == whole for side, whole in zip(site.grid, site.latent_pixels, strict=True)):
            maps = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)
            cond = [i for i, row in enumerate(site.rows) if row.branch == "cond"]
            source, target = (maps[i] for i in sorted(cond, key=lambda i: site.rows[i].role == "target"))
            target = self._edited(source, target, self.step_table[self.step_of(site.sigma)].to(q.dtype))
            self.step_store.append(torch.stack([source, target]).unflatten(2, site.grid))  # [2, heads, h, w, T]
        return super().attend(q, k, v, site)


class PublishedLocalBlend:
    """LocalBlend.__call__ and get_mask of the notebook, for one source and one target."""

    def __init__(self, count: int) -> None:
        self.alpha, self.substruct = (torch.zeros(2, 1, 1, 1, count) for _ in range(2))
        for layers, words in ((self.alpha, BLEND), (self.substruct, KEEP)):
            for prompt, tokens in enumerate(words):
                layers[prompt, ..., list(tokens)] = 1
        self.counter, self.store = 0, None

    def get_mask(self, maps, alpha, use_pool, x):
        maps = (maps * alpha).sum(-1).mean(1, keepdim=True)
        if use_pool:
            maps = functional.max_pool2d(maps, 3, 1, 1)
        mask = functional.interpolate(maps, size=x.shape[2:])
        mask = mask / mask.amax((2, 3), keepdim=True)
        mask = mask.gt(THRESHOLDS[1 - int(use_pool)])
        return mask[:1] | mask

    def __call__(self, x, step_store):
        self.store = step_store if self.store is None else [a + b for a, b in zip(self.store, step_store, strict=True)]
        self.counter += 1
        if self.counter <= int(START * STEPS):
            return x
        maps = torch.cat(self.store, dim=1)
        mask = self.get_mask(maps, self.alpha, True, x) & ~self.get_mask(maps, self.substruct, False, x)
        return x[:1] + mask.float() * (x - x[:1])


def published(model, edit, contexts, z, sigmas):
    control = P2PControl(edit, sigmas, P2POptions(0.8, 0.4))
    store = Store(edit, control.step, step_table(edit, 0.8, STEPS), control.self_branches)
    local_blend, rows, values = PublishedLocalBlend(edit.token_count), pair_rows(1, ("cond", "uncond")), sigmas.tolist()
    x = interleave(z, z)
    for sigma, target in zip(values, values[1:], strict=False):
        store.step_store = []
        cond, uncond = model.denoise(x, sigma, contexts, Controlled(store, rows))
        x = euler_step(x, uncond + SCALE * (cond - uncond), sigma, target)
        x = local_blend(x, store.step_store)
    return x


@pytest.mark.parametrize("kind", [replace_edit, refine_edit])
def test_keep_words_are_the_published_substract_words_over_edited_maps(kind):
    model, source, target, negative = nets.denoiser("bundled"), nets.prompt(1), nets.prompt(2), nets.prompt(3)
    edit = kind(
        source, target, blend_source=BLEND[0], blend_target=BLEND[1], keep_source=KEEP[0], keep_target=KEEP[1],
        equalizer=torch.linspace(0.5, 2, 7),
    )  # fmt: skip
    sigmas = model.schedule(STEPS)
    z = random_latent(1, 4, 8, 8, seed=7) * (1 + float(sigmas[0]) ** 2) ** 0.5
    theirs = published(model, edit, [pair_context(source, target, 1), negative], z, sigmas)
    errors = {}
    for edited_maps in (True, False):
        blend = LocalBlendOptions(START, *THRESHOLDS, divisor=2, edited_maps=edited_maps)
        options = P2POptions(0.8, 0.4, local_blend=blend)
        ours = attention_edit(model, edit, negative, z, sigmas=sigmas, guidance_scale=SCALE, options=options)
        assert (ours.source - theirs[:1]).norm() < 1e-5 * theirs[:1].norm()
        errors[edited_maps] = float((ours.edited - theirs[1:]).norm() / theirs[1:].norm())
    same = (theirs[0] == theirs[1]).all(0).float().mean()
    assert 0.1 < same < 0.9, "LocalBlend keeps some of the source, and not all"
    assert errors[True] < 1e-5 and errors[False] > 1e-2, errors
