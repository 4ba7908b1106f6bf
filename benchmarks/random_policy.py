"""Return of the uniformly random policy, the baseline of every learning curve.

    python -m benchmarks.random_policy
    python -m benchmarks.random_policy --tasks hopper-hop,cartpole-balance

Prints rows of results/published_scores.csv without the last column: mean and sample standard deviation over episodes,
with one random action per decision at the task table's action repeat. Episodes are not seeds, so the seeds column is
empty.
"""

import csv
import dataclasses
import statistics
import sys

from config import TASK_TABLE, Config, complete, parse_flags
from dmc2gym import make
from endings import EXPECTED, Refused, end


@dataclasses.dataclass(frozen=True)
class Args:
    """Measure the uniformly random policy."""

    tasks: str = ",".join(f"{domain}-{task}" for domain, task in TASK_TABLE)
    """Comma-separated tasks, <domain>-<task>."""
    num_episodes: int = 100
    """Episodes per task, of 1,000 environment steps each."""


def random_returns(task, num_episodes):
    """Undiscounted returns of `num_episodes` episodes, a list of floats, without rendering; `Refused`: no such task."""
    domain_name, _, task_name = task.partition("-")
    repeat = complete(Config(domain_name=domain_name, task_name=task_name)).action_repeat
    env = make(domain_name, task_name, seed=0, frame_skip=repeat)
    env.action_space.seed(0)
    returns = []
    for _ in range(num_episodes):
        env.reset()
        returns.append(0.0)
        over = False
        while not over:
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            returns[-1] += reward
            over = terminated or truncated
    return returns


def main():
    """The command."""
    try:
        args = parse_flags(Args)
        if args.num_episodes < 2:
            raise Refused(f"--num_episodes {args.num_episodes}: must be at least 2, for a standard deviation")
        source = f"this project, {args.num_episodes} episodes: python -m benchmarks.random_policy"
        rows = csv.writer(sys.stdout, lineterminator="\n")
        rows.writerow("method env_steps task mean std seeds source".split())
        for task in args.tasks.split(","):
            returns = random_returns(task, args.num_episodes)
            mean, std = statistics.mean(returns), statistics.stdev(returns)
            rows.writerow(["random policy", 0, task.replace("-", "_"), f"{mean:.1f}", f"{std:.1f}", "", source])
            sys.stdout.flush()
    except EXPECTED as error:
        end(error)


if __name__ == "__main__":
    main()
