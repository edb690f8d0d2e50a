"""Two prompts and their word alignment, which attention control acts on (Hertz et al. 2022)."""
