"""Evaluation episodes with the deterministic policy, in several environments beside each other."""

import numpy as np

VIDEO_SIZE = 256  # pixels, a multiple of 16 as H.264 wants


def eval_seed(config):
    """Seed of the evaluation environment, drawn from the run's: runs of two seeds meet different initial states."""
    return int(np.random.SeedSequence([config.seed, 1]).generate_state(1)[0])


def evaluate(envs, agent, num_episodes, seed, record_video, message, check=lambda: None):
    """Returns of `num_episodes` episodes with the mean action, a list of floats, and frames of the first.

    Episode i starts from `seed` + i, so that every evaluation of a run meets the same initial states, a saved model
    gives its logged returns again, and neither depends on the number of `envs`, which step beside each other.
    The frames are a list of (VIDEO_SIZE, VIDEO_SIZE, 3) uint8, empty without `record_video`. `message` takes a line for
    the user; `check` is called at each decision and may raise.
    """
    returns = [0.0] * num_episodes
    frames = []
    waiting = iter(range(num_episodes))

    def begin(env):
        """Start the next episode in `env`; [(env, episode)], or nothing if there is none left."""
        for episode in waiting:
            env.start(agent.act(env.reset(seed=(seed + episode) % 2**32), sample=False))
            return [(env, episode)]
        return []

    playing = [pair for env in envs for pair in begin(env)]
    while playing:
        check()
        still = []
        for env, episode in playing:
            obs, reward, terminated, truncated = env.finish()
            returns[episode] += reward
            if obs is None:
                message(f"warning: the physics diverged in evaluation episode {episode}, which ends there")
            elif record_video and episode == 0:
                frames.append(env.draw(VIDEO_SIZE, VIDEO_SIZE))
            if terminated or truncated:
                still += begin(env)
            else:
                env.start(agent.act(obs, sample=False))
                still.append((env, episode))
        playing = still
    return returns, frames


def summary(returns):
    """Mean and (population) standard deviation of episode returns."""
    return {"episode_reward": float(np.mean(returns)), "episode_reward_std": float(np.std(returns))}
