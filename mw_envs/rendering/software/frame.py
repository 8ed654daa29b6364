"""One frame from its parts, compiled as a whole: the software renderer's order of passes."""

from __future__ import annotations

import numpy as np

from mw_envs.rendering.software import raster, shading
from mw_envs.rendering.software.arrays import LANES, MARGIN, SAMPLES, Samples, ShadowMap, compiled

# Side of a shadow map's texels, in pixels; a surface is in shadow if it lies _SLACK texels behind what the light meets
# first, which itself lies as much deeper as its slope makes of _SLOPE_TEXELS.
TEXEL, _SLACK, _SLOPE_TEXELS = 1.25, 0.75, 1.0
UNLIMITED = 1 << 30  # where spans begin that are empty
_BAND = 16  # rows that are colored as one, few enough to stay in a core's cache


def samples(rows, columns):
    """The samples of a view, which see nothing."""
    shape = rows, SAMPLES * (columns + MARGIN)
    return Samples(np.zeros(shape, np.float32), np.zeros(shape, np.int32))


@compiled
def light_window(look, casting):
    """Where in the plane of the light that casts shadows some drawables are, in texels: left, top, right, bottom."""
    if look.lights.unshadowed == look.towards.shape[1]:
        return 0, 0, 0, 1
    return raster.project_to_light(look.casters, casting, look.to_light, look.workspace)


def texels(window):
    """How many numbers the shadow map of such a window takes."""
    left, top, right, bottom = window
    return (bottom - top) * (right - left + LANES)


@compiled
def cast_shadows(look, casting, window, pixel):
    """What the light meets of drawables that have been projected to its plane, kept in the workspace.

    :param window: see :func:`light_window`.
    """
    left, top, right, bottom = window
    rows, columns = bottom - top, right - left + LANES
    workspace, unshadowed = look.workspace, look.lights.unshadowed
    depth = workspace.shadows[: rows * columns].reshape(rows, columns)
    depth[:] = np.inf
    if unshadowed < look.towards.shape[1]:
        towards = look.towards[:, unshadowed]
        raster.rasterize_shadow(
            look.casters, casting, towards, workspace, right - left, left, top, _SLOPE_TEXELS, depth
        )
    return ShadowMap(depth, right - left, left, top, _SLACK * TEXEL * pixel)


@compiled
def draw_still(look, camera, poses, drawables, shadows, background, seen, spans, changed):
    """Draw what does not move over a background, and make it a part of that.

    :param drawables: opaque ones.
    :param shadows: those that they cast on the background, which holds them already, for what they cast on themselves.
    :param seen: the background's samples, and what is in the spans is something else's; both become the background's.
    :param changed: first and last pixel of each row whose samples may have changed, int32 (rows, 2); set.
    """
    geometry, workspace = look.geometry, look.workspace
    shading.darken_background(background, shadows)
    show_background(background.nearness, spans, seen)
    _empty(spans)
    rows, columns = background.light_d.shape
    window = _clipped(raster.project(geometry, drawables, poses, camera, workspace), (0, 0, columns, rows))
    raster.rasterize(geometry, drawables, camera, look.eyes, window, workspace, seen, spans)
    count = 0
    for y in range(window[1], window[3], _BAND):
        end, start = min(y + _BAND, window[3]), count
        count = shading.find_visible(y, end, spans, seen, look.frame, start, workspace)
        shading.prepare_visible(start, count, look)
        shading.resolve_still(y, end, spans, seen, look, camera, background)
    shading.bound_tiles(background)
    kept, shown, numbers = background.nearness, seen.nearness, seen.numbers
    for y in range(len(spans)):
        changed[y, 0], changed[y, 1] = spans[y, 0], spans[y, 1]
        for k in range(SAMPLES * spans[y, 0], SAMPLES * (spans[y, 1] + 1)):
            kept[y, k] = shown[y, k]
            numbers[y, k] = 0
    _empty(spans)


@compiled
def show_background(nearness, spans, seen):
    """Make samples those of a background.

    :param spans: first and last pixel of each row. Triangles are drawn some pixels at a time and may have reached
        beyond the last one, where a part of the view ended.
    """
    shown, numbers = seen.nearness, seen.numbers
    for y in range(len(spans)):
        if spans[y, 0] <= spans[y, 1]:
            for k in range(np.uint64(SAMPLES * spans[y, 0]), np.uint64(SAMPLES * (spans[y, 1] + 1 + MARGIN))):
                shown[y, k] = nearness[y, k]
                numbers[y, k] = 0


@compiled
def draw_moving(look, camera, poses, moving, transparent, casting, lit, pixel, background, canvas, part, picture):
    """Draw a part of a view, what moves over the background.

    :param moving: opaque drawables, and transparent ones, nearest first, int32.
    :param casting: those of them that cast shadows, int32.
    :param lit: their window in the light's plane, to which they have been projected.
    :param canvas: see :class:`mw_envs.rendering.software.arrays.Canvas`; left with the frame's own spans.
    :param part: pixels to draw: left, top, right, bottom, the last two exclusive.
    :param picture: uint8 (rows, columns, 3); set in that part.
    """
    geometry, workspace, frame = look.geometry, look.workspace, look.frame
    shadows = cast_shadows(look, casting, lit, pixel)
    picture[part[1] : part[3], part[0] : part[2]] = background.bright[part[1] : part[3], part[0] : part[2]]
    shading.darken(background, shadows, part, picture)
    seen, spans = canvas.seen, canvas.spans
    show_background(background.nearness, spans, seen)
    _empty(spans)
    left, top, right, bottom = _clipped(raster.project(geometry, moving, poses, camera, workspace), part)
    raster.rasterize(geometry, moving, camera, look.eyes, (left, top, right, bottom), workspace, seen, spans)
    count = 0
    for y in range(top, bottom, _BAND):
        end, start = min(y + _BAND, bottom), count
        count = shading.find_visible(y, end, spans, seen, frame, start, workspace)
        shading.prepare_visible(start, count, look)
        shading.choose_levels(start, count, look, camera)
        shading.resolve(y, end, spans, seen, look, camera, shadows, background, picture)
    # MuJoCo draws what is transparent twice, from front to back and from back to front.
    layers = len(transparent)
    nearness, layer_nearness, layer_numbers = seen.nearness, canvas.layer.nearness, canvas.layer.numbers
    for k in range(2 * layers):
        i = k if k < layers else 2 * layers - 1 - k
        one = transparent[i : i + 1]
        window = _clipped(raster.project(geometry, one, poses, camera, workspace), part)
        left, top, right, bottom = window
        for y in range(top, bottom):
            for sample in range(SAMPLES * left, SAMPLES * (right + MARGIN)):
                layer_nearness[y, sample], layer_numbers[y, sample] = nearness[y, sample], 0
        _empty(canvas.layer_spans)
        raster.rasterize(geometry, one, camera, look.eyes, window, workspace, canvas.layer, canvas.layer_spans)
        start = count
        count = shading.find_visible(top, bottom, canvas.layer_spans, canvas.layer, frame, start, workspace)
        shading.prepare_visible(start, count, look)
        shading.choose_levels(start, count, look, camera)
        alpha = look.materials.rgba[one[0], 3]
        shading.blend(top, bottom, canvas.layer_spans, canvas.layer, alpha, look, camera, picture)


@compiled
def _empty(spans):
    spans[:, 0], spans[:, 1] = UNLIMITED, -1


@compiled
def _clipped(window, part):
    """A window inside a part of the view, both as left, top, right, bottom."""
    left, top = max(part[0], window[0]), max(part[1], window[1])
    return left, top, max(left, min(part[2], window[2])), max(top, min(part[3], window[3]))
