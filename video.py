"""mp4 videos of episodes."""

import imageio.v3 as iio
import numpy as np


def save_video(path, frames, fps):
    """Write frames, each (H, W, 3) uint8 with H and W multiples of 16, as an H.264 mp4."""
    iio.imwrite(path, np.stack(frames), plugin="FFMPEG", fps=fps, codec="libx264")
