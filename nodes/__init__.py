"""The ComfyUI face: thin V3 nodes over `pipelines/`, grouped like it.

`extension` lists the nodes and needs a `comfy_api`; importing this package alone does not.
"""
