"""Timings on the machine at hand, never part of the tests. `python -m editkit.benchmarks --help` lists them."""
