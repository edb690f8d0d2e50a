"""Edits in bulk: one workflow over the lines of a manifest, with resumable results (`editkit batch`)."""
