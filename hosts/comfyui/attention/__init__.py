"""Attention control in native networks of each kind."""
