"""How the bundled model is trained, exported and measured.

`python -m editkit.training --help` lists the stages. Nothing else in the package imports this folder.
"""
