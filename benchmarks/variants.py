"""A smoke run of every variant on real pixels: finite losses, parameters, time per update relative to the default.

    python benchmarks/variants.py                          200 updates of each, batch 16
    python benchmarks/variants.py --batch_size 128 --updates 50

The variants are those of scripts/ablation.sh. Times are medians; the default is measured again at the end, and its
ratio to its first measurement says how steady the machine was.
"""

import dataclasses
import json
import math
import pathlib
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from agent import make_agent  # noqa: E402
from config import ConfigError, exit_with, parse, parse_flags  # noqa: E402
from dmc2gym import EnvError  # noqa: E402
from env_worker import make_env  # noqa: E402
from evaluate import choose_device  # noqa: E402
from replay_buffer import ReplayBuffer  # noqa: E402
from utils import keep_freed_memory, seed_everything  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Args:
    """Smoke run of every variant."""

    updates: int = 200
    """Updates of each variant."""
    batch_size: int = 16
    """Pairs per update (batch_512 has its own)."""
    task: str = "ball_in_cup-catch"
    """<domain>-<task> whose random episodes fill the replay."""
    only: str = ""
    """Names of variants, space between; empty: all."""
    json: str = ""
    """Also write the rows to this file."""


def variants():
    """{name: flags} of scripts/ablation.sh."""
    script = (ROOT / "scripts" / "ablation.sh").read_text()
    lines = script.split("<<'LIST'\n")[1].split("\nLIST\n")[0].splitlines()
    return {line.split()[0]: line.split()[1:] for line in lines}


def filled_replay(config, decisions, device):
    """A replay of real episodes with random actions."""
    env = make_env(config, seed=0)
    env.action_space.seed(0)
    shape = env.observation_space.shape
    dtype = torch.uint8 if len(shape) == 3 else torch.float32
    frame = (shape[0] // config.frame_stack, *shape[1:])
    action_dim = env.action_space.shape[0]
    replay = ReplayBuffer(
        decisions, frame, action_dim, config.frame_stack, config.max_episode_steps, device, seed=0, dtype=dtype
    )
    done = True
    for _ in range(decisions):
        if done:
            replay.begin_episode(env.reset()[0])
        action = env.action_space.sample()
        obs, reward, terminated, truncated, _ = env.step(action)
        replay.add(action, reward, obs, terminated)
        done = terminated or truncated
    return replay, shape, action_dim


def measure(config, replay, obs_shape, action_dim, updates, device):
    """Milliseconds per update (median), parameters, last losses."""
    seed_everything(0)
    agent = make_agent(config, obs_shape, action_dim, device)
    times, metrics = [], {}
    for index in range(updates):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        metrics.update(agent.update(agent.augment(replay.sample(config.batch_size)), index))
        losses = {name: value.item() for name, value in metrics.items() if name.endswith("loss")}
        times.append(time.perf_counter() - start)
        for name, value in losses.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"{name} is {value} after update {index}")
    trained = sum(p.numel() for p in agent.parameters() if p.requires_grad)
    return {"ms": 1000 * statistics.median(times), "parameters": trained, **losses}


def main():
    keep_freed_memory()
    try:
        args = parse_flags(Args)
        device = choose_device("auto")
        domain, _, task = args.task.partition("-")
        chosen = {name: flags for name, flags in variants().items() if not args.only or name in args.only.split()}
        chosen = {"default": [], **chosen, "default again": []}
        configs = {
            name: parse(["--domain_name", domain, "--task_name", task, "--batch_size", str(args.batch_size), *flags])
            for name, flags in chosen.items()
        }
        obs_of = {}  # whether states are observed -> replay, shape of observations, |A|
        for config in configs.values():
            states = config.encoder_type == "identity"
            obs_of[states] = obs_of.get(states) or filled_replay(config, 200, device)
    except (ConfigError, EnvError) as error:
        exit_with(error)
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout
    print(f"{args.task}, batch {args.batch_size}, {args.updates} updates, {device}, commit {commit.strip()}")
    print(f"{'variant':20} {'parameters':>12} {'ms/update':>10} {'ratio':>6}  losses after the last update")
    rows = {}
    for name, config in configs.items():
        row = rows[name] = measure(config, *obs_of[config.encoder_type == "identity"], args.updates, device)
        row["ratio"] = row["ms"] / rows["default"]["ms"]
        losses = ", ".join(f"{key} {value:.4g}" for key, value in row.items() if key.endswith("loss"))
        print(f"{name:20} {row['parameters']:12,} {row['ms']:10.1f} {row['ratio']:6.2f}  {losses}", flush=True)
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
