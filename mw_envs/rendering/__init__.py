"""Pictures of a MuJoCo scene, behind one interface.

A renderer draws what a :class:`View` names. :func:`get_renderer` gives the process's own renderer, created on first use
in the process that draws, so that environments can be made before worker processes are forked.
"""

from mw_envs.rendering.choice import RENDERERS, get_renderer, renderer_available
from mw_envs.rendering.view import CROPS, FULL_VIEW, Renderer, RendererUnavailableError, Scene, View, resolve_crop

__all__ = [
    "CROPS",
    "FULL_VIEW",
    "RENDERERS",
    "Renderer",
    "RendererUnavailableError",
    "Scene",
    "View",
    "get_renderer",
    "renderer_available",
    "resolve_crop",
]
