"""`dmc2gym.make` against dm_control itself: same seed, same actions, same frames, rewards and states."""

import copy
import os
import subprocess
import sys
import warnings

import gymnasium
import numpy as np
import pytest
from dm_control import suite
from gymnasium.utils.env_checker import check_env

import dmc2gym
import rendering
from endings import Refused

SEED = 7


def actions(n, size, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (n, size)).astype(np.float32)


@pytest.mark.parametrize(
    "domain, task, repeat",
    [("cartpole", "swingup", 8), ("ball_in_cup", "catch", 4), ("finger", "spin", 2), ("reacher", "easy", 4)],
)
def test_equals_a_plain_dm_control_loop(domain, task, repeat):
    plain = suite.load(domain, task, task_kwargs={"random": SEED})
    pixels = dmc2gym.make(domain, task, seed=SEED, from_pixels=True, frame_skip=repeat)
    states = dmc2gym.make(domain, task, seed=SEED, frame_skip=repeat)
    for episode in range(2):
        time_step = plain.reset()
        frame, _ = pixels.reset()
        state, _ = states.reset()
        for action in actions(5, plain.action_spec().shape[0], seed=episode):
            image = plain.physics.render(84, 84, camera_id=0)
            assert frame.dtype == np.uint8 and np.array_equal(frame, image.transpose(2, 0, 1))
            expected = np.concatenate([np.ravel(v) for v in time_step.observation.values()])
            assert np.array_equal(state, expected)
            total = 0.0
            for _ in range(repeat):
                time_step = plain.step(action.astype(np.float64))
                total += time_step.reward
            frame, reward, terminated, truncated, info = pixels.step(action)
            state, state_reward, *_ = states.step(action)
            assert reward == state_reward == total
            assert not terminated and not truncated and info["discount"] == 1


@pytest.mark.parametrize("repeat, decisions", [(8, 125), (3, 334), (300, 4)])
def test_episode_ends_by_truncation_after_all_its_steps(repeat, decisions):
    env = dmc2gym.make("cartpole", "swingup", seed=0, frame_skip=repeat)
    env.reset()
    for step in range(1, decisions + 1):
        _, _, terminated, truncated, _ = env.step(env.action_space.sample())
        assert not terminated
        assert truncated == (step == decisions)
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(env.action_space.sample())


def test_terminates_where_the_discount_is_zero():
    # point_mass and the like never do; a time-limited task made to fail does
    env = dmc2gym.make("cartpole", "balance", seed=0)
    env.reset()
    env._env.task.get_termination = lambda physics: 0.0  # the task's own hook for a true end
    _, _, terminated, truncated, info = env.step(np.zeros(1))
    assert terminated and not truncated and info["discount"] == 0


def test_one_render_per_decision(monkeypatch):
    env = dmc2gym.make("cartpole", "swingup", seed=0, from_pixels=True, frame_skip=8)
    calls = []
    real = env.physics.render
    monkeypatch.setattr(type(env.physics), "render", lambda self, *a, **k: calls.append(1) or real(*a, **k))
    env.reset()
    env.step(np.zeros(1))
    env.step(np.zeros(1))
    assert len(calls) == 3


def test_actions_are_normalised_to_the_tasks_bounds():
    env = dmc2gym.make("quadruped", "walk", seed=0)  # bounds that are not [-1, 1]
    spec = env._env.action_spec()
    env.reset()
    seen = []
    real = env._env.step
    env._env.step = lambda action: seen.append(action) or real(action)
    for value, expected in ((-1.0, spec.minimum), (1.0, spec.maximum), (0.0, (spec.minimum + spec.maximum) / 2)):
        env.step(np.full(spec.shape, value, np.float32))
        np.testing.assert_allclose(seen[-1], expected)


def test_other_arguments():
    env = dmc2gym.make(
        "walker", "walk", from_pixels=True, height=64, width=48, camera_id=1, channels_first=False, time_limit=0.1
    )
    frame, _ = env.reset()
    assert frame.shape == (64, 48, 3) == env.observation_space.shape
    assert np.array_equal(frame, env.physics.render(64, 48, camera_id=1))
    assert not np.array_equal(frame, env.physics.render(64, 48, camera_id=0))
    steps = 0
    truncated = False
    while not truncated:
        *_, truncated, _ = env.step(np.zeros(6))
        steps += 1
    assert steps == 4  # 0.1 s of simulated time at 0.025 s each
    env = dmc2gym.make("cartpole", "swingup", episode_length=10, frame_skip=4, environment_kwargs={"n_sub_steps": 1})
    env.reset()
    assert [env.step(np.zeros(1))[3] for _ in range(3)] == [False, False, True]
    with pytest.raises(Refused, match="visualize_reward"):
        dmc2gym.make("cartpole", "swingup", from_pixels=True, visualize_reward=True)
    with pytest.raises(Refused, match="5000: the task renders at most 480x640 pixels"):
        dmc2gym.make("cartpole", "swingup", from_pixels=True, height=5000)


@pytest.mark.parametrize("from_pixels", [True, False])
def test_passes_gymnasiums_checker(from_pixels):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of infinite state bounds, and of an environment made without a registry
        check_env(dmc2gym.make("cartpole", "swingup", seed=0, from_pixels=from_pixels, frame_skip=8))


def test_reset_with_a_seed_restarts_the_task():
    env = dmc2gym.make("reacher", "easy", seed=SEED)
    first, _ = env.reset()
    second, _ = env.reset()
    again, _ = env.reset(seed=SEED)
    assert np.array_equal(first, again) and not np.array_equal(first, second)


@pytest.mark.parametrize(
    "domain, task, nearest",
    [("cartpol", "swingup", "cartpole swingup"), ("walker", "runn", "walker run"), ("zzz", "q", "acrobot swingup")],
)
def test_unknown_task_lists_the_nearest(domain, task, nearest):
    with pytest.raises(Refused, match=f"no such task; the nearest are {nearest}"):
        dmc2gym.make(domain, task)


def backend_in_a_new_process(**environment):
    code = (
        "import dmc2gym, rendering, endings\n"
        "try:\n"
        "    backend = rendering.select_gl_backend()\n"
        "    assert dmc2gym.make('cartpole', 'swingup', from_pixels=True).reset()[0].any()\n"
        "    print(backend)\n"
        "except endings.Refused as error: print('error:', error)"
    )
    env = {k: v for k, v in os.environ.items() if k not in ("MUJOCO_GL", "PYOPENGL_PLATFORM")}
    run = subprocess.run([sys.executable, "-c", code], env={**env, **environment}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_rendering_backend():
    usable = rendering.select_gl_backend()  # what these tests draw with
    assert backend_in_a_new_process() == usable
    assert backend_in_a_new_process(MUJOCO_GL=usable) == usable
    assert backend_in_a_new_process(PYOPENGL_PLATFORM="other") == usable
    assert backend_in_a_new_process(MUJOCO_GL="magic") == (
        "error: MUJOCO_GL=magic: cannot render; use one of egl, osmesa, glfw"
    )


def test_no_usable_backend_names_the_packages(monkeypatch):
    monkeypatch.setattr(rendering, "renderer", lambda backend: None)
    monkeypatch.delenv("MUJOCO_EGL_DEVICE_ID", raising=False)
    monkeypatch.delitem(sys.modules, "dm_control")
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(Refused) as error:
        rendering.select_gl_backend()
    assert str(error.value) == (
        "MUJOCO_GL is not set, tried egl, osmesa: cannot render; install the Debian packages "
        "libegl1 libopengl0 libgl1-mesa-dri (egl) or libosmesa6 (osmesa)"
    )


@pytest.mark.parametrize("task", ["dog-fetch", "quadruped-walk"])
def test_the_usual_camera_shows_the_body(task):
    env = dmc2gym.make(*task.split("-"), seed=1, from_pixels=True)
    env.reset()
    number, kind = np.moveaxis(env.physics.render(84, 84, env._camera_id, segmentation=True), -1, 0)
    planes = np.flatnonzero(env.physics.model.geom_type == 0)
    assert ((number != -1) & ~((kind == 5) & np.isin(number, planes))).sum() > 100  # 5: a geom, not the dog's skin


@pytest.mark.parametrize(
    "task",
    [
        # keep their targets in the model, where no copy of the physics' state has them
        *("finger-turn_hard", "point_mass-hard", "swimmer-swimmer6", "manipulator-bring_ball", "reacher-easy"),
        "walker-run",
        "quadruped-walk",
    ],
)
def test_a_restored_episode_continues_unchanged(task):
    """In another environment, of another seed: states and rewards to the end of the episode, and the next one's."""
    domain, name = task.split("-")

    def new(seed):
        return dmc2gym.make(domain, name, seed=seed, frame_skip=25)

    def play(env, steps):
        seen = []
        for _ in range(steps):
            action = actions.uniform(-1, 1, env.action_space.shape)
            observation, reward, terminated, truncated, _ = env.step(action)
            seen += [*observation, reward]
            if terminated or truncated:
                seen += [*env.reset()[0]]
        return seen

    actions, env = np.random.default_rng(0), new(3)
    env.reset()
    play(env, 53)  # into the second episode of 40
    state, random = copy.deepcopy(env.state_dict()), actions.bit_generator.state
    expected = play(env, 60)
    other = new(4)
    other.reset()
    other.load_state_dict(state, None)
    actions.bit_generator.state = random
    assert play(other, 60) == expected
