"""A task as the loop drives it: `start` a step, do something else, `finish` it.

`WorkerEnv` steps in a process of its own, beside the caller; `SerialEnv` here, when the result is asked for. Physics
and frames are the same, so a run gives the same numbers with either.
"""

import functools
import os

import gymnasium
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from gymnasium.wrappers import FrameStackObservation, TransformObservation

import dmc2gym

EVAL_WORKERS = 4  # processes of one run's evaluation at most; each takes about as much memory as an idle train.py


def make_env(config, seed):
    """The config's task; observations (3 * frame_stack, size, size) uint8, the first frame repeated at reset.

    With the identity encoder: the stacked states, (n,) float32.
    """
    size = config.pre_transform_image_size
    env = dmc2gym.make(
        config.domain_name,
        config.task_name,
        seed=seed,
        from_pixels=config.encoder_type != "identity",
        height=size,
        width=size,
        frame_skip=config.action_repeat,
    )
    env = FrameStackObservation(env, config.frame_stack, padding_type="reset")
    stack = env.observation_space  # (frame_stack, *frame)
    shape = (stack.shape[0] * stack.shape[1], *stack.shape[2:])
    dtype = np.uint8 if stack.dtype == np.uint8 else np.float32
    space = gymnasium.spaces.Box(stack.low.min(), stack.high.max(), shape, dtype)
    return TransformObservation(env, lambda obs: obs.reshape(shape).astype(dtype, copy=False), space)


class SerialEnv:
    """One environment of `make_env` in this process.

    `observation_space`, `action_space` and `metadata` are the environment's.
    """

    def __init__(self, config, seed):
        self._env = make_env(config, seed)
        self.observation_space, self.action_space = self._env.observation_space, self._env.action_space
        self.metadata = self._env.metadata

    def reset(self, seed=None):
        """First observation of an episode; `seed` restarts the task's random state."""
        return self._env.reset(seed=seed)[0]

    def start(self, action):
        """Take one decision's step with `action` (|A|,)."""
        self._action = action

    def finish(self):
        """Its observation, reward, terminated and truncated."""
        return self._env.step(self._action)[:4]

    def draw(self, height, width):
        """RGB image (height, width, 3), uint8, of the current state; not between `start` and `finish`."""
        return self._env.unwrapped.render(height, width)

    def close(self):
        """Free what the environment holds."""
        self._env.close()


class WorkerEnv:
    """As `SerialEnv`, in a worker process, which also owns the rendering context and ends when this process does."""

    def __init__(self, config, seed):
        make = functools.partial(make_env, config, seed)
        # spawned, since a forked process inherits a state of threads and CUDA in which rendering may fail
        self._env = AsyncVectorEnv([make], context="spawn", autoreset_mode=AutoresetMode.DISABLED)
        self.observation_space, self.action_space = self._env.single_observation_space, self._env.single_action_space
        self.metadata = self._env.metadata

    def reset(self, seed=None):
        return self._env.reset(seed=seed)[0][0]

    def start(self, action):
        self._env.step_async(action[None])

    def finish(self):
        obs, reward, terminated, truncated, _ = self._env.step_wait()
        return obs[0], float(reward[0]), bool(terminated[0]), bool(truncated[0])

    def draw(self, height, width):
        return self._env.call("draw", height, width)[0]

    def close(self):
        self._env.close(terminate=True)


def open_env(config, seed):
    """The environment that a run trains in."""
    return (WorkerEnv if config.env_worker else SerialEnv)(config, seed)


def open_eval_envs(config, episodes):
    """Environments for `evaluate`: without workers one, else as many as have a core and something to do."""
    if not config.env_worker:
        return [SerialEnv(config, config.seed)]
    return [WorkerEnv(config, config.seed) for _ in range(min(episodes, len(os.sched_getaffinity(0)), EVAL_WORKERS))]
