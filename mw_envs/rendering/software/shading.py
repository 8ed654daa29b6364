"""Colors of what the samples see: the software renderer's light and shadows.

A color is computed at a pixel's center, as OpenGL's multisampling does, once for each group of triangles that it sees.
"""

from __future__ import annotations

import numpy as np

from mw_envs.rendering.software.arrays import (
    DRAWABLE,
    HALF,
    LEVEL,
    ONE,
    QUANTITIES,
    SAMPLES,
    TEXTURE,
    TILE,
    TRIANGLE_BITS,
    TRIANGLES,
    WEIGHT,
    ZERO,
    D,
    F,
    S,
    U,
    V,
    compiled,
    inlined,
)
from mw_envs.rendering.software.raster import ray_weights
from mw_envs.rendering.software.textures import sample_texture, texture_level

# Colors are clamped, as OpenGL does it.
_LEAST = np.array([0] * 6 + [-np.inf] * (QUANTITIES - 6), np.float32)
_MOST = np.array([1] * 6 + [np.inf] * (QUANTITIES - 6), np.float32)
NO_SHADOW = F(-1e9)
_FAR = (1 << 31) - 1  # in texels
_PLACE = (1 << 32) - 1  # the lower half of a slot
_ALMOST_ONE, _THIRD = F(0.999), F(1 / 3)
_SHARE, _FULL = F(1 / SAMPLES), F(255)
_1, _2, _3 = np.uint64(1), np.uint64(2), np.uint64(3)


@compiled
def prepare_lighting(poses, camera, lights, axes, texel, eyes, towards, to_light):
    """The camera and the lights in each drawable's coordinates, see :class:`mw_envs.rendering.software.arrays.Look`.

    :param axes: two directions across the light that casts shadows and the one along it, float32 (3, 3), or empty.
    :param texel: side of a shadow map's texel, meters.
    :param eyes: set; so are towards and to_light.
    """
    for d in range(len(poses)):
        p = poses[d]
        for i in range(len(axes)):
            scale = ONE / F(texel) if i < 2 else ONE
            for j in range(3):
                to_light[d, 4 * i + j] = scale * (axes[i, 0] * p[j] + axes[i, 1] * p[3 + j] + axes[i, 2] * p[6 + j])
            to_light[d, 4 * i + 3] = scale * (axes[i, 0] * p[9] + axes[i, 1] * p[10] + axes[i, 2] * p[11])
        x, y, z = camera.position[0] - p[9], camera.position[1] - p[10], camera.position[2] - p[11]
        for j in range(3):
            eyes[d, j] = p[j] * x + p[3 + j] * y + p[6 + j] * z
        for s in range(len(lights.towards)):
            lx, ly, lz = lights.towards[s]
            for j in range(3):
                towards[d, s, j] = p[j] * lx + p[3 + j] * ly + p[6 + j] * lz


@compiled
def find_visible(top, bottom, spans, seen, frame, count, workspace):
    """List the triangles that give samples their colors, one of each group that a pixel sees.

    :param top: first row, and bottom the one after the last.
    :param spans: first and last pixel of each row that may see one.
    :param seen: the samples; updated, their triangles become places in the list.
    :param count: how many have been listed in this frame.
    :return: how many are listed now.
    """
    visible, slots, numbers = workspace.visible, workspace.slots, seen.numbers
    now = np.int64(frame) << 32
    for y in range(top, bottom):
        for x in range(spans[y, 0], spans[y, 1] + 1):
            k = np.uint64(SAMPLES * x)
            n0, n1, n2, n3 = numbers[y, k], numbers[y, k + _1], numbers[y, k + _2], numbers[y, k + _3]
            if n0 | n1 | n2 | n3 == 0:
                continue
            if ((n0 ^ n1) | (n0 ^ n2) | (n0 ^ n3)) >> TRIANGLE_BITS == 0:
                place, count = _listed(n0, now, count, visible, slots)
                numbers[y, k], numbers[y, k + _1], numbers[y, k + _2], numbers[y, k + _3] = place, place, place, place
                continue
            # Without further branches, which would have to wait for memory.
            g0, g1, g2, g3 = n0 >> TRIANGLE_BITS, n1 >> TRIANGLE_BITS, n2 >> TRIANGLE_BITS, n3 >> TRIANGLE_BITS
            n1 = n0 if g1 == g0 else n1
            n2 = n0 if g2 == g0 else n1 if g2 == g1 else n2
            n3 = n0 if g3 == g0 else n1 if g3 == g1 else n2 if g3 == g2 else n3
            numbers[y, k], count = _listed(n0, now, count, visible, slots)
            numbers[y, k + _1], count = _listed(n1, now, count, visible, slots)
            numbers[y, k + _2], count = _listed(n2, now, count, visible, slots)
            numbers[y, k + _3], count = _listed(n3, now, count, visible, slots)
    return count


@inlined
def _listed(number, now, count, visible, slots):
    """A triangle's place in the list, counted from 1, or 0 for none, and how many are listed then."""
    t = np.uint64(number & (TRIANGLES - 1))
    slot = slots[t]
    fresh = (number != 0) & (slot < now)
    visible[count] = t
    slots[t] = now | count if fresh else slot
    place = (count if fresh else slot & _PLACE) + 1
    return place if number != 0 else 0, count + fresh


@inlined
def _evaluate(planes, slot, ray_x, ray_y):
    """All quantities of a visible triangle where a ray meets its plane, into the triangle's fourth row."""
    weight = planes[slot, 0, WEIGHT] * ray_x + planes[slot, 1, WEIGHT] * ray_y + planes[slot, 2, WEIGHT]
    # Seen edge on, a triangle's plane may lie along the ray.
    inverse = ONE / (weight if abs(weight) > F(1e-20) else F(1e-20))
    for j in range(QUANTITIES):
        value = (planes[slot, 0, j] * ray_x + planes[slot, 1, j] * ray_y + planes[slot, 2, j]) * inverse
        planes[slot, 3, j] = min(max(value, _LEAST[j]), _MOST[j])


@compiled
def _level(p, slot, ray_x, ray_y, step_x, step_y, mapping, levels):
    """How much a triangle's texture is reduced where a ray meets it.

    That is the level, and behind the point the share of the next one.

    :param p: planes of the triangles, evaluated for the ray.
    :param step_x: width of a pixel, and step_y its height, in rays.
    """
    d, texture = int(p[slot, 0, DRAWABLE]), int(p[slot, 0, TEXTURE])
    weight = p[slot, 0, WEIGHT] * ray_x + p[slot, 1, WEIGHT] * ray_y + p[slot, 2, WEIGHT]
    inverse = ONE / (weight if abs(weight) > F(1e-20) else F(1e-20))
    a, c, f = mapping[d, 1], mapping[d, 3], mapping[d, 5]
    # A place on the texture and its change by one pixel, across and down.
    s, q, r = p[slot, 3, S] * a, p[slot, 3, S + 1] * c, p[slot, 3, S + 2] * f
    across, down = step_x * inverse, step_y * inverse
    sx = (p[slot, 0, S] * a - s * p[slot, 0, WEIGHT]) * across
    qx = (p[slot, 0, S + 1] * c - q * p[slot, 0, WEIGHT]) * across
    rx = (p[slot, 0, S + 2] * f - r * p[slot, 0, WEIGHT]) * across
    sy = (p[slot, 1, S] * a - s * p[slot, 1, WEIGHT]) * down
    qy = (p[slot, 1, S + 1] * c - q * p[slot, 1, WEIGHT]) * down
    ry = (p[slot, 1, S + 2] * f - r * p[slot, 1, WEIGHT]) * down
    level, blend = texture_level(levels, texture, mapping[d, 0], s, q, r, sx, qx, rx, sy, qy, ry)
    return F(level) + min(blend, _ALMOST_ONE)


@compiled
def prepare_visible(start, count, look):
    """The quantities of visible triangles as functions of the ray.

    :param start: the first of them in the list, and count the one after the last.
    """
    # Fields of a tuple are counted references each time they are read; local names are not.
    frame, workspace, geometry, texture = look.frame, look.workspace, look.geometry, look.materials.texture
    triangles, triangle_corners, drawable = geometry.triangles, geometry.corners, geometry.drawable
    corners, lit, planes, visible = workspace.corners, workspace.lit, workspace.planes, workspace.visible
    fresh, fresh_vertices, fresh_drawables = workspace.fresh, workspace.fresh_vertices, workspace.fresh_drawables
    used = 0
    for i in range(start, count):
        t = visible[i]
        for k in range(3):
            corner = triangle_corners[t, k]
            fresh[used], fresh_vertices[used], fresh_drawables[used] = corner, triangles[t, k], drawable[t]
            used += lit[corner] != frame
            lit[corner] = frame
    _light_corners(used, look)
    for i in range(start, count):
        t = visible[i]
        _, na, nb, nc = ray_weights(workspace, triangles[t, 0], triangles[t, 1], triangles[t, 2])
        ca, cb, cc = triangle_corners[t, 0], triangle_corners[t, 1], triangle_corners[t, 2]
        for j in range(QUANTITIES):
            a, b, c = corners[ca, j], corners[cb, j], corners[cc, j]
            planes[i, 0, j] = na[0] * a + nb[0] * b + nc[0] * c
            planes[i, 1, j] = na[1] * a + nb[1] * b + nc[1] * c
            planes[i, 2, j] = na[2] * a + nb[2] * b + nc[2] * c
        d = drawable[t]
        planes[i, 0, LEVEL], planes[i, 0, TEXTURE], planes[i, 0, DRAWABLE] = -ONE, texture[d], d


@compiled
def choose_levels(start, count, look, camera):
    """How much the textures of visible triangles are reduced, once for each triangle.

    It is told in the middle of a triangle that does not reach behind the camera. Where this is not called, each pixel
    asks.

    :param start: the first of them in the list, and count the one after the last; they have been prepared.
    """
    workspace, triangles = look.workspace, look.geometry.triangles
    mapping, levels, planes = look.materials.mapping, look.textures.levels, workspace.planes
    fx, fy, near = F(1 / camera.focal_x), F(1 / camera.focal_y), F(camera.near)
    for i in range(start, count):
        if planes[i, 0, TEXTURE] >= ZERO:
            t = workspace.visible[i]
            planes[i, 0, LEVEL] = _middle_level(
                planes, i, triangles[t], workspace.camera, near, fx, fy, mapping, levels
            )


@compiled
def _light_corners(used, look):
    """The quantities of corners by OpenGL's fixed-function lighting with a local viewer.

    :param used: how many are listed as fresh in the workspace.
    """
    workspace, geometry, lights = look.workspace, look.geometry, look.lights
    normals, texture_places = geometry.normals, geometry.texture_places
    rgba, gloss = look.materials.rgba, look.materials.gloss
    xs, ys, zs = geometry.x, geometry.y, geometry.z
    corners = workspace.corners
    eyes, towards, to_light = look.eyes, look.towards, look.to_light
    ambient, diffuse, specular, unshadowed = lights.ambient, lights.diffuse, lights.specular, lights.unshadowed
    fresh, fresh_vertices, fresh_drawables = workspace.fresh, workspace.fresh_vertices, workspace.fresh_drawables
    for i in range(used):
        corner, v, d = fresh[i], fresh_vertices[i], fresh_drawables[i]
        nx, ny, nz = normals[corner, 0], normals[corner, 1], normals[corner, 2]
        x, y, z = xs[v], ys[v], zs[v]
        ex, ey, ez = eyes[d, 0] - x, eyes[d, 1] - y, eyes[d, 2] - z
        length = ONE / np.sqrt(ex * ex + ey * ey + ez * ez)
        ex, ey, ez = ex * length, ey * length, ez * length
        for j in range(3):
            corners[corner, j], corners[corner, 3 + j] = gloss[d, 0] * rgba[d, j], ZERO
            corners[corner, S + j] = texture_places[v, j]
        m = to_light[d]
        corners[corner, U] = m[0] * x + m[1] * y + m[2] * z + m[3]
        corners[corner, V] = m[4] * x + m[5] * y + m[6] * z + m[7]
        corners[corner, D] = m[8] * x + m[9] * y + m[10] * z + m[11]
        corners[corner, WEIGHT] = ONE
        for s in range(towards.shape[1]):
            first = 0 if s < unshadowed else 3
            lx, ly, lz = towards[d, s, 0], towards[d, s, 1], towards[d, s, 2]
            facing, shine = nx * lx + ny * ly + nz * lz, ZERO
            hx, hy, hz = ex + lx, ey + ly, ez + lz
            along, square = nx * hx + ny * hy + nz * hz, hx * hx + hy * hy + hz * hz
            # Most places are so far from the highlight that it adds less than a thousandth.
            if (along > ZERO) & (facing > ZERO) & (along * along > gloss[d, 3] * square):
                shine = gloss[d, 1] * np.exp(HALF * gloss[d, 2] * np.log(along * along / square))
            facing = max(facing, ZERO)
            for j in range(3):
                color = (ambient[s, j] + facing * diffuse[s, j]) * rgba[d, j] + shine * specular[s, j]
                corners[corner, first + j] += color
        for j in range(6):
            corners[corner, j] = min(corners[corner, j], ONE)


@compiled
def _middle_level(planes, slot, vertices, camera_places, near, step_x, step_y, mapping, levels):
    """How much a triangle's texture is reduced in its middle, see :func:`_level`; -1 if it reaches behind the camera.

    :param vertices: the triangle's.
    """
    x, y, nearest = ZERO, ZERO, near
    for k in range(3):
        v = vertices[k]
        away = camera_places[v, 2]
        nearest = min(nearest, away)
        x += camera_places[v, 0] / max(away, near) * _THIRD
        y += camera_places[v, 1] / max(away, near) * _THIRD
    if nearest < near:
        return -ONE
    _evaluate(planes, slot, x, y)
    return _level(planes, slot, x, y, step_x, step_y, mapping, levels)


@compiled
def _apply_texture(p, slot, ray_x, ray_y, step_x, step_y, mapping, pixels, levels):
    """Multiply the colors of a triangle by its texture; see :func:`_level`."""
    d, texture = int(p[slot, 0, DRAWABLE]), int(p[slot, 0, TEXTURE])
    s = p[slot, 3, S] * mapping[d, 1] + mapping[d, 2]
    q = p[slot, 3, S + 1] * mapping[d, 3] + mapping[d, 4]
    r = p[slot, 3, S + 2] * mapping[d, 5]
    reduction = p[slot, 0, LEVEL]
    if reduction < ZERO:
        reduction = _level(p, slot, ray_x, ray_y, step_x, step_y, mapping, levels)
    level = int(reduction)
    blend = reduction - F(level)
    red, green, blue = sample_texture(pixels, levels, texture, mapping[d, 0], s, q, r, level, blend)
    p[slot, 3, 0] *= red
    p[slot, 3, 1] *= green
    p[slot, 3, 2] *= blue
    p[slot, 3, 3] *= red
    p[slot, 3, 4] *= green
    p[slot, 3, 5] *= blue


@inlined
def _in_shadow(depth, columns, u0, v0, slack, u, v, d):
    """Whether a point of the light's space lies behind what a shadow map holds.

    Without a branch: one that is not foreseen would have to wait for all that the point was computed from.
    """
    column, row, rows = u - F(u0), v - F(v0), F(depth.shape[0])
    inside = (column >= ZERO) & (row >= ZERO) & (column < F(columns)) & (row < rows)
    i, j = np.uint64(row if inside else ZERO), np.uint64(column if inside else ZERO)
    return inside & (d > depth[i, j] + slack)


@inlined
def _unpacked(shadows):
    """A shadow map's fields as local names, for those of a tuple are counted references each time they are read."""
    return shadows.depth, shadows.columns, shadows.u0, shadows.v0, F(shadows.slack)


@inlined
def _different(places, y, x, numbers, shares):
    """List the different places that a pixel's samples see, and of how many samples each; how many these are.

    Where they are not all the same, without branches that depend on them.
    """
    k = np.uint64(SAMPLES * x)
    n0, n1, n2, n3 = places[y, k], places[y, k + _1], places[y, k + _2], places[y, k + _3]
    if n0 == n1 and n0 == n2 and n0 == n3:
        numbers[0], shares[0] = n0, SAMPLES
        return int(n0 != 0)
    same01, same02, same03, same12, same13, same23 = n0 == n1, n0 == n2, n0 == n3, n1 == n2, n1 == n3, n2 == n3
    different = 0
    numbers[different], shares[different] = n0, 1 + same01 + same02 + same03
    different += n0 != 0
    numbers[different], shares[different] = n1, 1 + same12 + same13
    different += (n1 != 0) & (not same01)
    numbers[different], shares[different] = n2, 1 + same23
    different += (n2 != 0) & (not same02) & (not same12)
    numbers[different], shares[different] = n3, 1
    different += (n3 != 0) & (not same03) & (not same13) & (not same23)
    return different


@compiled
def resolve(top, bottom, spans, seen, look, camera, shadows, background, picture):
    """Colors of the pixels that see triangles, over a picture that shows the background.

    :param top: first row, and bottom the one after the last.
    :param spans: first and last pixel of each row that may see one.
    :param shadows: those of what moves; others are the background's.
    :param picture: uint8 (rows, columns, 3); updated.
    """
    fx, fy = F(1 / camera.focal_x), F(1 / camera.focal_y)
    ox, oy = F(camera.center_x), F(camera.center_y)
    numbers, shares, places = np.empty(SAMPLES, np.int32), np.empty(SAMPLES, np.int32), seen.numbers
    planes, mapping = look.workspace.planes, look.materials.mapping
    pixels, levels = look.textures.pixels, look.textures.levels
    depth0, columns0, u0, v0, slack0 = _unpacked(shadows)
    depth1, columns1, u1, v1, slack1 = _unpacked(background.shadows)
    for y in range(top, bottom):
        ray_y = (F(y) + HALF - oy) * fy
        for x in range(spans[y, 0], spans[y, 1] + 1):
            different = _different(places, y, x, numbers, shares)
            ray_x = (F(x) + HALF - ox) * fx
            red, green, blue, covered = ZERO, ZERO, ZERO, ZERO
            for i in range(different):
                slot, weight = numbers[i] - 1, F(shares[i]) * _SHARE
                covered += weight
                _evaluate(planes, slot, ray_x, ray_y)
                if planes[slot, 0, TEXTURE] >= ZERO:
                    _apply_texture(planes, slot, ray_x, ray_y, fx, fy, mapping, pixels, levels)
                u, v, distance = planes[slot, 3, U], planes[slot, 3, V], planes[slot, 3, D]
                dark = _in_shadow(depth0, columns0, u0, v0, slack0, u, v, distance)
                dark |= _in_shadow(depth1, columns1, u1, v1, slack1, u, v, distance)
                light = ZERO if dark else ONE
                r = planes[slot, 3, 0] + light * planes[slot, 3, 3]
                g = planes[slot, 3, 1] + light * planes[slot, 3, 4]
                b = planes[slot, 3, 2] + light * planes[slot, 3, 5]
                red += weight * min(r, ONE)
                green += weight * min(g, ONE)
                blue += weight * min(b, ONE)
            if covered > ZERO:
                rest = ONE - covered
                picture[y, x, 0] = np.uint8(red * _FULL + rest * F(picture[y, x, 0]) + HALF)
                picture[y, x, 1] = np.uint8(green * _FULL + rest * F(picture[y, x, 1]) + HALF)
                picture[y, x, 2] = np.uint8(blue * _FULL + rest * F(picture[y, x, 2]) + HALF)


@compiled
def resolve_still(top, bottom, spans, seen, look, camera, background):
    """Make the colors of what does not move a part of the background.

    They are stored as the lights show them, as they are in shadow, and with where they lie in the light's space.

    :param top: first row, and bottom the one after the last.
    :param spans: first and last pixel of each row that may see a triangle.
    """
    bright, dark = background.bright, background.dark
    light_u, light_v, light_d = background.light_u, background.light_v, background.light_d
    fx, fy = F(1 / camera.focal_x), F(1 / camera.focal_y)
    ox, oy = F(camera.center_x), F(camera.center_y)
    numbers, shares, places = np.empty(SAMPLES, np.int32), np.empty(SAMPLES, np.int32), seen.numbers
    planes, mapping = look.workspace.planes, look.materials.mapping
    pixels, levels = look.textures.pixels, look.textures.levels
    depth1, columns1, u1, v1, slack1 = _unpacked(background.shadows)
    lit, unlit = np.empty(3, np.float32), np.empty(3, np.float32)
    for y in range(top, bottom):
        ray_y = (F(y) + HALF - oy) * fy
        for x in range(spans[y, 0], spans[y, 1] + 1):
            different = _different(places, y, x, numbers, shares)
            if different == 0:
                continue
            ray_x = (F(x) + HALF - ox) * fx
            rest = ONE
            lit[:] = ZERO
            unlit[:] = ZERO
            for i in range(different):
                slot, weight = numbers[i] - 1, F(shares[i]) * _SHARE
                rest -= weight
                _evaluate(planes, slot, ray_x, ray_y)
                if planes[slot, 0, TEXTURE] >= ZERO:
                    _apply_texture(planes, slot, ray_x, ray_y, fx, fy, mapping, pixels, levels)
                u, v, distance = planes[slot, 3, U], planes[slot, 3, V], planes[slot, 3, D]
                reached = planes[slot, 3, 3] + planes[slot, 3, 4] + planes[slot, 3, 5] > ZERO
                reached = reached and not _in_shadow(depth1, columns1, u1, v1, slack1, u, v, distance)
                if reached:
                    light_u[y, x], light_v[y, x] = int(np.floor(u)), int(np.floor(v))
                    light_d[y, x] = distance
                for j in range(3):
                    color = planes[slot, 3, j]
                    unlit[j] += weight * min(color, ONE)
                    lit[j] += weight * min(color + planes[slot, 3, 3 + j] if reached else color, ONE)
            for j in range(3):
                bright[y, x, j] = np.uint8(lit[j] * _FULL + rest * F(bright[y, x, j]) + HALF)
                dark[y, x, j] = np.uint8(unlit[j] * _FULL + rest * F(dark[y, x, j]) + HALF)


@compiled
def darken_background(background, shadows):
    """Make the shadows of what does not move a part of the background."""
    bright, dark = background.bright, background.dark
    light_u, light_v, light_d = background.light_u, background.light_v, background.light_d
    rows, columns = light_d.shape
    depth, width, u0, v0, slack = _unpacked(shadows)
    for y in range(rows):
        for x in range(columns):
            if _is_darkened(light_u, light_v, light_d, y, x, depth, width, u0, v0, slack):
                bright[y, x, 0], bright[y, x, 1], bright[y, x, 2] = dark[y, x, 0], dark[y, x, 1], dark[y, x, 2]
                light_d[y, x] = NO_SHADOW


@inlined
def _is_darkened(light_u, light_v, light_d, y, x, depth, columns, u0, v0, slack):
    """Whether a pixel of the background lies in a shadow."""
    # What lies before the map's first texel is a very large number, too.
    column, row = np.uint64(light_u[y, x] - u0), np.uint64(light_v[y, x] - v0)
    inside = column < np.uint64(columns) and row < np.uint64(depth.shape[0])
    return inside and light_d[y, x] > depth[row, column] + slack


@compiled
def _occupied(depth, width):
    """In which squares of TILE texels a shadow map holds something."""
    occupied = np.zeros((-(-depth.shape[0] // TILE), -(-width // TILE)), np.bool_)
    for i in range(depth.shape[0]):
        for j in range(occupied.shape[1]):
            nearest = F(np.inf)
            for k in range(np.uint64(TILE)):
                nearest = min(nearest, depth[i, np.uint64(j * TILE) + k])
            occupied[i // TILE, j] |= nearest < F(np.inf)
    return occupied


@compiled
def darken(background, shadows, part, picture):
    """Put the shadows of moving drawables on a part of the background.

    :param part: pixels: left, top, right, bottom, the last two exclusive.
    :param picture: uint8 (rows, columns, 3); pixels in shadow become those of the dark background.
    """
    left, top, right, bottom = part
    light_u, light_v, light_d = background.light_u, background.light_v, background.light_d
    dark, tiles = background.dark, background.tiles
    depth, width, u0, v0, slack = _unpacked(shadows)
    occupied = _occupied(depth, width)
    for i in range(top // TILE, (bottom - 1) // TILE + 1):
        for j in range(left // TILE, (right - 1) // TILE + 1):
            first_u, last_u = max(tiles[i, j, 0] - u0, 0), min(tiles[i, j, 1] - u0, width - 1)
            first_v, last_v = max(tiles[i, j, 2] - v0, 0), min(tiles[i, j, 3] - v0, depth.shape[0] - 1)
            if first_u > last_u or first_v > last_v:
                continue
            if not occupied[first_v // TILE : last_v // TILE + 1, first_u // TILE : last_u // TILE + 1].any():
                continue
            for y in range(max(i * TILE, top), min(i * TILE + TILE, bottom)):
                for x in range(max(j * TILE, left), min(j * TILE + TILE, right)):
                    if _is_darkened(light_u, light_v, light_d, y, x, depth, width, u0, v0, slack):
                        picture[y, x, 0], picture[y, x, 1] = dark[y, x, 0], dark[y, x, 1]
                        picture[y, x, 2] = dark[y, x, 2]


@compiled
def bound_tiles(background):
    """Set the background's tiles from where it lies in the light's space."""
    light_u, light_v, light_d, tiles = background.light_u, background.light_v, background.light_d, background.tiles
    rows, columns = light_d.shape
    for i in range(tiles.shape[0]):
        for j in range(tiles.shape[1]):
            first_u, last_u, first_v, last_v = _FAR, -_FAR, _FAR, -_FAR
            for y in range(i * TILE, min(i * TILE + TILE, rows)):
                for x in range(j * TILE, min(j * TILE + TILE, columns)):
                    if light_d[y, x] > NO_SHADOW:
                        first_u, last_u = min(first_u, light_u[y, x]), max(last_u, light_u[y, x])
                        first_v, last_v = min(first_v, light_v[y, x]), max(last_v, light_v[y, x])
            tiles[i, j, 0], tiles[i, j, 1], tiles[i, j, 2], tiles[i, j, 3] = first_u, last_u, first_v, last_v


@compiled
def blend(top, bottom, spans, seen, alpha, look, camera, picture):
    """Put a transparent drawable over a picture, as much as its samples cover.

    :param spans: first and last pixel of each row that may see it.
    """
    fx, fy = F(1 / camera.focal_x), F(1 / camera.focal_y)
    ox, oy = F(camera.center_x), F(camera.center_y)
    planes, mapping = look.workspace.planes, look.materials.mapping
    pixels, levels = look.textures.pixels, look.textures.levels
    for y in range(top, bottom):
        ray_y = (F(y) + HALF - oy) * fy
        for x in range(spans[y, 0], spans[y, 1] + 1):
            covered, slot = 0, -1
            for i in range(SAMPLES):
                place = seen.numbers[y, SAMPLES * x + i]
                if place != 0:
                    covered += 1
                    slot = place - 1
            if covered == 0:
                continue
            ray_x = (F(x) + HALF - ox) * fx
            _evaluate(planes, slot, ray_x, ray_y)
            if planes[slot, 0, TEXTURE] >= ZERO:
                _apply_texture(planes, slot, ray_x, ray_y, fx, fy, mapping, pixels, levels)
            opacity = F(alpha) * F(covered) * _SHARE
            for j in range(3):
                over = opacity * min(planes[slot, 3, j] + planes[slot, 3, 3 + j], ONE) * _FULL
                picture[y, x, j] = np.uint8(over + (ONE - opacity) * F(picture[y, x, j]) + HALF)
