"""Speed and memory of the update and of whole decisions, beside the plainest way of writing them (plain.py).

    python benchmarks/throughput.py                                     CoDy at batch 128 and 256, all modes
    python benchmarks/throughput.py --agents "cody_sac sac sac_ae" --batch_sizes "64 512" --json throughput.json
    python benchmarks/throughput.py --replay_sizes "1000 10000 100000"  also: sampling from replays of these sizes
    python benchmarks/throughput.py --agents ""                         plain.py alone

Every row is measured in a process of its own, so that no row inherits another's memory. `x plain` compares with
plain.py under the allocator's defaults, which is what a user of the released code has; `x raised` with plain.py under
the allocator settings that the project applies by itself. Times are medians over pairs of updates (every second one
steps actor and targets). FLOPs are counted by torch's FlopCounterMode; `of peak` is the time that they would take at
the matmul rate of their own dtype, measured in the same process, over the time that they took. `decisions/s` are
whole decisions on real pixels: act, environment step, store, sample, augment, update; in brackets with the
environment in a worker. `peak GB` is the process's own memory, without workers.
"""

import collections
import contextlib
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
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import plain  # noqa: E402
import torch  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode, flop_registry  # noqa: E402

from agent import make_agent  # noqa: E402
from config import ConfigError, exit_with, parse, parse_flags  # noqa: E402
from dmc2gym import EnvError  # noqa: E402
from env_worker import open_env  # noqa: E402
from evaluate import choose_device  # noqa: E402
from machine import keep_freed_memory  # noqa: E402
from replay_buffer import ReplayBuffer  # noqa: E402
from utils import seed_everything  # noqa: E402

PHASES = ("sample", "augment", "forward", "backward", "optimizer", "environment")
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


class Phases:
    """Seconds spent in each phase of the update; what is in no other phase is forward."""

    def __init__(self, device):
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._device = device

    def now(self):
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextlib.contextmanager
    def of(self, phase):
        """Time the block; what nested blocks take is theirs alone."""
        start, nested = self.now(), sum(self.seconds.values())
        yield
        self.seconds[phase] += self.now() - start - (sum(self.seconds.values()) - nested)

    @contextlib.contextmanager
    def inside_update(self):
        """Time every backward pass and optimizer step, whoever calls them."""
        backward, step = torch.autograd.backward, torch.optim.Adam.step

        def timed(phase, function):
            def call(*args, **kwargs):
                with self.of(phase):
                    return function(*args, **kwargs)

            return call

        torch.autograd.backward = timed("backward", backward)
        torch.optim.Adam.step = timed("optimizer", step)
        yield
        torch.autograd.backward, torch.optim.Adam.step = backward, step


class Ours:
    """The project's agent and replay."""

    def __init__(self, row, config, shape, actions, device):
        keep_freed_memory()
        self.agent = make_agent(config, shape, actions, device)
        frame = (shape[0] // config.frame_stack, *shape[1:])
        self.replay = random_replay(row["capacity"], frame, actions, config, device)
        self.sample, self.augment, self.update = self.replay.sample, self.agent.augment, self.agent.update

    def act(self, obs):
        return self.agent.act(obs, sample=True)

    def store(self, action, reward, obs):
        self.replay.add(action, reward, obs, False)


class Plain:
    """plain.py, under the allocator's defaults or with its threshold raised."""

    def __init__(self, row, config, shape, actions, device):
        if row["raised"]:
            keep_freed_memory()
        self.agent = plain.PlainAgent(shape[0], shape[1], actions, config.action_repeat, device)
        self.replay = plain.PlainReplay(row["capacity"], shape, actions, device)
        for stack in (self.replay.obs, self.replay.next_obs):
            stack[:] = np.random.randint(0, 256, stack.shape, np.uint8)
        self.sample, self.augment, self.update = self.replay.sample, plain.augment, self.agent.update

    @torch.no_grad()
    def act(self, obs):
        return self.agent.actor(torch.as_tensor(obs[None], device=self.replay.device).float())[0][0].cpu().numpy()

    def store(self, action, reward, obs):
        self.replay.obs[0], self.replay.next_obs[0] = obs, obs
        self.replay.action[0], self.replay.reward[0] = action, reward


def random_replay(capacity, frame, actions, config, device):
    """A full replay of noise."""
    steps = config.max_episode_steps
    replay = ReplayBuffer(capacity, frame, actions, config.frame_stack, steps, device, 0, storage=config.replay_device)
    noise = np.random.randint(0, 256, (64, *frame), np.uint8)
    for i in range(capacity):
        if i % steps == 0:
            replay.begin_episode(noise[i % 64])
        replay.add(np.random.rand(actions) * 2 - 1, np.random.rand(), noise[(i + 1) % 64], False)
    return replay


def matmul_peak(dtype, device, n=2048):
    """FLOP/s of the best of some n x n matrix products."""
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    clock, best = Phases(device), float("inf")
    for _ in range(12):
        start = clock.now()
        a @ b
        best = min(best, clock.now() - start)
    return 2 * n**3 / best


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
    return by_dtype


def config_of(row):
    """The config of a row."""
    domain, _, task = row["task"].partition("-")
    flags = {"domain_name": domain, "task_name": task, "batch_size": row["batch_size"], "device": row["device"]}
    if row["kind"] == "ours":
        flags.update(agent=row["agent"], precision=row["precision"], update_mode=row["update_mode"])
    compiled = ["--compile"] if row["compile"] else []
    return parse([part for name, value in flags.items() for part in (f"--{name}", str(value))] + compiled)


def measure(row):
    """Everything about one row: {kind, agent, batch_size, precision, update_mode, ...} -> the same with figures."""
    config = config_of(row)
    device = choose_device(config.device)
    seed_everything(0)
    size = config.image_size
    shape, actions = (3 * config.frame_stack, size, size), 1
    envs = []
    if row["decisions"]:
        envs = [open_env(dataclasses.replace(config, env_worker=worker), 0) for worker in (False, True)]
        if row["kind"] == "plain":
            envs.pop().close()
        actions = envs[0].action_space.shape[0]
    peaks = {name: matmul_peak(dtype, device) for name, dtype in DTYPES.items()}
    subject = {"ours": Ours, "plain": Plain}[row["kind"]](row, config, shape, actions, device)
    phases, index = Phases(device), 0

    def update(timed=contextlib.nullcontext):
        nonlocal index
        with timed("sample"):
            batch = subject.sample(config.batch_size)
        with timed("augment"):
            batch = subject.augment(batch)
        with timed("forward"):
            subject.update(batch, index)
        index += 1

    for _ in range(4 if not row["compile"] else 8):
        update()
    flops = flops_of(lambda: (update(), update()))
    flops = {name: flops[dtype] / 2 for name, dtype in DTYPES.items()}

    times = []
    for _ in range(row["updates"] // 2):
        start = phases.now()
        update(), update()
        times.append((phases.now() - start) / 2)
    seconds = statistics.median(times)
    ideal = sum(flops[name] / peaks[name] for name in DTYPES)

    phases.seconds = dict.fromkeys(PHASES, 0.0)
    with phases.inside_update():
        for _ in range(row["updates"]):
            update(phases.of)
    result = {
        "ms": 1e3 * seconds,
        "gflop": sum(flops.values()) / 1e9,
        "gflop_per_s": sum(flops.values()) / seconds / 1e9,
        "of_peak": ideal / seconds,
        "peaks_gflop_per_s": {name: peak / 1e9 for name, peak in peaks.items()},
        "phases_ms": {name: 1e3 * value / row["updates"] for name, value in phases.seconds.items()},
        "bytes_per_transition": subject.replay.nbytes / row["capacity"],
    }
    for name, env in zip(("serial", "worker"), envs, strict=False):
        obs = env.reset()
        subject.store(subject.act(obs), 0.0, obs)  # compiled by now, if it is to be
        start = phases.now()
        for _ in range(row["decisions"]):
            action = subject.act(obs)
            env.start(action)
            update() if name == "worker" else None
            with phases.of("environment"):
                obs, reward, _, _ = env.finish()
            update() if name == "serial" else None
            subject.store(action, reward, obs)
        result[f"decisions_per_s_{name}"] = row["decisions"] / (phases.now() - start)
        if name == "serial":
            result["phases_ms"]["environment"] = 1e3 * phases.seconds["environment"] / row["decisions"]
        env.close()
    if device.type == "cuda":
        result["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    else:
        result["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return {**row, "device": str(device), **result}


def in_own_process(row):
    """`measure`, in a new process."""
    command = [sys.executable, __file__, "--row", json.dumps(row)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)  # it has said why
    return json.loads(done.stdout.splitlines()[-1])


def rows_of(args):
    """The rows, plain.py's first for each batch size."""
    common = {"updates": args.updates, "decisions": args.decisions, "task": args.task, "device": args.device}
    common["capacity"] = 2000
    for batch_size in map(int, args.batch_sizes.split()):
        of_plain = {"kind": "plain", "agent": "cody_sac", "precision": "fp32", "update_mode": "plain", "compile": False}
        for raised in (False, True):
            yield {**of_plain, "batch_size": batch_size, "raised": raised, **common}
        for agent in args.agents.split():
            for precision in args.precisions.split():
                for mode in args.modes.split():
                    for compiled in (False, True) if args.compile else (False,):
                        row = {"kind": "ours", "agent": agent, "precision": precision, "update_mode": mode}
                        yield {**row, "compile": compiled, "batch_size": batch_size, **common}


def name_of(row):
    if row["kind"] == "plain":
        return "plain.py, " + ("threshold raised" if row["raised"] else "defaults")
    return f"{row['agent']} {row['update_mode']} {row['precision']}" + (" compiled" if row["compile"] else "")


def print_row(row, baselines):
    """One line of the table."""
    ratios = [baseline["ms"] / row["ms"] for baseline in baselines]
    decisions = f"{row.get('decisions_per_s_serial', 0):6.2f} ({row.get('decisions_per_s_worker', 0):.2f})"
    total = sum(row["phases_ms"].values())
    shares = " ".join(f"{100 * row['phases_ms'][name] / total:4.0f}" for name in PHASES)
    print(
        f"{name_of(row):30} {row['batch_size']:5} {row['ms']:8.1f} {1e3 / row['ms']:9.2f}"
        + "".join(f" {ratio:7.2f}" for ratio in ratios)
        + f" {decisions:>15} {row['gflop']:8.1f} {row['gflop_per_s']:8.0f} {100 * row['of_peak']:7.0f}%"
        f" {row['peak_gb']:7.2f} {row['bytes_per_transition'] / 1e3:8.1f}   {shares}",
        flush=True,
    )


def print_sampling(sizes):
    """Milliseconds to sample a batch of 128 from replays of these sizes."""
    keep_freed_memory()
    config = parse([])
    print(f"\n{'transitions':>12} {'ms/sample':>10} {'GB':>6}   batch 128")
    figures = {}
    for size in sizes:
        replay = random_replay(size, (3, 84, 84), 1, config, torch.device("cpu"))
        times = []
        for _ in range(50):
            start = time.perf_counter()
            replay.sample(128)
            times.append(time.perf_counter() - start)
        figures[size] = 1e3 * statistics.median(times)
        print(f"{size:12,} {figures[size]:10.2f} {replay.nbytes / 1e9:6.2f}", flush=True)
    return figures


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
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, commit {commit.strip()}")
    print(
        f"{'':30} {'batch':>5} {'ms':>8} {'updates/s':>9} {'x plain':>7} {'x raised':>7} {'decisions/s':>14}"
        f" {'GFLOP':>8} {'GFLOP/s':>8} {'of peak':>8} {'peak GB':>7} {'KB/trans':>8}   % of " + ", ".join(PHASES)
    )
    rows, baselines = [], []
    for row in rows_of(args):
        row = in_own_process(row)
        rows.append(row)
        if row["kind"] == "plain":
            baselines = [row] if not row["raised"] else [*baselines, row]
        print_row(row, baselines)
    peaks = {name: statistics.median(row["peaks_gflop_per_s"][name] for row in rows) for name in DTYPES}
    print("matmul peak, GFLOP/s: " + ", ".join(f"{name} {peak:.0f}" for name, peak in peaks.items()))
    sampling = print_sampling(map(int, args.replay_sizes.split())) if args.replay_sizes else {}
    if args.json:
        text = json.dumps({"rows": rows, "peaks": peaks, "sampling_ms": sampling}, indent=2)
        pathlib.Path(args.json).write_text(text + "\n")


if __name__ == "__main__":
    main()
