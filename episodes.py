"""Evaluation episodes with the deterministic policy, in several environments in parallel."""

import numpy as np


def eval_seed(config):
    """Evaluation seed, derived from the run's seed: runs with different seeds see different initial states."""
    return int(np.random.SeedSequence([config.seed, 1]).generate_state(1)[0])


def evaluate(envs, agent, num_episodes, seed, record_video, message, check=lambda: None):
    """Run `num_episodes` episodes with the mean action; return their returns (floats) and the first one's frames.

    Episode i uses `seed` + i, so every evaluation of a run starts from the same initial states and a saved model
    reproduces its logged returns, whatever the number of `envs`, which step in parallel. The frames are a list of
    (256, 256, 3) uint8, empty without `record_video`. `message` prints a line for the user; `check` is called at each
    decision and may raise.
    """
    returns, frames, playing = [0.0] * num_episodes, [], []
    waiting = list(range(num_episodes))

    def begin(env):
        """Start the next episode in `env`, if one is left."""
        if waiting:
            episode = waiting.pop(0)
            env.start(agent.act(env.reset(seed=(seed + episode) % 2**32), sample=False))
            playing.append((env, episode))

    for env in envs:
        begin(env)
    while playing:
        check()
        env, episode = playing.pop(0)
        obs, reward, terminated, truncated = env.finish()
        returns[episode] += reward
        if obs is None:
            message(f"warning: the physics diverged in evaluation episode {episode}, which ends there")
        elif record_video and episode == 0:
            frames.append(env.draw())
        if terminated or truncated:
            begin(env)
        else:
            env.start(agent.act(obs, sample=False))
            playing.append((env, episode))
    return returns, frames


def summary(returns):
    """Mean and (population) standard deviation of episode returns."""
    return {"episode_reward": float(np.mean(returns)), "episode_reward_std": float(np.std(returns))}
