"""A GIF of a saved policy: what the agent sees, enlarged without smoothing, beside what a person sees.

python -m benchmarks.gif --run results/policies/cartpole-swingup --out docs/cartpole.gif
"""

import dataclasses
import pathlib

import imageio_ffmpeg
import numpy as np

from agent import make_agent
from command_line import parse_flags
from endings import command
from env_worker import VIDEO_SIZE, open_eval_envs
from episodes import eval_seed
from machine import choose_device, limit_threads
from storage.checkpoint import load_policy
from storage.run_folder import load_config

# one palette for all frames and no dithering, which keeps the file small
PALETTE = "split[a][b];[a]palettegen=max_colors=128[p];[b][p]paletteuse=dither=none:diff_mode=rectangle"


@dataclasses.dataclass(frozen=True)
class Args:
    """Record the first evaluation episode of a run, or its beginning, in real time."""

    run: str
    """The run's folder, or an exported policy."""
    out: str
    """Path of the GIF."""
    decisions: int = 60
    """Decisions to record."""


def enlarge(frame):
    """(3, size, size) uint8 -> (VIDEO_SIZE, VIDEO_SIZE, 3), each pixel the nearest one."""
    at = np.arange(VIDEO_SIZE) * frame.shape[1] // VIDEO_SIZE
    return frame[:, at[:, None], at].transpose(1, 2, 0)


@command()
def main():
    """Play and write the GIF."""
    limit_threads()
    args = parse_flags(Args)
    config = dataclasses.replace(load_config(args.run), compile=False, save_video=True, env_worker=False)
    (env,) = open_eval_envs(config, 1)
    agent = make_agent(config, env.observation_space.shape, env.action_space.shape[0], choose_device("cpu"))
    load_policy(agent, pathlib.Path(args.run) / "model")
    obs, frames = env.reset(seed=eval_seed(config)), []
    for _ in range(args.decisions):
        frames.append(np.concatenate([enlarge(obs[-3:]), env.draw()], axis=1))
        env.start(agent.act(obs, sample=False))
        obs, _, terminated, truncated = env.finish()
        if terminated or truncated:
            break
    size, fps = frames[0].shape[1::-1], env.metadata["render_fps"]
    writer = imageio_ffmpeg.write_frames(
        args.out, size, fps=fps, pix_fmt_out="pal8", codec="gif", output_params=["-vf", PALETTE]
    )
    writer.send(None)
    for frame in frames:
        writer.send(frame)
    writer.close()
    print(f"{args.out}: {len(frames)} frames, {pathlib.Path(args.out).stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
