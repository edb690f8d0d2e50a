"""StyleDiffusion (Li et al. 2023; docs/methods.md, section 9).

inversion          learn value embeddings that reconstruct an image (sections 3.2 and 3.3 of the paper)
networks           the mapping networks M_t from image tokens to value embeddings
learning_control   value embeddings and the attention loss L_att inside the network
value_embeddings   what an inversion leaves, and its file format
edit               P2Plus edits, SDEdit starts and style transfer (sections 3.4, 5.2.5 and 5.2.7)
control            value embeddings during sampling (tau_v)
"""
