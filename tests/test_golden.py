"""The project's own classes reproduce numbers computed with the released code.

`update_small.npz` holds one batch of 6 pairs of transitions, all parameters of a small agent (4 filters, d = 8,
hidden width 32, |A| = 2, action repeat 4, omega 0.001) and what the released code computes from them in float32.
`updates_small.npz` holds four whole updates of the released agent: one batch (one of its transitions with not_done 0),
every noise that was drawn, losses, and parameters before and after (omega 0.1).
"""

import pathlib

import numpy as np
import pytest
import torch

from agent import make_agent
from cody import contrastive_logits, info_nce, kl_divergence
from config import parse
from replay_buffer import Batch
from sac import SAC, squashed_sample

HERE = pathlib.Path(__file__).parent
GOLDEN, UPDATES = (
    {key: torch.as_tensor(value) for key, value in np.load(HERE / name).items()}
    for name in ("update_small.npz", "updates_small.npz")
)
FLAGS = "--encoder_feature_dim 8 --hidden_dim 32 --num_filters 4 --action_repeat 4 --batch_size 6"
BATCH = "obs_prev action_prev obs action reward next_obs not_done".split()


def channels_last(weight):
    """Columns of a linear layer on conv features: from the released order (C, H, W) to ours, (H, W, C)."""
    if weight.dim() != 2 or weight.shape[1] != 4 * 35 * 35:
        return weight
    return weight.unflatten(1, (4, 35, 35)).permute(0, 2, 3, 1).flatten(1)


def golden_agent(golden, when="before", flags="") -> SAC:
    """Our agent with the released agent's parameters <when>/*."""
    agent = make_agent(parse([*FLAGS.split(), *flags.split()]), (9, 84, 84), 2, torch.device("cpu"))

    def load(module, prefix, renamed=()):
        """`renamed`: (theirs, ours) parts of names."""
        state = {}
        for name, value in golden.items():
            if name.startswith(f"{when}/{prefix}.") and ".encoder.net." not in name:
                name = name.removeprefix(f"{when}/{prefix}.")
                for theirs, ours in renamed:
                    name = name.replace(theirs, ours)
                state[name] = channels_last(value)
        module.load_state_dict(state)

    for name, encoder, critic in (
        ("critic", agent.encoder, agent.critic),
        ("critic_target", agent.target_encoder, agent.target_critic),
    ):
        load(encoder, f"{name}.encoder", [("convs.", "convs.layers."), ("fc.", "head.fc."), ("ln.", "head.ln.")])
        load(critic.Q1, f"{name}.Q1.trunk")
        load(critic.Q2, f"{name}.Q2.trunk")
    load(agent.actor.head.fc, "actor.encoder.fc")
    load(agent.actor.head.ln, "actor.encoder.ln")
    load(agent.actor.trunk, "actor.trunk")
    renamed = [("fc1.", "posterior."), ("fc2.", "prior."), ("predictor_target.", "target_predictor.")]
    load(agent.auxiliary, "cody", renamed)
    agent.log_alpha.data.fill_(golden[f"{when}/log_alpha"])
    return agent


@pytest.fixture
def agent():
    return golden_agent(GOLDEN)


@pytest.fixture
def batch():
    return Batch(**{name: GOLDEN[name] for name in BATCH})


def check(value, name, rtol=1e-4, slack=0.01):
    """Agreement to `rtol`; elements below `slack` times the largest are held to that size's absolute error.

    Gradients need slack 1: their small elements are sums that cancel, which float32 (the golden values' too: in
    float64 they differ as much) cannot give to 1e-4.
    """
    expected = channels_last(GOLDEN[f"out/{name}"])
    atol = rtol * slack * expected.abs().max().item()
    torch.testing.assert_close(value.detach(), expected.to(value.dtype), rtol=rtol, atol=atol)


def test_latents(agent, batch):
    check(agent.encoder(batch.obs), "latent")
    check(agent.target_encoder(batch.next_obs), "target_latent_next")
    check(agent.target_encoder(batch.obs_prev), "target_latent_prev")


def test_actor(agent, batch):
    # the golden actor's convolutions are the critic's, as here
    for i, conv in enumerate(agent.encoder.convs.layers):
        assert torch.equal(conv.weight, GOLDEN[f"before/actor.encoder.convs.{i}.weight"])
    mu, log_std = agent.actor(agent.encoder.convs(batch.obs))
    pi, log_pi = squashed_sample(mu, log_std, GOLDEN["out/actor_noise"])
    check(torch.tanh(mu), "actor_mu")
    check(log_std, "actor_log_std")
    check(pi, "actor_pi")
    check(log_pi, "actor_log_pi", rtol=1e-3)  # log(1 - pi^2) near saturation


def test_critic(agent, batch):
    q1, q2 = agent.critic(agent.encoder(batch.obs), batch.action)
    check(q1, "q1")
    check(q2, "q2")


def test_cody_parts(agent, batch):
    cody = agent.auxiliary
    mu_p, log_std_p = cody.posterior(agent.encoder(batch.obs), batch.action)
    mu_q, log_std_q = cody.prior(agent.target_encoder(batch.obs_prev), batch.action_prev)
    check(mu_p, "posterior_mu")
    check(log_std_p, "posterior_log_std")
    check(mu_q, "prior_mu")
    check(log_std_q, "prior_log_std")
    u = mu_p + log_std_p.exp() * GOLDEN["out/posterior_noise"]
    check(u, "posterior_sample")
    check(kl_divergence(mu_p, log_std_p, mu_q, log_std_q).sum(-1).mean(), "kl")
    query = cody.predictor(cody.projection(u))
    key = cody.target_predictor(torch.cat([agent.target_encoder(batch.next_obs), batch.reward / 4], dim=1))
    logits = contrastive_logits(query, cody.W, key)
    check(logits, "logits")
    check(info_nce(logits), "info_nce")


def test_cody_loss_and_gradients(agent, batch):
    z = agent.encoder(batch.obs)
    loss, metrics = agent.auxiliary.loss(
        batch, z, agent.encoder, agent.target_encoder, noise=GOLDEN["out/posterior_noise"]
    )
    check(loss, "cody_loss")
    check(metrics["kl"], "kl")
    check(metrics["info_nce"], "info_nce")
    loss.backward()
    check(agent.auxiliary.W.grad, "grad_W", slack=1)
    check(agent.encoder.convs.layers[0].weight.grad, "grad_conv0", slack=1)
    check(agent.encoder.head.fc.weight.grad, "grad_encoder_fc", slack=1)


def test_four_whole_updates(monkeypatch):
    """Losses of every step to 1e-4; every parameter after the fourth to 1e-3 of its size and 1e-2 of its movement.

    Seen to fail with, one at a time: the EMA step before the actor's; the encoder at encoder_lr alone in CoDy's step;
    cody_lr 1.2e-4; the target encoder at critic_tau; no EMA of the predictor; a gradient through y; a bootstrap of
    the transition with not_done 0; beta1 0.9 for alpha.
    """
    agent, after = golden_agent(UPDATES, flags="--omega_cody_loss 0.1"), golden_agent(UPDATES, "after")
    before = [p.detach().clone() for p in agent.parameters()]
    batch = Batch(**{name: UPDATES[name] for name in BATCH})
    for index in range(4):
        drawn = [UPDATES[f"step{index}/noise{i}"] for i in range(3 - index % 2)]  # the last of a step is not used
        monkeypatch.setattr(torch, "randn_like", lambda like, drawn=drawn: drawn.pop(0).reshape(like.shape))
        metrics = agent.update(batch, index)
        assert not drawn
        losses = {"critic_loss": "train_critic/loss", "cody_loss": "train/cody_loss", "kl": "train/kl"}
        if index % 2 == 0:
            losses.update(actor_loss="train_actor/loss", alpha_loss="train_alpha/loss")
        for ours, theirs in losses.items():
            expected = UPDATES[f"step{index}/{theirs}"]
            torch.testing.assert_close(metrics[ours], expected.float(), rtol=1e-4, atol=0, msg=f"{ours} {index}")
        torch.testing.assert_close(-metrics["info_nce"], UPDATES[f"step{index}/train/mi"].float(), rtol=1e-4, atol=0)
    for (name, ours), old, theirs in zip(agent.named_parameters(), before, after.parameters(), strict=True):
        error = (ours - theirs).norm()
        assert error <= 1e-3 * theirs.norm(), name
        assert error <= 1e-2 * (theirs - old).norm(), f"{name}: {error / (theirs - old).norm():.2e} of its movement"
