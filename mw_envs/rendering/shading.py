"""Colours of what the samples see: the software renderer's light and shadows.

A colour is computed once per pixel and triangle, at the pixel's centre, as OpenGL's multisampling does.
"""

from __future__ import annotations

import numpy as np

from mw_envs.rendering.arrays import (
    HALF,
    ONE,
    SAMPLES,
    TILE,
    TRIANGLE,
    ZERO,
    D,
    F,
    S,
    U,
    V,
    compiled,
    inlined,
)
from mw_envs.rendering.raster import ray_weights
from mw_envs.rendering.textures import sample_texture

NO_SHADOW = F(-1e9)
_SHARE, _FULL = F(1 / SAMPLES), F(255)
_1, _2, _3 = np.uint64(1), np.uint64(2), np.uint64(3)
# Of a fragment: the bits that hold its number of samples.
_SHIFT, _SAMPLES_OF = 3, 7
_FAR = 1 << 30


@compiled
def prepare_lighting(poses, camera, lights, eyes, towards):
    """The camera and the directions to the lights in each drawable's coordinates.

    :param eyes: float32 (D, 3); set.
    :param towards: float32 (D, S, 3); set.
    """
    for d in range(len(poses)):
        p = poses[d]
        x, y, z = camera.position[0] - p[9], camera.position[1] - p[10], camera.position[2] - p[11]
        for j in range(3):
            eyes[d, j] = p[j] * x + p[3 + j] * y + p[6 + j] * z
        for s in range(len(lights.towards)):
            lx, ly, lz = lights.towards[s]
            for j in range(3):
                towards[d, s, j] = p[j] * lx + p[3 + j] * ly + p[6 + j] * lz


@compiled
def find_visible(top, bottom, spans, seen, frame, count, workspace, found):
    """List the triangles that samples see, and what each pixel shows of them.

    :param top: first row, and bottom the one after the last.
    :param spans: first and last pixel of each row that may see one.
    :param count: how many have been listed in this frame.
    :param found: the pixels that show some, and their fragments; set.
    :return: how many triangles are listed now, and how many pixels.
    """
    visible, slots, pixels, fragments = workspace.visible, workspace.slots, found.pixels, found.fragments
    now = np.int64(frame) << 32
    listed, used = 0, 0
    for y in range(top, bottom):
        for x in range(spans[y, 0], spans[y, 1] + 1):
            k = np.uint64(SAMPLES * x)
            n0, n1 = seen[y, k] & TRIANGLE, seen[y, k + _1] & TRIANGLE
            n2, n3 = seen[y, k + _2] & TRIANGLE, seen[y, k + _3] & TRIANGLE
            if (n0 | n1 | n2 | n3) == 0:
                continue
            # The different triangles and their samples, without branches that depend on them.
            same01, same02, same03, same12, same13, same23 = n0 == n1, n0 == n2, n0 == n3, n1 == n2, n1 == n3, n2 == n3
            before, share = used, 1 + same01 + same02 + same03
            count, used = _list(n0, n0 != 0, share, now, visible, slots, fragments, count, used)
            different, share = (n1 != 0) & (not same01), 1 + same12 + same13
            count, used = _list(n1, different, share, now, visible, slots, fragments, count, used)
            different, share = (n2 != 0) & (not same02) & (not same12), 1 + same23
            count, used = _list(n2, different, share, now, visible, slots, fragments, count, used)
            different = (n3 != 0) & (not same03) & (not same13) & (not same23)
            count, used = _list(n3, different, 1, now, visible, slots, fragments, count, used)
            pixels[listed, 0], pixels[listed, 1], pixels[listed, 2], pixels[listed, 3] = y, x, before, used
            listed += 1
    return count, listed


@inlined
def _list(number, different, share, now, visible, slots, fragments, count, used):
    """List a fragment, if it is different from the pixel's others, and its triangle, if it is new in this frame.

    Without a branch, which would have to wait for memory: what is not to be listed is overwritten by the next.
    """
    t = number - 1 if different else 0
    slot = slots[t]
    fresh = different & (slot < now)
    visible[count] = t
    slots[t] = now | count if fresh else slot
    fragments[used] = ((count if fresh else slot & TRIANGLE) << _SHIFT) | share
    return count + fresh, used + different


@compiled
def prepare_visible(start, count, corners, look):
    """Light at the corners of visible triangles, and the weights of these corners as functions of the ray.

    :param start: the first of the triangles in the list, and count the one after the last.
    :param corners: how many corners have been lit in this frame.
    :return: how many are lit now.
    """
    # Fields of a tuple are counted references each time they are read; local names are not.
    geometry, workspace, materials, lights = look.geometry, look.workspace, look.materials, look.lights
    triangles, triangle_corners, drawable = geometry.triangles, geometry.corners, geometry.drawable
    normals, texture_places, rgba, gloss = geometry.normals, geometry.texture_places, materials.rgba, materials.gloss
    xs, ys, zs = geometry.x, geometry.y, geometry.z
    lu, lv, ld = workspace.light_u, workspace.light_v, workspace.light_d
    visible, rays, owned, lit, q = (
        workspace.visible,
        workspace.rays,
        workspace.owned,
        workspace.lit,
        workspace.quantities,
    )
    fresh, fresh_vertices, fresh_drawables = workspace.fresh, workspace.fresh_vertices, workspace.fresh_drawables
    eyes, towards, texture = look.eyes, look.towards, materials.texture
    ambient, diffuse, specular, unshadowed = lights.ambient, lights.diffuse, lights.specular, lights.unshadowed
    now, dark = np.int64(look.frame) << 32, corners
    for i in range(start, count):
        t = visible[i]
        a, b, c = triangles[t, 0], triangles[t, 1], triangles[t, 2]
        d = drawable[t]
        owned[i, 3] = d if texture[d] >= 0 else -1
        for k in range(3):
            corner = triangle_corners[t, k]
            fresh[corners], fresh_vertices[corners], fresh_drawables[corners] = corner, triangles[t, k], d
            place = lit[corner]
            unlit = place < now
            place = now | corners if unlit else place
            lit[corner] = place
            owned[i, k] = place & TRIANGLE
            corners += unlit
        _, na, nb, nc = ray_weights(workspace, a, b, c)
        rays[i, 0], rays[i, 1], rays[i, 2] = na
        rays[i, 3], rays[i, 4], rays[i, 5] = nb
        rays[i, 6], rays[i, 7], rays[i, 8] = nc
    for i in range(dark, corners):
        corner, v, d = fresh[i], fresh_vertices[i], fresh_drawables[i]
        # OpenGL's fixed-function lighting with a local viewer.
        nx, ny, nz = normals[corner, 0], normals[corner, 1], normals[corner, 2]
        ex, ey, ez = eyes[d, 0] - xs[v], eyes[d, 1] - ys[v], eyes[d, 2] - zs[v]
        length = ONE / np.sqrt(ex * ex + ey * ey + ez * ez)
        ex, ey, ez = ex * length, ey * length, ez * length
        red, green, blue = rgba[d, 0], rgba[d, 1], rgba[d, 2]
        r0, g0, b0, r1, g1, b1 = gloss[d, 0] * red, gloss[d, 0] * green, gloss[d, 0] * blue, ZERO, ZERO, ZERO
        for s in range(towards.shape[1]):
            lx, ly, lz = towards[d, s, 0], towards[d, s, 1], towards[d, s, 2]
            facing, shine = nx * lx + ny * ly + nz * lz, ZERO
            hx, hy, hz = ex + lx, ey + ly, ez + lz
            along, square = nx * hx + ny * hy + nz * hz, hx * hx + hy * hy + hz * hz
            # Most places are so far from the highlight that it adds less than a thousandth.
            if (along > ZERO) & (facing > ZERO) & (along * along > gloss[d, 3] * square):
                shine = gloss[d, 1] * np.exp(HALF * gloss[d, 2] * np.log(along * along / square))
            facing = max(facing, ZERO)
            r = (ambient[s, 0] + facing * diffuse[s, 0]) * red + shine * specular[s, 0]
            g = (ambient[s, 1] + facing * diffuse[s, 1]) * green + shine * specular[s, 1]
            b = (ambient[s, 2] + facing * diffuse[s, 2]) * blue + shine * specular[s, 2]
            if s < unshadowed:
                r0, g0, b0 = r0 + r, g0 + g, b0 + b
            else:
                r1, g1, b1 = r1 + r, g1 + g, b1 + b
        q[i, 0], q[i, 1], q[i, 2] = min(r0, ONE), min(g0, ONE), min(b0, ONE)
        q[i, 3], q[i, 4], q[i, 5] = min(r1, ONE), min(g1, ONE), min(b1, ONE)
        q[i, U], q[i, V], q[i, D] = lu[v], lv[v], ld[v]
        q[i, S], q[i, S + 1], q[i, S + 2] = texture_places[v, 0], texture_places[v, 1], texture_places[v, 2]
    return corners


@inlined
def _weights(rays, slot, ray_x, ray_y):
    """Weights of a visible triangle's corners where a ray meets its plane, and one over the sum they had before."""
    a = rays[slot, 0] * ray_x + rays[slot, 1] * ray_y + rays[slot, 2]
    b = rays[slot, 3] * ray_x + rays[slot, 4] * ray_y + rays[slot, 5]
    c = rays[slot, 6] * ray_x + rays[slot, 7] * ray_y + rays[slot, 8]
    weight = a + b + c
    # Seen edge on, a triangle's plane may lie along the ray.
    inverse = ONE / (weight if abs(weight) > F(1e-20) else F(1e-20))
    return a * inverse, b * inverse, c * inverse, inverse


@inlined
def _shade(fragment, ray_x, ray_y, step_x, step_y, rays, owned, q, textured, texture, mapping, pixels, levels):
    """Colours of a fragment by unshadowed lights and by shadowed ones, and its place in the light's space.

    :param step_x: width of a pixel, and step_y its height, in rays.
    :param textured: whether textures count.
    """
    slot = np.uint64(fragment >> _SHIFT)
    wa, wb, wc, inverse = _weights(rays, slot, ray_x, ray_y)
    a, b, c, d = np.uint64(owned[slot, 0]), np.uint64(owned[slot, 1]), np.uint64(owned[slot, 2]), owned[slot, 3]
    # Colours are clamped, as OpenGL does it.
    r0 = min(max(wa * q[a, 0] + wb * q[b, 0] + wc * q[c, 0], ZERO), ONE)
    g0 = min(max(wa * q[a, 1] + wb * q[b, 1] + wc * q[c, 1], ZERO), ONE)
    b0 = min(max(wa * q[a, 2] + wb * q[b, 2] + wc * q[c, 2], ZERO), ONE)
    r1 = min(max(wa * q[a, 3] + wb * q[b, 3] + wc * q[c, 3], ZERO), ONE)
    g1 = min(max(wa * q[a, 4] + wb * q[b, 4] + wc * q[c, 4], ZERO), ONE)
    b1 = min(max(wa * q[a, 5] + wb * q[b, 5] + wc * q[c, 5], ZERO), ONE)
    u = wa * q[a, U] + wb * q[b, U] + wc * q[c, U]
    v = wa * q[a, V] + wb * q[b, V] + wc * q[c, V]
    distance = wa * q[a, D] + wb * q[b, D] + wc * q[c, D]
    if textured and d >= 0:
        kind, scale_s, shift_s = mapping[d, 0], mapping[d, 1], mapping[d, 2]
        scale_t, shift_t, scale_r = mapping[d, 3], mapping[d, 4], mapping[d, 5]
        # A place on the texture and its change by one pixel, across and down: the quotient rule.
        s = wa * q[a, S] + wb * q[b, S] + wc * q[c, S]
        t = wa * q[a, S + 1] + wb * q[b, S + 1] + wc * q[c, S + 1]
        r = wa * q[a, S + 2] + wb * q[b, S + 2] + wc * q[c, S + 2]
        across, down = step_x * inverse, step_y * inverse
        xa, xb, xc = rays[slot, 0] * across, rays[slot, 3] * across, rays[slot, 6] * across
        ya, yb, yc = rays[slot, 1] * down, rays[slot, 4] * down, rays[slot, 7] * down
        sx = (xa * (q[a, S] - s) + xb * (q[b, S] - s) + xc * (q[c, S] - s)) * scale_s
        tx = (xa * (q[a, S + 1] - t) + xb * (q[b, S + 1] - t) + xc * (q[c, S + 1] - t)) * scale_t
        rx = (xa * (q[a, S + 2] - r) + xb * (q[b, S + 2] - r) + xc * (q[c, S + 2] - r)) * scale_r
        sy = (ya * (q[a, S] - s) + yb * (q[b, S] - s) + yc * (q[c, S] - s)) * scale_s
        ty = (ya * (q[a, S + 1] - t) + yb * (q[b, S + 1] - t) + yc * (q[c, S + 1] - t)) * scale_t
        ry = (ya * (q[a, S + 2] - r) + yb * (q[b, S + 2] - r) + yc * (q[c, S + 2] - r)) * scale_r
        s, t, r = s * scale_s + shift_s, t * scale_t + shift_t, r * scale_r
        red, green, blue = sample_texture(pixels, levels, texture[d], kind, s, t, r, sx, tx, rx, sy, ty, ry)
        r0, g0, b0, r1, g1, b1 = r0 * red, g0 * green, b0 * blue, r1 * red, g1 * green, b1 * blue
    return r0, g0, b0, r1, g1, b1, u, v, distance


@inlined
def _in_shadow(depth, columns, u0, v0, slack, u, v, d):
    """Whether a point of the light's space lies behind what a shadow map holds.

    Without a branch: one that is not foreseen would have to wait for all that the point was computed from.
    """
    column, row, rows = u - u0, v - v0, F(depth.shape[0])
    inside = (column >= ZERO) & (row >= ZERO) & (column < columns) & (row < rows)
    i, j = np.uint64(row if inside else ZERO), np.uint64(column if inside else ZERO)
    return inside & (d > depth[i, j] + slack)


@inlined
def _put(picture, y, x, red, green, blue, covered):
    """Put a colour over a pixel, as much as is covered; the colour is multiplied by that already."""
    rest = ONE - covered
    picture[y, x, 0] = np.uint8(red * _FULL + rest * F(picture[y, x, 0]) + HALF)
    picture[y, x, 1] = np.uint8(green * _FULL + rest * F(picture[y, x, 1]) + HALF)
    picture[y, x, 2] = np.uint8(blue * _FULL + rest * F(picture[y, x, 2]) + HALF)


@inlined
def _colour(
    first,
    end,
    fragments,
    ray_x,
    ray_y,
    step_x,
    step_y,
    rays,
    owned,
    quantities,
    textured,
    texture,
    mapping,
    texels,
    levels,
    depth,
    columns,
    u0,
    v0,
    slack,
    other_depth,
    other_columns,
    other_u0,
    other_v0,
    other_slack,
):
    """A pixel's colour times its coverage, the coverage, and whether one of its fragments has a texture."""
    red, green, blue, covered, nearest = ZERO, ZERO, ZERO, ZERO, np.int32(-1)
    for k in range(first, end):
        fragment = fragments[np.uint64(k)]
        weight = F(fragment & _SAMPLES_OF) * _SHARE
        r0, g0, b0, r1, g1, b1, u, v, d = _shade(
            fragment, ray_x, ray_y, step_x, step_y, rays, owned, quantities, textured, texture, mapping, texels, levels
        )
        dark = _in_shadow(depth, columns, u0, v0, slack, u, v, d)
        dark |= _in_shadow(other_depth, other_columns, other_u0, other_v0, other_slack, u, v, d)
        light = ZERO if dark else ONE
        red += weight * min(r0 + light * r1, ONE)
        green += weight * min(g0 + light * g1, ONE)
        blue += weight * min(b0 + light * b1, ONE)
        covered += weight
        nearest = max(nearest, owned[np.uint64(fragment >> _SHIFT), 3])
    return red, green, blue, covered, nearest >= 0


@compiled
def resolve(found, listed, look, camera, shadows, other_shadows, picture):
    """Colours of the pixels that see triangles, over a picture that shows the background.

    :param found: the pixels, of which so many are listed; spent.
    :param picture: uint8 (rows, columns, 3); updated.
    """
    fx, fy = F(1 / camera.focal_x), F(1 / camera.focal_y)
    ox, oy = F(camera.centre_x), F(camera.centre_y)
    rays, owned, quantities = look.workspace.rays, look.workspace.owned, look.workspace.quantities
    texture, mapping = look.materials.texture, look.materials.mapping
    texels, levels, pixels, fragments = look.textures.pixels, look.textures.levels, found.pixels, found.fragments
    depth, columns, u0, v0, slack = shadows.depth, F(shadows.columns), F(shadows.u0), F(shadows.v0), F(shadows.slack)
    other_depth, other_columns = other_shadows.depth, F(other_shadows.columns)
    other_u0, other_v0, other_slack = F(other_shadows.u0), F(other_shadows.v0), F(other_shadows.slack)
    # Pixels with textures have a loop of their own: with them, it needs more registers than there are.
    left = 0
    for p in range(listed):
        y, x, first, end = pixels[p, 0], pixels[p, 1], pixels[p, 2], pixels[p, 3]
        ray_x, ray_y = (F(x) + HALF - ox) * fx, (F(y) + HALF - oy) * fy
        red, green, blue, covered, textured = _colour(
            first, end, fragments, ray_x, ray_y, fx, fy, rays, owned, quantities, False, texture, mapping, texels,
            levels, depth, columns, u0, v0, slack, other_depth, other_columns, other_u0, other_v0, other_slack
        )  # fmt: skip
        if textured:
            pixels[left, 0], pixels[left, 1], pixels[left, 2], pixels[left, 3] = y, x, first, end
            left += 1
        else:
            _put(picture, np.uint64(y), np.uint64(x), red, green, blue, covered)
    for p in range(left):
        y, x, first, end = pixels[p, 0], pixels[p, 1], pixels[p, 2], pixels[p, 3]
        ray_x, ray_y = (F(x) + HALF - ox) * fx, (F(y) + HALF - oy) * fy
        red, green, blue, covered, _ = _colour(
            first, end, fragments, ray_x, ray_y, fx, fy, rays, owned, quantities, True, texture, mapping, texels,
            levels, depth, columns, u0, v0, slack, other_depth, other_columns, other_u0, other_v0, other_slack
        )  # fmt: skip
        _put(picture, np.uint64(y), np.uint64(x), red, green, blue, covered)


@compiled
def resolve_background(found, listed, look, camera, background):
    """The background's pixels as the lights show them, as they are in shadow, and where they are in the light's space.

    :param found: the pixels that see triangles, of which so many are listed.
    :param background: ``bright`` and ``dark`` show what is seen where no triangle is, and ``light_d`` that no shadow
        changes that; these and ``light_u`` and ``light_v`` are updated.
    """
    bright, dark, shadows = background.bright, background.dark, background.shadows
    light_u, light_v, light_d = background.light_u, background.light_v, background.light_d
    fx, fy = F(1 / camera.focal_x), F(1 / camera.focal_y)
    ox, oy = F(camera.centre_x), F(camera.centre_y)
    rays, owned, quantities = look.workspace.rays, look.workspace.owned, look.workspace.quantities
    texture, mapping = look.materials.texture, look.materials.mapping
    texels, levels, pixels, fragments = look.textures.pixels, look.textures.levels, found.pixels, found.fragments
    depth, columns, u0, v0, slack = shadows.depth, F(shadows.columns), F(shadows.u0), F(shadows.v0), F(shadows.slack)
    lit, unlit = np.empty(3, np.float32), np.empty(3, np.float32)
    for p in range(listed):
        y, x = pixels[p, 0], pixels[p, 1]
        ray_x, ray_y = (F(x) + HALF - ox) * fx, (F(y) + HALF - oy) * fy
        rest = ONE
        lit[:], unlit[:] = ZERO, ZERO
        for k in range(pixels[p, 2], pixels[p, 3]):
            fragment = fragments[k]
            weight = F(fragment & _SAMPLES_OF) * _SHARE
            r0, g0, b0, r1, g1, b1, u, v, distance = _shade(
                fragment, ray_x, ray_y, fx, fy, rays, owned, quantities, True, texture, mapping, texels, levels
            )
            reached = r1 + g1 + b1 > ZERO
            reached = reached and not _in_shadow(depth, columns, u0, v0, slack, u, v, distance)
            if reached:
                light_u[y, x], light_v[y, x] = int(np.floor(u)), int(np.floor(v))
                light_d[y, x] = distance
            light = ONE if reached else ZERO
            unlit[0] += weight * r0
            unlit[1] += weight * g0
            unlit[2] += weight * b0
            lit[0] += weight * min(r0 + light * r1, ONE)
            lit[1] += weight * min(g0 + light * g1, ONE)
            lit[2] += weight * min(b0 + light * b1, ONE)
            rest -= weight
        for j in range(3):
            behind = max(rest, ZERO) * F(bright[y, x, j]) + HALF
            bright[y, x, j] = np.uint8(min(lit[j] * _FULL + behind, _FULL))
            dark[y, x, j] = np.uint8(min(unlit[j] * _FULL + behind, _FULL))


@compiled
def finish_background(background):
    """Note from where in the light's plane each square of pixels is shadowed; forget which triangles are seen."""
    seen, reach = background.seen, background.reach
    light_u, light_v, light_d = background.light_u, background.light_v, background.light_d
    reach[:, :, 0], reach[:, :, 1], reach[:, :, 2], reach[:, :, 3] = _FAR, -_FAR, _FAR, -_FAR
    for y in range(light_d.shape[0]):
        for x in range(light_d.shape[1]):
            if light_d[y, x] > NO_SHADOW:
                square, u, v = reach[y // TILE, x // TILE], light_u[y, x], light_v[y, x]
                square[0], square[1] = min(square[0], u), max(square[1], u)
                square[2], square[3] = min(square[2], v), max(square[3], v)
        for k in range(seen.shape[1]):
            seen[y, k] &= ~TRIANGLE


@compiled
def darken(background, shadows, picture):
    """Put the shadows of moving drawables on the background.

    :param picture: uint8 (rows, columns, 3); pixels in shadow become those of the dark background.
    """
    rows, columns = picture.shape[:2]
    depth, slack, u0, v0 = shadows.depth, F(shadows.slack), shadows.u0, shadows.v0
    width, height = np.uint64(shadows.columns), np.uint64(depth.shape[0])
    u1, v1 = u0 + shadows.columns, v0 + depth.shape[0]
    light_u, light_v, light_d = background.light_u, background.light_v, background.light_d
    dark, reach = background.dark, background.reach
    for i in range(reach.shape[0]):
        first, end = columns, 0
        for j in range(reach.shape[1]):
            if reach[i, j, 0] < u1 and reach[i, j, 1] >= u0 and reach[i, j, 2] < v1 and reach[i, j, 3] >= v0:
                first, end = min(first, j * TILE), min((j + 1) * TILE, columns)
        for y in range(i * TILE, min((i + 1) * TILE, rows)):
            for x in range(first, end):
                # What lies before the map's first texel is a very large number, too.
                column, row = np.uint64(light_u[y, x] - u0), np.uint64(light_v[y, x] - v0)
                if column < width and row < height and light_d[y, x] > depth[row, column] + slack:
                    picture[y, x, 0], picture[y, x, 1], picture[y, x, 2] = dark[y, x, 0], dark[y, x, 1], dark[y, x, 2]


@compiled
def blend(found, listed, alpha, look, camera, picture):
    """Put a transparent drawable over a picture, as much as its samples cover.

    :param found: the pixels that see it, of which so many are listed.
    """
    fx, fy = F(1 / camera.focal_x), F(1 / camera.focal_y)
    ox, oy = F(camera.centre_x), F(camera.centre_y)
    rays, owned, quantities = look.workspace.rays, look.workspace.owned, look.workspace.quantities
    texture, mapping = look.materials.texture, look.materials.mapping
    texels, levels, pixels, fragments = look.textures.pixels, look.textures.levels, found.pixels, found.fragments
    for p in range(listed):
        y, x = pixels[p, 0], pixels[p, 1]
        ray_x, ray_y = (F(x) + HALF - ox) * fx, (F(y) + HALF - oy) * fy
        red, green, blue, opacity = ZERO, ZERO, ZERO, ZERO
        for k in range(pixels[p, 2], pixels[p, 3]):
            fragment = fragments[k]
            weight = F(alpha) * F(fragment & _SAMPLES_OF) * _SHARE
            r0, g0, b0, r1, g1, b1, _, _, _ = _shade(
                fragment, ray_x, ray_y, fx, fy, rays, owned, quantities, True, texture, mapping, texels, levels
            )
            red += weight * min(r0 + r1, ONE)
            green += weight * min(g0 + g1, ONE)
            blue += weight * min(b0 + b1, ONE)
            opacity += weight
        _put(picture, y, x, red, green, blue, opacity)
