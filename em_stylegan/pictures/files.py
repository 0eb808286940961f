"""Grids and videos on disk."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from em_data import save_image_grid, to_uint8

VIDEO_FORMATS = (".gif", ".png", ".mp4")


def save_grid(images, path, num_columns: int) -> None:
    """Write images [N, 1, R, R] in [-1, 1] as a PNG, in a folder that is created."""
    check_grid_format(path)
    save_image_grid(images, path, num_columns)


def check_grid_format(path) -> None:
    """Raise `ValueError` if `path` is not a PNG."""
    if Path(path).suffix != ".png":
        raise ValueError(f"{path}: the name of a grid ends in .png")


def save_video(images, path, frames_per_second: int) -> None:
    """Write images [N, 1, H, W] in [-1, 1] as an endless video; the suffix decides the format.

    A GIF or APNG (.png) keeps all 256 grey levels. A GIF's pace is the nearest that hundredths of a
    second allow. An MP4 (H.264) needs the program ffmpeg or the package imageio-ffmpeg.
    """
    path = Path(path)
    check_video_format(path)
    frames = to_uint8(images)[:, 0]  # [N, H, W]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    try:
        if path.suffix == ".mp4":
            _encode_mp4(frames, temporary, frames_per_second)
        else:
            first, *rest = [Image.fromarray(frame) for frame in frames]
            options: dict[str, Any] = {"append_images": rest, "save_all": True, "loop": 0}
            options["duration"] = round(1000 / frames_per_second)  # ms
            if path.suffix == ".gif":
                options |= {"duration": find_gif_duration(frames_per_second), "optimize": False}
            first.save(temporary, **options)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_video_format(path) -> None:
    """Raise `ValueError` if `path` is not a video, or the encoder for it is missing."""
    if Path(path).suffix not in VIDEO_FORMATS:
        raise ValueError(f"{path}: the name of a video ends in {', '.join(VIDEO_FORMATS)}")
    if Path(path).suffix == ".mp4":
        find_encoder()


def find_gif_duration(frames_per_second: int) -> int:
    """Return the milliseconds of a GIF's frame: hundredths of a second, at least 2.

    Viewers slow down a GIF with a shorter time to ten frames per second.
    """
    return 10 * max(2, round(100 / frames_per_second))


def find_encoder() -> str:
    """Return the path of ffmpeg, of the system or of the package imageio-ffmpeg."""
    if path := shutil.which("ffmpeg"):
        return path
    try:
        import imageio_ffmpeg
    except ImportError as error:
        raise ValueError(
            "MP4 needs an encoder: install ffmpeg, or pip install 'em-synthesis[video]'. "
            ".gif and .png (APNG) need none."
        ) from error
    return imageio_ffmpeg.get_ffmpeg_exe()


def _encode_mp4(frames, path, frames_per_second):
    height, width = frames.shape[1:]
    source = f"-f rawvideo -pix_fmt gray -s {width}x{height} -r {frames_per_second} -i -"
    target = "-c:v libx264 -crf 16 -pix_fmt yuv420p -movflags +faststart"
    command = [find_encoder(), "-loglevel", "error", "-y", *source.split(), *target.split()]
    done = subprocess.run(
        [*command, str(path)],
        input=np.ascontiguousarray(frames).tobytes(),
        capture_output=True,
        check=False,
    )
    if done.returncode:
        text = done.stderr.decode(errors="replace").strip()[-300:]
        raise ValueError(f"ffmpeg could not write the MP4: {text}")
