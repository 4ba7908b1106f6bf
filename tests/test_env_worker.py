"""Physics that diverges, cameras, and processes that have loaded Mesa and triton: real dm_control throughout."""

import errno
import json
import multiprocessing
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from contextlib import nullcontext

import numpy as np
import psutil
import pytest
import torch
from conftest import make_replay, run_loop

from config import parse
from dmc2gym import make
from endings import Ending, Refused
from env_worker import PHYSICS_ERRORS, SerialEnv, WorkerEnv, work
from episodes import evaluate
from logger import Logger

ROOT = pathlib.Path(__file__).parent.parent
STATE = (
    "--agent sac --encoder_type identity --hidden_dim 8 --action_repeat 100 --batch_size 4 --init_steps 12 "
    "--num_train_steps 33 --eval_freq 100 --num_eval_episodes 3 --no_env_worker"
)


class Exploding(SerialEnv):
    """An environment whose physics is given a huge velocity in the fifth step of every `every`-th episode."""

    def __init__(self, config, seed, every=2):
        super().__init__(config, seed)
        self._every, self._episode, self._step = every, -1, 0

    def reset(self, seed=None):
        self._episode, self._step = self._episode + 1, 0
        return super().reset(seed)

    def start(self, action):
        self._step += 1
        if self._step == 5 and self._episode % self._every == 0:
            self._env.unwrapped.physics.data.qvel[:] = 1e12
        super().start(action)


class Agent:
    """Acts at random, learns nothing."""

    def __init__(self, space):
        self.act = lambda obs, sample: space.sample()
        self.augment = lambda batch: batch
        self.update = lambda batch, index, detailed: {"critic_loss": torch.tensor(1.0)}
        self.images, self.named_parameters = lambda batch: {}, lambda: []


def test_diverged_physics_ends_the_episode(tmp_path, capsys):
    config = parse(STATE.split())
    env = Exploding(config, 0)
    env.action_space.seed(0)
    replay = make_replay(50, (5,), 1, frame_stack=1)
    run_loop(config, env, Exploding(config, 1), replay, Agent(env.action_space), Logger(tmp_path, config))
    rows = [json.loads(line) for line in (tmp_path / "train.log").read_text().splitlines()]
    # episodes of 5 and 10 decisions in turn
    assert [(row["step"], row["physics_errors"]) for row in rows] == [(5, 1), (15, 1), (20, 2), (30, 2)]
    lines = capsys.readouterr().out
    assert re.findall(r"warning: the physics diverged at step (\d+): episode (\d)", lines) == [("5", "0"), ("20", "2")]
    assert lines.count("warning: the physics diverged in evaluation episode") == 3  # the env's 0 and 2, then its 4
    # 4 + 10 + 4 + 10 + 3 transitions are stored, each bad one is not; the first of an episode begins no pair
    assert len(replay.legal_positions()) == 3 + 9 + 3 + 9 + 2
    assert torch.isfinite(replay.gather(replay.legal_positions()).next_obs).all()


def test_diverged_physics_stops_at_ten_episodes_in_a_row():
    config = parse([*STATE.split(), "--save_video"])
    env, said = Exploding(config, 0, every=1), []
    with pytest.raises(Ending, match=f"diverged in {PHYSICS_ERRORS} episodes in a row: Physics state is invalid"):
        evaluate([env], Agent(env.action_space), 20, 0, False, said.append)
    assert len(said) == PHYSICS_ERRORS - 1
    env = Exploding(config, 0, every=2)
    returns, frames = evaluate([env], Agent(env.action_space), 30, 0, True, said.append)
    assert len(returns) == 30 and len(frames) == 4  # the first episode is a bad one


def test_a_worker_needs_no_torch():
    """torch is nearly half of a worker's memory and of its start-up time."""
    env = WorkerEnv(parse(["--image_size", "32"]), 0)
    env.reset()
    maps = {pathlib.Path(m.path).name for m in psutil.Process(env._process.pid).memory_maps()}
    env.close()
    assert any("mujoco" in name for name in maps) and not any("torch" in name for name in maps)


def test_diverged_physics_in_a_worker():
    env = WorkerEnv(parse(STATE.replace("--no_env_worker", "").split()), 0)
    for episode in range(PHYSICS_ERRORS):
        env.reset()
        env.start(np.array([np.nan], np.float32))
        if episode < PHYSICS_ERRORS - 1:
            assert env.finish() == (None, 0.0, False, True)
    with pytest.raises(Ending, match="episodes in a row: Physics state is invalid"):
        env.finish()
    env.close()


def test_an_error_in_a_worker_keeps_its_traceback(monkeypatch):
    """Only the end of its caller ends a worker without a word."""

    def finish(env):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(SerialEnv, "finish", finish)
    for ends, outcome in ((False, pytest.raises(OSError, match="Cannot allocate memory")), (True, nullcontext())):
        here, there = multiprocessing.Pipe()
        here.send((parse(STATE.split()), 5))
        if ends:
            here.close()
        else:
            here.send(("start", np.zeros(1)))
        with outcome:
            work(there)


def test_usual_camera():
    """On quadruped camera 0 is so far away that hardly a pixel moves."""
    frames = {}
    for camera in (None, 2, 0):
        env = make("quadruped", "walk", from_pixels=True, camera_id=camera)
        frames[camera] = env.reset(seed=0)[0]
        assert camera != 2 or np.array_equal(env.render().transpose(2, 0, 1), frames[2])
    assert np.array_equal(frames[None], frames[2]) and not np.array_equal(frames[None], frames[0])
    cartpole = make("cartpole", "swingup", from_pixels=True), make("cartpole", "swingup", from_pixels=True, camera_id=0)
    assert np.array_equal(*(env.reset(seed=0)[0] for env in cartpole))
    with pytest.raises(Refused, match="--camera_id 2: must be from -1 to 1 on cartpole swingup"):
        make("cartpole", "swingup", camera_id=2)


@pytest.mark.parametrize(
    "setting, line",
    [
        ("MUJOCO_EGL_DEVICE_ID=77", r"MUJOCO_EGL_DEVICE_ID=77: cannot render on that device; the devices here: 0"),
        ("MUJOCO_EGL_DEVICE_ID=gpu", r"MUJOCO_EGL_DEVICE_ID=gpu: cannot render on that device; the devices here: 0"),
        ("MUJOCO_GL=disable", r"MUJOCO_GL=disable: switches drawing off; unset it, or use one of egl, osmesa, glfw"),
        ("MUJOCO_GL=foo", r"MUJOCO_GL=foo: cannot render; use one of egl, osmesa, glfw"),
    ],
)
def test_what_cannot_draw_is_one_line(tmp_path, setting, line):
    name, value = setting.split("=")
    environment = {**os.environ, "MUJOCO_GL": "egl", name: value}
    command = [sys.executable, str(ROOT / "train.py"), "--work_dir", str(tmp_path / "w")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 2 and not (tmp_path / "w").exists()
    assert re.fullmatch(f"train.py: error: {line}.*\n", result.stderr) and len(result.stderr) <= 200
    if value == "foo":  # states need no renderer
        states = [*command, *STATE.split(), "--env_worker"]
        result = subprocess.run(states, env=environment, capture_output=True, text=True)
        assert result.returncode == 0 and result.stderr == "", result.stderr


def test_capitals_name_a_backend():
    script = (
        "import rendering; print(rendering.select_gl_backend()); from dm_control import _render; print(_render.BACKEND)"
    )
    environment = {**os.environ, "MUJOCO_GL": "EGL"}
    result = subprocess.run([sys.executable, "-c", script], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.split() == ["egl", "egl"]


@pytest.fixture(scope="session")
def triton():
    """Folder that holds the triton of PyPI's torch, fetched once."""
    folder = (
        pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")) / "cody-tests" / "triton-3.7.1"
    )
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as fresh:
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", f"{fresh}/t"]
            if subprocess.run([*pip, "triton==3.7.1"], capture_output=True).returncode:
                pytest.skip("triton==3.7.1 cannot be fetched here")
            os.rename(f"{fresh}/t", folder)
    return folder


@pytest.mark.parametrize("worker", ["--no_env_worker", "--env_worker"])
def test_runs_beside_triton(tmp_path, triton, worker):
    """Mesa's LLVM beside triton's: a segmentation fault without the import in select_gl_backend."""
    environment = {**os.environ, "PYTHONPATH": str(triton)}
    flags = (
        "--action_repeat 100 --batch_size 4 --init_steps 6 --num_train_steps 12 --eval_freq 12 --num_eval_episodes 1"
    )
    flags += f" --hidden_dim 8 --num_filters 2 --encoder_feature_dim 4 --save_model --work_dir {tmp_path} {worker}"
    command = [sys.executable, str(ROOT / "train.py"), *flags.split()]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (run,) = tmp_path.glob("*/*")
    command = [sys.executable, str(ROOT / "evaluate.py"), "--run", str(run), "--num_eval_episodes", "1"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and json.loads(result.stdout)["step"] == 12, result.stderr
