"""Attention control: sites and hooks, word alignment, P2P and P2Plus, local blend, and their relatives."""
