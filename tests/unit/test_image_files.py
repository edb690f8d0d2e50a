"""Image files of every depth are read as what they show, or refused in one line."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from editkit.hosts.bundled.example_images import load_image, load_mask, load_transparency
from editkit.pipelines.core.errors import LoadError, ShapeError
from editkit.pipelines.core.shapes import check_image


def test_grey_of_16_bits_keeps_its_values(tmp_path):
    Image.fromarray(np.array([[0, 20000, 32768, 65535]], dtype=np.uint16)).save(tmp_path / "a.png")
    wanted = torch.tensor([0, 20000, 32768, 65535]) / 65535
    assert torch.allclose(load_mask(tmp_path / "a.png"), wanted[None, None])
    assert torch.allclose(load_image(tmp_path / "a.png"), wanted[None, None, :, None].expand(1, 1, 4, 3))
    assert not load_transparency(tmp_path / "a.png").any()


def test_fractions_keep_their_values_and_others_are_refused(tmp_path):
    Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32)).save(tmp_path / "a.tiff")
    assert load_mask(tmp_path / "a.tiff").tolist() == [[[0, 0.5, 1]]]
    for values in ([0.0, 255.0], [float("nan"), 0.0], [-1.0, 0.0]):
        Image.fromarray(np.array([values], dtype=np.float32)).save(tmp_path / "b.tiff")
        with pytest.raises(LoadError, match="0 to 1"):
            load_image(tmp_path / "b.tiff")


def test_transparency_of_a_palette_is_the_mask(tmp_path):
    page = Image.new("P", (3, 1))
    page.putpalette([10, 20, 30, 200, 200, 200])
    page.putpixel((1, 0), 1)
    page.save(tmp_path / "a.png", transparency=1)
    assert load_mask(tmp_path / "a.png").tolist() == load_transparency(tmp_path / "a.png").tolist() == [[[0, 1, 0]]]


def test_an_opaque_image_has_a_mask_of_brightness_and_no_transparency(tmp_path):
    Image.new("RGB", (2, 2), (255, 255, 255)).save(tmp_path / "a.png")
    assert load_mask(tmp_path / "a.png").all() and not load_transparency(tmp_path / "a.png").any()


def test_decompression_bombs_are_refused_in_one_line(tmp_path, monkeypatch):
    Image.new("L", (64, 64)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for read in (load_image, load_mask):
        with pytest.raises(LoadError, match="too many pixels") as refusal:
            read(tmp_path / "a.png")
        assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_damaged_files_are_refused(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(LoadError, match=r"a\.png cannot be read"):
        load_image(tmp_path / "a.png")


def test_images_in_0_to_255_are_refused_by_name():
    for wrong in (
        torch.full((1, 2, 2, 3), 255.0),
        torch.ones(1, 2, 2, 3, dtype=torch.uint8),
        torch.full((1, 2, 2, 3), -3.0),
    ):
        with pytest.raises(ShapeError, match=r"photo .*divide by 255"):
            check_image(wrong, "photo")
    overshot = torch.full((1, 2, 2, 3), 1.2)
    assert torch.equal(check_image(overshot, "photo"), overshot)
