"""The bundled model's workshop: the scene renderer, the oracle, the training stages and the evaluation.

`python -m editkit.training --help` lists the stages. Nothing here is imported by the nodes or by `pipelines/`.
"""
