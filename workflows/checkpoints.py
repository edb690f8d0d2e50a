"""Templates for one's own image on SD 1.5, SDXL, SD 3.5 and Flux: stock loaders, the mask painted on Load Image, one method.

Where a file is missing, the page offers it by the name, address and folder in the loader's properties.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .blueprints import BLUEPRINTS
from .elements import Fold, Output
from .graph import RESULT, Graph
from .parts import Start, prompts

HOST = "https://huggingface.co"
FIRST = "first edit"
EXAMPLE = "example.png"  # comes with ComfyUI


@dataclass(frozen=True)
class Family:
    """A checkpoint with text encoders and VAE, and the settings that suit it."""

    name: str
    file: str
    address: str
    cfg: float
    steps: int
    pixels: int
    methods: tuple[str, ...]


METHODS = {
    FIRST: "",
    "inpaint": "EditKit Inpaint (Blended Latent Diffusion)",
    "soft mask": "EditKit Inpaint with Soft Mask (Differential Diffusion)",
    "DiffEdit": "EditKit Replace Object by Prompts (DiffEdit)",
    "img2img": "EditKit Image to Image (SDEdit)",
    "word swap": "EditKit Word Swap (Prompt-to-Prompt)",
    "change pose": "EditKit Change Pose (MasaCtrl)",
    "keep structure": "EditKit Keep Structure (Plug-and-Play)",
    "null-text edit": "EditKit Edit Real Image (Null-Text Inversion)",
    "FlowEdit": "EditKit Two Prompts (FlowEdit)",
}
# The workflow on the bundled model whose thumbnail shows the method.
SHOWN_BY = {
    FIRST: "first_edit",
    "inpaint": "blended_edit",
    "soft mask": "differential_diffusion",
    "DiffEdit": "diffedit",
    "img2img": "sdedit",
    "word swap": "p2plus_real_image",
    "change pose": "masactrl",
    "keep structure": "plug_and_play",
    "null-text edit": "null_text_reconstruction",
    "FlowEdit": "flow_edit",
}
MASKED = (FIRST, "inpaint", "soft mask")
EVERY = tuple(METHODS)
FLOW = (FIRST, "inpaint", "soft mask", "FlowEdit")  # the others invert by DDIM
FAMILIES = (
    Family(
        "SD 1.5",
        "v1-5-pruned-emaonly-fp16.safetensors",
        "Comfy-Org/stable-diffusion-v1-5-archive",
        7.0,
        50,
        512,
        EVERY,
    ),
    Family("SDXL", "sd_xl_base_1.0.safetensors", "stabilityai/stable-diffusion-xl-base-1.0", 6.0, 50, 1024, EVERY),
    Family("SD 3.5", "sd3.5_large_fp8_scaled.safetensors", "Comfy-Org/stable-diffusion-3.5-fp8", 4.5, 28, 1024, FLOW),
    Family("Flux", "flux1-dev-fp8.safetensors", "Comfy-Org/flux1-dev", 1.0, 28, 1024, FLOW),
)
TITLES = {
    f"{number} {family.name} {method}": (family, method)
    for number, (family, method) in enumerate(
        ((family, method) for family in FAMILIES for method in family.methods), start=31
    )
}


def template(title: str) -> Graph:
    """The workflow of one title of `TITLES`."""
    family, method = TITLES[title]
    graph = Graph(title, _note(family, method))
    start = _begin(graph, family, masked=method in MASKED)
    with graph.group("2. Edit"):
        if method == FIRST:
            edited = _first_edit(graph, start, family)
        else:
            with graph.fold(METHODS[method].removeprefix("EditKit ")) as fold:
                edited = BLUEPRINTS[METHODS[method]](graph, fold, start)[0]
            _suit(fold, family)
    with graph.group("3. Result"):
        graph.add("SaveImage", RESULT, images=edited, filename_prefix="editkit/edit")
    return graph


def _begin(graph: Graph, family: Family, *, masked: bool) -> Start:
    with graph.group("1. Model and image"):
        model = graph.add("CheckpointLoaderSimple", ckpt_name=family.file)
        address = f"{HOST}/{family.address}/resolve/main/{family.file}?download=true"
        model.properties["models"] = [{"name": family.file, "url": address, "directory": "checkpoints"}]
        image = graph.add("LoadImage", "Load Image: paint the mask here" if masked else "Load Image", image=EXAMPLE)
    return Start(model.out, model["CLIP"], model["VAE"], image.out, image["MASK"], caption="", prompt="")


def _first_edit(graph: Graph, start: Start, family: Family) -> Output:
    positive, negative = prompts(graph, replace(start, prompt="the whole image after the edit"))
    return graph.add(
        "EditKit_BlendedEdit",
        "Blended Edit",
        model=start.model,
        positive=positive,
        negative=negative,
        vae=start.vae,
        image=start.image,
        mask=start.mask,
        cfg=family.cfg,
        steps=family.steps,
    ).out


def _suit(fold: Fold, family: Family) -> None:
    """CFG and steps of the family, where the method has them."""
    for node in fold.nodes:
        names = {socket.name for socket in node.sockets if socket.is_widget}
        if "steps" in names and node.type in ("EditKit_EditSigmas", "EditKit_SDEdit", "EditKit_DiffEdit"):
            node.inputs["steps"] = family.steps
        if "cfg" in names and node.type != "EditKit_InvertDDIM":
            node.inputs["cfg"] = family.cfg
        if "target_cfg" in names:
            flow = family.methods is FLOW
            node.inputs |= {
                "source_cfg": min(family.cfg, 3.5),
                "target_cfg": 13.5 if flow and family.cfg > 1 else family.cfg,
            }


def _note(family: Family, method: str) -> str:
    masked = method in MASKED
    paint = " and paint the mask with *Open in MaskEditor*" if masked else "; it needs no mask"
    describe = "after the edit" if masked or method == "img2img" else "as it is and as it should be"
    steps = (
        f"1. Choose an image of about {family.pixels} px in *Load Image*{paint}.",
        f"2. Describe the whole image {describe} in the prompt.",
        "3. Press **Run**." if method == FIRST else "3. Press **Run**. A double click on the subgraph shows its steps.",
    )
    return f"# {family.name}: {method}\n\n" + "\n".join(steps) + f"\n\nAny {family.name} checkpoint will do."
