"""Run episodes with the deterministic policy: in training, and as a command on a run that has saved its networks.

python evaluate.py --run runs/cartpole-swingup/cody_sac-20260101-120000-s1
python evaluate.py --run ... --step 10000 --num_eval_episodes 50 --video episode.mp4
"""

import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import shutil
import sys
from typing import Literal

import numpy as np
import torch

import dmc2gym
from agent import make_agent
from checkpoint import load_model
from config import ConfigError, exit_with, parse_flags
from env_worker import open_eval_envs
from run_folder import load_config
from utils import limit_threads
from video import save_video

VIDEO_SIZE = 256  # pixels, a multiple of 16 as H.264 wants


def eval_seed(config):
    """Seed of the evaluation environment, drawn from the run's: runs of two seeds meet different initial states."""
    return int(np.random.SeedSequence([config.seed, 1]).generate_state(1)[0])


def evaluate(envs, agent, num_episodes, seed, film, message, check=lambda: None):
    """Returns of `num_episodes` episodes with the mean action, a list of floats; pictures of the first if `film`.

    Episode i starts from `seed` + i, so that every evaluation of a run meets the same initial states, a saved model
    gives its logged returns again, and neither depends on the number of `envs`, which step beside each other.
    The pictures are a list of (VIDEO_SIZE, VIDEO_SIZE, 3) uint8, empty without `film`. `message`: takes a line for the
    user. `check`: called at each decision, may raise.
    """
    returns = [0.0] * num_episodes
    frames = []
    waiting = iter(range(num_episodes))

    def begin(env):
        """Start the next episode in `env`; [(env, episode)], or nothing if there is none left."""
        for episode in waiting:
            env.start(agent.act(env.reset(seed=(seed + episode) % 2**32), sample=False))
            return [(env, episode)]
        return []

    playing = [pair for env in envs for pair in begin(env)]
    while playing:
        check()
        still = []
        for env, episode in playing:
            obs, reward, terminated, truncated = env.finish()
            returns[episode] += reward
            if obs is None:
                message(f"warning: the physics diverged in evaluation episode {episode}, which ends there")
            elif film and episode == 0:
                frames.append(env.draw(VIDEO_SIZE, VIDEO_SIZE))
            if terminated or truncated:
                still += begin(env)
            else:
                env.start(agent.act(obs, sample=False))
                still.append((env, episode))
        playing = still
    return returns, frames


def choose_device(name):
    """The torch device that `--device` names."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: this torch finds no CUDA device; use auto or cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def check_machine(config, device):
    """Raise `ConfigError` if this machine lacks what a flag needs."""
    if config.replay_device == "cuda" and device.type != "cuda":
        raise ConfigError(f"--replay_device cuda: the networks run on {device}; use auto or cpu")
    variable, compiler = ("CC", "gcc") if device.type == "cuda" else ("CXX", "g++")
    if config.compile and not shutil.which(os.environ.get(variable, compiler)):
        raise ConfigError(f"--compile: needs a compiler and finds none; install {compiler}")
    # a folder of that name, as the package leaves behind, has no origin
    if config.wandb and not getattr(importlib.util.find_spec("wandb"), "origin", None):
        raise ConfigError(f"--wandb {config.wandb}: the package is not installed; pip install wandb")


@dataclasses.dataclass(frozen=True)
class Args:
    """Evaluate a run that is finished or was trained with --save_model."""

    run: str
    """Folder of the run."""
    step: int | None = None
    """Step of the saved model. None: the last."""
    num_eval_episodes: int = 10
    """Episodes."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the networks run; auto is cuda when there is one."""
    video: str | None = None
    """Write an mp4 of the first episode to this path, which must not exist."""


def run():
    """One JSON line with the mean, the standard deviation and all returns."""
    try:
        limit_threads()
        args = parse_flags(Args)
        if args.num_eval_episodes < 1:
            raise ConfigError(f"--num_eval_episodes {args.num_eval_episodes}: must be at least 1")
        if args.video:
            check_video_path(args.video)
            dmc2gym.select_gl_backend()
        config = dataclasses.replace(load_config(args.run), compile=False)  # takes longer than the episodes
        device = choose_device(args.device)
        envs = open_eval_envs(config, args.num_eval_episodes)
        agent = make_agent(config, envs[0].observation_space.shape, envs[0].action_space.shape[0], device)
        step = load_model(agent, pathlib.Path(args.run) / "model", args.step)
    except (ConfigError, dmc2gym.EnvError) as error:
        exit_with(error)
    try:
        message = functools.partial(print, file=sys.stderr)
        film = args.video is not None
        returns, frames = evaluate(envs, agent, args.num_eval_episodes, eval_seed(config), film, message)
    except (FloatingPointError, dmc2gym.EnvError) as error:
        sys.exit(f"{args.run}: stopped: {error}")
    row = {"step": step, "env_step": step * config.action_repeat, **summary(returns), "returns": returns}
    print(json.dumps(row), flush=True)  # before a video that a full disk may not take
    try:
        if frames:
            save_video(args.video, frames, envs[0].metadata["render_fps"])
    except OSError as error:
        exit_with(error)


def main():
    """The command: `run`; Ctrl-C ends it with exit code 130."""
    try:
        run()
    except KeyboardInterrupt:
        sys.exit(130)


def check_video_path(video):
    """Raise `ConfigError` unless `video` is a new .mp4 in an existing, writable folder."""
    path = pathlib.Path(video)
    if path.suffix != ".mp4":
        raise ConfigError(f"--video {video}: must end in .mp4")
    if path.exists():
        raise ConfigError(f"--video {video}: exists and is not written over")
    if not os.access(path.absolute().parent, os.W_OK | os.X_OK):
        raise ConfigError(f"--video {video}: {path.absolute().parent} is not a folder that can be written to")


def summary(returns):
    """Mean and (population) standard deviation of episode returns."""
    return {"episode_reward": float(np.mean(returns)), "episode_reward_std": float(np.std(returns))}


if __name__ == "__main__":
    main()
