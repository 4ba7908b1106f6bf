"""The cost of checkpoints: time to save and load one, share of a run's time, bytes on disk.

    python -m benchmarks.checkpoint_cost                            # the default networks on cartpole swingup
    python -m benchmarks.checkpoint_cost --transitions 100000 --flags="--domain_name walker --task_name walk"

Fills a replay with `--transitions` from a few random-policy episodes, repeated, then saves after each further episode.
The share assumes one checkpoint every `--checkpoint_minutes`, 10 by default. The journal's cost between checkpoints,
to pack and write each frame, has its own line.
"""

import dataclasses
import pathlib
import statistics
import tempfile
import time

import psutil
import torch

import train
from config import parse, parse_flags
from endings import EXPECTED, end
from machine import choose_device, keep_freed_memory, limit_threads
from storage.checkpoint import Checkpoints
from storage.run_folder import git_commit
from utils import GlobalRandomness


@dataclasses.dataclass(frozen=True)
class Args:
    """The cost of checkpoints."""

    transitions: int = 10_000
    """Transitions in the replay."""
    episodes: int = 2
    """Number of different episodes."""
    saves: int = 5
    """Number of checkpoints to time."""
    flags: str = ""
    """Flags of train.py."""


def episode(env):
    """[(obs, action, reward, terminated)] of a random policy; the first has no action."""
    rows, over = [(env.reset(), None, 0.0, False)], False
    while not over:
        action = env.action_space.sample()
        env.start(action)
        obs, reward, terminated, truncated = env.finish()
        over = terminated or truncated
        rows.append((obs, action, reward, terminated))
    return rows


def play(replay, rows):
    """Add the rows of `episode` to the replay; returns the seconds this took."""
    start = time.perf_counter()
    for obs, action, reward, terminated in rows:
        if action is None:
            replay.begin_episode(obs)
        else:
            replay.add(action, reward, obs, terminated)
    return time.perf_counter() - start


def make(config, folder, device):
    """(checkpoints, env, replay, agent) of a run in `folder`."""
    env, _, replay, agent = train.build(config, device)
    replay.open_journal(folder / "checkpoint")
    parts = {"agent": agent, **agent.optimizers, "replay": replay, "env": env, "randomness": GlobalRandomness()}
    return Checkpoints(folder, parts, config.checkpoint_minutes, {}, print), env, replay, agent


def measure(args, config, folder):
    """Measure and print all numbers."""
    device = choose_device(config.device)
    checkpoints, env, replay, agent = make(config, folder, device)
    episodes = [episode(env) for _ in range(args.episodes)]
    seconds, transitions = 0.0, 0
    while transitions < args.transitions:
        rows = episodes[transitions % len(episodes)]
        seconds += play(replay, rows)
        transitions += len(rows) - 1
    agent.update(agent.augment(replay.sample(config.batch_size)), 0)  # creates the optimizers' state
    env.reset()
    saves = []
    for _ in range(args.saves):
        start = time.perf_counter()
        checkpoints.save()
        saves.append(time.perf_counter() - start)
        play(replay, episodes[0])
    start = time.perf_counter()
    again, *_ = make(config, folder, device)
    built = time.perf_counter() - start
    start = time.perf_counter()
    again.load()
    loaded = time.perf_counter() - start
    sizes = {suffix: sum(p.stat().st_size for p in folder.rglob(f"*{suffix}")) for suffix in (".pt", ".replay")}
    save, minutes = statistics.median(saves), config.checkpoint_minutes
    print(f"save {save:.2f} s (the first {saves[0]:.2f} s), {save / (60 * minutes):.2%} of {minutes:g} minutes")
    print(f"load {loaded:.2f} s, beside {built:.1f} s to build the run")
    print(f"journal: {seconds / transitions * 1e6:.0f} us a transition, stored and written")
    print(f"networks and optimizers {sizes['.pt'] / 2e6:.0f} MB, twice")
    per_transition = sizes[".replay"] / (transitions + args.saves * (len(episodes[0]) - 1))
    print(f"replay on disk {per_transition / 1e3:.2f} KB a transition, {per_transition / 10:.0f} MB per 100,000")
    print(f"process {psutil.Process().memory_info().rss / 1e9:.2f} GB")
    print(f"replay in memory {replay.nbytes / replay.slots / 1e3:.2f} KB a transition ({replay.description})")


def main():
    keep_freed_memory()
    limit_threads()
    try:
        args = parse_flags(Args)
        capacity = f"--replay_buffer_capacity {args.transitions}"
        config = parse(f"{capacity} --num_train_steps {args.transitions + 10_000} --no_env_worker {args.flags}".split())
        print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, commit {git_commit()}", flush=True)
        with tempfile.TemporaryDirectory(dir=".") as folder:
            (pathlib.Path(folder) / "checkpoint").mkdir()
            measure(args, config, pathlib.Path(folder))
    except EXPECTED as error:
        end(error)


if __name__ == "__main__":
    main()
