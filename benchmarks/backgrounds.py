"""Time to draw a frame with each background, and a picture of the frames, on nine tasks.

    python -m benchmarks.backgrounds
    python -m benchmarks.backgrounds --folder videos --picture docs/backgrounds.png

Times are medians in ms; the backgrounds draw each state in turn, and the ratios are to the task's own background.
"""

import dataclasses
import statistics
import time

import imageio.v3 as iio
import numpy as np

import dmc2gym
from background import open_source
from benchmarks import describe_machine
from command_line import parse_flags
from config import TASK_TABLE, parse
from endings import command
from machine import choose_device
from rendering import select_gl_backend

TASKS = [*TASK_TABLE, ("dog", "walk"), ("quadruped", "walk"), ("manipulator", "bring_ball")]
COLUMNS = 3  # tasks in a row of the picture


@dataclasses.dataclass(frozen=True)
class Args:
    """The cost of backgrounds."""

    folder: str | None = None
    """Folder of videos or pictures to measure too."""
    frames: int = 50
    """Frames to draw per task and background."""
    picture: str | None = None
    """Path of a picture to write."""


def measure(task, sources, frames):
    """For each source, the median seconds of a frame and the last frame."""
    envs = [dmc2gym.make(*task, seed=3, from_pixels=True, background=source, frame_skip=4) for source in sources]
    for env in envs:
        env.physics.model.vis.global_.offheight = env.physics.model.vis.global_.offwidth = 84  # as in a run
        env.action_space.seed(0)
        env.reset(seed=5)
    times = [[] for _ in envs]
    for _ in range(frames):
        for env, seconds in zip(envs, times, strict=True):
            env.step(env.action_space.sample())
            start = time.perf_counter()
            env.render()
            seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in times], [env.render() for env in envs]


@command()
def main():
    """Print the table; write the picture."""
    args = parse_flags(Args)
    describe_machine(choose_device("auto"))
    select_gl_backend()
    names = ["none", "moving", *[args.folder] * (args.folder is not None)]
    sources = [open_source(parse(["--background", name]), "train") for name in names]
    print(f"{'task':24}{'none':>8}" + "".join(f"{name[-12:]:>13}{'ratio':>7}" for name in names[1:]))
    pictures = []
    for task in TASKS:
        (clean, *others), frames = measure(task, sources, args.frames)
        columns = "".join(f"{1e3 * seconds:13.1f}{seconds / clean:7.2f}" for seconds in others)
        print(f"{' '.join(task):24}{1e3 * clean:8.1f}{columns}", flush=True)
        pictures.append(np.concatenate(frames, 1))
    if args.picture:
        rows = [np.concatenate(pictures[i : i + COLUMNS], 1) for i in range(0, len(TASKS), COLUMNS)]
        iio.imwrite(args.picture, np.concatenate(rows).repeat(2, 0).repeat(2, 1))


if __name__ == "__main__":
    main()
