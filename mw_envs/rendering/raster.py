"""The inner loops of the software rasteriser, compiled by numba.

Letters: V vertices (places), C corners (a vertex with a normal), T triangles, D drawables, S lights.

*Samples* are the points at which coverage and depth are decided: ``s x s`` a pixel, at the centres of its cells.
Colours are computed once per pixel and triangle, at the pixel's centre, as OpenGL's multisampling does. Depths are kept
as one over the distance along the camera's axis, which is linear on the screen; a larger one is nearer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

# Arithmetic may be regrouped, but what is not finite stays what it is: comparisons keep it from becoming an index.
_FAST = {"arcp", "contract", "nsz", "reassoc"}
_OPTIONS: dict[str, Any] = {"cache": True, "nogil": True, "fastmath": _FAST, "error_model": "numpy"}
_compiled = numba.njit(**_OPTIONS)
# A call would hand over each field of each array.
_inlined = numba.njit(**_OPTIONS, inline="always")

NOTHING = -1
F = np.float32
_ZERO, _HALF, _ONE, _TWO = F(0), F(0.5), F(1), F(2)


class Geometry(NamedTuple):
    """What a scene's drawables are made of; set once.

    :param x: object coordinates of vertices, float32 (V,); so are y and z.
    :param triangles: vertices of each triangle, int32 (T, 3).
    :param corners: corners of each triangle, int32 (T, 3).
    :param drawable: drawable of each triangle, int32 (T,).
    :param normals: object coordinates of the corners' normals, float32 (C, 3).
    :param texture_places: object coordinates that textures are mapped by, float32 (V, 3).
    :param first_vertex: first vertex of each drawable and the end, int32 (D + 1,).
    :param first_triangle: first triangle of each drawable and the end, int32 (D + 1,).
    """

    x: Array
    y: Array
    z: Array
    triangles: Array
    corners: Array
    drawable: Array
    normals: Array
    texture_places: Array
    first_vertex: Array
    first_triangle: Array


class Materials(NamedTuple):
    """Looks of the drawables.

    :param rgba: float32 (D, 4).
    :param gloss: emission, specular reflection, exponent of the highlight, and the squared cosine below which there is
        none to be seen, float32 (D, 4).
    :param texture: index of the texture or -1, int32 (D,).
    :param mapping: 0 for a flat texture whose u = a x + b and v = c y + d, 1 for a cube of directions (a x, c y, e z);
        float32 (D, 6): kind, a, b, c, d, e.
    """

    rgba: Array
    gloss: Array
    texture: Array
    mapping: Array


class Textures(NamedTuple):
    """Pictures with their reductions by two, four, ...

    :param pixels: all levels of all textures, one after the other, uint8 (P, 3).
    :param levels: of each texture and level: first pixel, width, height of one face, faces; int32 (X, L, 4). A width of
        0 marks a level that is not there.
    """

    pixels: Array
    levels: Array


class Lights(NamedTuple):
    """Directional lights; those from ``unshadowed`` on are blocked by what the shadow maps hold.

    :param towards: unit vectors to the lights, float32 (S, 3).
    :param ambient: float32 (S, 3); so are diffuse and specular.
    :param unshadowed: number of lights that cast no shadows; they come first.
    """

    towards: Array
    ambient: Array
    diffuse: Array
    specular: Array
    unshadowed: int


class Camera(NamedTuple):
    """A pinhole, in pixels: a point (x, y, w) of camera space is seen at (centre_x + focal_x x / w, centre_y + ...).

    :param rotation: world to camera, float32 (3, 3); rows are right, up and forward.
    :param position: float32 (3,).
    :param near: least distance that is drawn, metres.
    """

    rotation: Array
    position: Array
    focal_x: float
    focal_y: float
    centre_x: float
    centre_y: float
    near: float


class Workspace(NamedTuple):
    """What is computed anew for each frame, in memory that is kept.

    :param camera_x: vertices in camera space, float32 (V,); so are camera_y and camera_w.
    :param screen_x: vertices on the screen in samples, float32 (V,); so is screen_y.
    :param inverse_w: one over the distance, 0 if nearer than the near plane, float32 (V,).
    :param light_u: vertices in texels of the shadow map, float32 (V,); so are light_v and light_d (metres).
    :param colors: of corners: by unshadowed lights, by shadowed ones, float32 (C, 6).
    :param lit: frame in which a corner's colours were computed, int64 (C,).
    :param planes: of triangles: what times a ray (x, y, 1) is each quantity times its weight, float32 (T, 3, 16).
    :param ready: frame in which a triangle's planes were computed, int64 (T,).
    """

    camera_x: Array
    camera_y: Array
    camera_w: Array
    screen_x: Array
    screen_y: Array
    inverse_w: Array
    light_u: Array
    light_v: Array
    light_d: Array
    colors: Array
    lit: Array
    planes: Array
    ready: Array


# Quantities that vary over a triangle: colour by unshadowed lights, by shadowed ones, place in the light's space, place
# on the texture, and the weight that all of them are multiplied by.
_U, _V, _D, _S, _WEIGHT, _QUANTITIES = 6, 7, 8, 9, 12, 13


class ShadowMap(NamedTuple):
    """Distances from the light of what it meets first, in a window of the light's plane.

    :param depth: metres, float32 (rows, columns); inf where it meets nothing.
    :param u0: texel of the first column, and v0 of the first row.
    :param slack: metres that a surface may lie behind the stored depth and still be lit.
    """

    depth: Array
    u0: int
    v0: int
    slack: float


@_compiled
def project(geometry, drawables, poses, camera, samples, workspace):
    """Vertices of some drawables to camera space and to the screen.

    :param drawables: their indices, int32.
    :param poses: rotation (row by row) and position of every drawable, float32 (D, 12).
    :return: the window of samples that they touch: left, top, right, bottom, the last two exclusive.
    """
    left, top, right, bottom = F(1e9), F(1e9), F(-1e9), F(-1e9)
    crossing = False
    c = camera.rotation
    scale_x, scale_y = F(camera.focal_x * samples), F(camera.focal_y * samples)
    shift_x, shift_y = F(camera.centre_x * samples), F(camera.centre_y * samples)
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
            inverse = _ONE / max(cw, near)
            sx, sy = shift_x + scale_x * cx * inverse, shift_y + scale_y * cy * inverse
            workspace.camera_x[v], workspace.camera_y[v], workspace.camera_w[v] = cx, cy, cw
            workspace.screen_x[v], workspace.screen_y[v] = sx, sy
            workspace.inverse_w[v] = inverse if cw > near else _ZERO
            nearest = min(nearest, cw)
            left, right = min(left, sx), max(right, sx)
            top, bottom = min(top, sy), max(bottom, sy)
        if nearest <= near:
            crossing = True
    if crossing:
        return -(1 << 30), -(1 << 30), 1 << 30, 1 << 30
    if left > right:
        return 0, 0, 0, 0
    limit = F(1 << 28)
    return (
        int(np.floor(max(left, -limit))) - 1,
        int(np.floor(max(top, -limit))) - 1,
        int(np.ceil(min(right, limit))) + 1,
        int(np.ceil(min(bottom, limit))) + 1,
    )


@_compiled
def project_to_light(geometry, drawables, poses, axes, texel, workspace):
    """Vertices of some drawables to the plane of the light.

    :param axes: two directions across the light and the one along it, float32 (3, 3).
    :param texel: side of a texel, metres.
    :return: the window of texels that they touch: left, top, right, bottom, the last two exclusive.
    """
    left, top, right, bottom = F(1e9), F(1e9), F(-1e9), F(-1e9)
    m = np.empty((3, 4), np.float32)
    for d in drawables:
        p = poses[d]
        for i in range(3):
            scale = _ONE / F(texel) if i < 2 else _ONE
            for j in range(3):
                m[i, j] = scale * (axes[i, 0] * p[j] + axes[i, 1] * p[3 + j] + axes[i, 2] * p[6 + j])
            m[i, 3] = scale * (axes[i, 0] * p[9] + axes[i, 1] * p[10] + axes[i, 2] * p[11])
        m00, m01, m02, m03 = m[0, 0], m[0, 1], m[0, 2], m[0, 3]
        m10, m11, m12, m13 = m[1, 0], m[1, 1], m[1, 2], m[1, 3]
        m20, m21, m22, m23 = m[2, 0], m[2, 1], m[2, 2], m[2, 3]
        for v in range(geometry.first_vertex[d], geometry.first_vertex[d + 1]):
            x, y, z = geometry.x[v], geometry.y[v], geometry.z[v]
            u = m00 * x + m01 * y + m02 * z + m03
            w = m10 * x + m11 * y + m12 * z + m13
            workspace.light_u[v], workspace.light_v[v] = u, w
            workspace.light_d[v] = m20 * x + m21 * y + m22 * z + m23
            left, right = min(left, u), max(right, u)
            top, bottom = min(top, w), max(bottom, w)
    if left > right:
        return 0, 0, 0, 0
    return int(np.floor(left)), int(np.floor(top)), int(np.ceil(right)) + 1, int(np.ceil(bottom)) + 1


@_compiled
def rasterise(geometry, drawables, workspace, facing, near, window, focal, stagger, nearest, triangle):
    """Find the triangle that each sample sees.

    :param facing: sign that the screen area of a triangle has when it shows its front.
    :param window: samples to draw in: left, top, right, bottom.
    :param focal: camera.focal_x, focal_y, centre_x, centre_y in samples.
    :param stagger: how far the samples of even rows lie to the right, and those of odd rows to the left, of the centres
        of their cells, and those of odd columns below them and of even ones above, in cells.
    :param nearest: one over the distance of what each sample sees, float32 (rows, columns); updated.
    :param triangle: and its triangle, int32 (rows, columns); updated.
    """
    x_first, y_first, x_end, y_end = window
    # Fields of a tuple are counted references each time they are read; local names are not.
    sx, sy, iw = workspace.screen_x, workspace.screen_y, workspace.inverse_w
    triangles, first_triangle = geometry.triangles, geometry.first_triangle
    sign, stagger = F(facing), F(stagger)
    margin = _HALF + abs(stagger)
    for d in drawables:
        for t in range(first_triangle[d], first_triangle[d + 1]):
            a, b, c = triangles[t, 0], triangles[t, 1], triangles[t, 2]
            za, zb, zc = iw[a], iw[b], iw[c]
            if za == _ZERO or zb == _ZERO or zc == _ZERO:
                if za != _ZERO or zb != _ZERO or zc != _ZERO:
                    _rasterise_crossing(t, a, b, c, workspace, sign, F(near), window, focal, nearest, triangle)
                continue
            ax, ay = sx[a], sy[a]
            bx, by = sx[b] - ax, sy[b] - ay
            cx, cy = sx[c] - ax, sy[c] - ay
            area = bx * cy - cx * by
            if area * sign <= _ZERO:
                continue
            low_x, high_x = min(_ZERO, bx, cx) + ax, max(_ZERO, bx, cx) + ax
            low_y, high_y = min(_ZERO, by, cy) + ay, max(_ZERO, by, cy) + ay
            x0, x1 = max(x_first, int(np.ceil(low_x - margin))), min(x_end - 1, int(np.floor(high_x + margin)) - 1)
            if x0 > x1:
                continue
            y0, y1 = max(y_first, int(np.ceil(low_y - margin))), min(y_end - 1, int(np.floor(high_y + margin)) - 1)
            if y0 > y1:
                continue
            inverse = _ONE / area
            # Barycentric weights of b and c, and the depth: linear in x and y.
            bdx, bdy = cy * inverse, -cx * inverse
            cdx, cdy = -by * inverse, bx * inverse
            zdx, zdy = bdx * (zb - za) + cdx * (zc - za), bdy * (zb - za) + cdy * (zc - za)
            dx, dy = F(x0) + _HALF - ax, F(y0) + _HALF - ay
            row_b, row_c, row_z = bdx * dx + bdy * dy, cdx * dx + cdy * dy, za + zdx * dx + zdy * dy
            for y in range(y0, y1 + 1):
                across = stagger if y & 1 == 0 else -stagger
                down = stagger if x0 & 1 else -stagger
                wb, wc, z = row_b + across * bdx, row_c + across * cdx, row_z + across * zdx
                for x in range(x0, x1 + 1):
                    b_here, c_here = wb + down * bdy, wc + down * cdy
                    if b_here >= _ZERO and c_here >= _ZERO and b_here + c_here <= _ONE:
                        z_here = z + down * zdy
                        if z_here > nearest[y, x]:
                            nearest[y, x] = z_here
                            triangle[y, x] = t
                    down = -down
                    wb += bdx
                    wc += cdx
                    z += zdx
                row_b += bdy
                row_c += cdy
                row_z += zdy


@_compiled
def _rasterise_crossing(t, a, b, c, workspace, sign, near, window, focal, nearest, triangle):
    """A triangle that the near plane cuts, by rays through the samples."""
    x_first, y_first, x_end, y_end = window
    fx, fy, ox, oy = focal
    n, na, nb, nc = _weights(workspace, a, b, c)
    # The determinant is positive where the front is seen in camera space; the screen may be a mirror image of it.
    if n * sign * F(fx) * F(fy) <= _ZERO:
        return
    for y in range(y_first, y_end):
        ray_y = (F(y) + _HALF - F(oy)) / F(fy)
        for x in range(x_first, x_end):
            ray_x = (F(x) + _HALF - F(ox)) / F(fx)
            wa = na[0] * ray_x + na[1] * ray_y + na[2]
            wb = nb[0] * ray_x + nb[1] * ray_y + nb[2]
            wc = nc[0] * ray_x + nc[1] * ray_y + nc[2]
            total = wa + wb + wc
            if wa * n < _ZERO or wb * n < _ZERO or wc * n < _ZERO:
                continue
            z = total / n  # one over the distance
            if z > _ZERO and z * near <= _ONE and z > nearest[y, x]:
                nearest[y, x] = z
                triangle[y, x] = t


@_inlined
def _weights(workspace, a, b, c):
    """Determinant of a triangle's camera coordinates, and the vectors whose products with a ray are its weights."""
    x, y, w = workspace.camera_x, workspace.camera_y, workspace.camera_w
    ax, ay, aw, bx, by, bw, cx, cy, cw = x[a], y[a], w[a], x[b], y[b], w[b], x[c], y[c], w[c]
    na = (by * cw - bw * cy, bw * cx - bx * cw, bx * cy - by * cx)
    nb = (cy * aw - cw * ay, cw * ax - cx * aw, cx * ay - cy * ax)
    nc = (ay * bw - aw * by, aw * bx - ax * bw, ax * by - ay * bx)
    return ax * na[0] + ay * na[1] + aw * na[2], na, nb, nc


@_compiled
def rasterise_shadow(geometry, drawables, workspace, u0, v0, slope_texels, depth):
    """Distances from the light of what it meets first, by the triangles whose front it sees.

    :param slope_texels: a triangle lies that many texels' worth of its slope deeper, against shadows on itself.
    :param depth: metres, float32 (rows, columns); updated.
    """
    lu, lv, ld = workspace.light_u, workspace.light_v, workspace.light_d
    triangles, first_triangle = geometry.triangles, geometry.first_triangle
    rows, columns = depth.shape
    shift_u, shift_v, slope = F(u0), F(v0), F(slope_texels)
    for d in drawables:
        for t in range(first_triangle[d], first_triangle[d + 1]):
            a, b, c = triangles[t, 0], triangles[t, 1], triangles[t, 2]
            ax, ay = lu[a], lv[a]
            bx, by = lu[b] - ax, lv[b] - ay
            cx, cy = lu[c] - ax, lv[c] - ay
            area = bx * cy - cx * by
            if area >= _ZERO:
                continue
            low_x, high_x = min(_ZERO, bx, cx) + ax - shift_u, max(_ZERO, bx, cx) + ax - shift_u
            x0, x1 = max(0, int(np.ceil(low_x - _HALF))), min(columns - 1, int(np.floor(high_x - _HALF)))
            if x0 > x1:
                continue
            low_y, high_y = min(_ZERO, by, cy) + ay - shift_v, max(_ZERO, by, cy) + ay - shift_v
            y0, y1 = max(0, int(np.ceil(low_y - _HALF))), min(rows - 1, int(np.floor(high_y - _HALF)))
            if y0 > y1:
                continue
            inverse = _ONE / area
            za, zb, zc = ld[a], ld[b], ld[c]
            bdx, bdy = cy * inverse, -cx * inverse
            cdx, cdy = -by * inverse, bx * inverse
            zdx, zdy = bdx * (zb - za) + cdx * (zc - za), bdy * (zb - za) + cdy * (zc - za)
            dx, dy = F(x0) + _HALF - ax + shift_u, F(y0) + _HALF - ay + shift_v
            row_b, row_c = bdx * dx + bdy * dy, cdx * dx + cdy * dy
            row_z = za + zdx * dx + zdy * dy + slope * max(abs(zdx), abs(zdy))
            for y in range(y0, y1 + 1):
                wb, wc, z = row_b, row_c, row_z
                for x in range(x0, x1 + 1):
                    if wb >= _ZERO and wc >= _ZERO and wb + wc <= _ONE and z < depth[y, x]:
                        depth[y, x] = z
                    wb += bdx
                    wc += cdx
                    z += zdx
                row_b += bdy
                row_c += cdy
                row_z += zdy


@_inlined
def _in_shadow(depth, u0, v0, slack, u, v, d):
    """Whether a point of the light's space lies behind what a shadow map holds."""
    column, row = u - u0, v - v0
    inside = column >= _ZERO and row >= _ZERO
    if inside and column < F(depth.shape[1]) and row < F(depth.shape[0]):
        return d > depth[int(row), int(column)] + slack
    return False


@_compiled
def _light_corner(corner, v, d, geometry, materials, lights, eyes, towards, workspace):
    """Colours of a corner by OpenGL's fixed-function lighting with a local viewer, clamped as OpenGL does."""
    nx, ny, nz = geometry.normals[corner, 0], geometry.normals[corner, 1], geometry.normals[corner, 2]
    ex, ey, ez = eyes[d, 0] - geometry.x[v], eyes[d, 1] - geometry.y[v], eyes[d, 2] - geometry.z[v]
    length = _ONE / np.sqrt(ex * ex + ey * ey + ez * ez)
    ex, ey, ez = ex * length, ey * length, ez * length
    rgba = materials.rgba
    emission, gloss, exponent = materials.gloss[d, 0], materials.gloss[d, 1], materials.gloss[d, 2]
    out = workspace.colors
    for k in range(3):
        out[corner, k], out[corner, 3 + k] = emission * rgba[d, k], _ZERO
    for s in range(towards.shape[1]):
        first = 0 if s < lights.unshadowed else 3
        lx, ly, lz = towards[d, s, 0], towards[d, s, 1], towards[d, s, 2]
        diffuse, specular = nx * lx + ny * ly + nz * lz, _ZERO
        if diffuse > _ZERO:
            hx, hy, hz = ex + lx, ey + ly, ez + lz
            along, square = nx * hx + ny * hy + nz * hz, hx * hx + hy * hy + hz * hz
            # Most places are so far from the highlight that it adds less than a thousandth.
            if along > _ZERO and along * along > materials.gloss[d, 3] * square:
                specular = gloss * np.exp(_HALF * exponent * np.log(along * along / square))
        else:
            diffuse = _ZERO
        for k in range(3):
            out[corner, first + k] += (lights.ambient[s, k] + diffuse * lights.diffuse[s, k]) * rgba[d, k]
            out[corner, first + k] += specular * lights.specular[s, k]
    for k in range(6):
        out[corner, k] = min(out[corner, k], _ONE)


@_inlined
def _texel(pixels, first, width, height, u, v, clamp):
    """Bilinear colour at (u, v) in pixels of one face; repeated or clamped at its edges."""
    u, v = u - _HALF, v - _HALF
    x, y = int(np.floor(u)), int(np.floor(v))
    fx, fy = u - F(x), v - F(y)
    if clamp:
        x0, x1 = min(max(x, 0), width - 1), min(max(x + 1, 0), width - 1)
        y0, y1 = min(max(y, 0), height - 1), min(max(y + 1, 0), height - 1)
    else:
        x0, x1, y0, y1 = x % width, (x + 1) % width, y % height, (y + 1) % height
    p00, p10 = first + y0 * width + x0, first + y0 * width + x1
    p01, p11 = first + y1 * width + x0, first + y1 * width + x1
    w00, w10 = (_ONE - fx) * (_ONE - fy), fx * (_ONE - fy)
    w01, w11 = (_ONE - fx) * fy, fx * fy
    r = w00 * pixels[p00, 0] + w10 * pixels[p10, 0] + w01 * pixels[p01, 0] + w11 * pixels[p11, 0]
    g = w00 * pixels[p00, 1] + w10 * pixels[p10, 1] + w01 * pixels[p01, 1] + w11 * pixels[p11, 1]
    b = w00 * pixels[p00, 2] + w10 * pixels[p10, 2] + w01 * pixels[p01, 2] + w11 * pixels[p11, 2]
    return r, g, b


@_inlined
def _cube_face(s, t, r):
    """Face of a cube map in OpenGL's order, and (u, v) in 0..1 on it, of a direction."""
    a, b, c = abs(s), abs(t), abs(r)
    if a >= b and a >= c:
        face, sc, tc, ma = (0, -r, -t, a) if s > _ZERO else (1, r, -t, a)
    elif b >= c:
        face, sc, tc, ma = (2, s, r, b) if t > _ZERO else (3, s, -r, b)
    else:
        face, sc, tc, ma = (4, s, -t, c) if r > _ZERO else (5, -s, -t, c)
    ma = max(ma, F(1e-20))
    return face, (sc / ma + _ONE) * _HALF, (tc / ma + _ONE) * _HALF


@_compiled
def sample_texture(textures, texture, kind, s, t, r, sx, tx, rx, sy, ty, ry):
    """Trilinear colour in 0..1 of a texture.

    :param s: coordinates; sx, tx, rx and sy, ty, ry are those of the next pixel across and down.
    """
    levels = textures.levels[texture]
    face, clamp = 0, kind == _ONE
    if clamp:
        face, u, v = _cube_face(s, t, r)
        fx, ux, vx = _cube_face(sx, tx, rx)
        fy, uy, vy = _cube_face(sy, ty, ry)
        if fx != face:
            ux, vx = u, v
        if fy != face:
            uy, vy = u, v
        if levels[0, 3] == 1:
            face = 0
    else:
        u, v, ux, vx, uy, vy = s, t, sx, tx, sy, ty
    width, height = F(levels[0, 1]), F(levels[0, 2])
    across = ((ux - u) * width) ** 2 + ((vx - v) * height) ** 2
    down = ((uy - u) * width) ** 2 + ((vy - v) * height) ** 2
    lod = _HALF * np.log2(max(across, down, F(1e-12)))
    top = 0
    while top + 1 < levels.shape[0] and levels[top + 1, 1] > 0:
        top += 1
    lod = min(max(lod, _ZERO), F(top))
    level = int(lod)
    blend = lod - F(level)
    w, h = levels[level, 1], levels[level, 2]
    red, green, blue = _texel(textures.pixels, levels[level, 0] + face * w * h, w, h, u * F(w), v * F(h), clamp)
    if blend > _ZERO:
        w, h = levels[level + 1, 1], levels[level + 1, 2]
        r1, g1, b1 = _texel(textures.pixels, levels[level + 1, 0] + face * w * h, w, h, u * F(w), v * F(h), clamp)
        red, green, blue = red + blend * (r1 - red), green + blend * (g1 - green), blue + blend * (b1 - blue)
    scale = F(1 / 255)
    return red * scale, green * scale, blue * scale


@_compiled
def _ready(t, frame, geometry, materials, lights, eyes, towards, workspace):
    """Colours and places of a triangle as functions of the ray; wanted once a frame, when a pixel sees it."""
    workspace.ready[t] = frame
    d = geometry.drawable[t]
    a, b, c = geometry.triangles[t, 0], geometry.triangles[t, 1], geometry.triangles[t, 2]
    _, na, nb, nc = _weights(workspace, a, b, c)
    k = workspace.colors
    for i in range(3):
        v = geometry.triangles[t, i]
        corner = geometry.corners[t, i]
        if workspace.lit[corner] != frame:
            workspace.lit[corner] = frame
            _light_corner(corner, v, d, geometry, materials, lights, eyes, towards, workspace)
        n0, n1, n2 = na if i == 0 else (nb if i == 1 else nc)
        for j in range(_QUANTITIES):
            if j < 6:
                value = k[corner, j]
            elif j == _U:
                value = workspace.light_u[v]
            elif j == _V:
                value = workspace.light_v[v]
            elif j == _D:
                value = workspace.light_d[v]
            elif j == _WEIGHT:
                value = _ONE
            else:
                value = geometry.texture_places[v, j - _S]
            if i == 0:
                workspace.planes[t, 0, j] = n0 * value
                workspace.planes[t, 1, j] = n1 * value
                workspace.planes[t, 2, j] = n2 * value
            else:
                workspace.planes[t, 0, j] += n0 * value
                workspace.planes[t, 1, j] += n1 * value
                workspace.planes[t, 2, j] += n2 * value


@_inlined
def _evaluate(planes, t, ray_x, ray_y, out):
    """All quantities of a triangle where a ray meets its plane."""
    for j in range(_QUANTITIES):
        out[j] = planes[t, 0, j] * ray_x + planes[t, 1, j] * ray_y + planes[t, 2, j]
    # Seen edge on, a triangle's plane may lie along the ray.
    weight = out[_WEIGHT]
    inverse = _ONE / (weight if abs(weight) > F(1e-20) else F(1e-20))
    for j in range(_QUANTITIES):
        out[j] *= inverse
    for j in range(6):
        out[j] = min(max(out[j], _ZERO), _ONE)


@_compiled
def _textured(t, ray_x, ray_y, step_x, step_y, geometry, materials, textures, workspace, out):
    """Multiply the colours of a triangle by its texture."""
    d = geometry.drawable[t]
    p = workspace.planes
    s, q, r = _texture_place(p, t, ray_x, ray_y, materials.mapping, d)
    sx, qx, rx = _texture_place(p, t, ray_x + step_x, ray_y, materials.mapping, d)
    sy, qy, ry = _texture_place(p, t, ray_x, ray_y + step_y, materials.mapping, d)
    color = sample_texture(textures, materials.texture[d], materials.mapping[d, 0], s, q, r, sx, qx, rx, sy, qy, ry)
    for j in range(3):
        out[j] *= color[j]
        out[3 + j] *= color[j]


@_inlined
def _texture_place(p, t, ray_x, ray_y, mapping, d):
    """Texture coordinates where a ray meets a triangle's plane."""
    inverse = _ONE / (p[t, 0, _WEIGHT] * ray_x + p[t, 1, _WEIGHT] * ray_y + p[t, 2, _WEIGHT])
    x = (p[t, 0, _S] * ray_x + p[t, 1, _S] * ray_y + p[t, 2, _S]) * inverse
    y = (p[t, 0, _S + 1] * ray_x + p[t, 1, _S + 1] * ray_y + p[t, 2, _S + 1]) * inverse
    z = (p[t, 0, _S + 2] * ray_x + p[t, 1, _S + 2] * ray_y + p[t, 2, _S + 2]) * inverse
    return mapping[d, 1] * x + mapping[d, 2], mapping[d, 3] * y + mapping[d, 4], mapping[d, 5] * z


@_compiled
def prepare_lighting(drawables, poses, camera, lights, eyes, towards):
    """The camera and the directions to the lights in each drawable's coordinates.

    :param eyes: float32 (D, 3); set.
    :param towards: float32 (D, S, 3); set.
    """
    for d in drawables:
        p = poses[d]
        x, y, z = camera.position[0] - p[9], camera.position[1] - p[10], camera.position[2] - p[11]
        for j in range(3):
            eyes[d, j] = p[j] * x + p[3 + j] * y + p[6 + j] * z
        for s in range(len(lights.towards)):
            lx, ly, lz = lights.towards[s]
            for j in range(3):
                towards[d, s, j] = p[j] * lx + p[3 + j] * ly + p[6 + j] * lz


@_compiled
def resolve(
    window,
    samples,
    triangle,
    frame,
    geometry,
    materials,
    textures,
    lights,
    eyes,
    towards,
    workspace,
    camera,
    shadows,
    other_shadows,
    picture,
):
    """Colours of the pixels that see moving triangles, over a picture that shows the background.

    :param window: pixels: left, top, right, bottom.
    :param triangle: what each sample sees, int32.
    :param picture: uint8 (rows, columns, 3); updated.
    """
    left, top, right, bottom = window
    fx, fy = F(1 / camera.focal_x), F(1 / camera.focal_y)
    ox, oy = F(camera.centre_x), F(camera.centre_y)
    count = samples * samples
    seen = np.empty(count, np.int32)
    times = np.empty(count, np.int32)
    share = F(1 / count)
    out = np.empty(16, np.float32)
    # Fields of a tuple are counted references each time they are read; local names are not.
    ready, planes, texture, drawable = workspace.ready, workspace.planes, materials.texture, geometry.drawable
    depth, u0, v0, slack = shadows.depth, F(shadows.u0), F(shadows.v0), F(shadows.slack)
    other_depth, other_u0, other_v0 = other_shadows.depth, F(other_shadows.u0), F(other_shadows.v0)
    other_slack = F(other_shadows.slack)
    for y in range(top, bottom):
        ray_y = (F(y) + _HALF - oy) * fy
        for x in range(left, right):
            different, covered = 0, 0
            for sy in range(y * samples, (y + 1) * samples):
                for sx in range(x * samples, (x + 1) * samples):
                    t = triangle[sy, sx]
                    if t < 0:
                        continue
                    covered += 1
                    i = 0
                    while i < different and seen[i] != t:
                        i += 1
                    if i == different:
                        seen[i], times[i] = t, 0
                        different += 1
                    times[i] += 1
            if covered == 0:
                continue
            ray_x = (F(x) + _HALF - ox) * fx
            red, green, blue = _ZERO, _ZERO, _ZERO
            for i in range(different):
                t = seen[i]
                if ready[t] != frame:
                    _ready(t, frame, geometry, materials, lights, eyes, towards, workspace)
                _evaluate(planes, t, ray_x, ray_y, out)
                if texture[drawable[t]] >= 0:
                    _textured(t, ray_x, ray_y, fx, fy, geometry, materials, textures, workspace, out)
                u, v, d = out[_U], out[_V], out[_D]
                if out[3] + out[4] + out[5] > _ZERO and not _in_shadow(depth, u0, v0, slack, u, v, d):
                    if not _in_shadow(other_depth, other_u0, other_v0, other_slack, u, v, d):
                        for j in range(3):
                            out[j] += out[3 + j]
                weight = F(times[i]) * share
                red += weight * min(out[0], _ONE)
                green += weight * min(out[1], _ONE)
                blue += weight * min(out[2], _ONE)
            rest = F(count - covered) * share
            full = F(255)
            picture[y, x, 0] = np.uint8(red * full + rest * F(picture[y, x, 0]) + _HALF)
            picture[y, x, 1] = np.uint8(green * full + rest * F(picture[y, x, 1]) + _HALF)
            picture[y, x, 2] = np.uint8(blue * full + rest * F(picture[y, x, 2]) + _HALF)


@_compiled
def resolve_background(
    samples,
    triangle,
    frame,
    geometry,
    materials,
    textures,
    lights,
    eyes,
    towards,
    workspace,
    camera,
    shadows,
    bright,
    dark,
    light_places,
):
    """The background's picture as the lights show it, as it is in shadow, and where it lies in the light's space.

    :param bright: uint8 (rows, columns, 3), shows what is seen where no triangle is; updated.
    :param dark: the same without lights that cast shadows; updated.
    :param light_places: u, v and depth, float32 (rows, columns, 3); set, with depth -1e9 where shadow changes nothing.
    """
    rows, columns = bright.shape[:2]
    fx, fy = F(1 / camera.focal_x), F(1 / camera.focal_y)
    ox, oy = F(camera.centre_x), F(camera.centre_y)
    share = F(1 / (samples * samples))
    out = np.empty(16, np.float32)
    ready, planes, texture, drawable = workspace.ready, workspace.planes, materials.texture, geometry.drawable
    depth, u0, v0, slack = shadows.depth, F(shadows.u0), F(shadows.v0), F(shadows.slack)
    lit = np.empty(3, np.float32)
    unlit = np.empty(3, np.float32)
    for y in range(rows):
        ray_y = (F(y) + _HALF - oy) * fy
        for x in range(columns):
            ray_x = (F(x) + _HALF - ox) * fx
            light_places[y, x, 2] = F(-1e9)
            rest = _ONE
            lit[:] = _ZERO
            unlit[:] = _ZERO
            for sy in range(y * samples, (y + 1) * samples):
                for sx in range(x * samples, (x + 1) * samples):
                    t = triangle[sy, sx]
                    if t < 0:
                        continue
                    rest -= share
                    if ready[t] != frame:
                        _ready(t, frame, geometry, materials, lights, eyes, towards, workspace)
                    _evaluate(planes, t, ray_x, ray_y, out)
                    if texture[drawable[t]] >= 0:
                        _textured(t, ray_x, ray_y, fx, fy, geometry, materials, textures, workspace, out)
                    for j in range(3):
                        unlit[j] += share * min(out[j], _ONE)
                    u, v, d = out[_U], out[_V], out[_D]
                    if out[3] + out[4] + out[5] > _ZERO and not _in_shadow(depth, u0, v0, slack, u, v, d):
                        for j in range(3):
                            out[j] += out[3 + j]
                            light_places[y, x, j] = out[_U + j]
                    for j in range(3):
                        lit[j] += share * min(out[j], _ONE)
            rest = max(rest, _ZERO)
            for j in range(3):
                behind = rest * F(bright[y, x, j]) + _HALF
                bright[y, x, j] = np.uint8(min(lit[j] * F(255) + behind, F(255)))
                dark[y, x, j] = np.uint8(min(unlit[j] * F(255) + behind, F(255)))


@_compiled
def darken(light_places, shadows, dark, picture):
    """Put the shadows of moving drawables on the background.

    :param picture: uint8 (rows, columns, 3); pixels in shadow become those of ``dark``.
    """
    rows, columns = picture.shape[:2]
    u0, v0 = F(shadows.u0), F(shadows.v0)
    width, height = F(shadows.depth.shape[1]), F(shadows.depth.shape[0])
    slack, depth = F(shadows.slack), shadows.depth
    for y in range(rows):
        for x in range(columns):
            u, v = light_places[y, x, 0] - u0, light_places[y, x, 1] - v0
            if u >= _ZERO and v >= _ZERO and u < width and v < height:
                if light_places[y, x, 2] > depth[int(v), int(u)] + slack:
                    picture[y, x, 0], picture[y, x, 1], picture[y, x, 2] = dark[y, x, 0], dark[y, x, 1], dark[y, x, 2]


@_compiled
def blend(
    window,
    samples,
    triangle,
    drawable_alpha,
    frame,
    geometry,
    materials,
    textures,
    lights,
    eyes,
    towards,
    workspace,
    camera,
    picture,
):
    """Put a transparent drawable over a picture, as much as its samples cover.

    :param triangle: its triangle that each sample sees, -1 where it is hidden, int32 (rows, columns).
    """
    left, top, right, bottom = window
    fx, fy = F(1 / camera.focal_x), F(1 / camera.focal_y)
    ox, oy = F(camera.centre_x), F(camera.centre_y)
    share = F(1 / (samples * samples))
    out = np.empty(16, np.float32)
    for y in range(top, bottom):
        ray_y = (F(y) + _HALF - oy) * fy
        for x in range(left, right):
            covered, t = 0, -1
            for sy in range(y * samples, (y + 1) * samples):
                for sx in range(x * samples, (x + 1) * samples):
                    if triangle[sy, sx] >= 0:
                        covered += 1
                        t = triangle[sy, sx]
            if covered == 0:
                continue
            ray_x = (F(x) + _HALF - ox) * fx
            if workspace.ready[t] != frame:
                _ready(t, frame, geometry, materials, lights, eyes, towards, workspace)
            _evaluate(workspace.planes, t, ray_x, ray_y, out)
            if materials.texture[geometry.drawable[t]] >= 0:
                _textured(t, ray_x, ray_y, fx, fy, geometry, materials, textures, workspace, out)
            alpha = F(drawable_alpha) * F(covered) * share
            full = F(255)
            for j in range(3):
                over = alpha * min(out[j] + out[3 + j], _ONE) * full
                picture[y, x, j] = np.uint8(over + (_ONE - alpha) * F(picture[y, x, j]) + _HALF)


@_compiled
def draw_sky(textures, texture, camera, picture):
    """The sky where nothing else is, looked up by the direction of each pixel's ray.

    :param texture: a cube map, or -1 for black.
    """
    rows, columns = picture.shape[:2]
    c = camera.rotation
    for y in range(rows):
        ray_y = (F(y) + _HALF - F(camera.centre_y)) / F(camera.focal_y)
        for x in range(columns):
            ray_x = (F(x) + _HALF - F(camera.centre_x)) / F(camera.focal_x)
            dx = c[0, 0] * ray_x + c[1, 0] * ray_y + c[2, 0]
            dy = c[0, 1] * ray_x + c[1, 1] * ray_y + c[2, 1]
            dz = c[0, 2] * ray_x + c[1, 2] * ray_y + c[2, 2]
            # MuJoCo turns the sky's cube by 90 degrees about x.
            r, g, b = sample_texture(textures, texture, _ONE, dx, dz, -dy, dx, dz, -dy, dx, dz, -dy)
            picture[y, x, 0] = np.uint8(r * F(255) + _HALF)
            picture[y, x, 1] = np.uint8(g * F(255) + _HALF)
            picture[y, x, 2] = np.uint8(b * F(255) + _HALF)


@_compiled
def restore(window, background, nearest, triangle):
    """Depths of the background in a window of samples, and no triangle."""
    left, top, right, bottom = window
    nearest[top:bottom, left:right] = background[top:bottom, left:right]
    triangle[top:bottom, left:right] = NOTHING
