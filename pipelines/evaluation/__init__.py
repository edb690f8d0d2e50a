"""Metrics, reports, CLIP ranking and drawing."""
