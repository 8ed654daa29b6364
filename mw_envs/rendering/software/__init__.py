"""The software renderer: a rasterizer that needs neither a GPU nor OpenGL."""
