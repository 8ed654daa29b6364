"""Colours of what the samples see: the software renderer's light, textures and shadows.

A colour is computed once per pixel and triangle, at the pixel's centre, as OpenGL's multisampling does.
"""

from __future__ import annotations

import numpy as np

from mw_envs.rendering.arrays import HALF, ONE, ZERO, F, compiled, inlined
from mw_envs.rendering.raster import ray_weights

# Quantities that vary over a triangle: colour by unshadowed lights, by shadowed ones, place in the light's space, place
# on the texture, and the weight that all of them are multiplied by.
_U, _V, _D, _S, _WEIGHT, _QUANTITIES = 6, 7, 8, 9, 12, 13


@inlined
def _in_shadow(depth, u0, v0, slack, u, v, d):
    """Whether a point of the light's space lies behind what a shadow map holds."""
    column, row = u - u0, v - v0
    inside = column >= ZERO and row >= ZERO
    if inside and column < F(depth.shape[1]) and row < F(depth.shape[0]):
        return d > depth[int(row), int(column)] + slack
    return False


@compiled
def _light_corner(corner, v, d, geometry, materials, lights, eyes, towards, workspace):
    """Colours of a corner by OpenGL's fixed-function lighting with a local viewer, clamped as OpenGL does."""
    nx, ny, nz = geometry.normals[corner, 0], geometry.normals[corner, 1], geometry.normals[corner, 2]
    ex, ey, ez = eyes[d, 0] - geometry.x[v], eyes[d, 1] - geometry.y[v], eyes[d, 2] - geometry.z[v]
    length = ONE / np.sqrt(ex * ex + ey * ey + ez * ez)
    ex, ey, ez = ex * length, ey * length, ez * length
    rgba = materials.rgba
    emission, gloss, exponent = materials.gloss[d, 0], materials.gloss[d, 1], materials.gloss[d, 2]
    out = workspace.colors
    for k in range(3):
        out[corner, k], out[corner, 3 + k] = emission * rgba[d, k], ZERO
    for s in range(towards.shape[1]):
        first = 0 if s < lights.unshadowed else 3
        lx, ly, lz = towards[d, s, 0], towards[d, s, 1], towards[d, s, 2]
        diffuse, specular = nx * lx + ny * ly + nz * lz, ZERO
        if diffuse > ZERO:
            hx, hy, hz = ex + lx, ey + ly, ez + lz
            along, square = nx * hx + ny * hy + nz * hz, hx * hx + hy * hy + hz * hz
            # Most places are so far from the highlight that it adds less than a thousandth.
            if along > ZERO and along * along > materials.gloss[d, 3] * square:
                specular = gloss * np.exp(HALF * exponent * np.log(along * along / square))
        else:
            diffuse = ZERO
        for k in range(3):
            out[corner, first + k] += (lights.ambient[s, k] + diffuse * lights.diffuse[s, k]) * rgba[d, k]
            out[corner, first + k] += specular * lights.specular[s, k]
    for k in range(6):
        out[corner, k] = min(out[corner, k], ONE)


@inlined
def _texel(pixels, first, width, height, u, v, clamp):
    """Bilinear colour at (u, v) in pixels of one face; repeated or clamped at its edges."""
    u, v = u - HALF, v - HALF
    x, y = int(np.floor(u)), int(np.floor(v))
    fx, fy = u - F(x), v - F(y)
    if clamp:
        x0, x1 = min(max(x, 0), width - 1), min(max(x + 1, 0), width - 1)
        y0, y1 = min(max(y, 0), height - 1), min(max(y + 1, 0), height - 1)
    else:
        x0, x1, y0, y1 = x % width, (x + 1) % width, y % height, (y + 1) % height
    p00, p10 = first + y0 * width + x0, first + y0 * width + x1
    p01, p11 = first + y1 * width + x0, first + y1 * width + x1
    w00, w10 = (ONE - fx) * (ONE - fy), fx * (ONE - fy)
    w01, w11 = (ONE - fx) * fy, fx * fy
    r = w00 * pixels[p00, 0] + w10 * pixels[p10, 0] + w01 * pixels[p01, 0] + w11 * pixels[p11, 0]
    g = w00 * pixels[p00, 1] + w10 * pixels[p10, 1] + w01 * pixels[p01, 1] + w11 * pixels[p11, 1]
    b = w00 * pixels[p00, 2] + w10 * pixels[p10, 2] + w01 * pixels[p01, 2] + w11 * pixels[p11, 2]
    return r, g, b


@inlined
def _cube_face(s, t, r):
    """Face of a cube map in OpenGL's order, and (u, v) in 0..1 on it, of a direction."""
    a, b, c = abs(s), abs(t), abs(r)
    if a >= b and a >= c:
        face, sc, tc, ma = (0, -r, -t, a) if s > ZERO else (1, r, -t, a)
    elif b >= c:
        face, sc, tc, ma = (2, s, r, b) if t > ZERO else (3, s, -r, b)
    else:
        face, sc, tc, ma = (4, s, -t, c) if r > ZERO else (5, -s, -t, c)
    ma = max(ma, F(1e-20))
    return face, (sc / ma + ONE) * HALF, (tc / ma + ONE) * HALF


@compiled
def sample_texture(textures, texture, kind, s, t, r, sx, tx, rx, sy, ty, ry):
    """Trilinear colour in 0..1 of a texture.

    :param s: coordinates; sx, tx, rx and sy, ty, ry are those of the next pixel across and down.
    """
    levels = textures.levels[texture]
    face, clamp = 0, kind == ONE
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
    lod = HALF * np.log2(max(across, down, F(1e-12)))
    top = 0
    while top + 1 < levels.shape[0] and levels[top + 1, 1] > 0:
        top += 1
    lod = min(max(lod, ZERO), F(top))
    level = int(lod)
    blend = lod - F(level)
    w, h = levels[level, 1], levels[level, 2]
    red, green, blue = _texel(textures.pixels, levels[level, 0] + face * w * h, w, h, u * F(w), v * F(h), clamp)
    if blend > ZERO:
        w, h = levels[level + 1, 1], levels[level + 1, 2]
        r1, g1, b1 = _texel(textures.pixels, levels[level + 1, 0] + face * w * h, w, h, u * F(w), v * F(h), clamp)
        red, green, blue = red + blend * (r1 - red), green + blend * (g1 - green), blue + blend * (b1 - blue)
    scale = F(1 / 255)
    return red * scale, green * scale, blue * scale


@compiled
def _ready(t, frame, geometry, materials, lights, eyes, towards, workspace):
    """Colours and places of a triangle as functions of the ray; wanted once a frame, when a pixel sees it."""
    workspace.ready[t] = frame
    d = geometry.drawable[t]
    a, b, c = geometry.triangles[t, 0], geometry.triangles[t, 1], geometry.triangles[t, 2]
    _, na, nb, nc = ray_weights(workspace, a, b, c)
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
                value = ONE
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


@inlined
def _evaluate(planes, t, ray_x, ray_y, out):
    """All quantities of a triangle where a ray meets its plane."""
    for j in range(_QUANTITIES):
        out[j] = planes[t, 0, j] * ray_x + planes[t, 1, j] * ray_y + planes[t, 2, j]
    # Seen edge on, a triangle's plane may lie along the ray.
    weight = out[_WEIGHT]
    inverse = ONE / (weight if abs(weight) > F(1e-20) else F(1e-20))
    for j in range(_QUANTITIES):
        out[j] *= inverse
    for j in range(6):
        out[j] = min(max(out[j], ZERO), ONE)


@compiled
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


@inlined
def _texture_place(p, t, ray_x, ray_y, mapping, d):
    """Texture coordinates where a ray meets a triangle's plane."""
    inverse = ONE / (p[t, 0, _WEIGHT] * ray_x + p[t, 1, _WEIGHT] * ray_y + p[t, 2, _WEIGHT])
    x = (p[t, 0, _S] * ray_x + p[t, 1, _S] * ray_y + p[t, 2, _S]) * inverse
    y = (p[t, 0, _S + 1] * ray_x + p[t, 1, _S + 1] * ray_y + p[t, 2, _S + 1]) * inverse
    z = (p[t, 0, _S + 2] * ray_x + p[t, 1, _S + 2] * ray_y + p[t, 2, _S + 2]) * inverse
    return mapping[d, 1] * x + mapping[d, 2], mapping[d, 3] * y + mapping[d, 4], mapping[d, 5] * z


@compiled
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


@compiled
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
        ray_y = (F(y) + HALF - oy) * fy
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
            ray_x = (F(x) + HALF - ox) * fx
            red, green, blue = ZERO, ZERO, ZERO
            for i in range(different):
                t = seen[i]
                if ready[t] != frame:
                    _ready(t, frame, geometry, materials, lights, eyes, towards, workspace)
                _evaluate(planes, t, ray_x, ray_y, out)
                if texture[drawable[t]] >= 0:
                    _textured(t, ray_x, ray_y, fx, fy, geometry, materials, textures, workspace, out)
                u, v, d = out[_U], out[_V], out[_D]
                if out[3] + out[4] + out[5] > ZERO and not _in_shadow(depth, u0, v0, slack, u, v, d):
                    if not _in_shadow(other_depth, other_u0, other_v0, other_slack, u, v, d):
                        for j in range(3):
                            out[j] += out[3 + j]
                weight = F(times[i]) * share
                red += weight * min(out[0], ONE)
                green += weight * min(out[1], ONE)
                blue += weight * min(out[2], ONE)
            rest = F(count - covered) * share
            full = F(255)
            picture[y, x, 0] = np.uint8(red * full + rest * F(picture[y, x, 0]) + HALF)
            picture[y, x, 1] = np.uint8(green * full + rest * F(picture[y, x, 1]) + HALF)
            picture[y, x, 2] = np.uint8(blue * full + rest * F(picture[y, x, 2]) + HALF)


@compiled
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
        ray_y = (F(y) + HALF - oy) * fy
        for x in range(columns):
            ray_x = (F(x) + HALF - ox) * fx
            light_places[y, x, 2] = F(-1e9)
            rest = ONE
            lit[:] = ZERO
            unlit[:] = ZERO
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
                        unlit[j] += share * min(out[j], ONE)
                    u, v, d = out[_U], out[_V], out[_D]
                    if out[3] + out[4] + out[5] > ZERO and not _in_shadow(depth, u0, v0, slack, u, v, d):
                        for j in range(3):
                            out[j] += out[3 + j]
                            light_places[y, x, j] = out[_U + j]
                    for j in range(3):
                        lit[j] += share * min(out[j], ONE)
            rest = max(rest, ZERO)
            for j in range(3):
                behind = rest * F(bright[y, x, j]) + HALF
                bright[y, x, j] = np.uint8(min(lit[j] * F(255) + behind, F(255)))
                dark[y, x, j] = np.uint8(min(unlit[j] * F(255) + behind, F(255)))


@compiled
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
            if u >= ZERO and v >= ZERO and u < width and v < height:
                if light_places[y, x, 2] > depth[int(v), int(u)] + slack:
                    picture[y, x, 0], picture[y, x, 1], picture[y, x, 2] = dark[y, x, 0], dark[y, x, 1], dark[y, x, 2]


@compiled
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
        ray_y = (F(y) + HALF - oy) * fy
        for x in range(left, right):
            covered, t = 0, -1
            for sy in range(y * samples, (y + 1) * samples):
                for sx in range(x * samples, (x + 1) * samples):
                    if triangle[sy, sx] >= 0:
                        covered += 1
                        t = triangle[sy, sx]
            if covered == 0:
                continue
            ray_x = (F(x) + HALF - ox) * fx
            if workspace.ready[t] != frame:
                _ready(t, frame, geometry, materials, lights, eyes, towards, workspace)
            _evaluate(workspace.planes, t, ray_x, ray_y, out)
            if materials.texture[geometry.drawable[t]] >= 0:
                _textured(t, ray_x, ray_y, fx, fy, geometry, materials, textures, workspace, out)
            alpha = F(drawable_alpha) * F(covered) * share
            full = F(255)
            for j in range(3):
                over = alpha * min(out[j] + out[3 + j], ONE) * full
                picture[y, x, j] = np.uint8(over + (ONE - alpha) * F(picture[y, x, j]) + HALF)


@compiled
def draw_sky(textures, texture, camera, picture):
    """The sky where nothing else is, looked up by the direction of each pixel's ray.

    :param texture: a cube map, or -1 for black.
    """
    rows, columns = picture.shape[:2]
    c = camera.rotation
    for y in range(rows):
        ray_y = (F(y) + HALF - F(camera.centre_y)) / F(camera.focal_y)
        for x in range(columns):
            ray_x = (F(x) + HALF - F(camera.centre_x)) / F(camera.focal_x)
            dx = c[0, 0] * ray_x + c[1, 0] * ray_y + c[2, 0]
            dy = c[0, 1] * ray_x + c[1, 1] * ray_y + c[2, 1]
            dz = c[0, 2] * ray_x + c[1, 2] * ray_y + c[2, 2]
            # MuJoCo turns the sky's cube by 90 degrees about x.
            r, g, b = sample_texture(textures, texture, ONE, dx, dz, -dy, dx, dz, -dy, dx, dz, -dy)
            picture[y, x, 0] = np.uint8(r * F(255) + HALF)
            picture[y, x, 1] = np.uint8(g * F(255) + HALF)
            picture[y, x, 2] = np.uint8(b * F(255) + HALF)
