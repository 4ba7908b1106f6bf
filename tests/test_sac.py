"""SAC's losses, targets, update order and initialisation."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.distributions import Independent, Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

from replay_buffer import Batch
from sac import squashed_sample
from utils import mlp, soft_update, weight_init


def parameters(module):
    return [p.detach().clone() for p in module.parameters()]


def changed(module, before):
    return [not torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True)]


def test_log_pi_agrees_with_tanh_transform():
    torch.manual_seed(0)
    mu, log_std = torch.randn(2, 64, 3, dtype=torch.float64) * 0.5
    noise = torch.randn(64, 3, dtype=torch.float64)
    pi, log_pi = squashed_sample(mu, log_std, noise)
    policy = TransformedDistribution(Independent(Normal(mu, log_std.exp()), 1), TanhTransform())
    unsaturated = (pi.abs() < 0.99).all(1)  # beyond, the guard of 1e-6 inside the log shows
    assert unsaturated.sum() > 40
    expected = policy.log_prob(pi)[unsaturated]
    torch.testing.assert_close(log_pi.squeeze(1)[unsaturated], expected, rtol=1e-4, atol=1e-4)


def test_log_std_range(small_agent, random_batch):
    agent = small_agent("--actor_log_std_min -3 --actor_log_std_max 1")
    agent.actor.trunk[-1].weight.data *= 1e4
    log_std = agent.actor(agent.encoder.convs(random_batch().obs))[1]
    assert log_std.min() >= -3 and log_std.max() <= 1
    assert log_std.min() < -2.9 and log_std.max() > 0.9


@pytest.mark.parametrize("not_done", [1.0, 0.0])
def test_target_q(small_agent, random_batch, not_done):
    """y = r + gamma * not_done * (min Q_target(o', a') - alpha log pi(a'|o')), written out."""
    agent = small_agent()
    batch = random_batch()._replace(not_done=torch.full((16, 1), not_done))
    torch.manual_seed(5)
    y = agent.target_q(batch, agent.encoder, agent.target_encoder)
    torch.manual_seed(5)
    with torch.no_grad():
        mu, log_std = agent.actor(agent.encoder.convs(batch.next_obs))
        u = mu + log_std.exp() * torch.randn_like(mu)
        log_pi = Normal(mu, log_std.exp()).log_prob(u) - torch.log(1 - torch.tanh(u) ** 2 + 1e-6)
        z_a = torch.cat([agent.target_encoder(batch.next_obs), torch.tanh(u)], dim=1)
        q = torch.minimum(agent.target_critic.Q1(z_a), agent.target_critic.Q2(z_a))
        expected = batch.reward + 0.99 * not_done * (q - 0.1 * log_pi.sum(1, keepdim=True))
    torch.testing.assert_close(y, expected)
    assert not y.requires_grad


def test_losses_and_update_order(small_agent, random_batch):
    """Critic step, then actor and temperature on the new critic, then EMA, then the auxiliary step."""
    agent, batch = small_agent(), random_batch()
    twin = copy.deepcopy(agent)
    for module, old in (("encoder", agent.encoder), ("critic", agent.critic), ("actor", agent.actor)):
        assert all(a is not b for a, b in zip(getattr(twin, module).parameters(), old.parameters(), strict=True))
    torch.manual_seed(9)
    metrics = agent.update(batch, index=0)

    torch.manual_seed(9)
    y = twin.target_q(batch, twin.encoder, twin.target_encoder)
    q1, q2 = twin.critic(twin.encoder(batch.obs), batch.action)
    critic_loss = ((q1 - y) ** 2).mean() + ((q2 - y) ** 2).mean()
    optimizer = torch.optim.Adam([*twin.encoder.parameters(), *twin.critic.parameters()], 1e-3)
    critic_loss.backward()
    optimizer.step()
    torch.testing.assert_close(metrics["critic_loss"], critic_loss.detach())

    mu, log_std = twin.actor(twin.encoder.convs(batch.obs).detach())
    pi, log_pi = squashed_sample(mu, log_std, torch.randn_like(mu))
    q = torch.min(*twin.critic(twin.encoder(batch.obs).detach(), pi))
    actor_loss = (0.1 * log_pi - q).mean()
    optimizer = torch.optim.Adam(twin.actor.parameters(), 1e-3)
    actor_loss.backward()
    optimizer.step()
    torch.testing.assert_close(metrics["actor_loss"], actor_loss.detach())
    alpha_loss = (0.1 * (-log_pi.detach() + 2)).mean()  # target entropy -|A| = -2
    torch.testing.assert_close(metrics["alpha_loss"], alpha_loss)

    soft_update(twin.critic, twin.target_critic, 0.01)
    soft_update(twin.encoder, twin.target_encoder, 0.05)
    soft_update(twin.auxiliary.predictor, twin.auxiliary.target_predictor, 0.05)

    twin.zero_grad()
    z = twin.encoder(batch.obs)
    loss, _ = twin.auxiliary.loss(batch, z, twin.encoder, twin.target_encoder)
    loss.backward()
    torch.optim.Adam(twin.encoder.parameters(), 1.1e-3).step()
    torch.optim.Adam([p for p in twin.auxiliary.parameters() if p.requires_grad], 1e-4).step()
    torch.testing.assert_close(metrics["cody_loss"], loss.detach())

    for (name, ours), theirs in zip(agent.named_parameters(), twin.parameters(), strict=True):
        if name == "log_alpha":
            assert math.isclose(ours.item(), math.log(0.1) - 1e-4 * torch.sign(alpha_loss), rel_tol=1e-5)
        else:
            torch.testing.assert_close(ours, theirs, msg=name)


def test_odd_updates_leave_actor_temperature_and_targets(small_agent, random_batch):
    agent, batch = small_agent(), random_batch()
    still = (agent.actor, agent.target_encoder, agent.target_critic, agent.auxiliary.target_predictor)
    before = [parameters(module) for module in still]
    alpha = agent.log_alpha.item()
    metrics = agent.update(batch, index=1)
    assert not any(any(changed(module, old)) for module, old in zip(still, before, strict=True))
    assert agent.log_alpha.item() == alpha and "actor_loss" not in metrics
    agent.update(batch, index=2)
    assert all(any(changed(module, old)) for module, old in zip(still, before, strict=True))
    assert agent.log_alpha.item() != alpha


def test_actor_loss_reaches_only_the_actor(small_agent, random_batch):
    agent, batch = small_agent(), random_batch()
    encoder, critic, actor = (parameters(m) for m in (agent.encoder, agent.critic, agent.actor))
    agent._update_actor(agent.encoder.convs(batch.obs).detach())
    assert not any(changed(agent.encoder, encoder)) and not any(changed(agent.critic, critic))
    assert all(changed(agent.actor, actor))
    # the convolutions are one set of parameters, and not the actor's
    assert not any("conv" in name for name, _ in agent.actor.named_parameters())


@pytest.mark.parametrize("mode", ["sequential", "joint"])
def test_detach_encoder_stops_the_critic_at_the_convolutions(small_agent, random_batch, mode):
    agent, batch = small_agent(f"--agent sac --detach_encoder --update_mode {mode}"), random_batch()
    convs, head = parameters(agent.encoder.convs), parameters(agent.encoder.head)
    agent.update(batch, index=1)
    assert not any(changed(agent.encoder.convs, convs)) and all(changed(agent.encoder.head, head))


def test_targets_start_equal_and_follow_at_their_own_rates(small_agent, random_batch):
    agent = small_agent()
    for online, target in ((agent.encoder, agent.target_encoder), (agent.critic, agent.target_critic)):
        assert not any(changed(target, parameters(online)))
    assert not any(p.requires_grad for m in (agent.target_encoder, agent.target_critic) for p in m.parameters())

    agent, batch = small_agent("--agent sac --critic_tau 0.2 --encoder_tau 0.7"), random_batch()
    before = [parameters(agent.target_encoder), parameters(agent.target_critic)]
    agent.update(batch, index=1)
    assert not any(changed(agent.target_encoder, before[0]) + changed(agent.target_critic, before[1]))
    agent.update(batch, index=2)
    for tau, online, target, old in (
        (0.7, agent.encoder, agent.target_encoder, before[0]),
        (0.2, agent.critic, agent.target_critic, before[1]),
    ):
        expected = [(1 - tau) * t + tau * n for t, n in zip(old, parameters(online), strict=True)]
        torch.testing.assert_close(parameters(target), expected)


def test_soft_update():
    net, target = mlp(3, 4, 2, 1), mlp(3, 4, 2, 1)
    expected = [0.9 * t + 0.1 * n for t, n in zip(parameters(target), parameters(net), strict=True)]
    soft_update(net, target, 0.1)
    torch.testing.assert_close(parameters(target), expected)


def test_weight_init():
    torch.manual_seed(0)
    linear = nn.Linear(30, 12).apply(weight_init)
    torch.testing.assert_close(linear.weight @ linear.weight.T, torch.eye(12), rtol=0, atol=1e-5)
    conv = nn.Conv2d(8, 8, 3).apply(weight_init)
    tap = conv.weight[:, :, 1, 1]
    torch.testing.assert_close(tap @ tap.T, 2 * torch.eye(8), rtol=0, atol=1e-5)  # gain sqrt(2)
    conv.weight.data[:, :, 1, 1] = 0
    assert not conv.weight.any() and not conv.bias.any() and not linear.bias.any()


def test_orthogonal_convolutions(small_agent):
    """Over the whole kernel, as DrQ's; nothing else is drawn differently, and targets start equal."""
    agent, usual = small_agent("--conv_init orthogonal"), small_agent()
    for name, ours in agent.state_dict().items():
        if name.endswith("weight") and "convs" in name:
            flat = ours.flatten(1)
            torch.testing.assert_close(flat @ flat.T, 2 * torch.eye(4), rtol=0, atol=1e-5)
            assert ours[:, :, 0, 0].any() and torch.equal(ours, agent.state_dict()[name.replace("target_", "")])
        else:
            assert torch.equal(ours, usual.state_dict()[name])


def test_acting(small_agent):
    agent = small_agent("--pre_transform_image_size 24")
    obs = torch.randint(0, 256, (9, 24, 24), dtype=torch.uint8)
    with torch.no_grad():
        mean = torch.tanh(agent.actor(agent.encoder.convs(obs[None, :, 2:22, 2:22]))[0])[0]
    state = torch.get_rng_state()
    assert torch.equal(torch.as_tensor(agent.act(obs.numpy(), sample=False)), mean)
    assert torch.equal(torch.get_rng_state(), state)  # an evaluation does not disturb the training noise
    samples = {tuple(agent.act(obs.numpy(), sample=True)) for _ in range(3)}
    assert len(samples) == 3


def test_each_observation_is_augmented_independently(small_agent):
    agent = small_agent()
    image = torch.randint(0, 256, (1, 9, 20, 20), dtype=torch.uint8).expand(32, -1, -1, -1)
    nothing = torch.zeros(32, 1)
    batch = agent.augment(Batch(image, nothing, image, nothing, nothing, image, nothing))
    assert batch.obs.shape == image.shape
    for a, b in ((batch.obs_prev, batch.obs), (batch.obs, batch.next_obs), (batch.obs_prev, batch.next_obs)):
        assert not torch.equal(a, b)
    assert batch.action is nothing


def test_random_crop_is_used_when_frames_are_larger(small_agent):
    agent = small_agent("--pre_transform_image_size 24")
    image = torch.randint(0, 256, (4, 9, 24, 24), dtype=torch.uint8)
    assert agent._augment(image).shape == (4, 9, 20, 20)
