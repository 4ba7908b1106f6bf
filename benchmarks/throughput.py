"""Speed and memory of updates and of whole decisions, each mode compared with the faithful one.

    python -m benchmarks.throughput                                           # CoDy at batch 128 and 256, all modes
    python -m benchmarks.throughput --rows="--agent cody_sac, --agent sac" --batch_sizes 512 --flags="--frame_stack 4"

Each row runs in its own process. `ms` is the median over pairs of updates (every second one steps actor and targets),
with sampling and augmentation, on frames of one random episode; `sample %` and `augment %` are their shares. `ratio` is
relative to the first row with the same batch size. On a noisy machine, `--rounds 5` measures all rows five times and
prints medians, with the lowest and highest ratio. `decisions/s` counts whole decisions on real pixels, with the
environment in its worker. `GFLOP` is counted by torch; `GB` is the peak memory of the process, on CUDA of the GPU.
"""

import concurrent.futures
import dataclasses
import itertools
import multiprocessing
import resource
import statistics
import time

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from agent import make_agent
from benchmarks import describe_machine, fill, random_episode
from command_line import parse_flags
from config import parse
from endings import Refused, command
from env_worker import open_env
from machine import bf16_time_ratio, choose_device, keep_freed_memory, limit_threads
from replay_buffer import ReplayBuffer
from utils import seed_everything

REPLAY = 2000  # transitions to sample from


@dataclasses.dataclass(frozen=True)
class Args:
    """A table of speed and memory."""

    rows: str = "--update_mode sequential, --update_mode joint, --precision bf16, --update_mode joint --precision bf16"
    """Comma-separated rows of train.py flags; the first is the baseline of the others."""
    batch_sizes: str = "128 256"
    """Space-separated values of --batch_size."""
    flags: str = ""
    """Flags of train.py for every row."""
    updates: int = 10
    """Updates timed per row."""
    decisions: int = 10
    """Whole decisions timed per row."""
    rounds: int = 1
    """Number of rounds; each measures every row once."""


def now():
    """The time in seconds, after the GPU, if in use, has finished its queue."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def median_seconds(update, updates):
    """Seconds per call of `update`: the median over pairs, after four warm-up calls."""
    times = []
    for _ in range(2 + updates // 2):
        start = now()
        update()
        update()
        times.append((now() - start) / 2)
    return statistics.median(times[2:])


def measure(config, updates, decisions):
    """The numbers of one row, {column: value}."""
    keep_freed_memory()
    limit_threads()
    seed_everything(0)
    device = choose_device(config.device)
    env = open_env(config, 0)
    action_dim = env.action_space.shape[0]
    agent = make_agent(config, env.observation_space.shape, action_dim, device)
    replay = ReplayBuffer(config, env.observation_space, action_dim, device)
    fill(replay, [random_episode(env)], REPLAY)
    parts = []  # seconds to sample and to augment, per update

    def update():
        start = now()
        batch = replay.sample(config.batch_size)
        sampled = now()
        batch = agent.augment(batch)
        parts.append((sampled - start, now() - sampled))
        agent.update(batch, index=len(parts))

    seconds = median_seconds(update, updates)
    with FlopCounterMode(display=False) as flops:
        update()
        update()
    obs = env.reset()
    agent.act(obs, sample=True)  # triggers compilation, if enabled
    start = now()
    for _ in range(decisions):
        action = agent.act(obs, sample=True)
        env.start(action)
        update()
        obs, reward, terminated, truncated = env.finish()
        replay.add(action, reward, obs, False)
        if terminated or truncated:
            obs = env.reset()
    decision = (now() - start) / decisions
    env.close()
    sample, augment = np.median(parts, axis=0) / seconds
    cuda = device.type == "cuda"
    memory = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "batch": config.batch_size, "ms": 1e3 * seconds, "sample %": 100 * sample, "augment %": 100 * augment,
        "decisions/s": 1 / decision, "GFLOP": flops.get_total_flops() / 2e9, "GB": memory / 1e9,
        "KB/transition": replay.nbytes / REPLAY / 1e3,
    }  # fmt: skip


def in_own_process(function, *args):
    """The result of function(*args) in a new process."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def rows_of(args):
    """[(the row's flags, its config)], ordered by batch size; `Refused` if a flag is invalid."""
    for flag, least in {"updates": 2, "decisions": 2, "rounds": 1}.items():
        if getattr(args, flag) < least:
            raise Refused(f"--{flag} {getattr(args, flag)}: must be at least {least}")
    rows = []
    for batch_size, row in itertools.product(args.batch_sizes.split(), args.rows.split(",")):
        flags = f"--replay_buffer_capacity {REPLAY} --batch_size {batch_size} {args.flags} {row}"
        rows.append((row.strip(), parse(flags.split())))
    if not rows:
        raise Refused("--batch_sizes: names none")
    return rows


def table(names, rounds):
    """Medians over `rounds`, each a list of its rows' numbers, with ratios to the first row of the same batch size."""
    import pandas  # not above, where its memory would count as every row's

    frame = pandas.concat(map(pandas.DataFrame, rounds), keys=range(len(rounds)), names=["round", "row"])
    frame.insert(2, "ratio", frame["ms"] / frame.groupby(["round", "batch"])["ms"].transform("first"))
    by_row = frame.groupby("row")
    medians = by_row.median().astype({"batch": int})
    if len(rounds) > 1:
        medians["lowest ratio"] = by_row["ratio"].min()
        medians["highest ratio"] = by_row["ratio"].max()
    return medians.set_index(pandas.Index(names))


@command()
def main():
    args = parse_flags(Args)
    rows = rows_of(args)
    device = choose_device(rows[0][1].device)
    describe_machine(device)
    if device.type == "cpu":
        print(f"a convolution takes {bf16_time_ratio():.2f} times as long in bf16 as in fp32", flush=True)
    rounds = []
    for _ in range(args.rounds):
        rounds.append([in_own_process(measure, config, args.updates, args.decisions) for _, config in rows])
    print("\n" + table([name for name, _ in rows], rounds).to_string(float_format="%.2f"))


if __name__ == "__main__":
    main()
