"""The note of each workflow, in Markdown, shown to the left of its nodes."""

from __future__ import annotations

import re

CHECKPOINT = """
## With your own checkpoint

1. Choose your checkpoint in *Load EditKit Model*, which loads it as **Load Checkpoint** does.
2. Add **Load Image**, paint the mask with *Open in MaskEditor*, and connect its IMAGE and MASK to *own image* and *own
mask* of *Example Image and Mask*.
3. Describe the whole image after the edit in the prompt. Use *cfg* 5 to 7.5 and images of about 512 px (SD 1.x) or 1024
px (SDXL).
"""

UNMASKED = """
## With your own checkpoint

1. Choose your checkpoint in *Load EditKit Model*, which loads it as **Load Checkpoint** does.
2. Add **Load Image** and connect its IMAGE to *own image* of *Example Image and Mask*. You do not need a mask.
3. Describe the whole image in the prompts. Use *cfg* 5 to 7.5 and images of about 512 px (SD 1.x) or 1024 px (SDXL).
"""

DRAWN = """
## With your own checkpoint

1. Choose your checkpoint in *Load EditKit Model*, which loads it as **Load Checkpoint** does.
2. Set the size in *Empty Latent Image* to about 512 px (SD 1.x) or 1024 px (SDXL), and *cfg* to 5 to 7.5.
3. Describe the whole image in both prompts. To edit your own image with **Load Image**, see the workflow
*p2plus_real_image*.
"""

FLOW = """
## With SD3.5 or Flux

1. Replace *Load EditKit Model*. SD3.5: **Load Checkpoint**. Flux: **Load Diffusion Model**, **DualCLIPLoader**
(clip_l, t5xxl) and **Load VAE** (ae).
2. Replace *Example Image and Mask* by **Load Image** at about one megapixel, and describe the whole image in the
prompts.
3. Replace *Edit Sigmas* by **BasicScheduler** (simple, denoise 1): SD3.5 28 to 50 steps, Flux dev 28.
4. SD3.5 has CFG (4 to 5). Flux dev has distilled guidance: set every *cfg* to 1 and put
*FluxGuidance* (3.5) behind the target prompt.
"""

RANKER = """4. Put open_clip weights (image and text encoder in one safetensors file) into *models/editkit_rankers*:
*Load CLIP Ranker* finds them. The bundled ranker knows only images of the bundled model.
"""

NOTES = {
    "first_edit": """
# The first edit

Press **Run**: the prompt paints a star under the mask, and everything else stays as it was, bit for bit. Change the prompt
and run again.

*Blended Edit* holds the whole method; the next workflow shows its steps one by one.
""",
    "blended_edit": """
# Blended Latent Diffusion, step by step

Adds a new object under the mask (inpainting). Every stage of the method is a separate node, so you can look at each
result or insert your own node.

The mask is downsampled to the latent grid. A mask schedule starts with a dilated mask and shrinks it to yours. The loop
denoises with the prompt and puts the source back outside the mask after every step. Four candidates are ranked, and a
copy of the decoder is fine-tuned on the best one. The result equals the source outside the mask, bit for bit.
""",
    "blended_any_sampler": """
# Blended Latent Diffusion with KSampler

*Blended Latent Diffusion Patch* patches the model so that any sampler edits only under the mask. Change sampler, scheduler and
steps as you like; SamplerCustomAdvanced works too. Outside the mask the result equals the latent the sampler starts from.
""",
    "thin_mask": """
# A stroke thinner than a latent pixel

The mask is a stroke three pixels wide; a latent pixel covers eight. In the plain loop (kernels *1*) the background is
fixed so close to the stroke that hardly anything can form. With *7,5,3,1* the mask starts dilated and shrinks to the
stroke. Both loops start from the same noise.

*stages* is *equal log-sigma* here. On a latent of twelve pixels objects form late; with *equal steps* the background
would erase the new object again.
""",
    "background_replacement": """
# Replace the background

The mask covers everything except the object. To paint the object instead, add **InvertMask** after your mask.

A mask this large does not need to be dilated, and a dilated mask would cover the object. The schedule therefore has only
the kernel *1*, and mode *area* gives the object every latent pixel it covers by more than half.
""",
    "scribble": """
# From a scribble

The image holds a rough green blob with a mask around it. At *strength* 0.7 the loop starts from a noised source that
still has the position and colour of the blob, but not its outline. The prompt decides what it becomes. A lower strength
keeps more of the scribble.
""",
    "ranked_batch_tuned_winner": """
# Best of eight candidates

One run makes eight candidates. The prompt describes the whole image; *CLIP Rank* sees only the region under the mask, so
its text names only the new object. Only the winner goes to the decoder fine-tune.
""",
    "editing_session": """
# Three edits in a row

Each edit starts from the finished image of the previous one: add a star on the right, replace the ring on the left (the
same mask, inverted), then turn the star into a circle.

Every edit equals its source outside the mask, bit for bit, so the rest of the image does not degrade.
""",
    "diffedit": """
# DiffEdit: edit without drawing a mask

The source prompt says what the image shows, the target prompt what it should show. Where the model predicts different
noise for the two prompts, the image must change: that is the mask. The image is then inverted and decoded with the target
prompt under the mask. Outside the mask its trajectory is used.

*DiffEdit, Replace Object (All in One)* does all of this in one node. Prompts that differ in few words give the cleanest
masks. A lower *threshold* gives a larger mask.
""",
    "diffedit_into_blended": """
# DiffEdit mask with Blended Latent Diffusion

This combination is ours, not from a paper. The mask comes from two prompts, as in DiffEdit. A mask schedule dilates it
first and shrinks it to the mask that was found, as in Blended Latent Diffusion. The background is the trajectory of the
inverted image instead of fresh noise. A copy of the decoder is fine-tuned on the result, and the result equals the
source outside the mask, bit for bit.
""",
    "differential_diffusion": """
# Differential Diffusion: a soft mask

A soft mask says how much each region may change. Regions with low values are kept for most of the steps and released
late, so there is no hard border. Here the soft mask is the difference map of DiffEdit before the threshold. A painted,
feathered mask works too: use *Latent Mask Downsample* with threshold 0.
""",
    "null_text_reconstruction": """
# Null-text inversion

Sampling without guidance reconstructs an inverted image. With guidance, which every edit needs, the result drifts away:
see *plain*. Null-text inversion optimises the empty prompt for every step, so that guided sampling follows the
trajectory. Only these embeddings are trained.

They work with any sampler through *Per-Step Negative Guider*, and as negative prompt of EditKit's own nodes. With another
prompt the same embeddings edit the image: here the background gets stripes, and the circle stays unchanged.
*Save Inversion Embeddings* keeps them.
""",
    "sdedit": """
# SDEdit: image to image

The image, with a rough green blob in it, is noised and then denoised with the prompt. There is no mask: everything may
change, and *strength* decides how much. 0.3 keeps the blob, 0.5 keeps its position and colour, 1 ignores the image.
""",
    "flow_edit": """
# FlowEdit: two prompts, no mask, no inversion

Every step adds the same noise to the image and to the edited image, and moves the edited image by the difference of
the model's predictions under the two prompts. What both prompts describe stays. *steps that edit* decides how much
may change: fewer keep more of the image.
""",
    "word_swap": """
# DDIM inversion with a word swap

The image is inverted with the prompt that describes it. The noise is then sampled with one word of the prompt replaced,
here by one of ComfyUI's samplers without added noise. Colours and background stay similar, but nothing keeps the layout:
the new object may move or grow. Compare with *diffedit*.

With VAE and image connected, *DDIM Inversion* also reports how exactly it reconstructs the image. The sampler must use the
SIGMAS of the inversion.
""",
    "p2p_replace": """
# Prompt-to-Prompt: word swap

Both prompts start from the same noise: the latent batch of 2 holds the source and the target. In the first steps the
target uses the source's cross-attention maps (*tau_c*) and self-attention maps (*tau_s*). The circle turns green and
stays where it is. Any sampler works.
""",
    "p2p_refine": """
# Prompt-to-Prompt: add a word

The target prompt has more words than the source prompt. *refine* keeps the maps of the words that both prompts share;
new words attend freely. The circle stays and its background gets stripes. This workflow uses SamplerCustomAdvanced.
""",
    "p2p_reweight": """
# Prompt-to-Prompt: word weights

Source and target prompt are equal. *weights* in *Align Prompts (P2P, Word Swap)* changes the weight of a word, here *red*. 1 is
neutral, 2 to 4 is stronger, 0 and below removes it: at -2 the red object shrinks, at -4 it is gone.

*Prompt-to-Prompt Edit (P2P, P2Plus)* does the whole edit in one node, without a sampler.
""",
    "p2plus_real_image": """
# P2Plus on a real image

The image is inverted, which finds its noise, and then edited. The source is restored at every step, and the source branch
runs only while its attention is used.

A circle and a square have different shapes: *tau_u* 0.5 (P2Plus) releases the structure of the source. 0 is plain
Prompt-to-Prompt. The cross-attention maps show the region of each word. For a photograph, connect *Negative-Prompt
Inversion* or *Null-Text Inversion* as negative: they keep what no word mentions.
""",
    "masactrl": """
# MasaCtrl: the same object in another place

The target gets its layout from its own prompt and its appearance from the source: from step 4 on, its deeper
self-attention layers use the keys and values of the source. The circle moves aside for a star.

The *MasaCtrl* node patches the model for any sampler. The sampler starts from the noised latent of the inversion,
repeated to a pair; *trajectory* keeps the source of the pair equal to the image.
""",
    "plug_and_play": """
# Plug-and-Play: the same structure, another appearance

The features and self-attention maps of the image are injected into the target. Its structure stays, and the prompt decides
about colour and material. *features_until* and *attention_until* are fractions of the steps; lower values give the prompt
more influence.

*Plug-and-Play, Keep Structure (PnP)* patches the model for any sampler. The sampler starts from the noised latent of the
inversion, repeated to a pair; *trajectory* keeps the source of the pair equal to the image.
""",
    "layered_edit": """
# LayerDiffusion: object and background at once

A red circle on mint becomes a black circle on a striped sky background. The embeddings of two prompts, one of the object
and one of the background, are optimised on a reference background. A copy of the model is then fine-tuned on the object
of the image and on the reference background. The sampler alternates between the object's embedding and the mixed
embedding.

The object prompt says what changes (black). What stays (a circle) is learned from the image. The model generates the
reference background; connect an *image* to use your own. *Save LoRA* writes a LoRA file. Your model is not changed.

Steps and learning rates suit the bundled model. For a checkpoint use the defaults of the nodes: 500 steps at 0.001, then
250 steps at the automatic rate.
""",
    "layered_edit_with_diffedit_mask": """
# LayerDiffusion without drawing a mask

The mask of the object comes from two prompts, as in DiffEdit. The new background is another image, scaled and cropped to
fit. The rest is as in *layered_edit*. Any MASK works: painted, found or from a segmentation node.

Steps and learning rates suit the bundled model. For a checkpoint use the defaults of the nodes: 500 steps at 0.001, then
250 steps at the automatic rate.
""",
    "imagic": """
# Imagic: an image and a sentence

The sentence says what the image should become. Its embedding is optimised on the image, then a copy of the model is
fine-tuned with it. Sampling uses an embedding between the optimised one (*eta* 0) and that of the sentence (*eta* 1).

Steps and learning rates suit the bundled model. For a checkpoint use the defaults of the node.
""",
    "style_inversion_edit": """
# StyleDiffusion: edit with learned value embeddings

The cross-attention maps stay those of the prompt; the value embeddings are learned from the image, by a small network for
every step that gets the image from an image encoder. Guided sampling then reconstructs the image: see *reconstructed*.
The value embeddings are saved with the trajectory; with *Load Inversion Embeddings* an edit needs neither image nor
encoder.

The edit is Prompt-to-Prompt: *tau_v* is the fraction of the steps with the learned value embeddings, *tau_c*, *tau_s* and
*tau_u* those with the source's attention maps. With *SDEdit strength* the edit starts from the noised image instead of the
inversion, so shapes change more.

Steps and updates suit the bundled model. For a checkpoint use 30 steps and *inner_steps* 0 (as the preset).
""",
    "style_transfer": """
# StyleDiffusion: style transfer

Two images are inverted on the same sigmas. The value embeddings of the second image, the style, are learned. The first
image, the content, is then sampled from its own noise with these value embeddings and with its own features, as in
Plug-and-Play.

The target prompt is the prompt of the style image with the objects of the content image, so that each word gets the value
embedding learned at its position. *features_until* and *attention_until* decide how long the structure of the content is
kept.

Steps and updates suit the bundled model. For a checkpoint use 30 steps and *inner_steps* 0 (as the preset).
""",
}


def note(name: str, *, ranker: bool = False, mask: bool = True, drawn: bool = False, flow: bool = False) -> str:
    """The note of a workflow with the steps to use another checkpoint, one line per paragraph or list item."""
    steps = FLOW if flow else DRAWN if drawn else CHECKPOINT if mask else UNMASKED
    text = NOTES[name] + steps + (RANKER if ranker else "")
    return re.sub(r"(?<!\n)\n(?!\n|\d\.)", " ", text.strip())
