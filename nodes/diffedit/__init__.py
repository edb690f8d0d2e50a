"""DiffEdit: the mask from two prompts, the masked decode of an inverted image, and the whole method."""
