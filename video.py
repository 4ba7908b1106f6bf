"""Episode videos as mp4."""

import os
import pathlib
import shutil
import subprocess

import imageio.v3 as iio
import imageio_ffmpeg

from endings import Refused, signals_kept_from_children


def check_ffmpeg(flag):
    """Raise `Refused` if there is no ffmpeg to write the video for which `flag` asks."""
    variable = os.environ.get("IMAGEIO_FFMPEG_EXE")
    try:
        subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-version"], capture_output=True, check=True)
    except (OSError, RuntimeError, subprocess.CalledProcessError):
        why = f"IMAGEIO_FFMPEG_EXE={variable} does not work" if variable else "pip install imageio-ffmpeg"
        raise Refused(f"--{flag}: needs ffmpeg and finds none; {why}") from None


def save_video(path, frames, fps):
    """Write frames, each (H, W, 3) uint8 with H and W multiples of 16, as an H.264 mp4.

    The file appears complete or not at all; raises `OSError` if the write fails, as on a full disk.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp.mp4")
    try:
        with signals_kept_from_children():
            iio.imwrite(temporary, frames, plugin="FFMPEG", fps=fps, codec="libx264", ffmpeg_log_level="quiet")
            if imageio_ffmpeg.count_frames_and_secs(temporary)[0] != len(frames):  # ffmpeg fails silently
                raise OSError("incomplete")
        os.replace(temporary, path)
    except (OSError, RuntimeError):
        temporary.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free / 1e6
        raise OSError(f"{path}: no video written: ffmpeg failed; the disk has {free:,.0f} MB free") from None
