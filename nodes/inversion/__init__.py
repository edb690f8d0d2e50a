"""Nodes of inversion and guided reconstruction."""
