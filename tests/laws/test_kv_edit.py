"""KV-Edit: outside the mask keys, values and latents are the source's; inside they are the target's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from editkit.pipelines.attention.kv_edit import KVEdit
from editkit.pipelines.core.attention_sites import Row, Site
from editkit.pipelines.core.errors import ShapeError
from editkit.pipelines.core.masks import constant_schedule
from editkit.tests.toy_attention import TOKENS, rows_of, site

SIGMAS = torch.tensor([1.0, 0.6, 0.3, 0.0])
PAIRS = rows_of("sc0", "tc0", "su0", "tu0", "sc1", "tc1", "su1", "tu1")
GRID = (2, 3)
SIDES = (4, 6)  # each token stands for 2 x 2 latent pixels


def joint(text: int = TOKENS, rows: tuple[Row, ...] = PAIRS) -> Site:
    return site(rows, 1.0, cross=False, text=text, grid=GRID, latent_pixels=SIDES)


def qkv(text: int = TOKENS) -> tuple[Tensor, ...]:
    shape = (len(PAIRS), 2, text + GRID[0] * GRID[1], 5)
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))


def masks(*edited: tuple[int, int]) -> Tensor:
    """One mask per image, with one edited latent pixel each."""
    made = torch.zeros(len(edited), *SIDES)
    for mask, (row, column) in zip(made, edited, strict=True):
        mask[row, column] = 1
    return made


@pytest.mark.parametrize("text", [TOKENS, 0], ids=["joint", "image tokens only"])
def test_tokens_outside_the_mask_are_the_sources(text: int) -> None:
    q, k, v = qkv(text)
    control = KVEdit(SIGMAS, constant_schedule(masks((0, 0), (3, 5))))
    out = control.attend(q, k, v, joint(text))
    for index, row in enumerate(PAIRS):
        own = {text + (0 if row.image == 0 else 5), *range(text)}  # the token of the edited pixel, and the words
        source = PAIRS.index(row._replace(role="source"))
        chosen = [index if token in own or row.role == "source" else source for token in range(k.shape[2])]
        keys, values = (torch.stack([x[i, :, t] for t, i in enumerate(chosen)], dim=1) for x in (k, v))
        expected = F.scaled_dot_product_attention(q[index], keys, values)
        torch.testing.assert_close(out[index], expected)


def test_a_full_mask_is_the_targets_own_attention() -> None:
    q, k, v = qkv()
    out = KVEdit(SIGMAS, constant_schedule(torch.ones(1, *SIDES))).attend(q, k, v, joint())
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))


def test_latents_outside_the_mask_stay_bit_for_bit() -> None:
    generator = torch.Generator().manual_seed(1)
    source, target = (torch.randn(2, 4, *SIDES, generator=generator) for _ in range(2))
    mask = masks((0, 0), (3, 5))
    out = KVEdit(SIGMAS, constant_schedule(mask)).blend(source, target, 0)
    inside = mask[:, None].expand_as(out) == 1
    assert torch.equal(out[inside], target[inside]) and torch.equal(out[~inside], source[~inside])


def test_words_of_a_unet_stay_plain() -> None:
    control = KVEdit(SIGMAS, constant_schedule(masks((0, 0), (3, 5))))
    assert control.wants(joint()) and not control.wants(site(PAIRS, 1.0, cross=True))
    assert not control.wants(joint(rows=rows_of("sc0", "su0")))


def test_a_mask_of_another_size_is_refused() -> None:
    q, k, v = qkv()
    with pytest.raises(ShapeError, match="latent pixels"):
        KVEdit(SIGMAS, constant_schedule(torch.ones(1, 3, 3))).attend(q, k, v, joint())
