"""LayerDiffusion: change an image's object and its background together (Li et al. 2023; docs/methods.md, section 10).

embeddings             stage 1: fit the embeddings of object and background to the image (equations 2 and 3)
finetune               stage 2: fit a copy of the network to the object and to a new background (equations 4 to 6)
iterative_guidance     sampling: alternate between the object's embedding and the mix (equation 8)
reference_background   the object's mask on the latent grid, and the image of the new background
fitting                what both stages share: memory check, early stopping, gradient checkpointing

There is no official code. Not to be confused with LayerDiffuse, which generates transparent images.
"""
