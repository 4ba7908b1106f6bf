"""Measurements of speed, memory and baselines; run them from the repository root as python -m benchmarks.NAME."""

import itertools

import torch

from machine import limit_threads
from storage.run_folder import git_commit


def describe_machine(device):
    """Print the device, the number of threads, torch's version and our commit."""
    limit_threads()
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, commit {git_commit()}", flush=True)


def random_episode(env):
    """[(obs, action, reward, terminated)] of one episode of the random policy; the first has only an observation."""
    steps, over = [(env.reset(), None, 0.0, False)], False
    while not over:
        action = env.action_space.sample()
        env.start(action)
        obs, reward, terminated, truncated = env.finish()
        over = terminated or truncated
        steps.append((obs, action, reward, terminated))
    return steps


def fill(replay, episodes, transitions):
    """Add the episodes in turn, again and again, until at least `transitions` are stored; returns their number."""
    turns, stored = itertools.cycle(episodes), 0
    while stored < transitions:
        (first_obs, *_), *steps = next(turns)
        replay.begin_episode(first_obs)
        for obs, action, reward, terminated in steps:
            replay.add(action, reward, obs, terminated)
        stored += len(steps)
    return stored
