"""EditKit: text-driven image editing with diffusion models, one node per algorithmic step.

ComfyUI finds `WEB_DIRECTORY` and `comfy_entrypoint`; headless users import `editkit.pipelines`. Importing this package
loads nothing else.
"""

from __future__ import annotations

__version__ = "0.1.0"

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """The extension that ComfyUI loads; the nodes are imported only here."""
    from .nodes.extension import EditKitExtension

    return EditKitExtension()
