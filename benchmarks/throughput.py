"""Speed and memory of updates and of whole decisions, each mode compared with the faithful one.

    python -m benchmarks.throughput                                           # CoDy at batch 128 and 256, all modes
    python -m benchmarks.throughput --rows="--agent cody_sac, --agent sac" --batch_sizes 512 --flags="--frame_stack 4"

Each row runs in its own process, so no row inherits another's memory. Times are medians over pairs of updates (every
second update steps actor and targets), including sampling and augmentation, on frames of one random episode. `ratio`
is relative to the first row with the same batch size. On a noisy machine, `--rounds 5` measures all rows five times
and prints medians, with the lowest and highest ratio. `sample` and `augment` are the shares of `ReplayBuffer.sample`
and `SAC.augment` in the row's time. torch's FlopCounterMode counts FLOPs; `of peak` is the time they would take at
their dtype's highest rate in any matrix product, convolution or update of this command, over the measured time.
`decisions/s` counts whole decisions on real pixels, with the environment in its worker: act, environment step, store,
sample, augment, update. `GB` is the peak memory of the process, or of the GPU on CUDA.
"""

import collections
import concurrent.futures
import dataclasses
import itertools
import multiprocessing
import resource
import statistics
import time

import gymnasium
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from agent import make_agent
from config import parse, parse_flags
from endings import EXPECTED, Refused, end
from env_worker import open_env
from machine import bf16_time_ratio, choose_device, keep_freed_memory, limit_threads
from replay_buffer import ReplayBuffer
from storage.run_folder import git_commit
from utils import seed_everything

REPLAY = 2000  # transitions to sample from
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


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


def now(device):
    """The time in seconds, after the device has finished its queue."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def median_seconds(update, updates, device):
    """Seconds per call of `update`: the median over pairs, after four warm-up calls."""
    times = []
    for _ in range(2 + updates // 2):
        start = now(device)
        update(), update()
        times.append((now(device) - start) / 2)
    return statistics.median(times[2:])


def random_frames(shape):
    """64 observations of noise, the same in every row."""
    return np.random.default_rng(0).integers(0, 256, (64, *shape), np.uint8)


def frames_of_an_episode(env):
    """The first 64 observations of a random episode, or fewer if it is shorter."""
    frames, over = [env.reset()], False
    while not over and len(frames) < 64:
        env.start(env.action_space.sample())
        obs, _, terminated, truncated = env.finish()
        over = terminated or truncated
        frames.append(obs)
    return np.stack(frames)


def full_replay(config, frames, actions, device):
    """A full replay that repeats these observations, (64 or fewer, C, H, W)."""
    space = gymnasium.spaces.Box(0, 255, frames.shape[1:], np.uint8)
    replay = ReplayBuffer(config, space, actions, device)
    n = len(frames)
    for i in range(REPLAY):
        if i % config.max_episode_steps == 0:
            replay.begin_episode(frames[i % n])
        replay.add(np.random.rand(actions) * 2 - 1, np.random.rand(), frames[(i + 1) % n], False)
    return replay


def rates(device, names):
    """{dtype: the highest FLOP/s of a matrix product and of the default encoder's second convolution}."""
    best = {}
    for name in names:
        dtype = DTYPES[name]
        a = torch.randn(2048, 2048, device=device).to(dtype)
        h = torch.randn(128, 32, 41, 41, device=device).to(dtype, memory_format=torch.channels_last)
        w = torch.randn(32, 32, 3, 3, device=device).to(dtype, memory_format=torch.channels_last)
        times = {2 * 2048**3: lambda a=a: a @ a, 2 * 128 * 39**2 * 9 * 32**2: lambda h=h, w=w: torch.conv2d(h, w)}
        best[name] = max(flops / median_seconds(call, 6, device) for flops, call in times.items())
    return best


def flops_of(function):
    """FLOPs of a call per dtype, by torch's FlopCounterMode."""
    by_dtype = collections.Counter()

    def tallied(formula):
        def count(*args, **kwargs):
            by_dtype[next(arg.dtype for arg in args if isinstance(arg, torch.Tensor))] += formula(*args, **kwargs)
            return 0

        count._get_raw = True  # tells FlopCounterMode that the formula takes tensors, not shapes
        return count

    with FlopCounterMode(display=False, custom_mapping={op: tallied(f) for op, f in flop_registry.items()}):
        function()
    return {name: by_dtype[dtype] for name, dtype in DTYPES.items()}


def measure(config, updates, decisions):
    """The measurements of one row, a dict."""
    keep_freed_memory()
    limit_threads()
    device = choose_device(config.device)
    seed_everything(0)
    env = open_env(config, 0)
    actions = env.action_space.shape[0]
    peaks = rates(device, {"fp32", config.precision})  # bf16 takes minutes where a CPU lacks it
    agent = make_agent(config, (3 * config.frame_stack, config.image_size, config.image_size), actions, device)
    replay = full_replay(config, frames_of_an_episode(env), actions, device)
    index, sampling, augmenting = 0, [], []

    def update():
        nonlocal index
        start = now(device)
        batch = replay.sample(config.batch_size)
        sampled = now(device)
        batch = agent.augment(batch)
        sampling.append(sampled - start)
        augmenting.append(now(device) - sampled)
        agent.update(batch, index)
        index += 1

    seconds = median_seconds(update, updates, device)
    flops = {name: value / 2 for name, value in flops_of(lambda: (update(), update())).items()}
    obs = env.reset()
    agent.act(obs, sample=True)  # triggers compilation, if enabled
    start = now(device)
    for _ in range(decisions):
        action = agent.act(obs, sample=True)
        env.start(action)
        update()
        obs, reward, _, _ = env.finish()
        replay.add(action, reward, obs, False)
    per_s = decisions / (now(device) - start)
    env.close()
    cuda = device.type == "cuda"
    memory = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "seconds": seconds, "flops": flops, "peaks": peaks,
        "sample": statistics.median(sampling) / seconds, "augment": statistics.median(augmenting) / seconds,
        "decisions_per_s": per_s, "memory": memory, "bytes_per_transition": replay.nbytes / REPLAY,
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
        rows.append((" ".join(row.split()), parse(flags.split())))
    if not rows:
        raise Refused("--batch_sizes: names none")
    return rows


def measure_rows(rows, args):
    """One round: the measurements of each row, including `ratio`."""
    results, baselines = [], {}
    for _, config in rows:
        row = in_own_process(measure, config, args.updates, args.decisions)
        row["ratio"] = row["seconds"] / baselines.setdefault(config.batch_size, row["seconds"])
        results.append(row)
    return results


def over_rounds(rows):
    """Combine one row's rounds: medians, the highest peak rates, and the list of all ratios."""
    figures = {name: statistics.median(row[name] for row in rows) for name in rows[0].keys() - {"flops", "peaks"}}
    figures["flops"] = rows[0]["flops"]
    figures["peaks"] = {name: max(row["peaks"][name] for row in rows) for name in rows[0]["peaks"]}
    figures["ratios"] = [row["ratio"] for row in rows]
    return figures


def highest_rates(rows):
    """{dtype: FLOP/s} of the probes, or of an update that beats them, so no row exceeds 100 %."""
    best = {name: max(row["peaks"].get(name, 1.0) for row in rows) for name in DTYPES}
    for row in sorted(rows, key=lambda row: row["flops"]["bf16"]):  # pure float32 rows first
        name = "bf16" if row["flops"]["bf16"] else "fp32"
        others = sum(row["flops"][other] / best[other] for other in DTYPES if other != name)
        best[name] = max(best[name], row["flops"][name] / (row["seconds"] - others))
    return best


def print_table(rows, results):
    """Print one line per row."""
    best = highest_rates(results)
    width = max(len(name) for name, _ in rows) + 2
    titles = ("batch", "ms", "ratio", "sample", "augment", "decisions/s", "GFLOP", "of peak", "GB", "KB/transition")
    print("\n" + " " * width + "".join(f"{title:>15}" for title in titles))
    for (name, config), row in zip(rows, results, strict=True):
        spread = f" {min(row['ratios']):.2f}-{max(row['ratios']):.2f}" if len(row["ratios"]) > 1 else ""
        ideal = sum(row["flops"][dtype] / best[dtype] for dtype in DTYPES)
        cells = (
            f"{config.batch_size}", f"{1e3 * row['seconds']:.1f}", f"{row['ratio']:.2f}{spread}",
            f"{row['sample']:.1%}", f"{row['augment']:.1%}",
            f"{row['decisions_per_s']:.2f}", f"{sum(row['flops'].values()) / 1e9:.1f}",
            f"{ideal / row['seconds']:.0%}", f"{row['memory'] / 1e9:.2f}", f"{row['bytes_per_transition'] / 1e3:.1f}",
        )  # fmt: skip
        print(f"{name:{width}}" + "".join(f"{cell:>15}" for cell in cells))
    seen = (f"{name} {rate / 1e9:.0f}" for name, rate in best.items() if rate > 1)
    print("\nhighest rates, GFLOP/s: " + ", ".join(seen))


def main():
    try:
        args = parse_flags(Args)
        rows = rows_of(args)
        device = choose_device(rows[0][1].device)
        limit_threads()
        print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, commit {git_commit()}")
        if device.type == "cpu":
            print(f"a convolution takes {bf16_time_ratio():.2f} times as long in bf16 as in fp32", flush=True)
        rounds = [measure_rows(rows, args) for _ in range(args.rounds)]
        print_table(rows, [over_rounds(of_row) for of_row in zip(*rounds, strict=True)])
    except EXPECTED as error:
        end(error)


if __name__ == "__main__":
    main()
