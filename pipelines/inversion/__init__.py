"""DDIM inversion and guided reconstruction: null-text, negative-prompt and proximal inversion."""
