"""The parts of the CoDy loss against torch.distributions and brute force, and the reach of its gradient."""

import copy
import math

import torch
from torch.distributions import Independent, Normal, kl_divergence

import cody


def test_kl_agrees_with_torch_distributions():
    torch.manual_seed(0)
    mu_p, log_std_p, mu_q, log_std_q = torch.randn(4, 32, 9, dtype=torch.float64)
    p, q = (Independent(Normal(m, s.exp()), 1) for m, s in ((mu_p, log_std_p), (mu_q, log_std_q)))
    torch.testing.assert_close(cody.kl_divergence(mu_p, log_std_p, mu_q, log_std_q).sum(-1), kl_divergence(p, q))
    assert cody.kl_divergence(mu_p, log_std_p, mu_p, log_std_p).abs().max() < 1e-12


def test_info_nce_agrees_with_a_brute_force_loop():
    torch.manual_seed(0)
    n, d = 7, 5
    query, key = torch.randn(2, n, d, dtype=torch.float64)
    W = torch.rand(d, d, dtype=torch.float64)
    total = 0.0
    for i in range(n):
        scores = [sum(query[i, a] * W[a, b] * key[j, b] for a in range(d) for b in range(d)).item() for j in range(n)]
        total -= scores[i] - math.log(sum(math.exp(s) for s in scores))
    logits = cody.contrastive_logits(query, W, key)
    assert math.isclose(cody.info_nce(logits).item(), total / n, rel_tol=1e-12)
    assert (logits.max(dim=1).values == 0).all()


def test_metrics(small_agent, random_batch):
    agent, batch = small_agent(), random_batch(16)
    z = agent.encoder(batch.obs)
    noise = torch.randn(16, 9)
    loss, metrics = agent.auxiliary.loss(batch, z, agent.encoder, agent.target_encoder, noise=noise)
    omega = agent.config.omega_cody_loss
    torch.testing.assert_close(loss, metrics["info_nce"] + omega * metrics["kl"])
    torch.testing.assert_close(metrics["mi_bound"], math.log(16) - metrics["info_nce"])
    z = agent.encoder(batch.obs)
    torch.testing.assert_close(metrics["latent_norm"], z.pow(2).sum(1).sqrt().mean())
    torch.testing.assert_close(metrics["latent_std"], z.std(0).mean())
    posterior = agent.auxiliary.posterior(z, batch.action)
    torch.testing.assert_close(metrics["posterior_mu"], posterior[0].mean())
    torch.testing.assert_close(metrics["posterior_std"], posterior[1].exp().mean())
    assert 0 <= metrics["contrastive_accuracy"] <= 1


def test_accuracy_is_one_when_each_query_is_its_key(small_agent, random_batch, monkeypatch):
    agent, batch = small_agent(), random_batch(8)
    monkeypatch.setattr(cody, "contrastive_logits", lambda query, W, key: torch.eye(8) * 50 + query.sum() * 0)
    z = agent.encoder(batch.obs)
    _, metrics = agent.auxiliary.loss(batch, z, agent.encoder, agent.target_encoder)
    assert metrics["contrastive_accuracy"] == 1 and metrics["info_nce"] < 1e-6


def test_gradient_reaches_everything_but_the_targets(small_agent, random_batch):
    agent, batch = small_agent(), random_batch()
    task = agent.auxiliary
    loss, _ = task.loss(batch, agent.encoder(batch.obs), agent.encoder, agent.target_encoder)
    loss.backward()
    trained = [*agent.encoder.parameters(), *(p for p in task.parameters() if p.requires_grad)]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    frozen = [*task.target_predictor.parameters(), *agent.target_encoder.parameters()]
    others = [*agent.actor.parameters(), *agent.critic.parameters(), agent.log_alpha]
    assert all(p.grad is None for p in frozen + others)
    assert not any(p.requires_grad for p in frozen)


def test_kl_alone_trains_the_prior_but_not_through_its_input(small_agent, random_batch):
    agent, batch = small_agent(), random_batch()
    agent.target_encoder.requires_grad_(True)  # if a gradient could reach the target encoder, it would show
    task = agent.auxiliary
    _, metrics = task.loss(batch, agent.encoder(batch.obs), agent.encoder, agent.target_encoder)
    metrics["kl"].backward()
    assert all(p.grad.abs().sum() > 0 for p in task.prior.parameters())
    assert all(p.grad.abs().sum() > 0 for p in agent.encoder.parameters())
    assert all(p.grad is None for p in agent.target_encoder.parameters())
    assert all(p.grad is None for p in (*task.projection.parameters(), *task.predictor.parameters(), task.W))


def test_omega_weights_the_kl(small_agent, random_batch):
    batch = random_batch()
    losses = {}
    for omega in (0.0, 0.1):
        agent = small_agent(f"--omega_cody_loss {omega}")
        z = agent.encoder(batch.obs)
        losses[omega], metrics = agent.auxiliary.loss(
            batch, z, agent.encoder, agent.target_encoder, noise=torch.zeros(16, 9)
        )
    torch.testing.assert_close(losses[0.1] - losses[0.0], 0.1 * metrics["kl"])


def test_reward_enters_the_key_per_physics_step(small_agent, random_batch):
    """The same reward per control step gives the same loss at any repeat."""
    batch = random_batch()
    losses = []
    for repeat in (1, 4):
        agent = small_agent(f"--action_repeat {repeat}")
        scaled = batch._replace(reward=batch.reward * repeat)
        z = agent.encoder(batch.obs)
        loss, _ = agent.auxiliary.loss(scaled, z, agent.encoder, agent.target_encoder, noise=torch.zeros(16, 9))
        losses.append(loss.item())
    assert math.isclose(*losses, rel_tol=1e-6)


def test_one_adam_at_the_summed_rate_is_two_adams_on_the_same_gradient():
    """The released code steps the encoder twice, at encoder_lr and at cody_lr."""
    torch.manual_seed(0)
    weights = torch.randn(20, dtype=torch.float64)
    one, two = weights.clone().requires_grad_(), weights.clone().requires_grad_()
    single = torch.optim.Adam([one], 1e-3 + 1e-4)
    pair = [torch.optim.Adam([two], lr) for lr in (1e-3, 1e-4)]
    for _ in range(50):
        gradient = torch.randn(20, dtype=torch.float64)
        one.grad, two.grad = gradient.clone(), gradient.clone()
        single.step()
        for optimizer in pair:
            optimizer.step()
    torch.testing.assert_close(one, two)


def test_learning_rates(small_agent):
    agent = small_agent("--encoder_lr 0.002 --cody_lr 0.0005")
    own, encoder = agent.auxiliary_optimizer.param_groups
    assert encoder["lr"] == 0.0025 and own["lr"] == 0.0005
    assert {id(p) for p in encoder["params"]} == {id(p) for p in agent.encoder.parameters()}
    expected = {id(p) for p in agent.auxiliary.parameters() if p.requires_grad}
    assert {id(p) for p in own["params"]} == expected


def test_target_predictor_starts_equal_and_follows(small_agent, random_batch):
    agent = small_agent()
    task = agent.auxiliary
    pairs = list(zip(task.predictor.parameters(), task.target_predictor.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    before = copy.deepcopy(list(task.target_predictor.parameters()))
    for parameter in task.predictor.parameters():
        parameter.data += 1
    task.update_targets()
    for (online, target), old in zip(pairs, before, strict=True):
        torch.testing.assert_close(target, 0.95 * old + 0.05 * online)
