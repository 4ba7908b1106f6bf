"""A task as the loop drives it: `start` a step, do something else, `finish` it.

`WorkerEnv` steps in a process of its own, beside the caller; `SerialEnv` here, when the result is asked for. Physics
and frames are the same, so a run gives the same numbers with either.
"""

import contextlib
import importlib
import multiprocessing
import pathlib
import subprocess
import sys
from multiprocessing.connection import Connection

import gymnasium
import numpy as np
from gymnasium.wrappers import FrameStackObservation, TransformObservation

import dmc2gym
import rendering
from endings import Ending, signals_kept_from_children
from machine import available_cores

EVAL_WORKERS = 4  # processes of one run's evaluation at most
PHYSICS_ERRORS = 10  # episodes in a row that may end since the physics diverged


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
        camera_id=config.camera_id,
        frame_skip=config.action_repeat,
    )
    env = FrameStackObservation(env, config.frame_stack, padding_type="reset")
    stack = env.observation_space  # (frame_stack, *frame)
    shape = (stack.shape[0] * stack.shape[1], *stack.shape[2:])
    dtype = np.uint8 if stack.dtype == np.uint8 else np.float32
    space = gymnasium.spaces.Box(stack.low.min(), stack.high.max(), shape, dtype)
    return TransformObservation(env, lambda obs: obs.reshape(shape).astype(dtype, copy=False), space)


class Restorable:
    """An environment whose state can be saved and restored, its sampling of actions included."""

    def state_dict(self):
        """Of a moment between two steps."""
        import torch  # here alone: it is nearly half of the size of a worker, which does not need it

        sampling = self.action_space.np_random.bit_generator.state
        return {"episode": self.episode_state(), "obs": torch.from_numpy(self.obs), "sampling": sampling}

    def load_state_dict(self, state):
        """Come to the state that `state_dict` was of, by taking the episode's steps again without drawing."""
        self.restore(state["episode"], state["obs"].numpy())
        self.action_space.np_random.bit_generator.state = state["sampling"]


class SerialEnv(Restorable):
    """One environment of `make_env` in this process.

    `observation_space`, `action_space` and `metadata` are the environment's, `obs` is the last observation.
    """

    def __init__(self, config, seed):
        self._env = make_env(config, seed)
        self.observation_space, self.action_space = self._env.observation_space, self._env.action_space
        self.metadata = self._env.metadata
        self.obs = None  # the last observation
        self._physics_errors = 0  # in a row

    def reset(self, seed=None):
        """First observation of an episode; `seed` restarts the task's random state."""
        self.obs = self._env.reset(seed=seed)[0]
        return self.obs

    def start(self, action):
        """Take one decision's step with `action` (|A|,)."""
        self._action = action

    def finish(self):
        """Its observation, reward, terminated and truncated; the observation is None if the physics has diverged.

        Raises:
            Ending: that has ended `PHYSICS_ERRORS` episodes in a row.
        """
        obs, reward, terminated, truncated, info = self._env.step(self._action)
        if "physics_error" in info:
            self._physics_errors += 1
            if self._physics_errors == PHYSICS_ERRORS:
                reason = info["physics_error"]
                raise Ending(f"the physics diverged in {PHYSICS_ERRORS} episodes in a row: {reason}")
            return None, reward, terminated, truncated
        if terminated or truncated:
            self._physics_errors = 0
        self.obs = obs
        return obs, reward, terminated, truncated

    def episode_state(self):
        """Where the episode stands, not between `start` and `finish`; without the last observation."""
        return {"steps": self._env.unwrapped.state_dict(), "physics_errors": self._physics_errors}

    def restore(self, episode_state, obs):
        """Come to the state that `episode_state` was of, and `obs` the last observation."""
        stack = self._env.env  # FrameStackObservation
        frames = obs.reshape(-1, *stack.observation_space.shape[1:])
        self._env.unwrapped.load_state_dict(episode_state["steps"], frames[-1])
        stack.obs_queue.extend(frames)  # pushes the ones before out
        self._physics_errors = episode_state["physics_errors"]
        self.obs = obs

    def draw(self, height, width):
        """RGB image (height, width, 3), uint8, of the current state; not between `start` and `finish`."""
        return self._env.unwrapped.render(height, width)

    def close(self):
        """Free what the environment holds."""
        self._env.close()


class WorkerEnv(Restorable):
    """As `SerialEnv`, in a process of its own, which also owns the rendering context.

    The worker ends when this process does, however that ends, and the signals of a cluster or a terminal do not reach
    it. (Gymnasium's AsyncVectorEnv does the same with tracebacks at each.) Several workers start at once: the first use
    of each waits for it.

    Raises, from any method:
        Ending: what the environment raised, or that the worker has died.
    """

    def __init__(self, config, seed):
        rendering.select_gl_backend(required=config.encoder_type != "identity")  # for all workers, which inherit it
        self._pipe, theirs = multiprocessing.Pipe()
        with theirs, signals_kept_from_children():
            command = [sys.executable, str(pathlib.Path(__file__).resolve()), str(theirs.fileno())]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], start_new_session=True)
        self._send((config, seed))
        self._spaces = None
        self.obs = None  # the last observation

    @property
    def observation_space(self):
        return self._described()[0]

    @property
    def action_space(self):
        return self._described()[1]

    @property
    def metadata(self):
        return self._described()[2]

    def reset(self, seed=None):
        self.obs = self._call("reset", seed)
        return self.obs

    def start(self, action):
        self._described()
        self._send(("step", action))

    def finish(self):
        result = self._receive()
        self.obs = self.obs if result[0] is None else result[0]
        return result

    def episode_state(self):
        return self._call("episode_state")

    def restore(self, episode_state, obs):
        self._call("restore", episode_state, obs)
        self.obs = obs

    def draw(self, height, width):
        return self._call("draw", height, width)

    def close(self):
        self._pipe.close()
        self._process.wait()

    def _described(self):
        """(observation_space, action_space, metadata), the worker's first message."""
        if self._spaces is None:
            self._spaces = self._receive()
        return self._spaces

    def _call(self, *message):
        self._described()
        self._send(message)
        return self._receive()

    def _send(self, message):
        with contextlib.suppress(OSError):  # the worker is dead: `_receive` will say so
            self._pipe.send(message)

    def _receive(self):
        """The worker's next answer."""
        try:
            message = self._pipe.recv()
        except (EOFError, OSError):
            code = self._process.wait()
            raise Ending(f"an environment worker has died with exit code {code}") from None
        if isinstance(message, Ending):
            raise message
        return message


def work(pipe):
    """A worker: make the environment of the first message, then answer the others until the caller is gone."""
    with contextlib.suppress(EOFError, OSError):
        config, seed = pipe.recv()
        importlib.import_module("dm_control.suite")  # with the backend that the caller has chosen
        try:
            env = SerialEnv(config, seed)
            pipe.send((env.observation_space, env.action_space, env.metadata))
            while True:
                method, *arguments = pipe.recv()
                if method == "step":
                    env.start(*arguments)
                    pipe.send(env.finish())
                else:
                    pipe.send(getattr(env, method)(*arguments))
        except Ending as error:
            pipe.send(error)


def open_env(config, seed):
    """The environment that a run trains in."""
    return (WorkerEnv if config.env_worker else SerialEnv)(config, seed)


def open_eval_envs(config, episodes):
    """Environments for `evaluate`: without workers one, else as many as have a core and something to do."""
    if not config.env_worker:
        return [SerialEnv(config, config.seed)]
    return [WorkerEnv(config, config.seed) for _ in range(min(episodes, available_cores(), EVAL_WORKERS))]


if __name__ == "__main__":
    work(Connection(int(sys.argv[1])))
