"""Return of the uniformly random policy, the baseline of every learning curve.

    python -m benchmarks.random_policy
    python -m benchmarks.random_policy --tasks hopper-hop,cartpole-balance

Prints rows of results/published_scores.csv without the last column: mean and sample standard deviation over episodes,
at the task table's action repeat. Episodes are not seeds, so the seeds column is empty.
"""

import dataclasses
import statistics

from benchmarks import random_episode
from command_line import parse_flags
from config import TASK_TABLE, Config, complete
from endings import Refused, command
from env_worker import SerialEnv


@dataclasses.dataclass(frozen=True)
class Args:
    """Measure the uniformly random policy."""

    tasks: str = ",".join(f"{domain}-{task}" for domain, task in TASK_TABLE)
    """Comma-separated tasks, <domain>-<task>."""
    num_episodes: int = 100
    """Episodes per task, of 1,000 environment steps each."""


@command()
def main():
    """The command."""
    args = parse_flags(Args)
    if args.num_episodes < 2:
        raise Refused(f"--num_episodes {args.num_episodes}: must be at least 2, for a standard deviation")
    source = f"this project, {args.num_episodes} episodes: python -m benchmarks.random_policy"
    print("method,env_steps,task,mean,std,seeds,source")
    for name in args.tasks.split(","):
        domain, _, task = name.partition("-")
        config = complete(Config(domain_name=domain, task_name=task, encoder_type="identity"))  # states: no rendering
        env = SerialEnv(config, seed=0)
        env.action_space.seed(0)
        returns = [sum(reward for _, _, reward, _ in random_episode(env)) for _ in range(args.num_episodes)]
        mean, std = statistics.mean(returns), statistics.stdev(returns)
        print(f'random policy,0,{domain}_{task},{mean:.1f},{std:.1f},,"{source}"', flush=True)


if __name__ == "__main__":
    main()
