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
}


def note(name: str, *, ranker: bool = False) -> str:
    """A workflow's note and how to swap in a real checkpoint, one line per paragraph or list item."""
    text = NOTES[name] + CHECKPOINT + (RANKER if ranker else "")
    return re.sub(r"(?<!\n)\n(?!\n|\d\.)", " ", text.strip())
