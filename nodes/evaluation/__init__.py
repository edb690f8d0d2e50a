"""Nodes that rank candidates and measure edits."""
