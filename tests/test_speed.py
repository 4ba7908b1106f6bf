"""The faster modes: the computations that they share or change; all else stays the same."""

import copy
import math
import pathlib
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import psutil
import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, make_replay

from agent import make_agent
from config import parse
from encoder import CachedEncoder, ConvNet
from endings import Ending, Refused
from env_worker import SerialEnv, WorkerEnv
from sac import SAC, squashed_sample
from utils import soft_update

ROOT = pathlib.Path(__file__).parent.parent


def adam(parameters, lr):
    return torch.optim.Adam(parameters, lr)


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--detach_encoder",
        "--target_augmentations 2 --critic_augmentations 3",
        "--target_augmentations 2 --critic_augmentations 3 --detach_encoder",
    ],
)
def test_joint_update_agrees_with_its_twin(small_agent, random_batch, flags):
    """Both losses from the weights before the update, one backward of their sum into the encoder, then the rest."""
    agent, detach = small_agent(f"--update_mode joint --encoder_lr 0.002 {flags}"), "--detach" in flags
    batch = agent.augment(random_batch())
    first = batch._replace(obs=batch.obs[:16], next_obs=batch.next_obs[:16])
    twin = copy.deepcopy(agent)
    torch.manual_seed(9)
    metrics = agent.update(batch, index=0)

    torch.manual_seed(9)
    y = twin.target_q(batch, twin.encoder, twin.target_encoder)
    critic_losses = []
    for obs in batch.obs.split(16):
        features = twin.encoder.convs(obs)
        q1, q2 = twin.critic(twin.encoder.head(features.detach() if detach else features), batch.action)
        critic_losses.append(((q1 - y) ** 2).mean() + ((q2 - y) ** 2).mean())
    critic_loss = sum(critic_losses) / len(critic_losses)
    features = twin.encoder.convs(first.obs)
    cody_loss, _ = twin.auxiliary.loss(first, twin.encoder.head(features), twin.encoder, twin.target_encoder)
    (critic_loss + cody_loss).backward()
    adam(twin.critic.parameters(), 1e-3).step()
    adam([p for p in twin.auxiliary.parameters() if p.requires_grad], 1e-4).step()
    adam(twin.encoder.parameters(), 2e-3).step()
    torch.testing.assert_close(metrics["critic_loss"], critic_loss.detach())
    torch.testing.assert_close(metrics["cody_loss"], cody_loss.detach())

    mu, log_std = twin.actor(features.detach())  # of the convolutions before their step
    pi, log_pi = squashed_sample(mu, log_std, torch.randn_like(mu))
    q = torch.min(*twin.critic(twin.encoder.head(features.detach()).detach(), pi))
    actor_loss = (0.1 * log_pi - q).mean()
    actor = adam(twin.actor.parameters(), 1e-3)
    actor.zero_grad()
    actor_loss.backward()
    actor.step()
    torch.testing.assert_close(metrics["actor_loss"], actor_loss.detach())
    soft_update(twin.critic, twin.target_critic, 0.01)
    soft_update(twin.encoder, twin.target_encoder, 0.05)
    soft_update(twin.auxiliary.predictor, twin.auxiliary.target_predictor, 0.05)
    for (name, ours), theirs in zip(agent.named_parameters(), twin.parameters(), strict=True):
        if name != "log_alpha":
            torch.testing.assert_close(ours, theirs, msg=name, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("agent", ["sac", "sac_ae --decoder_update_freq 2", "cody_sac --cody_objective published"])
def test_joint_update_of_every_agent(small_agent, random_batch, agent):
    agent = small_agent(f"--agent {agent} --update_mode joint")
    batch = agent.augment(random_batch())
    for index in range(3):
        before = [p.detach().clone() for p in agent.encoder.parameters()]
        metrics = agent.update(batch, index)
        assert all(torch.isfinite(value).all() for value in metrics.values())
        assert not any(torch.equal(p, b) for p, b in zip(agent.encoder.parameters(), before, strict=True))


def test_calm_steps_of_cody(small_agent, random_batch):
    """The clip is seen in Adam's first moment, the warm-up in the size of Adam's first step, which is its rate."""
    batch = random_batch()
    flags = "--cody_max_grad_norm 1e-3 --cody_warmup_updates 10"
    plain, calm = small_agent(), small_agent(flags)
    before = copy.deepcopy(calm.state_dict())
    norms = []
    for agent in (plain, calm):
        torch.manual_seed(0)
        metrics = agent.update(batch, index=1001)
        norms.append([metrics[name] for name in ("auxiliary_grad_norm", "auxiliary_encoder_grad_norm")])
    assert norms[0] == norms[1] and min(norms[0]) > 1e-2  # logged before the clip
    state = calm.auxiliary_optimizer.state
    gradients = torch.cat([moments["exp_avg"].flatten() for moments in state.values()]) / 0.1
    torch.testing.assert_close(gradients.norm(), torch.tensor(1e-3), rtol=1e-3, atol=0)
    step = (calm.auxiliary.W - before["auxiliary.W"]).abs().max()
    torch.testing.assert_close(step, torch.tensor(0.2 * 1e-4), rtol=0.1, atol=0)  # the second of ten
    for index, share in ((1001, 0.2), (1009, 1.0), (1020, 1.0)):
        calm.update(batch, index)
        rates = [group["lr"] for group in calm.auxiliary_optimizer.param_groups]
        assert rates == [share * 1e-4, share * (1e-3 + 1e-4)]


def test_calm_steps_of_cody_in_joint_mode(small_agent, random_batch):
    """The clip counts CoDy's gradient at the latent as well; the warm-up is the weight of that gradient."""
    batch = random_batch()
    moments, own = [], []
    warmup, clip = "--cody_warmup_updates 10", "--cody_max_grad_norm 1e-3"
    for flags in ("", "--agent sac", warmup, clip, f"{warmup} {clip}"):
        agent = small_agent()
        calm = small_agent(f"--update_mode joint {flags}")
        names = calm.state_dict().keys()
        calm.load_state_dict({name: value for name, value in agent.state_dict().items() if name in names})
        torch.manual_seed(0)
        calm.update(batch, index=1001)
        state = calm.encoder_optimizer.state
        moments.append(torch.cat([state[p]["exp_avg"].flatten() for p in calm.encoder.parameters()]) / 0.1)
        if "sac" not in flags:
            optimizer = calm.auxiliary_optimizer
            own.append(torch.cat([m["exp_avg"].flatten() for m in optimizer.state.values()]).norm() / 0.1)
            assert [group["lr"] for group in optimizer.param_groups] == [1e-4 * (0.2 if "warm" in flags else 1)]
    both, critic, warm, clipped, warm_and_clipped = moments
    torch.testing.assert_close(warm - critic, 0.2 * (both - critic), rtol=1e-2, atol=1e-6)
    scale = own[2] / own[0]  # one for CoDy's networks and the latent
    assert own[0] == own[1] and own[2] == own[3] < 1e-3 and 0 < scale < 0.1
    torch.testing.assert_close((clipped - critic).norm(), scale * (both - critic).norm(), rtol=2e-2, atol=0)
    torch.testing.assert_close((warm_and_clipped - critic).norm(), 0.2 * (clipped - critic).norm(), rtol=5e-2, atol=0)


def gradients_of(optimizer, parameters):
    """The gradient of an Adam's first step, from its first moment."""
    return [optimizer.state[p]["exp_avg"] / 0.1 for p in parameters]


@pytest.mark.parametrize("clip", ["", "--cody_max_grad_norm 0.05 --cody_warmup_updates 10"])
@pytest.mark.parametrize("objective", ["dynamics_kl", "published"])
@pytest.mark.parametrize("ratio, times", [(1.0, 1), (0.3, 2), (3.0, 2)])
def test_the_gradient_ratio_agrees_with_two_backwards(small_agent, random_batch, ratio, times, objective, clip):
    """Each loss goes back through an encoder of its own, and both are added at every weight."""
    flags = f"--cody_objective {objective} --critic_augmentations {times} --cody_grad_ratio {ratio} {clip}"
    agent = small_agent(f"--update_mode joint {flags}")
    batch = agent.augment(random_batch())
    first = batch._replace(obs=batch.obs[:16], next_obs=batch.next_obs[:16])
    twin = copy.deepcopy(agent)
    torch.manual_seed(9)
    metrics = agent.update(batch, index=1001, detailed=True)

    torch.manual_seed(9)
    y = twin.target_q(batch, twin.encoder, twin.target_encoder)
    latents = [twin.encoder(obs) for obs in batch.obs.split(16)]
    losses = [((q - y) ** 2).mean() for z in latents for q in twin.critic(z, batch.action)]
    weights, head = list(twin.encoder.parameters()), len(list(twin.encoder.head.parameters()))
    of_critic = torch.autograd.grad(sum(losses) / times, [*weights, *latents])
    z = twin.encoder(first.obs)
    cody_loss, _ = twin.auxiliary.loss(first, z, twin.encoder, twin.target_encoder)
    networks = [p for p in twin.auxiliary.parameters() if p.requires_grad]
    of_cody = torch.autograd.grad(cody_loss, [*weights, z, *networks])

    def norm(tensors):
        return math.sqrt(sum(float(x.double().square().sum()) for x in tensors))

    n = len(weights)
    a, c, own = norm(of_cody[n : n + 1]), norm(of_critic[n:]), norm(of_cody[n + 1 :])
    scale = ratio * c / a
    clipped = min(1, 0.05 / math.hypot(scale * a, own)) if clip else 1
    warm = 0.2 if clip else 1  # the second of ten updates
    assert metrics["cody_grad_scale"].item() == pytest.approx(scale, rel=1e-4)
    assert metrics["latent_grad_ratio"].item() == pytest.approx(a / c, rel=1e-4)
    assert metrics["cody_grad_scale_at_bound"] == 0
    of_head = norm(of_cody[n - head : n]) / norm(of_critic[n - head : n])
    assert metrics["head_grad_ratio"].item() == pytest.approx(of_head, rel=1e-4)
    for ours, g_critic, g_cody in zip(
        gradients_of(agent.encoder_optimizer, agent.encoder.parameters()), of_critic[:n], of_cody[:n], strict=True
    ):
        torch.testing.assert_close(ours, g_critic + warm * clipped * scale * g_cody, rtol=1e-3, atol=1e-5)
    networks = [p for p in agent.auxiliary.parameters() if p.requires_grad]
    for ours, g_cody in zip(gradients_of(agent.auxiliary_optimizer, networks), of_cody[n + 1 :], strict=True):
        torch.testing.assert_close(ours, clipped * g_cody, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "cody, critic, scale, at_bound",
    [(1e-9, 1.0, 1e4, 1), (0.0, 1.0, 1e4, 1), (1.0, 0.0, 0.0, 0), (0.0, 0.0, 0.0, 0)],
)
def test_the_gradient_scale_is_bounded_and_never_nan(small_agent, random_batch, cody, critic, scale, at_bound):
    """Where the gradient of CoDy's or the critic's loss is zero, or CoDy's nearly so."""
    agent = small_agent("--update_mode joint --cody_grad_ratio 1 --kl_prior none")
    agent.auxiliary.W.data.mul_(cody)
    agent.critic.Q1[-1].weight.data.mul_(critic)
    agent.critic.Q2[-1].weight.data.mul_(critic)
    metrics = agent.update(random_batch(), index=1001)
    assert metrics["cody_grad_scale"] == scale and metrics["cody_grad_scale_at_bound"] == at_bound
    assert metrics["latent_grad_ratio"] < 1e-6 or critic == 0
    assert all(torch.isfinite(p).all() for p in agent.parameters())


def test_beta2_of_codys_step(small_agent):
    agent = small_agent("--cody_beta2 0.95")
    betas = {name: {group["betas"] for group in o.param_groups} for name, o in agent.optimizers.items()}
    assert betas.pop("auxiliary_optimizer") == {(0.9, 0.95)}
    assert betas == {name: {group["betas"] for group in small_agent().optimizers[name].param_groups} for name in betas}


def test_the_warm_up_begins_with_the_first_update(tmp_path, call, monkeypatch):
    """The first update of the decision after --init_steps, which may make several."""
    rates, step = [], SAC._auxiliary_step

    def noted(agent, *args):
        step(agent, *args)
        rates.append(agent.auxiliary_optimizer.param_groups[0]["lr"])

    monkeypatch.setattr(SAC, "_auxiliary_step", noted)
    flags = "--num_train_steps 12 --init_steps 8 --updates_per_step 2 --cody_warmup_updates 5 --eval_freq 12"
    flags += f" --batch_size 4 --num_eval_episodes 1 --no_env_worker --action_repeat 100 --run_dir {tmp_path}/a"
    assert call("train.py", f"{SMALL} {flags}").returncode == 0
    assert rates == [1e-4 * min(1, i / 5) for i in range(1, 9)]


def test_the_flag_of_strides_reaches_the_agent(small_agent):
    for flags, strides in (("", [2, 1]), ("--num_strided_layers 0", [1, 1]), ("--num_strided_layers 2", [2, 2])):
        assert [layer.stride[0] for layer in small_agent(flags).encoder.convs.layers] == strides


@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_bf16_is_near_fp32_and_parameters_stay_fp32(offset):
    torch.manual_seed(0)
    fp32 = ConvNet((9, 40, 40), 4, 16, offset=offset)
    bf16 = ConvNet((9, 40, 40), 4, 16, offset=offset, dtype=torch.bfloat16)
    bf16.load_state_dict(fp32.state_dict())
    obs = torch.randint(0, 256, (8, 9, 40, 40), dtype=torch.uint8)
    a, b = fp32(obs), bf16(obs)
    assert a.dtype == b.dtype == torch.float32 and not torch.equal(a, b)
    assert F.cosine_similarity(a, b).min() > 0.999
    b.square().sum().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in bf16.parameters())


@pytest.mark.parametrize("num_strided, strides", [(0, (1, 1, 1)), (1, (2, 1, 1)), (2, (2, 2, 1))])
def test_convolutions_agree_with_plain_ones_on_scaled_pixels(num_strided, strides):
    torch.manual_seed(0)
    net = ConvNet((9, 40, 40), 3, 8, num_strided, offset=0.5)
    obs = torch.randint(0, 256, (4, 9, 40, 40), dtype=torch.uint8)
    h = obs / 255 - 0.5
    for layer, stride in zip(net.layers, strides, strict=True):
        h = torch.relu(F.conv2d(h, layer.weight.contiguous(), layer.bias, stride))
    torch.testing.assert_close(net(obs), h.permute(0, 2, 3, 1).flatten(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target, critic", [(1, 1), (2, 3)])
@pytest.mark.parametrize("index", [1, 2])
def test_conv_passes_of_one_update(small_agent, random_batch, index, target, critic):
    """o_t before and after the critic's step, o_{t+1} online, targets of o_{t+1} and o_{t-1}; the targets' features of
    o_{t+1} a second time only where an EMA step comes between. Only critic and target use further augmentations."""
    expected = {
        "sequential": [critic, 1, target, target, 1] + [1] * (index == 2),
        "joint": [critic, target, target, 1],
    }
    for mode, passes in expected.items():
        flags = f"--target_augmentations {target} --critic_augmentations {critic} --update_mode {mode}"
        agent, seen = small_agent(flags), []
        for encoder in (agent.encoder, agent.target_encoder):
            encoder.convs.register_forward_hook(lambda module, args, out, seen=seen: seen.append(len(args[0]) / 16))
        agent.update(agent.augment(random_batch()), index)
        assert sorted(seen) == sorted(passes)


def test_cached_encoder(small_agent, random_batch):
    encoder, batch = small_agent().encoder, random_batch()
    cached = CachedEncoder(encoder)
    first = cached.convs(batch.obs)
    assert not first.requires_grad
    seen = []
    encoder.convs.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    for part in (batch.obs, batch.obs[:5]):
        assert cached.convs(part).data_ptr() == first.data_ptr() and cached(part).shape == (len(part), 8)
        assert torch.equal(cached(part), cached(batch.obs)[: len(part)])
    assert seen == []
    assert torch.equal(cached(batch.obs[5:]), encoder(batch.obs[5:])) and seen == [11, 11]
    assert torch.equal(cached(batch.next_obs), encoder(batch.next_obs))


def test_features_are_channels_last_from_storage_on(small_agent):
    """No copy hides between the sampled frames and the convolution."""
    replay = make_replay(50, (3, 20, 20), 2)
    for i in range(30):
        frame = torch.full((9, 20, 20), i, dtype=torch.uint8)
        replay.begin_episode(frame) if i % 10 == 0 else replay.add([0, 0], 0, frame, False)
    agent = small_agent()
    obs = agent.augment(replay.sample(4)).obs
    assert obs.dtype == torch.uint8 and obs.is_contiguous(memory_format=torch.channels_last)
    for layer in agent.encoder.convs.layers:
        assert layer.weight.is_contiguous(memory_format=torch.channels_last)


def test_precision_reaches_the_agent(small_agent, random_batch):
    obs = random_batch().obs
    fp32, bf16 = (small_agent(f"--precision {precision}") for precision in ("fp32", "bf16"))
    assert (fp32.encoder.convs.dtype, bf16.target_encoder.convs.dtype) == (torch.float32, torch.bfloat16)
    assert not torch.equal(fp32.encoder(obs), bf16.encoder(obs))


def test_worker_steps_beside_its_caller():
    """`start` returns before the step is made, and `finish` returns the same as the environment in this process."""
    config = parse(["--action_repeat", "10", "--image_size", "32", "--save_video"])
    here, there = SerialEnv(config, 5), WorkerEnv(config, 5)
    assert (here.observation_space, here.action_space) == (there.observation_space, there.action_space)
    assert np.array_equal(here.reset(seed=7), there.reset(seed=7))
    action = here.action_space.sample()
    here.start(action)
    expected = here.finish()
    worker = psutil.Process(there._process.pid)
    worker.suspend()
    while worker.status() != psutil.STATUS_STOPPED:  # the signal takes a moment on a busy machine
        time.sleep(0.001)
    late = threading.Timer(10, worker.resume)  # a `start` that waits for the step would wait for this
    late.start()
    there.start(action)
    assert worker.status() == psutil.STATUS_STOPPED
    late.cancel()
    worker.resume()
    obs, *rest = there.finish()
    assert np.array_equal(obs, expected[0]) and rest == list(expected[1:])
    assert np.array_equal(here.draw(), there.draw())
    there.close()


def test_a_worker_that_dies_ends_the_run():
    """In the middle of a step, and at each use after that."""
    env = WorkerEnv(parse(["--action_repeat", "10", "--image_size", "32"]), 5)
    env.reset()
    env.start(env.action_space.sample())
    env._process.kill()
    for use in (env.finish, env.reset, env.state_dict):
        with pytest.raises(Ending, match="an environment worker has died with exit code -9"):
            use()


def test_what_the_worker_cannot_make_is_the_callers_error():
    worker = WorkerEnv(parse(["--task_name", "swingdown"]), 5)
    with pytest.raises(Refused, match="--task_name swingdown: no such task"):
        worker.reset()


def test_keep_freed_memory_ends_page_faults():
    """The kernel's page faults show that a freed block is reused, not mapped again."""
    script = (
        "import resource, sys, torch\n"
        "from machine import keep_freed_memory\n"
        "if sys.argv[1] == 'kept': keep_freed_memory()\n"
        "for i in range(40):\n"  # the heap needs some rounds to find its shape
        "    if i == 30: before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    torch.ones(16 * 2**20)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
    )
    faults = {}
    for kept in ("kept", "default"):
        command = [sys.executable, "-c", script, kept]
        faults[kept] = int(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout)
    assert faults["kept"] < faults["default"] / 10  # ten blocks are 163,840 pages of 4 KB


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler on CPU")
@pytest.mark.parametrize("mode", ["sequential", "joint --cody_grad_ratio 1"])
def test_compiled_updates_agree(small_agent, random_batch, tmp_path, monkeypatch, mode):
    # torch's usual cache may hold code for another instruction set, which gives NaN instead of an error
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    flags = f"--num_filters 8 --update_mode {mode}"
    plain, compiled, batch = small_agent(flags), small_agent(f"{flags} --compile"), random_batch()
    assert compiled.encoder.convs._compiled_call_impl and not plain.encoder.convs._compiled_call_impl
    torch._dynamo.reset()  # compiled by an earlier test
    torch._dynamo.utils.counters.clear()
    for index in range(2):
        torch.manual_seed(index)
        expected = plain.update(batch, index, detailed=True)
        torch.manual_seed(index)
        metrics = compiled.update(batch, index, detailed=True)
        for name in {"critic_loss", "cody_loss", "head_grad_ratio"} & {*metrics}:
            torch.testing.assert_close(metrics[name], expected[name], rtol=1e-3, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 5
    assert compiled.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("storage", ["cpu", "cuda"])
@pytest.mark.parametrize(
    "flags",
    [
        *("", "--update_mode joint", "--precision bf16", "--update_mode joint --compile"),
        "--update_mode joint --target_augmentations 2 --cody_max_grad_norm 1 --cody_warmup_updates 9",
    ],
)
def test_updates_never_wait_for_the_gpu(storage, flags):
    """Only acting waits for the device, which computes its action."""
    device = torch.device("cuda")
    replay = make_replay(200, (3, 84, 84), 2, episode_steps=50, device=device, replay_device=storage)
    for i in range(100):
        frame = torch.zeros(9, 84, 84, dtype=torch.uint8)
        replay.begin_episode(frame) if i % 50 == 0 else replay.add([0, 0], 0, frame, False)
    agent = make_agent(parse(flags.split()), (9, 84, 84), 2, device)
    for index in range(4):  # the first calls of a library may wait
        agent.update(agent.augment(replay.sample(32)), index)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for index in range(4):
            replay.add([0, 0], 0, frame, False)
            agent.update(agent.augment(replay.sample(32)), index)
    finally:
        torch.cuda.set_sync_debug_mode("default")
