"""Timings and claims: opt-in, never part of the tests. `python -m editkit.benchmarks --help` lists them."""
