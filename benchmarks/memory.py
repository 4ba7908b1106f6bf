"""Memory of a running train.py and of its environment workers, over many decisions.

    python benchmarks/memory.py                                   20,000 decisions with small networks
    python benchmarks/memory.py --flags "--batch_size 64" --every 60

Flags in --flags go to train.py after those of the default run, so they win. Prints resident memory as decisions go by
and, at the end, how much it grew after the replay was full.
"""

import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import psutil  # noqa: E402

from config import ConfigError, exit_with, parse_flags  # noqa: E402

DEFAULT = (
    "--image_size 64 --num_filters 8 --hidden_dim 128 --batch_size 8 --replay_buffer_capacity 4000 --eval_freq 5000 "
    "--num_eval_episodes 1 --num_train_steps 20000 --save_tb"
)


@dataclasses.dataclass(frozen=True)
class Args:
    """Memory over a run."""

    flags: str = ""
    """More flags for train.py."""
    every: float = 20.0
    """Seconds between readings."""


def megabytes(processes):
    """Resident memory of processes that are still there."""
    total = 0
    for process in processes:
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            pass
    return total / 1e6


def steps_of(work_dir):
    """Decisions of the last finished episode."""
    for log in work_dir.glob("*/*/train.log"):
        return json.loads(log.read_text().splitlines()[-1])["step"]
    return 0


def main():
    try:
        args = parse_flags(Args)
    except ConfigError as error:
        exit_with(error)
    with tempfile.TemporaryDirectory() as work_dir:
        command = [sys.executable, str(ROOT / "train.py"), *DEFAULT.split(), *args.flags.split()]
        running = subprocess.Popen([*command, "--work_dir", work_dir], stdout=subprocess.DEVNULL)
        process, readings = psutil.Process(running.pid), []
        print(f"{'decisions':>10} {'train.py MB':>12} {'workers MB':>11}")
        while running.poll() is None:
            time.sleep(args.every)
            step = steps_of(pathlib.Path(work_dir))
            try:
                reading = (step, megabytes([process]), megabytes(process.children(recursive=True)))
            except psutil.NoSuchProcess:
                break
            if reading[1]:  # it may have ended meanwhile
                readings.append(reading)
                print(f"{step:10,} {reading[1]:12.0f} {reading[2]:11.0f}", flush=True)
    if running.wait():
        sys.exit(running.returncode)
    if not readings:
        sys.exit("the run was shorter than --every")
    steady = [reading for reading in readings if readings[-1][0] / 4 <= reading[0]]
    (first, before, _), (last, after, _) = steady[0], steady[-1]
    print(
        f"train.py from decision {first:,} to {last:,}: {after - before:+.0f} MB ({100 * (after / before - 1):+.1f} %)"
    )


if __name__ == "__main__":
    main()
