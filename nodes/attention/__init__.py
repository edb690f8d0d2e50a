"""Nodes of attention control: aligned prompts, P2P and P2Plus, MasaCtrl, Plug-and-Play, cross-attention maps."""
