"""Run episodes with the deterministic policy: in training, and as a command on a run saved with --save_model.

python evaluate.py --run runs/cartpole-swingup/cody_sac-20260101-120000-s1
python evaluate.py --run ... --step 10000 --num_eval_episodes 50 --video episode.mp4
"""

import dataclasses
import json
import os
import pathlib
from typing import Literal

import gymnasium
import numpy as np
import torch
from gymnasium.wrappers import FrameStackObservation, TransformObservation

import dmc2gym
from agent import make_agent
from checkpoint import load_config, load_model
from config import ConfigError, exit_with, parse_flags
from video import save_video

VIDEO_SIZE = 256  # pixels, a multiple of 16 as H.264 wants


def make_env(config, seed):
    """The config's task; observations (3 * frame_stack, size, size) uint8, the first frame repeated at reset.

    With the identity encoder: the stacked states, (n,) float32.
    """
    size = config.pre_transform_image_size
    env = dmc2gym.make(
        config.domain_name,
        config.task_name,
        seed=seed,
        from_pixels=config.encoder_type != "identity",
        height=size,
        width=size,
        frame_skip=config.action_repeat,
    )
    env = FrameStackObservation(env, config.frame_stack, padding_type="reset")
    stack = env.observation_space  # (frame_stack, *frame)
    shape = (stack.shape[0] * stack.shape[1], *stack.shape[2:])
    dtype = np.uint8 if stack.dtype == np.uint8 else np.float32
    space = gymnasium.spaces.Box(stack.low.min(), stack.high.max(), shape, dtype)
    return TransformObservation(env, lambda obs: obs.reshape(shape).astype(dtype, copy=False), space)


def eval_seed(config):
    """Seed of the evaluation environment: the run's own, far from the seeds that people train with."""
    return (config.seed + 2**31) % 2**32


def evaluate(env, agent, num_episodes, seed, video=None):
    """Returns of `num_episodes` episodes with the mean action, a list of floats.

    The environment restarts from `seed`, so that every evaluation of a run meets the same initial states and a
    saved model gives its logged returns again. `video`: path of an mp4 of the first episode.
    """
    returns = []
    for episode in range(num_episodes):
        obs, _ = env.reset(seed=seed if episode == 0 else None)
        frames = []
        episode_reward, done = 0.0, False
        while not done:
            obs, reward, terminated, truncated, _ = env.step(agent.act(obs, sample=False))
            episode_reward += reward
            done = terminated or truncated
            if video and episode == 0:
                frames.append(env.unwrapped.render(VIDEO_SIZE, VIDEO_SIZE))
        returns.append(episode_reward)
        if frames:
            save_video(video, frames, env.metadata["render_fps"])
    return returns


def choose_device(name):
    """The torch device that `--device` names."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: this torch finds no CUDA device; use auto or cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


@dataclasses.dataclass(frozen=True)
class Args:
    """Evaluate a run that was trained with --save_model."""

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


def main():
    """The command: one JSON line with the mean, the standard deviation and all returns."""
    try:
        args = parse_flags(Args)
        if args.num_eval_episodes < 1:
            raise ConfigError(f"--num_eval_episodes {args.num_eval_episodes}: must be at least 1")
        if args.video:
            check_video_path(args.video)
            dmc2gym.select_gl_backend()
        config = load_config(args.run)
        device = choose_device(args.device)
        env = make_env(config, eval_seed(config))
        agent = make_agent(config, env.observation_space.shape, env.action_space.shape[0], device)
        step = load_model(agent, pathlib.Path(args.run) / "model", args.step)
    except (ConfigError, dmc2gym.EnvError) as error:
        exit_with(error)
    returns = evaluate(env, agent, args.num_eval_episodes, eval_seed(config), args.video)
    row = {"step": step, "env_step": step * config.action_repeat, **summary(returns), "returns": returns}
    print(json.dumps(row))


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
