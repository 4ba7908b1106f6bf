"""dm_control tasks as Gymnasium environments, with the `make` signature of the dmc2gym package.

dm_control reads `MUJOCO_GL` only once, at import. `make` therefore imports it after choosing the rendering backend.
"""

import contextlib
import difflib
import importlib
import math
import os

import gymnasium
import numpy as np

from background import Background
from endings import Refused
from rendering import DRAWING_OFF, select_gl_backend

# by domain or task, where camera 0 hardly shows the body; quadruped's is that of drq, drqv2, dreamerv3 and tdmpc2
CAMERAS = {"quadruped": 2, "dog-fetch": 2}


def check_task(config):
    """Raise `Refused` if the suite lacks the config's task, camera or image size; does not render.

    Not for a process that makes environments: if this call imports dm_control, it cannot render.
    """
    before = os.environ.get("MUJOCO_GL")
    os.environ["MUJOCO_GL"] = DRAWING_OFF[0]
    importlib.import_module("dm_control.suite")
    del os.environ["MUJOCO_GL"]
    if before is not None:
        os.environ["MUJOCO_GL"] = before
    physics = _load(config.domain_name, config.task_name).physics
    if config.encoder_type != "identity" or config.save_video:
        _camera(physics, config.domain_name, config.task_name, config.camera_id)
    if config.encoder_type != "identity":
        _check_size(physics, config.pre_transform_image_size, config.pre_transform_image_size)


def _load(domain_name, task_name, *arguments):
    """dm_control's suite.load; for an unknown name raises `Refused` with the nearest real ones."""
    from dm_control import suite

    tasks = [f"{domain} {task}" for domain, task in suite.ALL_TASKS]
    name = f"{domain_name} {task_name}"
    if name not in tasks:
        near = difflib.get_close_matches(name, tasks, n=4, cutoff=0.4) or tasks
        same_domain = [task for task in tasks if task.split()[0] == domain_name]
        names = ", ".join(dict.fromkeys(near + same_domain))
        raise Refused(f"--domain_name {domain_name} --task_name {task_name}: no such task; the nearest are {names}")
    return suite.load(domain_name, task_name, *arguments)


def _camera(physics, domain_name, task_name, camera_id):
    """`camera_id`, or the task's usual camera for None; `Refused` if the task lacks it."""
    usual = CAMERAS.get(f"{domain_name}-{task_name}", CAMERAS.get(domain_name, 0))
    camera = usual if camera_id is None else camera_id
    cameras = physics.model.ncam
    if not -1 <= camera < cameras:
        raise Refused(f"--camera_id {camera_id}: must be from -1 to {cameras - 1} on {domain_name} {task_name}")
    return camera


def _check_size(physics, height, width):
    largest = physics.model.vis.global_
    if height > largest.offheight or width > largest.offwidth:
        raise Refused(
            f"--image_size or --pre_transform_image_size {max(height, width)}: the task renders at most "
            f"{largest.offheight}x{largest.offwidth} pixels"
        )


class DMCEnv(gymnasium.Env):
    """A dm_control suite task as a Gymnasium environment.

    Actions are float32 in [-1, 1]. Observations are uint8 images of (3, height, width), or (height, width, 3) without
    `channels_first`; without `from_pixels` they are the float64 state, flattened in the order of the task's observation
    dictionary. `info` holds the task's `discount`.

    One `step` takes `frame_skip` control steps and sums their rewards; an episode has `episode_length` control steps.
    `time_limit` is in seconds of simulated time; None is the task's own. Camera -1 is MuJoCo's free camera, None the
    task's usual one. A `background`, a source of background.py, is shown in place of floor and sky. Raises `Refused` if
    the task or camera is unknown, the image is too large to render, or no rendering backend works.
    """

    def __init__(
        self,
        domain_name,
        task_name,
        seed=1,
        visualize_reward=False,
        from_pixels=False,
        height=84,
        width=84,
        camera_id=None,
        frame_skip=1,
        episode_length=1000,
        environment_kwargs=None,
        time_limit=None,
        channels_first=True,
        background=None,
    ):
        if from_pixels and visualize_reward:
            raise Refused("visualize_reward shows the reward in the pixels: not with from_pixels")
        select_gl_backend(required=from_pixels)
        from dm_control.rl.control import PhysicsError  # after the backend is chosen

        task_kwargs = {"random": seed}
        if time_limit is not None:
            task_kwargs["time_limit"] = time_limit
        self._env = _load(domain_name, task_name, task_kwargs, environment_kwargs, visualize_reward)
        self._physics_error = PhysicsError
        self._from_pixels = from_pixels
        self._height, self._width = height, width
        self._camera_id = _camera(self.physics, domain_name, task_name, camera_id)
        self._frame_skip, self._channels_first = frame_skip, channels_first
        self._background = background and Background(background, seed)
        self._actions = []
        self._max_steps = math.ceil(episode_length / frame_skip)
        self._over = True  # `reset` must come next

        spec = self._env.action_spec()
        bounded = np.abs(spec.maximum) < 1e9  # MuJoCo reports +-1e10 for an unbounded actuator
        self._action_low = np.where(bounded, spec.minimum, -1.0)
        self._action_high = np.where(bounded, spec.maximum, 1.0)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, spec.shape, np.float32)
        if from_pixels:
            _check_size(self.physics, height, width)
            shape = (3, height, width) if channels_first else (height, width, 3)
            self.observation_space = gymnasium.spaces.Box(0, 255, shape, np.uint8)
        else:
            size = sum(int(np.prod(s.shape)) for s in self._env.observation_spec().values())
            self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (size,), np.float64)
        self.render_mode = "rgb_array"
        step_seconds = self._env.control_timestep() * frame_skip  # simulated time
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": 1.0 / step_seconds}

    @property
    def physics(self):
        """dm_control's physics object."""
        return self._env.physics

    def reset(self, *, seed=None, options=None):
        """Start an episode: first observation and info; `seed` reseeds the task's random state."""
        super().reset(seed=seed)
        if seed is not None:
            self._env.task.random.seed(seed)
            if self._background:
                self._background.seed(seed)
        self._observation = self._observe(self._begin())
        return self._observation, {"discount": 1.0}

    def step(self, action):
        """Take `frame_skip` control steps with one action; terminated only if the task's discount is 0.

        If the physics diverges, the episode is truncated with reward 0 and the previous observation, and
        `info["physics_error"]` gives the reason.
        """
        if self._over:
            raise gymnasium.error.ResetNeeded("call reset() before step(), and after each episode")
        try:
            time_step, reward = self._advance(action)
            self._observation = self._observe(time_step)
        except self._physics_error as error:
            self._over = True
            return self._observation, 0.0, False, True, {"discount": 1.0, "physics_error": " ".join(str(error).split())}
        terminated = time_step.last() and time_step.discount == 0
        truncated = not terminated and (time_step.last() or len(self._actions) >= self._max_steps)
        self._over = terminated or truncated
        return self._observation, reward, terminated, truncated, {"discount": time_step.discount}

    def _begin(self, background_state=None):
        """Start an episode and keep the random states from which it can be replayed; returns the first time step."""
        if self._background:
            self._background.begin(background_state)
        self._random = self._env.task.random.get_state()
        self._actions = []
        self._over = False
        return self._env.reset()

    def _advance(self, action):
        """Take the control steps of one `step`; returns the last time step and the summed reward."""
        action = np.array(action, np.float64)
        self._actions.append(action.tolist())
        action = self._action_low + (action + 1) / 2 * (self._action_high - self._action_low)
        reward = 0.0
        for _ in range(self._frame_skip):
            time_step = self._env.step(action)
            reward += time_step.reward or 0.0
            if time_step.last():
                break
        return time_step, reward

    def state_dict(self):
        """State of the episode: the random states before it, and its actions so far."""
        kind, keys, *rest = self._random
        state = {"random": [kind, keys.tolist(), *rest], "actions": self._actions.copy(), "over": self._over}
        return state | {"background": self._background.state} if self._background else state

    def load_state_dict(self, state, observation):
        """Restore the result of `state_dict` by replaying the episode's actions, without rendering.

        Copying the physics' state would not suffice, since some tasks keep their targets in the model. `observation` is
        the last one: a renderer need not draw the same image twice.
        """
        self._env.task.random.set_state(state["random"])
        self._begin(state.get("background"))
        with contextlib.suppress(self._physics_error):  # raised by the last action
            for action in state["actions"]:
                self._advance(action)
        self._over = state["over"]
        self._observation = observation

    def render(self, height=None, width=None):
        """RGB image (height, width, 3), uint8, of the current state."""
        size = (height or self._height, width or self._width)
        if self._background:
            return self._background.draw(self.physics, *size, self._camera_id, len(self._actions))
        return self.physics.render(*size, self._camera_id)

    def _observe(self, time_step):
        if not self._from_pixels:
            return np.concatenate([np.ravel(v) for v in time_step.observation.values()]).astype(np.float64)
        image = self.render()
        return np.ascontiguousarray(image.transpose(2, 0, 1)) if self._channels_first else image

    def close(self):
        """Free the rendering context."""
        self._env.close()


make = DMCEnv
