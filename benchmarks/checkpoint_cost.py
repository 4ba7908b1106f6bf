"""The cost of checkpoints: time to save and load one, share of a run's time, bytes on disk.

    python -m benchmarks.checkpoint_cost                            # the default networks on cartpole swingup
    python -m benchmarks.checkpoint_cost --transitions 100000 --flags="--domain_name walker --task_name walk"

Fills a replay with `--transitions` from a few random-policy episodes, repeated, then saves `--saves` times, an episode
apart.
The share assumes one checkpoint every `--checkpoint_minutes`; the journal's cost between them has its own line.
"""

import dataclasses
import pathlib
import statistics
import tempfile
import time

import psutil

import train
from benchmarks import describe_machine, fill, random_episode
from command_line import parse_flags
from config import parse
from endings import command
from machine import choose_device, keep_freed_memory
from storage.checkpoint import Checkpoints
from storage.run_folder import CHECKPOINT
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


def make(config, folder):
    """(checkpoints, env, replay, agent) of a run in `folder`."""
    env, _, replay, agent = train.build(config, choose_device(config.device))
    parts = {"agent": agent, **agent.optimizers, "replay": replay, "env": env, "randomness": GlobalRandomness()}
    checkpoints = Checkpoints(folder, parts, config.checkpoint_minutes, {}, print)
    replay.open_journal(folder / CHECKPOINT)
    return checkpoints, env, replay, agent


def measure(args, config, folder):
    """Measure and print all numbers."""
    checkpoints, env, replay, agent = make(config, folder)
    episodes = [random_episode(env) for _ in range(args.episodes)]
    start = time.perf_counter()
    transitions = fill(replay, episodes, args.transitions)
    journal = (time.perf_counter() - start) / transitions
    agent.update(agent.augment(replay.sample(config.batch_size)), 0)  # creates the optimizers' state
    env.reset()
    saves = []
    for number in range(args.saves):
        if number:
            transitions += fill(replay, episodes, 1)
        start = time.perf_counter()
        checkpoints.save()
        saves.append(time.perf_counter() - start)
    start = time.perf_counter()
    again, *_ = make(config, folder)
    built = time.perf_counter()
    again.load()
    loaded = time.perf_counter()
    networks, frames = (sum(path.stat().st_size for path in folder.rglob(f"*.{kind}")) for kind in ("pt", "replay"))
    save, minutes = statistics.median(saves), config.checkpoint_minutes
    print(f"save {save:.2f} s (the first {saves[0]:.2f} s), {save / (60 * minutes):.2%} of {minutes:g} minutes")
    print(f"load {loaded - built:.2f} s, beside {built - start:.1f} s to build the run")
    print(f"journal: {journal * 1e6:.0f} us a transition, stored and written")
    print(f"networks and optimizers {networks / 2e6:.0f} MB, twice")
    on_disk = frames / transitions
    print(f"replay on disk {on_disk / 1e3:.2f} KB a transition, {on_disk / 10:.0f} MB per 100,000")
    print(f"process {psutil.Process().memory_info().rss / 1e9:.2f} GB")
    print(f"replay in memory {replay.nbytes / replay.slots / 1e3:.2f} KB a transition ({replay.description})")


@command()
def main():
    keep_freed_memory()
    args = parse_flags(Args)
    sizes = f"--replay_buffer_capacity {args.transitions} --num_train_steps {args.transitions + 10_000}"
    config = parse(f"{sizes} --no_env_worker {args.flags}".split())
    describe_machine(choose_device(config.device))
    with tempfile.TemporaryDirectory(dir=".") as folder:
        measure(args, config, pathlib.Path(folder))


if __name__ == "__main__":
    main()
