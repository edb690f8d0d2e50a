"""Metrics of an edit, their report, CLIP ranking and drawing."""
