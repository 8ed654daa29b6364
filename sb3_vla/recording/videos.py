"""Videos of episodes: a frame for every simulator step, and underneath what the policy was told and how it went."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import av
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from sb3_vla.common.errors import InputError
from sb3_vla.common.files import temporary_path
from sb3_vla.common.paths import local_path

Frame = npt.NDArray[np.uint8]

# The text under an image of 480 pixels; it grows with the image.
_FONT_SIZE = 17
_REFERENCE_WIDTH = 480
_STRIP_COLOR = (24, 26, 31)
_TEXT_COLOR = (236, 238, 241)
_OUTCOME_COLORS: dict[bool | None, tuple[int, int, int]] = {True: (98, 211, 138), False: (255, 123, 114)}


def enlarge(frame: Frame, smallest: int = 480) -> Frame:
    """
    Enlarge a small image by a whole number, so that it shows the very pixels that the policy sees.

    :param frame: uint8, shape ``(H, W, 3)``
    :param smallest: wanted size of the shorter side in pixels; a larger image stays as it is
    :return: uint8, shape ``(s * H, s * W, 3)`` with the smallest whole ``s`` that reaches ``smallest``
    """
    scale = max(1, -(-smallest // min(frame.shape[:2])))
    return frame.repeat(scale, axis=0).repeat(scale, axis=1)


def annotate(frame: Frame, lines: Sequence[str], success: bool | None = None) -> Frame:
    """
    Write lines of text in a strip below the image; the image itself stays untouched.

    :param frame: uint8, shape ``(H, W, 3)``
    :param lines: text; a line too long for the width is broken
    :param success: marks the strip in green for success, in red for failure; None for neither
    :return: uint8, shape ``(H + strip, W, 3)``
    :raises ValueError: if the frame is not an RGB image
    """
    frame = _checked_frame(frame)
    height, width = frame.shape[:2]
    size = max(11, round(_FONT_SIZE * width / _REFERENCE_WIDTH))
    font = ImageFont.load_default(size)
    margin = size // 2
    broken = [part for line in lines for part in _broken_line(line, font, width - 2 * margin)]
    line_height = round(size * 1.4)
    canvas = Image.new("RGB", (width, height + line_height * len(broken) + 2 * margin), _STRIP_COLOR)
    canvas.paste(Image.fromarray(frame), (0, 0))
    draw = ImageDraw.Draw(canvas)
    mark = _OUTCOME_COLORS.get(success)
    if mark is not None:
        draw.rectangle((0, height, width, height + max(2, size // 4)), fill=mark)
    for number, line in enumerate(broken):
        color = mark if mark is not None and number == len(broken) - 1 else _TEXT_COLOR
        draw.text((margin, height + margin + number * line_height), line, fill=color, font=font)
    return np.asarray(canvas)


class Mp4Writer:
    """
    Writes frames to an MP4 (H.264, yuv420p) one after the other, so that an episode is never held in memory.

    The file appears under its name when the writer is closed without an error, and not before.

    :param path: the file; may be changed until the writer is closed
    :param fps: frames per second; MetaWorld simulates 80 steps per second
    :param options: of the encoder libx264
    :raises ValueError: if ``fps`` is not positive or the name does not end in ``.mp4``
    """

    def __init__(self, path: str | Path, fps: float, options: Mapping[str, str] | None = None) -> None:
        self.path = local_path(path)
        if self.path.suffix != ".mp4":
            raise InputError(f"A video is written as MP4, so its name must end in .mp4, got {self.path.name!r}.")
        if not fps > 0:
            raise InputError(f"Expected a positive number of frames per second, got {fps}.")
        self.fps = Fraction(fps).limit_denominator(1001)
        self.frames = 0
        self.bytes = 0  # encoded so far; the file itself lags behind
        self._options: dict[str, object] = {"preset": "veryfast", "crf": "20", **(options or {})}
        self._shape: tuple[int, ...] = ()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = temporary_path(self.path)
        # With the index at its start, a player need not load the whole file first.
        self._container = av.open(str(self._temporary), "w", format="mp4", options={"movflags": "+faststart"})

    def append(self, frame: Frame) -> None:
        """
        Add one frame.

        :param frame: uint8, shape ``(H, W, 3)``, the same for all frames; an odd height or width is padded by one pixel
        :raises ValueError: if it is not such an image
        """
        frame = _checked_frame(frame)
        if not self._shape:
            self._shape = frame.shape
            self._stream = self._container.add_stream("libx264", rate=self.fps)
            self._stream.options = self._options
            self._stream.time_base = 1 / self.fps
            self._stream.pix_fmt = "yuv420p"
            # By itself an encoder takes more threads than there are cores; a worker films several episodes at a time.
            self._stream.thread_count = 1
            self._stream.height, self._stream.width = (side + side % 2 for side in frame.shape[:2])
        if frame.shape != self._shape:
            raise InputError(
                f"All frames of a video must have one shape: the first was {self._shape}, this is {frame.shape}."
            )
        odd_height, odd_width = (side % 2 for side in frame.shape[:2])
        padded = np.pad(frame, ((0, odd_height), (0, odd_width), (0, 0)), mode="edge")
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(padded), format="rgb24")
        picture.pts, picture.time_base = self.frames, 1 / self.fps
        packets = self._stream.encode(picture)
        self._container.mux(packets)
        self.frames += 1
        self.bytes += sum(packet.size for packet in packets)

    def close(self) -> None:
        """
        Finish the file and give it its name.

        :raises ValueError: if no frame was added
        """
        if not self._shape:
            self.discard()
            raise InputError(f"No frame was given for the video {self.path}.")
        self._container.mux(self._stream.encode(None))
        self._container.close()
        os.replace(self._temporary, self.path)

    def discard(self) -> None:
        """Give the video up and delete what was written."""
        try:
            self._container.close()
        finally:
            self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> Mp4Writer:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error_type is None:
            self.close()
        else:
            self.discard()


def _checked_frame(frame: npt.NDArray[np.uint8]) -> Frame:
    frame = np.asarray(frame)
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or 0 in frame.shape:
        raise InputError(
            f"Expected a picture of shape (height, width, 3) and uint8, got {frame.shape} and {frame.dtype}."
        )
    return frame


def _broken_line(line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Break a line at spaces to fit into so many pixels; a single word may stick out."""
    parts = [""]
    for word in line.split(" "):
        longer = f"{parts[-1]} {word}" if parts[-1] else word
        if parts[-1] and font.getlength(longer) > width:
            parts.append(word)
        else:
            parts[-1] = longer
    return parts
