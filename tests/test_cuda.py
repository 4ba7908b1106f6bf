"""CUDA without a GPU: updates on the meta device, graphs of torch.compile, the GPU that draws, shares of its memory."""

import functools
import json
import os
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gymnasium.spaces import Box
from test_train import STATE

import cody
import encoder
import rendering
from agent import make_agent
from config import parse
from endings import Refused
from replay_buffer import ReplayBuffer

SMALL = "--batch_size 8 --replay_buffer_capacity 40 --num_filters 4 --hidden_dim 16 --encoder_feature_dim 8"
ROWS = [
    *(f"--update_mode {mode} {rest}" for mode in ("sequential", "joint") for rest in (
        "", "--agent sac", "--agent sac_ae", "--cody_objective published", "--detach_encoder",
        "--target_augmentations 2 --critic_augmentations 3", "--cody_warmup_updates 50 --cody_max_grad_norm 1",
    )),
    "--update_mode joint --cody_grad_ratio 1 --num_strided_layers 2 --conv_init orthogonal",
    "--kl_prior shared --key_encoder online --reward_prediction regression --action_encoder --projection linear",
    "--kl_prior unit_gaussian --encoder_type protorl --pre_transform_image_size 100",
    "--kl_prior none --precision bf16 --deterministic",
]  # fmt: skip


SLIPS = {
    "a factory without device": lambda logits: F.cross_entropy(logits, torch.arange(len(logits))),
    "a random number of the CPU": lambda logits: (logits * torch.rand(len(logits))).mean(),
    "a value read on the host": lambda logits: logits.mean() * logits.mean().item(),
    "a branch on a value": lambda logits: logits.mean() if logits.isfinite().all() else logits.sum(),
    "a boolean mask": lambda logits: logits[logits > 0].mean(),
}


@pytest.fixture
def meta(monkeypatch):
    """Let the agent run on the meta device: no fused Adam there, and all tensors have the address 0."""
    adam = torch.optim.Adam
    monkeypatch.setattr(torch.optim, "Adam", lambda *args, fused, **kwargs: adam(*args, **kwargs))

    @torch.no_grad()
    def once(self, function, x):
        for known_function, known, result in self._seen:
            if known_function is function and known is x:
                return result
        self._seen.append((function, x, function(x)))
        return self._seen[-1][2]

    monkeypatch.setattr(encoder.CachedEncoder, "_once", once)


def run_updates(flags, device):
    """Two updates, as a run makes them, and the images of the second."""
    config = parse(f"{SMALL} {flags}".split())
    size = config.pre_transform_image_size
    replay = ReplayBuffer(config, Box(0, 255, (9, size, size), np.uint8), 1, torch.device(device))
    frame = np.zeros((9, size, size), np.uint8)
    replay.begin_episode(frame)
    for _ in range(20):
        replay.add(np.zeros(1), 1.0, frame, False)
    agent = make_agent(config, (9, size, size), 1, torch.device(device))
    for index in (0, 1):
        batch = agent.augment(replay.sample(config.batch_size))
        detailed = index == 0 and config.agent != "sac_ae"  # whose PSNR and SSIM are computed on the host
        metrics = agent.update(batch, index, detailed)
        assert {value.device.type for value in metrics.values()} == {device}
    agent.images(batch)


@pytest.mark.parametrize("flags", ROWS)
def test_an_update_stays_on_its_device(meta, flags):
    """Meta tensors have no values, so an update that waits for the device, or mixes devices, fails."""
    run_updates(flags, "meta")


@pytest.mark.parametrize("slip", SLIPS)
def test_the_meta_device_catches(meta, monkeypatch, slip):
    monkeypatch.setattr(cody, "info_nce", SLIPS[slip])
    with pytest.raises((RuntimeError, NotImplementedError)):
        run_updates("", "meta")


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--update_mode joint",
        "--cody_objective published",
        "--target_augmentations 3 --critic_augmentations 2",
        "--update_mode joint --target_augmentations 3 --critic_augmentations 2",
    ],
)
def test_compiled_networks_stay_compiled(monkeypatch, flags):
    """torch.compile runs a function eagerly, silently, once it has seen it with too many shapes."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **kwargs: compile_(self, dynamic=False, backend=backend)
    )
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        run_updates(f"--compile {flags}", "cpu")
    assert 10 <= len(graphs) <= 24


@pytest.fixture
def gl(monkeypatch):
    """A machine on which EGL, without a choice or on a device that can draw, works."""
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.delenv("MUJOCO_EGL_DEVICE_ID", raising=False)
    monkeypatch.setattr(rendering, "sys", types.SimpleNamespace(modules={}, platform="linux"))  # before dm_control
    monkeypatch.setattr(rendering, "renderer", functools.cache(lambda backend: "works"))
    yield
    os.environ.pop("MUJOCO_EGL_DEVICE_ID", None)


@pytest.mark.parametrize(
    "numbers, device",
    [
        ([2, 1, 0, 5], "2"),  # as on the machine of mujoco#3245
        ([0, None], "0"),
        ([None, 0], "1"),
        ([3, 1], None),  # the run's own GPU is hidden from EGL
        ([None], None),
        ([], None),
    ],
)
def test_frames_are_drawn_on_the_gpu_of_the_run(gl, monkeypatch, numbers, device):
    monkeypatch.setattr(rendering, "egl_devices", lambda: numbers)
    assert rendering.select_gl_backend(cuda=True) == "egl"
    assert os.environ.get("MUJOCO_EGL_DEVICE_ID") == device


def test_a_gpu_that_cannot_draw_is_not_chosen(gl, monkeypatch):
    monkeypatch.setattr(rendering, "egl_devices", lambda: [None, 0])
    only_mesa = functools.cache(lambda backend: None if "MUJOCO_EGL_DEVICE_ID" in os.environ else "llvmpipe")
    monkeypatch.setattr(rendering, "renderer", only_mesa)
    assert rendering.select_gl_backend(cuda=True) == "egl" and "MUJOCO_EGL_DEVICE_ID" not in os.environ


def test_a_choice_of_the_user_and_a_run_on_the_cpu_are_left_alone(gl, monkeypatch):
    monkeypatch.setattr(rendering, "egl_devices", lambda: [1, 0])
    rendering.select_gl_backend()
    assert "MUJOCO_EGL_DEVICE_ID" not in os.environ
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "0")
    rendering.select_gl_backend(cuda=True)
    assert os.environ["MUJOCO_EGL_DEVICE_ID"] == "0"


def test_egl_devices_here():
    """Mesa's software device is none of CUDA's; the query itself works."""
    assert all(number is None or number >= 0 for number in rendering.egl_devices())
    if rendering.renderer("egl"):
        assert rendering.egl_devices()


@pytest.mark.parametrize("free, runs, place", [(80e9, 1, "cuda"), (80e9, 32, "cpu"), (3e9, 1, "cpu"), (9e9, 4, "cuda")])
def test_the_replay_shares_a_gpu(monkeypatch, free, runs, place):
    """2.1 GB of frames go to the GPU if they take less than half of this run's share beyond the networks."""
    chosen = []

    def refuse(slots, shape, dtype, device):
        chosen.append(device.type)
        raise torch.OutOfMemoryError("CUDA out of memory: no GPU here")

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80e9))
    monkeypatch.setattr("replay_buffer.RawFrames", refuse)
    monkeypatch.setenv("CODY_RUNS_PER_GPU", str(runs))
    with pytest.raises(Refused):
        ReplayBuffer(parse([]), Box(0, 255, (9, 84, 84), np.uint8), 1, torch.device("cuda"))
    assert chosen == [place]


def test_tf32_needs_cuda(tmp_path, call, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = call("train.py", f"--precision tf32 --work_dir {tmp_path}/runs")
    line = "train.py: error: --precision tf32: the networks run on cpu, which has no TF32; use fp32 or bf16\n"
    assert (result.returncode, result.stderr) == (2, line) and not list(tmp_path.iterdir())
    sweep = f"--name a --work_dir {tmp_path} --variant fp32:--seed=1 --variant tf32:--precision=tf32 --"
    result = call("sweep.py", sweep)
    assert result.returncode == 2 and "--precision tf32: the networks" in result.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_tf32_is_on_only_if_asked_for(precision):
    make_agent(parse(f"{SMALL} --precision {precision}".split()), (9, 84, 84), 1, torch.device("cpu"))
    on = precision == "tf32"
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == (on, on)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def test_deterministic_on_a_cpu(tmp_path, call):
    """Accepted there, where it changes nothing; a run keeps it."""
    flags = f"{STATE} --device cpu --num_train_steps 20 --deterministic --run_dir {tmp_path}/a"
    result = call("train.py", flags)
    assert result.returncode == 0 and " in fp32, deterministic, " in result.stdout
    assert json.loads((tmp_path / "a/args.json").read_text())["deterministic"] is True
    assert not torch.are_deterministic_algorithms_enabled()
    result = call("train.py", f"--no_deterministic --num_train_steps 30 --run_dir {tmp_path}/a")
    assert result.returncode == 2 and "--deterministic False: the run has True" in result.stderr


def test_deterministic_on_cuda(monkeypatch):
    """What make_agent asks of torch, with a stand-in for the agent, since there is no GPU."""
    monkeypatch.setattr("agent.SAC", lambda *args: None)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        make_agent(parse(["--deterministic"]), (9, 84, 84), 1, torch.device("cuda"))
        assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = True
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
