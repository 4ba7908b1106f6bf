"""Environments whose step has two halves, `start` and `finish`, with other work in between.

`WorkerEnv` steps in its own process, in parallel to the caller; `SerialEnv` steps in this process, in `finish`. Physics
and frames are the same, so a run gives the same numbers with either.
"""

import contextlib
import functools
import importlib
import multiprocessing
import subprocess
import sys
from multiprocessing.connection import Connection

import gymnasium
import numpy as np
from gymnasium.wrappers import FrameStackObservation, TransformObservation

import dmc2gym
import rendering
from background import check_folders, open_source
from endings import Ending, signals_kept_from_children
from machine import available_cores, choose_device

VIDEO_SIZE = 256  # pixels, a multiple of 16 as H.264 requires
EVAL_WORKERS = 4  # maximum number of processes for one run's evaluation
PHYSICS_ERRORS = 10  # consecutive episodes with diverged physics that stop a run


class Restorable:
    """Mixin to save and restore an environment's state, including the generator of its random actions."""

    def state_dict(self):
        """State between two steps."""
        import torch  # imported here: workers do not need it and would nearly double in size

        sampling = self.action_space.np_random.bit_generator.state
        return {"episode": self.episode_state(), "obs": torch.from_numpy(self.obs), "sampling": sampling}

    def load_state_dict(self, state):
        """Restore the result of `state_dict` by replaying the episode's actions, without rendering."""
        self.obs = state["obs"].numpy()
        self.restore(state["episode"], self.obs)
        self.action_space.np_random.bit_generator.state = state["sampling"]


class SerialEnv(Restorable):
    """The config's task in this process.

    Observations (3 * frame_stack, size, size) uint8 repeat the first frame at reset. With the identity encoder they are
    the stacked states, (n,) float32. `obs` is the last one. `background` is a source of background.py, or None.
    """

    def __init__(self, config, seed, background=None):
        self.background = background
        env = dmc2gym.make(
            config.domain_name,
            config.task_name,
            seed=seed,
            from_pixels=config.encoder_type != "identity",
            height=config.pre_transform_image_size,
            width=config.pre_transform_image_size,
            camera_id=config.camera_id,
            frame_skip=config.action_repeat,
            background=background,
        )
        # an offscreen buffer of the drawn size is faster than MuJoCo's 640x480, with the same pixels
        buffer = env.physics.model.vis.global_
        buffer.offheight = buffer.offwidth = max(config.pre_transform_image_size, VIDEO_SIZE * config.save_video)
        env = FrameStackObservation(env, config.frame_stack, padding_type="reset")
        stack = env.observation_space  # (frame_stack, *frame)
        shape = (stack.shape[0] * stack.shape[1], *stack.shape[2:])
        dtype = np.uint8 if stack.dtype == np.uint8 else np.float32
        space = gymnasium.spaces.Box(stack.low.min(), stack.high.max(), shape, dtype)
        self._env = TransformObservation(env, lambda obs: obs.reshape(shape).astype(dtype, copy=False), space)
        self.observation_space, self.action_space, self.metadata = space, env.action_space, env.metadata
        self._physics_errors = 0  # in a row

    def reset(self, seed=None):
        """Start an episode and return its first observation; `seed` reseeds the task's random state."""
        self.obs = self._env.reset(seed=seed)[0]
        return self.obs

    def start(self, action):
        """Start one decision's step with `action` (|A|,)."""
        self._action = action

    def finish(self):
        """The step's observation, reward, terminated and truncated; the observation is None if the physics diverged.

        Raises `Ending` if it diverged in `PHYSICS_ERRORS` episodes in a row.
        """
        obs, reward, terminated, truncated, info = self._env.step(self._action)
        if "physics_error" in info:
            self._physics_errors += 1
            if self._physics_errors == PHYSICS_ERRORS:
                raise Ending(f"the physics diverged in {PHYSICS_ERRORS} episodes in a row: {info['physics_error']}")
            return None, reward, terminated, truncated
        if terminated or truncated:
            self._physics_errors = 0
        self.obs = obs
        return obs, reward, terminated, truncated

    def episode_state(self):
        """State of the episode, without the last observation; not between `start` and `finish`."""
        return {"steps": self._env.unwrapped.state_dict(), "physics_errors": self._physics_errors}

    def restore(self, episode_state, obs):
        """Restore the result of `episode_state`; `obs` is the last observation."""
        stack = self._env.env  # FrameStackObservation
        frames = obs.reshape(-1, *stack.observation_space.shape[1:])
        self._env.unwrapped.load_state_dict(episode_state["steps"], frames[-1])
        stack.obs_queue.extend(frames)  # pushes older frames out
        self._physics_errors = episode_state["physics_errors"]

    def draw(self):
        """RGB image (VIDEO_SIZE, VIDEO_SIZE, 3), uint8, of the current state; not between `start` and `finish`."""
        return self._env.unwrapped.render(VIDEO_SIZE, VIDEO_SIZE)

    def close(self):
        """Free the environment's resources."""
        self._env.close()


class WorkerEnv(Restorable):
    """A `SerialEnv` in its own process, which also owns the rendering context.

    The worker exits when this process does, even if killed, and does not receive signals from a cluster or terminal.
    (Gymnasium's AsyncVectorEnv prints a traceback in each case.) Several workers start in parallel: the constructor
    returns at once, and the first use of each waits until it is ready. Any method may raise `Ending`: the environment
    raised it, or the worker died.
    """

    def __init__(self, config, seed, background=None):
        self.background = background
        self._pipe, theirs = multiprocessing.Pipe()
        with theirs, signals_kept_from_children():
            command = [sys.executable, __file__, str(theirs.fileno())]
            inherited = [theirs.fileno(), *(background.descriptors if background else ())]
            self._process = subprocess.Popen(command, pass_fds=inherited, start_new_session=True)
        self._send(config, seed, background)

    @functools.cached_property
    def observation_space(self):
        return self._call("observation_space")

    @functools.cached_property
    def action_space(self):
        return self._call("action_space")

    @functools.cached_property
    def metadata(self):
        return self._call("metadata")

    def reset(self, seed=None):
        self.obs = self._call("reset", seed)
        return self.obs

    def start(self, action):
        self._send("start", action)

    def finish(self):
        result = self._receive()
        self.obs = self.obs if result[0] is None else result[0]
        return result

    def episode_state(self):
        return self._call("episode_state")

    def restore(self, episode_state, obs):
        self._call("restore", episode_state, obs)

    def draw(self):
        return self._call("draw")

    def close(self):
        self._pipe.close()
        self._process.wait()

    def _call(self, *message):
        self._send(*message)
        return self._receive()

    def _send(self, *message):
        with contextlib.suppress(OSError):  # the worker is dead; `_receive` raises
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
    """Worker loop: make the environment from the first message, then answer messages until the caller is gone."""
    with contextlib.suppress(EOFError, ConnectionError):
        arguments = pipe.recv()
        importlib.import_module("dm_control.suite")  # with the rendering backend that the caller has chosen
        try:
            env = SerialEnv(*arguments)
            while True:
                name, *arguments = pipe.recv()  # of a method or an attribute
                answer = getattr(env, name)
                if callable(answer):
                    answer = answer(*arguments)
                pipe.send(env.finish() if name == "start" else answer)
        except Ending as error:
            pipe.send(error)


def open_env(config, seed):
    """The training environment; raises `Refused` for a bad folder of backgrounds, of evaluations too."""
    check_folders(config)
    _choose_renderer(config)
    return (WorkerEnv if config.env_worker else SerialEnv)(config, seed, open_source(config, "train"))


def open_eval_envs(config, episodes):
    """Environments for `evaluate`: one without workers, else at most one per episode, core and `EVAL_WORKERS`."""
    _choose_renderer(config)
    background = open_source(config, "test")
    if not config.env_worker:
        return [SerialEnv(config, config.seed, background)]
    workers = min(episodes, available_cores(), EVAL_WORKERS)
    return [WorkerEnv(config, config.seed, background) for _ in range(workers)]


def _choose_renderer(config):
    """Choose once for all workers, which inherit it; videos of a run on states need one too."""
    draws = config.encoder_type != "identity" or config.save_video
    rendering.select_gl_backend(required=draws, cuda=draws and choose_device(config.device).type == "cuda")


if __name__ == "__main__":
    work(Connection(int(sys.argv[1])))
