"""Speed and memory of the update and of whole decisions, each mode beside the faithful one.

    python benchmarks/throughput.py                                     CoDy at batch 128 and 256, all modes
    python benchmarks/throughput.py --agents "cody_sac sac sac_ae" --batch_sizes "64 512" --json throughput.json
    python benchmarks/throughput.py --replay_sizes "1000 10000 100000"  also: sampling from replays of these sizes

Every row is measured in a process of its own, so that no row inherits another's memory. Times are medians over pairs
of updates (every second one steps actor and targets), sampling and augmentation included, on random frames. `ratio` is
the time of the first row with this batch size over the row's. FLOPs are counted by torch's FlopCounterMode; `of peak`
is the time that they would take at the highest rate of their dtype that this run has seen, in products, convolutions
or updates, over the time that they took. `decisions/s` are whole decisions on real pixels: act, environment step,
store, sample, augment, update; in brackets with the environment in a worker. `GB` is the process's own peak.
"""

import collections
import dataclasses
import json
import pathlib
import resource
import statistics
import subprocess
import sys
import time
from typing import Literal

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import gymnasium  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode, flop_registry  # noqa: E402

from agent import make_agent  # noqa: E402
from config import ConfigError, exit_with, parse, parse_flags  # noqa: E402
from dmc2gym import EnvError  # noqa: E402
from env_worker import open_env  # noqa: E402
from evaluate import choose_device  # noqa: E402
from machine import bf16_time_ratio, keep_freed_memory, limit_threads  # noqa: E402
from replay_buffer import ReplayBuffer  # noqa: E402
from utils import git_commit, seed_everything  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class Args:
    """Table of speed and memory."""

    agents: str = "cody_sac"
    """Values of --agent, space between."""
    batch_sizes: str = "128 256"
    """Values of --batch_size."""
    precisions: str = "fp32 bf16"
    """Values of --precision."""
    modes: str = "sequential joint"
    """Values of --update_mode."""
    compile: bool = False
    """Also each row with --compile."""
    updates: int = 10
    """Updates timed in each row."""
    decisions: int = 10
    """Whole decisions timed in each row; 0: none."""
    task: str = "cartpole-swingup"
    """<domain>-<task> of the whole decisions."""
    replay_sizes: str = ""
    """Transitions in replays to sample from, for the table of sampling times."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where."""
    json: str = ""
    """Also write everything to this file."""
    row: str = ""
    """Measure this one row, a JSON object, and print it as JSON (what the command runs for each row)."""


def now(device):
    """Seconds, when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def median_seconds(update, updates, device):
    """Seconds per call of `update`, the median over pairs, after four that warm up."""
    times = []
    for i in range(2 + updates // 2):
        start = now(device)
        update(), update()
        if i >= 2:
            times.append((now(device) - start) / 2)
    return statistics.median(times)


def random_replay(config, capacity, actions, device):
    """A full replay of noise, as many transitions as `capacity`."""
    config = dataclasses.replace(config, replay_buffer_capacity=capacity, num_train_steps=capacity)
    size = config.image_size
    space = gymnasium.spaces.Box(0, 255, (3 * config.frame_stack, size, size), np.uint8)
    replay = ReplayBuffer(config, space, actions, device)
    noise = np.random.randint(0, 256, (64, *space.shape), np.uint8)
    for i in range(capacity):
        if i % config.max_episode_steps == 0:
            replay.begin_episode(noise[i % 64])
        replay.add(np.random.rand(actions) * 2 - 1, np.random.rand(), noise[(i + 1) % 64], False)
    return replay


def rates(device):
    """{dtype: the highest FLOP/s of some matrix products and of the default encoder's convolution}."""
    best = {}
    for name, dtype in DTYPES.items():
        calls = []
        for n in (512, 1024, 2048):
            a = torch.randn(n, n, device=device).to(dtype)
            calls.append((2 * n**3, lambda a=a: a @ a))
        for n in (32, 128):
            h = torch.randn(n, 32, 39, 39, device=device).to(dtype, memory_format=torch.channels_last)
            w = torch.randn(32, 32, 3, 3, device=device).to(dtype, memory_format=torch.channels_last)
            calls.append((2 * n * 9 * 32 * 32 * 37**2, lambda h=h, w=w: torch.conv2d(h, w)))
        best[name] = 0.0
        for flops, call in calls:
            for _ in range(6):
                start = now(device)
                call()
                best[name] = max(best[name], flops / (now(device) - start))
    return best


def flops_of(function):
    """FLOPs of a call by torch's FlopCounterMode, by dtype."""
    by_dtype = collections.Counter()

    def tallied(formula):
        def count(*args, **kwargs):
            flops = formula(*args, **kwargs)
            by_dtype[next(arg.dtype for arg in args if isinstance(arg, torch.Tensor))] += flops
            return flops

        count._get_raw = True  # FlopCounterMode's mark of a formula that takes tensors, not shapes
        return count

    with FlopCounterMode(display=False, custom_mapping={op: tallied(f) for op, f in flop_registry.items()}):
        function()
    return {name: by_dtype[dtype] for name, dtype in DTYPES.items()}


def config_of(row):
    """The config of a row."""
    domain, _, task = row["task"].partition("-")
    flags = ["--domain_name", domain, "--task_name", task] + (["--compile"] if row["compile"] else [])
    for name in ("agent", "batch_size", "precision", "update_mode", "device"):
        flags += [f"--{name}", str(row[name])]
    return parse(flags)


def measure(row):
    """Everything about one row: {agent, batch_size, precision, update_mode, ...} -> the same with figures."""
    keep_freed_memory()
    limit_threads()
    config = config_of(row)
    device = choose_device(config.device)
    seed_everything(0)
    workers = (False, True) if row["decisions"] else ()
    envs = [open_env(dataclasses.replace(config, env_worker=worker), 0) for worker in workers]
    actions = envs[0].action_space.shape[0] if envs else 1
    peaks = rates(device)
    agent = make_agent(config, (3 * config.frame_stack, config.image_size, config.image_size), actions, device)
    replay = random_replay(config, 2000, actions, device)
    index, sampling = 0, []

    def update():
        nonlocal index
        start = now(device)
        batch = agent.augment(replay.sample(config.batch_size))
        sampling.append(now(device) - start)
        agent.update(batch, index)
        index += 1

    seconds = median_seconds(update, row["updates"], device)
    flops = {name: value / 2 for name, value in flops_of(lambda: (update(), update())).items()}
    result = {"ms": 1e3 * seconds, "sampling_ms": 1e3 * statistics.median(sampling), "flops": flops, "peaks": peaks}
    result["bytes_per_transition"] = replay.nbytes / 2000
    for worker, env in zip(workers, envs, strict=True):
        obs = env.reset()
        agent.act(obs, sample=True)  # compiled by now, if it is to be
        start = now(device)
        for _ in range(row["decisions"]):
            action = agent.act(obs, sample=True)
            env.start(action)
            update()
            obs, reward, _, _ = env.finish()
            replay.add(action, reward, obs, False)
        result["decisions_per_s" + ("_worker" if worker else "")] = row["decisions"] / (now(device) - start)
        env.close()
    cuda = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {**row, "device": str(device), "peak_gb": peak / 1e9, **result}


def in_own_process(script, row):
    """What `<script> --row <row>` prints, a JSON object, from a new process."""
    done = subprocess.run([sys.executable, script, "--row", json.dumps(row)], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)  # it has said why
    return json.loads(done.stdout.splitlines()[-1])


def rows_of(args):
    """The rows, batch size by batch size."""
    common = {"updates": args.updates, "decisions": args.decisions, "task": args.task, "device": args.device}
    for batch_size in map(int, args.batch_sizes.split()):
        for agent in args.agents.split():
            for precision in args.precisions.split():
                for mode in args.modes.split():
                    for compiled in (False, True) if args.compile else (False,):
                        row = {"agent": agent, "batch_size": batch_size, "precision": precision, "update_mode": mode}
                        yield {**row, "compile": compiled, **common}


def print_table(rows):
    """One line a row."""
    best = {name: max(row["peaks"][name] for row in rows) for name in DTYPES}
    for row in rows:  # an update of one dtype that beats the probes is the peak itself
        used = [name for name in DTYPES if row["flops"][name]]
        if len(used) == 1:
            best[used[0]] = max(best[used[0]], 1e3 * row["flops"][used[0]] / row["ms"])
    print(
        f"\n{'':36} {'batch':>5} {'ms':>8} {'ratio':>6} {'sampling':>9} {'decisions/s':>15} {'GFLOP':>7} {'of peak':>8}"
    )
    first = {}
    for row in rows:
        baseline = first.setdefault(row["batch_size"], row)
        name = f"{row['agent']} {row['update_mode']} {row['precision']}" + (" compiled" if row["compile"] else "")
        ideal = sum(row["flops"][dtype] / best[dtype] for dtype in DTYPES)
        decisions = f"{row.get('decisions_per_s', 0):.2f} ({row.get('decisions_per_s_worker', 0):.2f})"
        print(
            f"{name:36} {row['batch_size']:5} {row['ms']:8.1f} {baseline['ms'] / row['ms']:6.2f}"
            f" {100 * row['sampling_ms'] / row['ms']:8.1f}% {decisions:>15} {sum(row['flops'].values()) / 1e9:7.1f}"
            f" {1e5 * ideal / row['ms']:7.0f}%  {row['peak_gb']:.2f} GB,"
            f" {row['bytes_per_transition'] / 1e3:.1f} KB/transition"
        )
    print("\nhighest rates, GFLOP/s: " + ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in best.items()))


def print_sampling(sizes):
    """Milliseconds to sample a batch of 128 from replays of these sizes."""
    keep_freed_memory()
    print(f"\n{'transitions':>12} {'ms/sample':>10} {'GB':>6}   batch 128")
    for size in sizes:
        replay = random_replay(parse([]), size, 1, torch.device("cpu"))
        times = []
        for _ in range(50):
            start = time.perf_counter()
            replay.sample(128)
            times.append(time.perf_counter() - start)
        print(f"{size:12,} {1e3 * statistics.median(times):10.2f} {replay.nbytes / 1e9:6.2f}", flush=True)


def main():
    try:
        args = parse_flags(Args)
        if args.row:
            return print(json.dumps(measure(json.loads(args.row))))
        if args.updates < 2 or args.decisions < 0:
            raise ConfigError(f"--updates {args.updates} --decisions {args.decisions}: at least 2 and 0")
        device = choose_device(args.device)
        for row in rows_of(args):
            config_of(row)
    except (ConfigError, EnvError) as error:
        exit_with(error)
    limit_threads()
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, commit {git_commit()}")
    if device.type == "cpu":
        print(f"a convolution takes {bf16_time_ratio():.2f} times as long in bf16 as in fp32")
    rows = [in_own_process(__file__, row) for row in rows_of(args)]
    print_table(rows)
    if args.replay_sizes:
        print_sampling(map(int, args.replay_sizes.split()))
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
