"""Videos hold every frame in order, appear whole or not at all, and keep the text out of the picture."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import pytest
from toy import write_mp4

from sb3_vla.recording.videos import Mp4Writer, annotate, enlarge


def frames_of(path: Path) -> npt.NDArray[np.uint8]:
    with av.open(str(path)) as video:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)])


def ramp(count: int, height: int, width: int) -> npt.NDArray[np.uint8]:
    """Pictures with a smooth ramp, each brighter than the one before."""
    row, column = np.mgrid[0:height, 0:width]
    picture = np.stack([row, column, row + column], axis=-1) * 100 // (height + width)
    return np.stack([picture + 10 * number for number in range(count)]).astype(np.uint8)


def test_mp4_gives_the_frames_back(tmp_path: Path) -> None:
    frames = ramp(7, 48, 64)
    write_mp4(tmp_path / "deeper" / "video.mp4", frames, fps=40)
    read = frames_of(tmp_path / "deeper" / "video.mp4")
    assert read.shape == frames.shape
    # The codec errs by a few gray levels, the frames differ by ten.
    assert np.abs(read.astype(int) - frames).mean(axis=(1, 2, 3)).max() < 4
    assert [path.name for path in (tmp_path / "deeper").iterdir()] == ["video.mp4"]


def test_mp4_is_what_browsers_play(tmp_path: Path) -> None:
    write_mp4(tmp_path / "video.mp4", ramp(3, 33, 47), fps=12.5)
    with av.open(str(tmp_path / "video.mp4")) as video:
        stream = video.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert (stream.codec_context.height, stream.codec_context.width) == (34, 48)
        assert stream.average_rate == 12.5
    content = (tmp_path / "video.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat"), "the index must stand before the pictures"


def test_captions_stand_below_the_picture(tmp_path: Path) -> None:
    frames = ramp(3, 96, 96)
    lines = [["Reach a goal", f"step {step}"] for step in range(3)]
    annotated = [annotate(frame, part) for frame, part in zip(frames, lines, strict=True)]
    write_mp4(tmp_path / "video.mp4", np.stack(annotated), 40)
    read = frames_of(tmp_path / "video.mp4")
    assert read.shape[1] > 96 and read.shape[2] == 96
    assert np.abs(read[:, :95].astype(int) - frames[:, :95]).mean() < 4


def test_annotate_leaves_the_picture_alone() -> None:
    picture = ramp(1, 480, 480)[0]
    lines = ["Bypass a wall and press a button from the top", "step 5 of 160"]
    for success in (None, False, True):
        annotated = annotate(picture, lines, success)
        np.testing.assert_array_equal(annotated[:480], picture)
        assert annotated.dtype == np.uint8
    plain, green, red = annotate(picture, lines), annotate(picture, lines, True), annotate(picture, lines, False)
    assert plain.shape == green.shape == red.shape
    assert np.diff(green[481, 0, :2].astype(int)) > 90 and np.diff(red[481, 0, :2].astype(int)) < -90
    assert np.ptp(plain[481, 0]) < 10, "a strip that is marked with neither"
    assert annotate(picture, [lines[0] * 3]).shape[0] > annotate(picture, [lines[0]]).shape[0], "long lines are broken"


def test_enlarge_repeats_pixels() -> None:
    picture = ramp(1, 96, 128)[0]
    large = enlarge(picture)
    assert large.shape == (480, 640, 3)
    np.testing.assert_array_equal(large[::5, ::5], picture)
    np.testing.assert_array_equal(large[4::5, 4::5], picture)
    np.testing.assert_array_equal(enlarge(large), large)
    assert enlarge(ramp(1, 100, 100)[0]).shape == (500, 500, 3)


@pytest.mark.parametrize(
    ("frames", "name", "fps", "message"),
    [
        (ramp(2, 16, 16).astype(np.float32), "a.mp4", 40, "float32"),
        (ramp(2, 16, 16)[..., :1], "a.mp4", 40, r"\(16, 16, 1\)"),
        (ramp(2, 16, 16)[:0], "a.mp4", 40, "No frame"),
        (ramp(2, 16, 16), "a.avi", 40, "end in .mp4"),
        (ramp(2, 16, 16), "a.mp4", 0, "got 0"),
    ],
)
def test_bad_input_leaves_no_file(
    tmp_path: Path, frames: npt.NDArray[np.uint8], name: str, fps: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_mp4(tmp_path / name, frames, fps)
    assert not list(tmp_path.iterdir())


def test_frames_of_one_shape(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"first was \(16, 16, 3\), this is \(16, 18, 3\)"):
        with Mp4Writer(tmp_path / "a.mp4", 40) as writer:
            writer.append(ramp(1, 16, 16)[0])
            writer.append(ramp(1, 16, 18)[0])
    assert not list(tmp_path.iterdir())
