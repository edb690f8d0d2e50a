"""Prompt edits made by hand, sites made by hand, and attention edits with their maps written out: what ours must equal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from editkit.pipelines.attention.prompts.prompt_edit import PromptEdit
from editkit.pipelines.core.attention_sites import Passive, Row, Site
from editkit.pipelines.core.protocols import Context
from editkit.tests.toys import random_latent

TOKENS, WIDTH = 7, 16


def context(seed: int, rows: int = 1, tokens: int = TOKENS, width: int = WIDTH, **fields) -> Context:
    return Context(random_latent(rows, tokens, width, seed=seed), **fields)


def replace_edit(source: Context, target: Context, **fields) -> PromptEdit:
    """Every token from its own place: a word swap of equal length."""
    count = source.tokens.shape[1]
    return PromptEdit(source, target, **{**_plain(count), **fields})


def refine_edit(source: Context, target: Context, new: Sequence[int] = (3,), **fields) -> PromptEdit:
    """A token that the source lacks, before the rest moves one place on."""
    count = source.tokens.shape[1]
    mapper, alphas = torch.zeros(count, count), torch.ones(count)
    before = 0
    for token in range(count):
        if token in new:
            alphas[token] = 0
        else:
            mapper[before, token] = 1
            before += 1
    return PromptEdit(source, target, **{**_plain(count), "mapper": mapper, "alphas": alphas, **fields})


def _plain(count: int) -> dict:
    return {"mapper": torch.eye(count), "alphas": torch.ones(count), "equalizer": torch.ones(count), "step_ranges": {}}


def rows_of(*names: str) -> tuple[Row, ...]:
    """ "sc0" is the source, conditional, image 0; "tu1" the target, unconditional, image 1."""
    roles, branches = {"s": "source", "t": "target"}, {"c": "cond", "u": "uncond"}
    return tuple(Row(roles[name[0]], branches[name[1]], int(name[2:])) for name in names)  # type: ignore[arg-type]


def site(rows: tuple[Row, ...], sigma: float = 1.0, **fields) -> Site:
    plain = {
        "place": "up",
        "block": 4,
        "blocks": 12,
        "depth": 0,
        "order": 8,
        "layers": 16,
        "grid": (2, 3),
        "latent_pixels": (4, 6),
        "cross": True,
    }
    return Site(**{**plain, **fields, "sigma": sigma, "rows": rows})


class ExplicitEdit(Passive):
    """The published order of things on whole maps: replace or refine, reweight, time gate; then maps times values.

    `step_table` [steps, T]; `open_self` names the branches whose self-attention is replaced at a step.
    """

    def __init__(self, edit: PromptEdit, step_of, step_table: Tensor, open_self, divisor: int = 2):
        self.edit, self.step_of, self.step_table, self.open_self, self.divisor = (
            edit,
            step_of,
            step_table,
            open_self,
            divisor,
        )

    def wants(self, site):
        return True

    def attend(self, q, k, v, site):
        maps = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)
        step, before = self.step_of(site.sigma), maps
        maps = maps.clone()
        for i, row in enumerate(site.rows):
            if row.role == "source" or row._replace(role="source") not in site.rows:
                continue
            source = before[site.rows.index(row._replace(role="source"))]
            if site.cross and row.branch == "cond":
                maps[i] = self._edited(source, before[i], self.step_table[step].to(q.dtype))
            elif not site.cross and row.branch in self.open_self(step) and self._small(site):
                maps[i] = source
        return maps @ v

    def _edited(self, source, target, edited):
        edit = self.edit
        new = source @ edit.mapper.to(source.dtype)
        new = new * edit.alphas + target * (1 - edit.alphas)
        new = new * edit.equalizer
        return edited * new + (1 - edited) * target

    def _small(self, site):
        return all(-(-whole // self.divisor) >= side for side, whole in zip(site.grid, site.latent_pixels, strict=True))
