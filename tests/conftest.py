"""Shared by the tests: small agents and random batches."""

import dataclasses
import importlib
import signal
import sys
import types

import gymnasium
import numpy as np
import pytest
import torch

import rendering
import train
from agent import make_agent
from config import Config, complete, parse
from replay_buffer import Batch, ReplayBuffer

rendering.select_gl_backend()
import dm_control.suite  # noqa: E402, F401  before a test imports it as sweep.py does, without a renderer

for number, handler in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
    if signal.getsignal(number) == signal.SIG_IGN:  # as under nohup, and in the background of a script; it is inherited
        signal.signal(number, handler)

SMALL = "--encoder_feature_dim 8 --hidden_dim 32 --num_filters 4 --image_size 20 --num_layers 2 --action_repeat 4"


def make_replay(capacity, frame_shape, action_dim, frame_stack=3, episode_steps=10, device="cpu", **flags):
    """A replay of `capacity` transitions in episodes of `episode_steps`, for frames (C, H, W), or states (n,)."""
    sizes = {"replay_buffer_capacity": capacity, "num_train_steps": capacity, "action_repeat": 1000 // episode_steps}
    config = dataclasses.replace(complete(Config()), frame_stack=frame_stack, **sizes, **flags)
    shape = (frame_stack * frame_shape[0], *frame_shape[1:])
    pixels = len(shape) == 3
    space = gymnasium.spaces.Box(0, 255, shape, np.uint8 if pixels else np.float32)
    return ReplayBuffer(config, space, action_dim, torch.device(device))


def run_loop(config, env, eval_env, replay, agent, logger):
    """The training loop of train.py around these parts, without a folder."""
    replay.check_memory = lambda: None
    folder = types.SimpleNamespace(tick=lambda step: None)
    checkpoints = types.SimpleNamespace(save_if_due=lambda evaluated=False: None)
    replay.begin_episode(env.reset())
    train.Run(config, folder, env, [eval_env], replay, agent, logger, train.Progress(), checkpoints).train()


@pytest.fixture
def call(monkeypatch, capsys):
    """Factory: `call("train.py", flags)` is that command in this process, without the seconds that a new one takes to
    import torch and to find out what draws; its exit code, stdout and stderr."""

    def command(script, flags):
        module = importlib.import_module(script.removesuffix(".py"))
        monkeypatch.setattr(sys, "argv", [script, *flags.split()])
        capsys.readouterr()
        code = None
        try:
            module.main()
        except SystemExit as exit_:
            code = exit_.code
        out, err = capsys.readouterr()
        if isinstance(code, str):  # what Python does with sys.exit("words")
            code, err = 1, f"{err}{code}\n"
        return types.SimpleNamespace(returncode=code or 0, stdout=out, stderr=err)

    return command


@pytest.fixture
def small_agent():
    """Factory: flags -> agent with small networks and two actions."""

    def make(flags="", seed=0, obs_shape=(9, 20, 20)):
        torch.manual_seed(seed)
        return make_agent(parse(f"{SMALL} {flags}".split()), obs_shape, 2, torch.device("cpu"))

    return make


@pytest.fixture
def random_batch():
    """Factory: B -> `Batch` of noise for `small_agent`."""

    def make(n=16, seed=0):
        g = torch.Generator().manual_seed(seed)
        images = torch.randint(0, 256, (3, n, 9, 20, 20), dtype=torch.uint8, generator=g)
        actions = torch.rand(2, n, 2, generator=g) * 2 - 1
        reward = torch.rand(n, 1, generator=g)
        not_done = torch.ones(n, 1)
        return Batch(images[0], actions[0], images[1], actions[1], reward, images[2], not_done)

    return make
