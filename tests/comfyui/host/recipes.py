"""How every node runs on a model: its inputs, and what must come out. `RECIPES` has one function per node id."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from editkit.tests.comfyui.host.scene import SIDE, SOURCE, TARGET, Scene, a_mask, an_image, finite
from editkit.tests.nodes.graph import call, classes

STEPS = {"steps": 2, "seed": 3}


# --- loading, images, masks -------------------------------------------------------------------------------------------


def load_model(scene: Scene) -> None:
    assert len(call("LoadModel", model="bundled")) == 3


def load_ranker(scene: Scene) -> None:
    finite(scene.ranker.embed_texts([SOURCE]))


def load_example(scene: Scene) -> None:
    image, mask, _ = classes()["EditKit_LoadExample"].execute("one_object").result
    finite(image, mask)


def encode_image(scene: Scene) -> None:
    scene.a_latent(call("EncodeImage", image=scene.image, vae=scene.vae, posterior="sample")[0])


def decode_latent(scene: Scene) -> None:
    an_image(call("DecodeLatent", latent=scene.latent, vae=scene.vae)[0])


def latent_mask(scene: Scene) -> None:
    a_mask(scene.latent_mask, SIDE // 8)


def dilation_schedule(scene: Scene) -> None:
    finite(call("DilationSchedule", latent_mask=scene.latent_mask, parts="equal log-sigma")[1])


def release_schedule(scene: Scene) -> None:
    finite(call("ReleaseSchedule", latent_mask=scene.latent_mask)[1])


def save_embeddings(scene: Scene) -> None:
    (file,) = call("SaveEmbeddings", embeddings=scene.learned, filename_prefix="family")
    assert file


def load_embeddings(scene: Scene) -> None:
    (file,) = call("SaveEmbeddings", embeddings=scene.learned, filename_prefix="family")
    scene.a_latent(masked_decode_of(scene, call("LoadEmbeddings", file=file)[0]))


def save_lora(scene: Scene) -> None:
    assert call("SaveLora", lora=scene.tuned[1], filename_prefix="family")[0]


# --- blending ---------------------------------------------------------------------------------------------------------


def edit_sigmas(scene: Scene) -> None:
    assert scene.sigmas.shape == (3,) and (scene.sigmas.diff() < 0).all()


def noise_latent(scene: Scene) -> None:
    scene.a_latent(call("NoiseLatent", model=scene.model, latent=scene.latent, sigmas=scene.sigmas, copies=2)[0], 2)


def blended_denoise(scene: Scene) -> None:
    prompts = {"positive": scene.target, "negative": scene.negative}
    given = {"sigmas": scene.sigmas, "latent": scene.noised, "source_latent": scene.latent}
    scene.a_latent(call("BlendedDenoise", model=scene.model, **prompts, **given, schedule=scene.schedule)[0])


def blended_edit(scene: Scene) -> None:
    prompts = {"positive": scene.target, "negative": scene.negative}
    given = {"vae": scene.vae, "image": scene.image, "mask": scene.mask, "candidates": 2}
    images, latent = call("BlendedEdit", model=scene.model, **prompts, **given, **STEPS)
    an_image(images, 2)
    scene.a_latent(latent, 2)


def blended_model(scene: Scene) -> None:
    model = call("BlendedModel", model=scene.model, schedule=scene.schedule)[0]
    scene.sampled(model, scene.target, {"samples": scene.latent["samples"]})


def crop_window(scene: Scene) -> None:
    image, mask, _ = call("CropWindow", image=scene.image, mask=scene.mask, size=16, context=0)
    finite(image, mask)


def paste_window(scene: Scene) -> None:
    image, _, window = call("CropWindow", image=scene.image, mask=scene.mask, size=16, context=0)
    an_image(call("PasteWindow", edited=1 - image, source=scene.image, window=window)[0])


def pixel_blend(scene: Scene) -> None:
    an_image(call("BlendPixels", edited=1 - scene.image, source=scene.image, mask=scene.mask)[0])


def poisson_blend(scene: Scene) -> None:
    an_image(call("BlendPoisson", edited=1 - scene.image, source=scene.image, mask=scene.mask)[0])


def composite(scene: Scene) -> None:
    an_image(call("CompositeSource", edited=1 - scene.image, source=scene.image, mask=scene.mask)[0])


def tune_decoder(scene: Scene) -> None:
    given = {"latent": scene.latent, "source": scene.image, "mask": scene.mask, "steps": 2}
    an_image(call("TuneDecoder", vae=scene.vae, **given)[1])


def tune_latent(scene: Scene) -> None:
    given = {"latent": scene.latent, "source": scene.image, "mask": scene.mask, "steps": 2}
    latent, image, *_ = call("TuneLatent", vae=scene.vae, **given, model=scene.model)
    scene.a_latent(latent)
    an_image(image)


def rank_by_text(scene: Scene) -> None:
    images = torch.cat([scene.image, 1 - scene.image])
    an_image(
        call("RankByText", images=images, ranker=scene.ranker, text=TARGET, region="masked", keep=2, mask=scene.mask)[
            0
        ],
        2,
    )


def measure_edit(scene: Scene) -> None:
    table, page = call("MeasureEdit", source=scene.image, edited=1 - scene.image, mask=scene.mask)
    assert "PSNR" in table
    finite(page)


# --- inversion --------------------------------------------------------------------------------------------------------


def invert_ddim(scene: Scene) -> None:
    scene.a_latent(scene.inversion[1])


def sdedit(scene: Scene) -> None:
    prompts = {"positive": scene.target, "negative": scene.negative}
    scene.a_latent(call("SDEdit", model=scene.model, **prompts, latent=scene.latent, **STEPS)[0])


def flow_inversion(scene: Scene) -> None:
    scene.a_latent(scene.flow_inversion[1])


def flow_inversion_edit(scene: Scene) -> None:
    prompts = {"positive": scene.target, "negative": scene.negative}
    scene.a_latent(call("FlowInversionEdit", model=scene.model, **prompts, trajectory=scene.flow_inversion[0])[0])


def flow_edit(scene: Scene) -> None:
    prompts = {"source": scene.positive, "target": scene.target, "negative": scene.negative}
    given = {"latent": scene.latent, "sigmas": scene.sigmas}
    scene.a_latent(call("FlowEdit", model=scene.model, **prompts, **given)[0])


def null_text(scene: Scene) -> None:
    scene.a_latent(scene.null_text[1])


def negative_prompt(scene: Scene) -> None:
    scene.a_latent(masked_decode_of(scene, scene.learned))


def masked_decode_of(scene: Scene, negative: Any) -> dict:
    given = {"trajectory": scene.trajectory, "latent_mask": scene.latent_mask}
    return call("MaskedDecode", model=scene.model, positive=scene.target, negative=negative, **given)[0]


def masked_decode(scene: Scene) -> None:
    scene.a_latent(masked_decode_of(scene, scene.negative))


def embeddings_guider(scene: Scene) -> None:
    given = {"positive": scene.target, "embeddings": scene.learned}
    guider = call("EmbeddingsGuider", model=scene.model, **given)[0]
    scene.guided(guider, {"samples": torch.zeros_like(scene.latent["samples"])})


def diffedit_mask(scene: Scene) -> None:
    prompts = {"source": scene.positive, "target": scene.target}
    mask, pixels, heat, change = call("DiffEditMask", model=scene.model, latent=scene.latent, **prompts, maps=2)
    a_mask(mask, SIDE)
    a_mask(pixels, SIDE // 8)
    an_image(heat)
    finite(change)


def diffedit(scene: Scene) -> None:
    prompts = {"source": scene.positive, "target": scene.target, "negative": scene.negative}
    scene.a_latent(
        call("DiffEdit", model=scene.model, latent=scene.latent, **prompts, maps=2, **STEPS, **scene.mode)[0]
    )


# --- attention --------------------------------------------------------------------------------------------------------


def align_prompts(scene: Scene) -> None:
    mapper = scene.edit.mapper
    assert mapper.shape[0] == mapper.shape[1] == scene.positive[0][0].shape[1]
    finite(mapper)


def p2plus(scene: Scene) -> None:
    scene.pairs("P2Plus", {"edit": scene.edit})


def p2plus_edit(scene: Scene) -> None:
    given = {"negative": scene.negative, "trajectory": scene.trajectory}
    for latent in call("P2PlusEdit", model=scene.model, edit=scene.edit, **given):
        scene.a_latent(latent)


def masactrl(scene: Scene) -> None:
    scene.pairs("MasaCtrl", {"source": scene.positive, "target": scene.target, "from_step": 0, "object": scene.edit})


def kv_edit(scene: Scene) -> None:
    scene.pairs("KVEdit", {"source": scene.positive, "target": scene.target, "latent_mask": scene.latent_mask})


def plug_and_play(scene: Scene) -> None:
    scene.pairs("FeatureInjection", {"source": scene.positive, "target": scene.target})


def attention_maps(scene: Scene) -> None:
    given = {"edit": scene.edit, "trajectory": scene.trajectory, "levels": 1, "words": "cat"}
    image, masks, picked = call("AttentionMaps", model=scene.model, **given)
    finite(image)
    a_mask(masks, SIDE // 8)
    a_mask(picked, SIDE // 8)


def style_invert(scene: Scene) -> None:
    scene.a_latent(scene.style[1])


def style_edit(scene: Scene) -> None:
    given = {"embeddings": scene.style[0], "edit": scene.edit, "negative": scene.negative}
    for latent in call("StyleEdit", model=scene.model, **given):
        scene.a_latent(latent)


def style_transfer(scene: Scene) -> None:
    prompts = {"source": scene.positive, "target": scene.target, "negative": scene.negative}
    given = {"embeddings": scene.style[0], "trajectory": scene.trajectory}
    scene.a_latent(call("StyleTransfer", model=scene.model, **prompts, **given)[0])


# --- LayerDiffusion and Imagic ----------------------------------------------------------------------------------------


def layered_embeddings(scene: Scene) -> None:
    finite(*(made[0][0] for made in scene.layered[:3]), scene.layered[3])


def layered_reference(scene: Scene) -> None:
    prompts = {"positive": scene.target, "negative": scene.negative}
    given = {"vae": scene.vae, "latent": scene.latent}
    latent, image = call("LayeredReference", **given, model=scene.model, **prompts, **STEPS)
    scene.a_latent(latent)
    an_image(image)


def layered_tune(scene: Scene) -> None:
    scene.sampled(scene.tuned[0], scene.target, {"samples": scene.latent["samples"]})


def iterative_guidance(scene: Scene) -> None:
    prompts = {"object": scene.positive, "mixed": scene.target, "negative": scene.negative}
    guider = call("IterativeGuidance", model=scene.model, **prompts, sigmas=scene.sigmas)[0]
    scene.guided(guider, {"samples": torch.zeros_like(scene.latent["samples"])})


def imagic(scene: Scene) -> None:
    few = {"embedding_steps": 1, "steps": 1, "rank": 2}
    tuned, _, positive, *_ = call("Imagic", model=scene.model, latent=scene.latent, target=scene.target, **few)
    scene.sampled(tuned, positive, {"samples": scene.latent["samples"]})


RECIPES: dict[str, Callable[[Scene], None]] = {
    f"EditKit_{name}": recipe
    for name, recipe in {
        "AlignPrompts": align_prompts,
        "AttentionMaps": attention_maps,
        "BlendPixels": pixel_blend,
        "BlendPoisson": poisson_blend,
        "BlendedEdit": blended_edit,
        "BlendedDenoise": blended_denoise,
        "BlendedModel": blended_model,
        "CompositeSource": composite,
        "CropWindow": crop_window,
        "DecodeLatent": decode_latent,
        "DiffEdit": diffedit,
        "DiffEditMask": diffedit_mask,
        "DilationSchedule": dilation_schedule,
        "EditSigmas": edit_sigmas,
        "EmbeddingsGuider": embeddings_guider,
        "EncodeImage": encode_image,
        "FeatureInjection": plug_and_play,
        "FlowEdit": flow_edit,
        "FlowInversion": flow_inversion,
        "FlowInversionEdit": flow_inversion_edit,
        "Imagic": imagic,
        "InvertDDIM": invert_ddim,
        "IterativeGuidance": iterative_guidance,
        "LatentMask": latent_mask,
        "LayeredEmbeddings": layered_embeddings,
        "LayeredReference": layered_reference,
        "LayeredTune": layered_tune,
        "LoadEmbeddings": load_embeddings,
        "LoadExample": load_example,
        "LoadModel": load_model,
        "LoadRanker": load_ranker,
        "KVEdit": kv_edit,
        "MasaCtrl": masactrl,
        "MaskedDecode": masked_decode,
        "MeasureEdit": measure_edit,
        "NegativePrompt": negative_prompt,
        "NoiseLatent": noise_latent,
        "NullText": null_text,
        "P2Plus": p2plus,
        "P2PlusEdit": p2plus_edit,
        "PasteWindow": paste_window,
        "RankByText": rank_by_text,
        "ReleaseSchedule": release_schedule,
        "SDEdit": sdedit,
        "SaveEmbeddings": save_embeddings,
        "SaveLora": save_lora,
        "StyleEdit": style_edit,
        "StyleInvert": style_invert,
        "StyleTransfer": style_transfer,
        "TuneDecoder": tune_decoder,
        "TuneLatent": tune_latent,
    }.items()
}
