"""Textures, filtered as OpenGL filters them; the sky."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from mw_envs.rendering.software.arrays import HALF, ONE, ZERO, F, Textures, compiled, inlined

_LEVELS = 16


class TexturePool:
    """The textures of many scenes, each kept once.

    ``arrays`` are those for the inner loops.
    """

    def __init__(self) -> None:
        self._known: dict[bytes, int] = {}
        self.arrays = Textures(np.zeros((1, 3), np.uint8), np.zeros((0, _LEVELS, 4), np.int32))

    def add(self, picture: npt.NDArray[np.uint8]) -> int:
        """Index in the pool of a texture.

        :param picture: its faces, uint8 (faces, height, width, 3).
        """
        digest = hashlib.sha256(repr(picture.shape).encode())
        digest.update(picture.tobytes())
        key = digest.digest()
        if key not in self._known:
            pixels, levels = [self.arrays.pixels], np.zeros((1, _LEVELS, 4), np.int32)
            first, faces = len(self.arrays.pixels), len(picture)
            level = picture.astype(np.float32)
            for number in range(_LEVELS):
                levels[0, number] = first, level.shape[2], level.shape[1], faces
                pixels.append(np.floor(level + 0.5).astype(np.uint8).reshape(-1, 3))
                first += len(pixels[-1])
                if level.shape[1] == level.shape[2] == 1:
                    break
                level = _halved(_halved(level, 2), 1)
            self.arrays = Textures(np.concatenate(pixels), np.concatenate([self.arrays.levels, levels]))
            self._known[key] = len(self.arrays.levels) - 1
        return self._known[key]


def _halved(pictures: npt.NDArray[np.float32], axis: int) -> npt.NDArray[np.float32]:
    """Pictures with half the pixels along an axis, each the linear interpolation at its center, halves rounded up."""
    size = pictures.shape[axis]
    if size == 1:
        return pictures
    half = size // 2
    center = (np.arange(half) + 0.5) * size / half - 0.5
    low = np.floor(center).astype(int)
    weight = (center - low).reshape([-1 if k == axis else 1 for k in range(4)]).astype(np.float32)
    upper = np.minimum(low + 1, size - 1)
    between = pictures.take(low, axis) * (1 - weight) + pictures.take(upper, axis) * weight
    return np.asarray(np.floor(between + 0.5), np.float32)


@compiled
def _bilinear(pixels, levels, texture, level, face, u, v, clamp):
    """Color at (u, v), in 0..1 of one face, repeated or clamped at its edges; 0..255."""
    width, height = levels[texture, level, 1], levels[texture, level, 2]
    u, v = u * F(width) - HALF, v * F(height) - HALF
    left, top = np.floor(u), np.floor(v)
    fx, fy = u - left, v - top
    x0, y0 = int(left), int(top)
    x1, y1 = x0 + 1, y0 + 1
    if clamp:
        x0, x1, y0, y1 = max(x0, 0), min(x1, width - 1), max(y0, 0), min(y1, height - 1)
    else:
        x0, x1 = x0 + width if x0 < 0 else x0, x1 - width if x1 >= width else x1
        y0, y1 = y0 + height if y0 < 0 else y0, y1 - height if y1 >= height else y1
    first = levels[texture, level, 0] + face * width * height
    row0, row1 = first + y0 * width, first + y1 * width
    p00, p10, p01, p11 = np.uint64(row0 + x0), np.uint64(row0 + x1), np.uint64(row1 + x0), np.uint64(row1 + x1)
    w00, w10 = (ONE - fx) * (ONE - fy), fx * (ONE - fy)
    w01, w11 = (ONE - fx) * fy, fx * fy
    return (
        w00 * F(pixels[p00, 0]) + w10 * F(pixels[p10, 0]) + w01 * F(pixels[p01, 0]) + w11 * F(pixels[p11, 0]),
        w00 * F(pixels[p00, 1]) + w10 * F(pixels[p10, 1]) + w01 * F(pixels[p01, 1]) + w11 * F(pixels[p11, 1]),
        w00 * F(pixels[p00, 2]) + w10 * F(pixels[p10, 2]) + w01 * F(pixels[p01, 2]) + w11 * F(pixels[p11, 2]),
    )


@compiled
def _cube_face(s, t, r):
    """Face of a cube map in OpenGL's order that a direction meets, and its part across, down and towards that face."""
    a, b, c = abs(s), abs(t), abs(r)
    if a >= b and a >= c:
        return (0, -r, -t, a) if s > ZERO else (1, r, -t, a)
    if b >= c:
        return (2, s, r, b) if t > ZERO else (3, s, -r, b)
    return (4, s, -t, c) if r > ZERO else (5, -s, -t, c)


@compiled
def _on_face(face, s, t, r):
    """The same three parts, for a face that is known."""
    if face < 2:
        return (-r, -t, s) if face == 0 else (r, -t, -s)
    if face < 4:
        return (s, r, t) if face == 2 else (s, -r, -t)
    return (s, -t, r) if face == 4 else (-s, -t, -r)


@compiled
def texture_level(levels, texture, kind, s, t, r, sx, tx, rx, sy, ty, ry):
    """The reduction of a texture that has a pixel's size, and how much of the next one is mixed in.

    :param s: coordinates; sx, tx, rx and sy, ty, ry are their changes by one pixel across and down.
    """
    if kind == ONE:
        face, across, down, ahead = _cube_face(s, t, r)
        scale = HALF / max(ahead, F(1e-20))
        u, v = across * scale, down * scale
        ax, dx, hx = _on_face(face, sx, tx, rx)
        ay, dy, hy = _on_face(face, sy, ty, ry)
        two = F(2)
        ux, vx = (ax - two * u * hx) * scale, (dx - two * v * hx) * scale
        uy, vy = (ay - two * u * hy) * scale, (dy - two * v * hy) * scale
    else:
        ux, vx, uy, vy = sx, tx, sy, ty
    width, height = F(levels[texture, 0, 1]), F(levels[texture, 0, 2])
    ux, vx, uy, vy = ux * width, vx * height, uy * width, vy * height
    square = max(ux * ux + vx * vx, uy * uy + vy * vy)
    level, blend = 0, ZERO
    if square > ONE:
        reduction = HALF * np.log2(square)
        level = int(min(reduction, F(levels.shape[1] - 1)))
        blend = reduction - F(level)
        while level > 0 and levels[texture, level, 1] == 0:
            level, blend = level - 1, ONE
        if level + 1 == levels.shape[1] or levels[texture, level + 1, 1] == 0:
            blend = ZERO
    return level, blend


@inlined
def sample_texture(pixels, levels, texture, kind, s, t, r, level, blend):
    """Trilinear color in 0..1 of a texture.

    :param s: coordinates, with t and r.
    :param level: see :func:`texture_level`; so is blend.
    """
    face, clamp = 0, kind == ONE
    if clamp:
        face, across, down, ahead = _cube_face(s, t, r)
        scale = HALF / max(ahead, F(1e-20))
        u, v = across * scale + HALF, down * scale + HALF
        if levels[texture, 0, 3] == 1:
            face = 0
    else:
        u, v = s - np.floor(s), t - np.floor(t)
    red, green, blue = _bilinear(pixels, levels, texture, level, face, u, v, clamp)
    if blend > ZERO:
        r1, g1, b1 = _bilinear(pixels, levels, texture, level + 1, face, u, v, clamp)
        red, green, blue = red + blend * (r1 - red), green + blend * (g1 - green), blue + blend * (b1 - blue)
    scale = F(1 / 255)
    return red * scale, green * scale, blue * scale


@compiled
def draw_sky(textures, texture, camera, picture):
    """The sky where nothing else is, looked up by the direction of each pixel's ray.

    :param texture: a cube map.
    """
    rows, columns = picture.shape[:2]
    c, pixels, levels = camera.rotation, textures.pixels, textures.levels
    for y in range(rows):
        ray_y = (F(y) + HALF - F(camera.center_y)) / F(camera.focal_y)
        for x in range(columns):
            ray_x = (F(x) + HALF - F(camera.center_x)) / F(camera.focal_x)
            dx = c[0, 0] * ray_x + c[1, 0] * ray_y + c[2, 0]
            dy = c[0, 1] * ray_x + c[1, 1] * ray_y + c[2, 1]
            dz = c[0, 2] * ray_x + c[1, 2] * ray_y + c[2, 2]
            # MuJoCo turns the sky's cube by 90 degrees about x.
            r, g, b = sample_texture(pixels, levels, texture, ONE, dx, dz, -dy, 0, ZERO)
            picture[y, x, 0] = np.uint8(r * F(255) + HALF)
            picture[y, x, 1] = np.uint8(g * F(255) + HALF)
            picture[y, x, 2] = np.uint8(b * F(255) + HALF)
