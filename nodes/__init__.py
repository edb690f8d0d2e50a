"""The ComfyUI nodes: thin V3 classes over `pipelines/`, in folders of the same names.

`extension` lists all nodes and needs a `comfy_api`. Importing this package alone does not.
"""
