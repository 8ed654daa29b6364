"""Which triangle each sample sees, and what the light meets first: the software renderer's geometry."""

from __future__ import annotations

import numpy as np

from mw_envs.rendering.software.arrays import (
    HALF,
    LANE_X,
    LANE_Y,
    LANES,
    ONE,
    SAMPLE_X,
    SAMPLE_Y,
    SAMPLES,
    ZERO,
    F,
    compiled,
    inlined,
)

_FIRST_SAMPLE, _LAST_SAMPLE = F(SAMPLE_X.min()), F(SAMPLE_X.max())  # of a pixel's row, and of its column
_BLOCK = LANES // SAMPLES  # pixels
_UNLIMITED = 1 << 30


@compiled
def project(geometry, drawables, poses, camera, workspace):
    """Vertices of some drawables to camera space and to the screen.

    :param drawables: their indices, int32.
    :param poses: rotation (row by row) and position of every drawable, float32 (D, 12).
    :return: the window of pixels that they touch: left, top, right, bottom, the last two exclusive.
    """
    left, top, right, bottom = F(1e9), F(1e9), F(-1e9), F(-1e9)
    crossing = False
    c, camera_places, screen = camera.rotation, workspace.camera, workspace.screen
    scale_x, scale_y = F(camera.focal_x), F(camera.focal_y)
    shift_x, shift_y = F(camera.center_x), F(camera.center_y)
    near = F(camera.near)
    m = np.empty((3, 4), np.float32)
    for d in drawables:
        p = poses[d]
        for i in range(3):
            for j in range(3):
                m[i, j] = c[i, 0] * p[j] + c[i, 1] * p[3 + j] + c[i, 2] * p[6 + j]
            m[i, 3] = (
                c[i, 0] * (p[9] - camera.position[0])
                + c[i, 1] * (p[10] - camera.position[1])
                + c[i, 2] * (p[11] - camera.position[2])
            )
        m00, m01, m02, m03 = m[0, 0], m[0, 1], m[0, 2], m[0, 3]
        m10, m11, m12, m13 = m[1, 0], m[1, 1], m[1, 2], m[1, 3]
        m20, m21, m22, m23 = m[2, 0], m[2, 1], m[2, 2], m[2, 3]
        nearest = F(1e9)
        for v in range(geometry.first_vertex[d], geometry.first_vertex[d + 1]):
            x, y, z = geometry.x[v], geometry.y[v], geometry.z[v]
            cx = m00 * x + m01 * y + m02 * z + m03
            cy = m10 * x + m11 * y + m12 * z + m13
            cw = m20 * x + m21 * y + m22 * z + m23
            inverse = ONE / max(cw, near)
            sx, sy = shift_x + scale_x * cx * inverse, shift_y + scale_y * cy * inverse
            camera_places[v, 0], camera_places[v, 1], camera_places[v, 2], camera_places[v, 3] = cx, cy, cw, ZERO
            screen[v, 0], screen[v, 1], screen[v, 2], screen[v, 3] = sx, sy, inverse if cw > near else ZERO, ZERO
            nearest = min(nearest, cw)
            left, right = min(left, sx), max(right, sx)
            top, bottom = min(top, sy), max(bottom, sy)
        if nearest <= near:
            crossing = True
    if crossing:
        return -_UNLIMITED, -_UNLIMITED, _UNLIMITED, _UNLIMITED
    if left > right:
        return 0, 0, 0, 0
    limit = F(1 << 28)
    return (
        int(np.floor(max(left, -limit))),
        int(np.floor(max(top, -limit))),
        int(np.floor(min(right, limit))) + 1,
        int(np.floor(min(bottom, limit))) + 1,
    )


@compiled
def project_to_light(casters, drawables, to_light, workspace):
    """Vertices of what some drawables' shadows are cast by to the plane of the light.

    :param to_light: see :class:`mw_envs.rendering.software.arrays.Look`.
    :return: the window of texels that they touch: left, top, right, bottom, the last two exclusive.
    """
    left, top, right, bottom = F(1e9), F(1e9), F(-1e9), F(-1e9)
    light = workspace.light
    for d in drawables:
        m = to_light[d]
        m00, m01, m02, m03 = m[0], m[1], m[2], m[3]
        m10, m11, m12, m13 = m[4], m[5], m[6], m[7]
        m20, m21, m22, m23 = m[8], m[9], m[10], m[11]
        for v in range(casters.first_vertex[d], casters.first_vertex[d + 1]):
            x, y, z = casters.x[v], casters.y[v], casters.z[v]
            u = m00 * x + m01 * y + m02 * z + m03
            w = m10 * x + m11 * y + m12 * z + m13
            light[v, 0], light[v, 1], light[v, 2], light[v, 3] = u, w, m20 * x + m21 * y + m22 * z + m23, ZERO
            left, right = min(left, u), max(right, u)
            top, bottom = min(top, w), max(bottom, w)
    if left > right:
        return 0, 0, 0, 1  # a map has at least one row
    return int(np.floor(left)), int(np.floor(top)), int(np.ceil(right)) + 1, int(np.ceil(bottom)) + 1


@inlined
def _list_front(geometry, drawables, places, bounded, front):
    """List the triangles whose front is towards a place, and how many these are.

    :param geometry: or casters.
    :param places: in each drawable's coordinates, float32 (D, 3).
    :param bounded: 1, or 0 if the places are directions.
    """
    facing, first_triangle = geometry.facing, geometry.first_triangle
    count = 0
    for d in drawables:
        x, y, z = places[d, 0], places[d, 1], places[d, 2]
        for t in range(first_triangle[d], first_triangle[d + 1]):
            # Without a branch, which could not be foreseen.
            front[count] = t
            count += facing[t, 0] * x + facing[t, 1] * y + facing[t, 2] * z > bounded * facing[t, 3]
    return count


@compiled
def rasterize(geometry, drawables, camera, eyes, window, workspace, seen, spans):
    """Find the triangle that each sample sees, of drawables that have been projected.

    :param eyes: the camera in each drawable's coordinates, float32 (D, 3).
    :param window: pixels to draw in: left, top, right, bottom.
    :param seen: the samples, updated.
    :param spans: first and last pixel of each row that may see a triangle, int32 (rows, 2); widened.
    """
    x_first, y_first, x_end, y_end = window
    # Fields of a tuple are counted references each time they are read; local names are not.
    screen, nearness, numbers = workspace.screen, seen.nearness, seen.numbers
    triangles, front, block = geometry.triangles, workspace.front, F(_BLOCK)
    # A triangle's front is counter-clockwise, on a screen whose rows run downwards.
    sign = F(np.sign(camera.focal_x * camera.focal_y))
    for i in range(_list_front(geometry, drawables, eyes, ONE, front)):
        t = front[i]
        a, b, c = triangles[t, 0], triangles[t, 1], triangles[t, 2]
        za, zb, zc = screen[a, 2], screen[b, 2], screen[c, 2]
        if za == ZERO or zb == ZERO or zc == ZERO:
            if za != ZERO or zb != ZERO or zc != ZERO:
                _rasterize_crossing(triangles[t, 3], a, b, c, workspace, camera, window, seen, spans)
            continue
        ax, ay = screen[a, 0], screen[a, 1]
        bx, by = screen[b, 0] - ax, screen[b, 1] - ay
        cx, cy = screen[c, 0] - ax, screen[c, 1] - ay
        area = bx * cy - cx * by
        if area * sign <= ZERO:
            continue
        low_x, high_x = min(ZERO, bx, cx) + ax, max(ZERO, bx, cx) + ax
        x0 = max(x_first, int(np.ceil(low_x - _LAST_SAMPLE)))
        x1 = min(x_end - 1, int(np.floor(high_x - _FIRST_SAMPLE)))
        if x0 > x1:
            continue
        low_y, high_y = min(ZERO, by, cy) + ay, max(ZERO, by, cy) + ay
        y0 = max(y_first, int(np.ceil(low_y - _LAST_SAMPLE)))
        y1 = min(y_end - 1, int(np.floor(high_y - _FIRST_SAMPLE)))
        if y0 > y1:
            continue
        inverse = ONE / area
        # Barycentric weights of b and c, and one over the distance: linear in x and y.
        bdx, bdy = cy * inverse, -cx * inverse
        cdx, cdy = -by * inverse, bx * inverse
        zdx, zdy = bdx * (zb - za) + cdx * (zc - za), bdy * (zb - za) + cdy * (zc - za)
        dx, dy = F(x0) - ax, F(y0) - ay
        row_b, row_c, row_z = bdx * dx + bdy * dy, cdx * dx + cdy * dy, za + zdx * dx + zdy * dy
        number = triangles[t, 3]
        for y in range(y0, y1 + 1):
            spans[y, 0], spans[y, 1] = min(spans[y, 0], x0), max(spans[y, 1], x1)
            wb, wc, z = row_b, row_c, row_z
            for x in range(x0, x1 + 1, _BLOCK):
                first = np.uint64(x * SAMPLES)
                for lane in range(np.uint64(LANES)):
                    b_here = wb + bdx * LANE_X[lane] + bdy * LANE_Y[lane]
                    c_here = wc + cdx * LANE_X[lane] + cdy * LANE_Y[lane]
                    z_here = z + zdx * LANE_X[lane] + zdy * LANE_Y[lane]
                    old, other = nearness[y, first + lane], numbers[y, first + lane]
                    # One expression, without a branch, so that all lanes are one vector. What is drawn later hides
                    # what is as near, as MuJoCo has it.
                    hit = (b_here >= ZERO) & (c_here >= ZERO) & (b_here + c_here <= ONE) & (z_here >= old)
                    nearness[y, first + lane] = z_here if hit else old
                    numbers[y, first + lane] = number if hit else other
                wb += bdx * block
                wc += cdx * block
                z += zdx * block
            row_b += bdy
            row_c += cdy
            row_z += zdy


@compiled
def _rasterize_crossing(number, a, b, c, workspace, camera, window, seen, spans):
    """A triangle that the near plane cuts, by rays through the samples."""
    x_first, y_first, x_end, y_end = window
    n, na, nb, nc = ray_weights(workspace, a, b, c)
    # The determinant is positive where the front is seen in camera space, which is a mirror image of the world's.
    if n <= ZERO:
        return
    for y in range(y_first, y_end):
        spans[y, 0], spans[y, 1] = x_first, x_end - 1
        for x in range(x_first, x_end):
            for i in range(SAMPLES):
                ray_x = (F(x) + SAMPLE_X[i] - F(camera.center_x)) / F(camera.focal_x)
                ray_y = (F(y) + SAMPLE_Y[i] - F(camera.center_y)) / F(camera.focal_y)
                wa = na[0] * ray_x + na[1] * ray_y + na[2]
                wb = nb[0] * ray_x + nb[1] * ray_y + nb[2]
                wc = nc[0] * ray_x + nc[1] * ray_y + nc[2]
                if wa < ZERO or wb < ZERO or wc < ZERO:
                    continue
                z = (wa + wb + wc) / n  # one over the distance
                if z > ZERO and z * F(camera.near) <= ONE and z >= seen.nearness[y, x * SAMPLES + i]:
                    seen.nearness[y, x * SAMPLES + i], seen.numbers[y, x * SAMPLES + i] = z, number


@inlined
def ray_weights(workspace, a, b, c):
    """Determinant of a triangle's camera coordinates, and the vectors whose products with a ray are its weights."""
    p = workspace.camera
    ax, ay, aw, bx, by, bw, cx, cy, cw = p[a, 0], p[a, 1], p[a, 2], p[b, 0], p[b, 1], p[b, 2], p[c, 0], p[c, 1], p[c, 2]
    na = (by * cw - bw * cy, bw * cx - bx * cw, bx * cy - by * cx)
    nb = (cy * aw - cw * ay, cw * ax - cx * aw, cx * ay - cy * ax)
    nc = (ay * bw - aw * by, aw * bx - ax * bw, ax * by - ay * bx)
    return ax * na[0] + ay * na[1] + aw * na[2], na, nb, nc


@compiled
def rasterize_shadow(casters, drawables, towards, workspace, columns, u0, v0, slope_texels, depth):
    """Distances from the light of what it meets first, by the triangles whose front it sees.

    :param towards: the direction to the light in each drawable's coordinates, float32 (D, 3).
    :param columns: columns of the map that count.
    :param slope_texels: a triangle lies that many texels' worth of its slope deeper, against shadows on itself.
    :param depth: meters, float32 (rows, columns + margin); updated.
    """
    light, triangles, front = workspace.light, casters.triangles, workspace.front
    rows = depth.shape[0]
    shift_u, shift_v, slope, block = F(u0), F(v0), F(slope_texels), F(LANES)
    for i in range(_list_front(casters, drawables, towards, ZERO, front)):
        t = front[i]
        a, b, c = triangles[t, 0], triangles[t, 1], triangles[t, 2]
        ax, ay = light[a, 0], light[a, 1]
        bx, by = light[b, 0] - ax, light[b, 1] - ay
        cx, cy = light[c, 0] - ax, light[c, 1] - ay
        area = bx * cy - cx * by
        if area >= ZERO:
            continue
        low_x, high_x = min(ZERO, bx, cx) + ax - shift_u, max(ZERO, bx, cx) + ax - shift_u
        x0, x1 = max(0, int(np.ceil(low_x - HALF))), min(columns - 1, int(np.floor(high_x - HALF)))
        if x0 > x1:
            continue
        low_y, high_y = min(ZERO, by, cy) + ay - shift_v, max(ZERO, by, cy) + ay - shift_v
        y0, y1 = max(0, int(np.ceil(low_y - HALF))), min(rows - 1, int(np.floor(high_y - HALF)))
        if y0 > y1:
            continue
        inverse = ONE / area
        za, zb, zc = light[a, 2], light[b, 2], light[c, 2]
        bdx, bdy = cy * inverse, -cx * inverse
        cdx, cdy = -by * inverse, bx * inverse
        zdx, zdy = bdx * (zb - za) + cdx * (zc - za), bdy * (zb - za) + cdy * (zc - za)
        dx, dy = F(x0) + HALF - ax + shift_u, F(y0) + HALF - ay + shift_v
        row_b, row_c = bdx * dx + bdy * dy, cdx * dx + cdy * dy
        row_z = za + zdx * dx + zdy * dy + slope * max(abs(zdx), abs(zdy))
        for y in range(y0, y1 + 1):
            wb, wc, z = row_b, row_c, row_z
            for x in range(x0, x1 + 1, LANES):
                first = np.uint64(x)
                for lane in range(np.uint64(LANES)):
                    right = F(np.int32(lane))
                    b_here, c_here, z_here = wb + bdx * right, wc + cdx * right, z + zdx * right
                    old = depth[y, first + lane]
                    hit = (b_here >= ZERO) & (c_here >= ZERO) & (b_here + c_here <= ONE) & (z_here < old)
                    depth[y, first + lane] = z_here if hit else old
                wb += bdx * block
                wc += cdx * block
                z += zdx * block
            row_b += bdy
            row_c += cdy
            row_z += zdy
