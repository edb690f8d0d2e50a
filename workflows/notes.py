"""What each workflow says about itself, in Markdown, shown left of its nodes."""

from __future__ import annotations

import re

CHECKPOINT = """
## With a checkpoint of yours

1. Put **Load Checkpoint** in the place of *Load model* and connect its MODEL, CLIP and VAE the same way.
2. Put **Load Image** in the place of *Example picture*; paint the mask with *Open in MaskEditor* and use its MASK.
3. Describe the whole picture after the edit in the prompt. Pictures of about 512 px (SD 1.x) or 1024 px (SDXL) suit
the checkpoint.
"""

UNMASKED = """
## With a checkpoint of yours

1. Put **Load Checkpoint** in the place of *Load model* and connect its MODEL, CLIP and VAE the same way.
2. Put **Load Image** in the place of *Example picture*; a mask is not needed.
3. Describe the whole picture in the prompts. *cfg* 5 to 7.5 and pictures of about 512 px (SD 1.x) or 1024 px (SDXL) suit
the checkpoint.
"""

DRAWN = """
## With a checkpoint of yours

1. Put **Load Checkpoint** in the place of *Load model* and connect its MODEL, CLIP and VAE the same way.
2. Set the size in *Empty Latent Image*: about 512 px (SD 1.x) or 1024 px (SDXL), and *cfg* 5 to 7.5.
3. Describe the whole picture in both prompts. To edit a picture of yours instead, with **Load Image**, see the workflow
*p2plus_real_image*.
"""

RANKER = """4. The bundled ranker knows the bundled model's pictures only. In *Load ranker* choose open_clip weights of
yours.
"""

NOTES = {
    "blended_edit": """
# Blended Latent Diffusion, step by step

Puts a new object under the mask. Every step of the method is a node of its own: look at what passes between any two, or
put another node there.

The mask comes onto the latent grid; a schedule grows it at first and shrinks it to yours. The loop denoises towards the
prompt and puts the source back outside the mask after every step. Four candidates are ranked, and a copy of the decoder
is fitted to the best one. At the end the outside is the source, bit for bit.
""",
    "blended_any_sampler": """
# The blended edit through KSampler

*Blended model* patches the model so that any native sampler edits under the mask only. Change sampler, scheduler and
steps as you like; SamplerCustomAdvanced works too. The outside follows the LATENT that the sampler is given and ends
at it.
""",
    "thin_mask": """
# A stroke thinner than a latent cell

The mask is a stroke of three pixels; a cell of the latent grid is eight. In the plain loop (kernels *1*) the background
is pinned so close to the stroke that little can form there. With *7,5,3,1* the mask begins grown and shrinks to the
stroke. Both start from the same noise.

*parts* is *equal log-sigma* here: on a latent of twelve cells what is drawn is decided late, and with *equal steps*, as
published, the stroke is alone long enough to lose it again.
""",
    "background_replacement": """
# Another background

The mask covers everything but the object. If you would rather paint the object, put **InvertMask** behind your picture.

A mask this large needs no room to grow, and grown it would cover the object: the schedule has the kernel *1* only, and
mode *area* leaves the object every cell that is mostly its own.
""",
    "scribble": """
# From a scribble

The picture holds a rough green blob, and the mask lies around it. At *strength* 0.7 the loop starts from a level of
noise that keeps the blob's place and colour but not its edge: the prompt decides what it becomes. A lower strength keeps
more of the scribble.
""",
    "ranked_batch_tuned_winner": """
# Eight candidates, one winner

One run of the loop gives eight candidates. The prompt describes the whole picture; the ranker looks only at what is
under the mask, so its text names only the new object. The winner alone pays for a fine-tune of the decoder.
""",
    "editing_session": """
# Three edits in a row

Each edit begins with the finished picture of the one before: add a star on the right, replace the ring on the left (the
same mask, inverted), then make a circle of the star.

Every edit ends with its source outside the mask, bit for bit, so nothing wears out where you did not edit.
""",
    "diffedit": """
# DiffEdit: an edit without drawing a mask

Two prompts say what the picture shows and what it should show. Where the model, shown the same noised picture, predicts
different things for them, there the edit belongs: that is the mask. The picture is then inverted, which finds its own path up
to noise, and decoded towards the second prompt under the mask and along its own path outside.

*Edit by two prompts* does all of it in one node. Prompts that differ in few words give the cleanest masks; a lower
*threshold* gives a larger one.
""",
    "diffedit_into_blended": """
# DiffEdit's mask in Blended Latent Diffusion

No paper wrote this one. The mask comes from two prompts, as in DiffEdit; it is grown at first and shrinks to what was found,
as in Blended Latent Diffusion; and the background of the blended loop is the picture's own inverted path instead of noise.
A copy of the decoder is fitted to the result, and at the end the outside is the source, bit for bit.
""",
    "differential_diffusion": """
# Differential Diffusion: change by degrees

A soft map says how much every part may change. Parts that may change a little are held to the source for most of the
steps and let go late, so that there is no hard border at all. Here the map is DiffEdit's own measure of disagreement between
the two prompts, before any threshold; a painted, feathered mask does as well: bring it onto the latent grid with
*Latent mask* at threshold 0.
""",
    "null_text_reconstruction": """
# Null-text inversion

An inverted picture comes back when it is sampled without guidance; with guidance, as every edit needs it, the way back
drifts off: see *plain*. Null-text inversion learns, for every step, what the empty prompt should have been so that guided
sampling retraces the inversion. Only these embeddings learn; the model stays as it is.

They work in any native sampler through *Guider with embeddings*, and in the place of the negative prompt in EditKit's own
nodes. The same embeddings with another prompt edit the picture: here the background gets stripes, and the circle stays
where and what it was. *Save embeddings* keeps them.
""",
    "sdedit": """
# SDEdit: from a rough picture

The picture, with a rough green blob in it, is noised part of the way and denoised towards the prompt. There is no mask:
everything may change, and *strength* decides how much. 0.3 keeps the blob, 0.5 keeps its place and colour, 1 forgets the picture.
""",
    "word_swap": """
# DDIM inversion with a swapped word

The picture is inverted with the prompt that describes it, and the noise found is sampled with one word of the prompt
replaced, here by a native sampler that adds no noise of its own. Colours and background stay much as they were, but nothing
holds the layout: the new object may move or grow. Compare with *diffedit*.

Connected to VAE and picture, the inversion also says how well the way back reconstructs the picture. The sampler must run on
the very SIGMAS of the inversion.
""",
    "p2p_replace": """
# Prompt-to-Prompt: one word for another

Both prompts are drawn from the same noise, side by side: the latent batch of 2 holds the source and the target. While
*tau_c* of the run lasts, the target's words look where the source's words look; while *tau_s* lasts, its layout is the
source's. So the circle turns green and stays where it is. Any native sampler will do.
""",
    "p2p_refine": """
# Prompt-to-Prompt: a word more

The target prompt says more than the source prompt: *refine* keeps the place of every word that both have, and lets the new
one look where it likes. The circle stays, its background gets stripes. Here through SamplerCustomAdvanced.
""",
    "p2p_reweight": """
# Prompt-to-Prompt: a stronger or weaker word

Source and target prompt are the same; *weights* in *Align prompts* changes the strength of a word, here *red*. 1 leaves it
as it is, 2 to 4 strengthens it, 0 and less takes it away: at -2 the red thing shrinks, at -4 it is gone.

*Edit by prompt* does the whole edit in one node; no sampler is needed.
""",
    "p2plus_real_image": """
# P2Plus on a real picture

The picture is inverted, which finds the noise it would have been drawn from, and edited on the way back: the source is put
back at every step, and takes a row of the model only while it is looked at.

A circle and a square have different shapes: *tau_u* 0.5 (P2Plus) lets go of the source's structure. Set it to 0 for plain
Prompt-to-Prompt. The maps show where the words of the source prompt look. For a photograph, connect *Negative-prompt
inversion* or *Null-text inversion* in the place of the negative prompt: they keep what no word speaks of.
""",
    "masactrl": """
# MasaCtrl: the same thing in another place

The target takes its layout from its own prompt, but asks the source what things look like: the keys and values of its
self-attention are the source's, from step 4 and from the middle of the network on. The circle moves aside for a star.

*Same object, other pose* patches the model for any native sampler. The picture's path, repeated to a pair, is where the
sampler starts; *trajectory* holds the first of the pair to the picture.
""",
    "plug_and_play": """
# Plug-and-Play: the same structure, other looks

The picture's features and self-attention go into the target: its structure stays, and the prompt decides about colour and
material. *features_until* and *attention_until* say for which part of the run; less leaves the prompt more.

*Same structure, other looks* patches the model for any native sampler. The picture's path, repeated to a pair, is where the
sampler starts; *trajectory* holds the first of the pair to the picture.
""",
    "layered_edit": """
# LayerDiffusion: subject and background at once

One picture of a red circle on mint becomes a black one on striped sky, drawn from noise. Two prompts, one of the subject and one
of the background, are fitted to a reference of the new background. Then a copy of the model learns the picture's subject
and the reference's background. Sampling follows the subject's prompt and the mix of both in turn, step by step.

The prompt of the subject says what changes (black); what stays (that it is a circle) the model learns from the picture.
The reference is made by the model from the text of the background; connect an *image* to use one of yours. *Save what a model
learned* writes a LoRA file that any loader reads. Nothing of your model changes.

Steps and learning rates suit the bundled model. For a checkpoint take the nodes' own: 500 at 0.001, then 250 at the preset's.
""",
    "layered_edit_with_diffedit_mask": """
# LayerDiffusion without drawing a mask

The subject's mask comes from two prompts, as in DiffEdit, and the new background from another picture, scaled and cut to fit.
Everything else is as in *layered_edit*. Any MASK does: drawn, found, or from a segmenter.

Steps and learning rates suit the bundled model. For a checkpoint take the nodes' own: 500 at 0.001, then 250 at the preset's.
""",
    "imagic": """
# Imagic: a picture and a sentence

The sentence says what the picture should become. Its embedding is fitted to the picture as it is, then a copy of the model is
fitted to both; sampled with an embedding between the fitted one and the sentence's, the picture changes as little as the
sentence allows. *eta* is the way from the one (0) to the other (1).

Steps and learning rates suit the bundled model. For a checkpoint take the node's own.
""",
    "style_inversion_edit": """
# StyleDiffusion: a picture's own values

The words keep looking where they look; what they bring along is learned from the picture itself, by a small network for every
step that sees the picture through an image encoder. Guided sampling then gives the picture back: see *reconstructed*. The values
and the picture's path are saved; with *Load embeddings* the edit needs neither picture nor encoder.

The edit is Prompt-to-Prompt on top: *tau_v* says how long the edited picture keeps the values, *tau_c*, *tau_s* and *tau_u* how
long it attends like the source. With *sdedit_strength* the picture is noised part of the way instead of inverted: freer in
shape.

Steps and updates suit the bundled model. For a checkpoint take 30 steps and *inner_steps* 0, the preset's own.
""",
    "style_transfer": """
# StyleDiffusion: one picture in the style of another

Two pictures are inverted on the same sigmas. The values of the second, the style, are learned; the first, the content, is then
drawn again from its own noise with these values, and with its own features in the decoder, as in Plug-and-Play.

The target prompt has the content's things in the sentence of the style picture, so that each word meets the value learned for its
place. *features_until* and *attention_until* say how long the content's structure holds.

Steps and updates suit the bundled model. For a checkpoint take 30 steps and *inner_steps* 0, the preset's own.
""",
}


def note(name: str, *, ranker: bool = False, mask: bool = True, drawn: bool = False) -> str:
    """A workflow's note and how to swap in a real checkpoint, one line per paragraph or list item."""
    text = NOTES[name] + (DRAWN if drawn else CHECKPOINT if mask else UNMASKED) + (RANKER if ranker else "")
    return re.sub(r"(?<!\n)\n(?!\n|\d\.)", " ", text.strip())
