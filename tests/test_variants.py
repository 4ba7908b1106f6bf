"""Every flag of the method space has its documented effect, and no other.

`reference` is the CoDy loss with all variants, written once more from docs/algorithm.md in the plainest way, on the
parameters of the agent under test. `KL`, `PROJECTION`, ... are parameter counts from layer sizes.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence

from config import parse
from endings import Refused

B, D, H, A = 16, 8, 32, 2  # batch, latent, hidden, |A|


def linear(i, o):
    return i * o + o


def dynamics(d_in, u, norm=True):
    return linear(d_in, H) + linear(H, H) + linear(H, 2 * u) + (4 * u if norm else 0)


def count(module):
    return sum(p.numel() for p in module.parameters())


def run(module, x):
    """A Sequential of Linear, ReLU and LayerNorm by hand."""
    for layer in module:
        if isinstance(layer, torch.nn.Linear):
            x = x @ layer.weight.T + layer.bias
        elif isinstance(layer, torch.nn.LayerNorm):
            x = norm(layer, x)
        elif isinstance(layer, torch.nn.Sequential):
            x = run(layer, x)
        else:
            x = x.clamp(min=0)
    return x


def norm(layer, x):
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + layer.eps).sqrt()
    return x * layer.weight + layer.bias


def gaussian(net, z, a, layer_norm):
    out = run(net.net, torch.cat([z, a], 1))
    out = norm(net.ln, out) if layer_norm else out
    n = out.shape[1] // 2
    return Normal(out[:, :n], out[:, n:].exp())


def reference(agent, batch, noise):
    c, t = agent.config, agent.auxiliary
    code = (lambda a: run(t.action_encoder, a)) if c.action_encoder else (lambda a: a)
    reward = {"per_step": batch.reward / 4, "symmetric": batch.reward / 2 - 1, "none": batch.reward}[c.reward_norm]
    p = gaussian(t.posterior, agent.encoder(batch.obs), code(batch.action), c.dynamics_layer_norm)
    u = p.loc + p.scale * noise
    w = {"mlp": lambda: run(t.projection, u), "linear": lambda: run([t.projection], u), "none": lambda: u}
    query = run(t.predictor, w[c.projection]())
    key = (agent.encoder if c.key_encoder == "online" else agent.target_encoder)(batch.next_obs).detach()
    if c.reward_prediction == "contrastive":
        key = torch.cat([key, reward], 1)
    key = run(t.target_predictor, key).detach()
    loss = F.cross_entropy(query @ t.W @ key.T, torch.arange(B))
    if c.kl_prior != "none":
        if c.kl_prior == "unit_gaussian":
            q = Normal(torch.zeros_like(u), torch.ones_like(u))
        else:
            previous = (agent.encoder if c.kl_encoder == "online" else agent.target_encoder)(batch.obs_prev).detach()
            net = t.posterior if c.kl_prior == "shared" else t.prior
            q = gaussian(net, previous, code(batch.action_prev), c.dynamics_layer_norm)
        loss = loss + c.omega_cody_loss * kl_divergence(p, q).sum(1).mean()
    if c.reward_prediction == "regression":
        loss = loss + ((run(t.reward_head, u) - reward) ** 2).mean()
    return loss


VARIANTS = {
    "default": "",
    "kl_prior none": "--kl_prior none",
    "kl_prior unit_gaussian": "--kl_prior unit_gaussian --omega_cody_loss 0.1",
    "kl_prior shared": "--kl_prior shared --omega_cody_loss 0.1",
    "kl_encoder online": "--kl_encoder online --omega_cody_loss 0.1",
    "key_encoder online": "--key_encoder online",
    "no dynamics_layer_norm": "--no_dynamics_layer_norm --omega_cody_loss 0.1",
    "reward_prediction none": "--reward_prediction none",
    "reward_prediction regression": "--reward_prediction regression",
    "reward_norm symmetric": "--reward_norm symmetric",
    "reward_norm none": "--reward_norm none",
    "regression of symmetric": "--reward_prediction regression --reward_norm symmetric",
    "action_encoder": "--action_encoder",
    "projection linear": "--projection linear",
    "projection none": "--projection none",
    "predictor_layers 1": "--predictor_layers 1",
    "predictor_layers 4": "--predictor_layers 4",
}


def prepared(small_agent, flags, seed=0):
    """An agent whose target and online networks differ, as after some updates."""
    agent = small_agent(flags, seed)
    torch.manual_seed(1)
    with torch.no_grad():
        for module in (agent.target_encoder, agent.auxiliary):
            for p in module.parameters():
                p.add_(0.05 * torch.randn_like(p))
    return agent


@pytest.mark.parametrize("flags", VARIANTS.values(), ids=VARIANTS.keys())
def test_loss_and_gradients_agree_with_the_reference(small_agent, random_batch, flags):
    agent, batch = prepared(small_agent, flags), random_batch(B)
    noise = torch.randn(B, D + ("reward_prediction" not in flags))
    names = [name for name, p in agent.named_parameters() if p.requires_grad]
    trained = [p for p in agent.parameters() if p.requires_grad]
    loss, _ = agent.auxiliary.loss(batch, agent.encoder(batch.obs), agent.encoder, agent.target_encoder, noise=noise)
    expected = reference(agent, batch, noise)
    torch.testing.assert_close(loss, expected)
    ours = torch.autograd.grad(loss, trained, allow_unused=True)
    theirs = torch.autograd.grad(expected, trained, allow_unused=True)
    for name, g, e in zip(names, ours, theirs, strict=True):
        assert (g is None) == (e is None), name
        if g is not None:
            torch.testing.assert_close(g, e, rtol=1e-3, atol=1e-5, msg=name)
        # gradient reaches all of the encoder and all of the task's own weights, and nothing else
        assert (g is not None) == name.startswith(("encoder.", "auxiliary.")), name


@pytest.mark.parametrize("flags", [flags for flags in VARIANTS.values() if flags])
def test_each_variant_is_another_loss(small_agent, random_batch, flags):
    """No flag is parsed and then ignored."""
    batch = random_batch(B)
    losses = []
    omega = "--omega_cody_loss 0.1" if "omega" in flags else ""
    for variant in (omega, flags):
        agent = prepared(small_agent, variant)
        z = agent.encoder(batch.obs)
        torch.manual_seed(2)
        losses.append(agent.auxiliary.loss(batch, z, agent.encoder, agent.target_encoder)[0].item())
    assert not math.isclose(*losses, rel_tol=1e-7)


U = D + 1
DEFAULT = {
    "posterior": dynamics(D + A, U),
    "prior": dynamics(D + A, U),
    "projection": linear(U, H) + linear(H, U),
    "predictor": linear(U, H) + linear(H, D),
    "target_predictor": linear(U, H) + linear(H, D),
}


@pytest.mark.parametrize(
    "flags, changes",
    [
        ("", {}),
        ("--kl_prior none", {"prior": 0}),
        ("--kl_prior unit_gaussian", {"prior": 0}),
        ("--kl_prior shared", {"prior": 0}),
        ("--kl_encoder online", {}),
        ("--key_encoder online", {}),
        ("--no_dynamics_layer_norm", {n: dynamics(D + A, U, False) for n in ("posterior", "prior")}),
        (
            "--reward_prediction none",
            {
                **{n: dynamics(D + A, D) for n in ("posterior", "prior")},
                "projection": linear(D, H) + linear(H, D),
                **{n: linear(D, H) + linear(H, D) for n in ("predictor", "target_predictor")},
            },
        ),
        ("--reward_norm none", {}),
        ("--reward_norm symmetric", {}),
        (
            "--action_encoder",
            {
                "action_encoder": linear(A, 512) + linear(512, 16) + 32,
                **{n: dynamics(D + 16, U) for n in ("posterior", "prior")},
            },
        ),
        ("--projection linear", {"projection": linear(U, U)}),
        ("--projection none", {"projection": 0}),
        ("--predictor_layers 1", {n: linear(U, D) for n in ("predictor", "target_predictor")}),
        (
            "--predictor_layers 4",
            {n: linear(U, H) + 2 * linear(H, H) + linear(H, D) for n in ("predictor", "target_predictor")},
        ),
    ],
)
def test_parameter_counts(small_agent, flags, changes):
    """A disabled part has no parameters, in the task and in its optimizer."""
    agent = small_agent(flags)
    expected = {**DEFAULT, **changes}
    for name, child in agent.auxiliary.named_children():
        assert count(child) == expected.get(name, 0) or flags == "--kl_prior shared", name
    assert count(agent.auxiliary) == sum(expected.values()) + D * D  # and W
    optimised = sum(p.numel() for group in agent.auxiliary_optimizer.param_groups for p in group["params"])
    assert optimised == count(agent.encoder) + sum(expected.values()) + D * D - expected["target_predictor"]


@pytest.mark.parametrize("prior, seen", [("learned", 1), ("shared", 1), ("unit_gaussian", 0), ("none", 0)])
def test_a_prior_that_is_off_costs_nothing(small_agent, random_batch, prior, seen):
    """o_{t-1} is neither augmented nor encoded where nothing uses it."""
    agent, batch = small_agent(f"--kl_prior {prior}"), random_batch(B)
    augmented = []
    agent._augment = lambda images, times: augmented.append(images) or images
    encoded = []
    agent.target_encoder.convs.register_forward_pre_hook(lambda module, args: encoded.append(args[0]))
    agent.update(agent.augment(batch), index=1)
    assert sum(images is batch.obs_prev for images in augmented) == seen
    assert sum(images is batch.obs_prev for images in encoded) == seen
    assert len(augmented) == 2 + seen
    assert len(encoded) == 1 + seen  # next_obs once, for the critic and for the keys
    agent.update(batch, index=2)
    assert len(encoded) == 3 + 2 * seen  # and twice where the target has moved between the two


def test_published_objective(small_agent, random_batch):
    agent = small_agent("--cody_objective published --omega_cody_loss 0.3 --beta_cody_loss 0.7")
    t = agent.auxiliary
    torch.manual_seed(1)
    with torch.no_grad():
        for module in (agent.target_encoder, t.target_action_encoder, t.target_dynamics):
            for p in module.parameters():
                p.add_(0.05 * torch.randn_like(p))
    batch = random_batch(B)._replace(second_obs=random_batch(B, seed=1).obs)
    loss, metrics = t.loss(batch, agent.encoder(batch.obs), agent.encoder, agent.target_encoder)

    z, code = agent.encoder(batch.obs), run(t.action_encoder, batch.action)
    z2, code2 = agent.target_encoder(batch.second_obs), run(t.target_action_encoder, batch.action)
    prediction = run(t.dynamics, torch.cat([z, code], 1))
    target = run(t.target_dynamics, torch.cat([z2, code2], 1))
    z_next = agent.target_encoder(batch.next_obs)
    labels = torch.arange(B)
    l1 = F.cross_entropy(prediction @ t.W1 @ target.T, labels)
    l2 = F.cross_entropy(torch.cat([code, z], 1) @ t.W2 @ z_next.T, labels)
    l3 = ((prediction - z_next) ** 2).mean()
    torch.testing.assert_close(loss, l1 + 0.3 * l2 + 0.7 * l3)
    torch.testing.assert_close(metrics["info_nce"], l1)

    loss.backward()
    for name, p in agent.named_parameters():
        reached = p.grad is not None and p.grad.abs().sum() > 0
        own = name.startswith("auxiliary.") and "target_" not in name
        assert reached == (own or name.startswith("encoder.")), name
    action_code = linear(A, 512) + linear(512, 16) + 32
    p_net = linear(D + 16, H) + linear(H, H) + linear(H, D) + 2 * D
    assert count(t) == 2 * (action_code + p_net) + D * D + (D + 16) * D


def test_published_targets_follow_at_their_own_rate_and_views_differ(small_agent, random_batch):
    agent = small_agent("--cody_objective published")
    t = agent.auxiliary
    for online, target in ((t.action_encoder, t.target_action_encoder), (t.dynamics, t.target_dynamics)):
        before = [p.clone() for p in target.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(before, online.parameters(), strict=True))
        for p in online.parameters():
            p.data += 1
    t.update_targets()
    for old, new, p in zip(before, target.parameters(), online.parameters(), strict=True):
        torch.testing.assert_close(new, 0.995 * old + 0.005 * p)
    batch = agent.augment(random_batch(B))
    assert batch.second_obs.shape == batch.obs.shape and not torch.equal(batch.second_obs, batch.obs)
    assert torch.isfinite(agent.update(batch, 0)["cody_loss"])


def test_protorl_encoder(small_agent, random_batch):
    agent, batch = small_agent("--encoder_type protorl"), random_batch(B)
    h = batch.obs / 255 - 0.5
    for conv, stride in zip(agent.encoder.convs.layers, (2, 1), strict=True):
        h = F.conv2d(h, conv.weight, conv.bias, stride).clamp(min=0)
    h = h.permute(0, 2, 3, 1).flatten(1)
    z = h @ agent.encoder.head.weight.T + agent.encoder.head.bias
    torch.testing.assert_close(agent.encoder(batch.obs), z)  # linear: no LayerNorm, no tanh
    ln = agent.critic.latent_input[0]
    q = run(agent.critic.Q1, torch.cat([torch.tanh(norm(ln, z)), batch.action], 1))
    torch.testing.assert_close(agent.critic(z, batch.action)[0], q)
    head = agent.actor.head
    actor_latent = torch.tanh(norm(head.ln, h @ head.fc.weight.T + head.fc.bias))
    torch.testing.assert_close(agent.actor(h)[0], run(agent.actor.trunk, actor_latent)[:, :A])
    metrics = agent.update(batch, 0)
    assert all(torch.isfinite(v).all() for v in metrics.values())


def test_identity_encoder(small_agent):
    agent = small_agent_from_state(small_agent, "")
    assert count(agent.encoder) == 0 and agent.encoder.latent_dim == 5
    state = torch.randn(B, 5)
    assert torch.equal(agent.encoder(state), state)
    batch = state_batch()
    augmented = agent.augment(batch)
    assert all(torch.equal(a, b) for a, b in zip(augmented[:7], batch[:7], strict=True))
    for index in range(3):
        metrics = agent.update(batch, index, detailed=True)
    assert all(torch.isfinite(v).all() for v in metrics.values())
    assert agent.images(batch) == {}


def small_agent_from_state(small_agent, flags):
    from agent import make_agent

    torch.manual_seed(0)
    config = parse(f"--agent sac --encoder_type identity --hidden_dim 32 --action_repeat 4 {flags}".split())
    return make_agent(config, (5,), 2, torch.device("cpu"))


def state_batch():
    from replay_buffer import Batch

    states = torch.randn(3, B, 5)
    ones = torch.ones(B, 1)
    return Batch(states[0], torch.rand(B, 2), states[1], torch.rand(B, 2), ones, states[2], ones)


def test_sac_has_no_auxiliary(small_agent, random_batch):
    agent, batch = small_agent("--agent sac"), random_batch(B)
    assert agent.auxiliary is None and not hasattr(agent, "auxiliary_optimizer")
    convs = []
    agent.encoder.convs.register_forward_hook(lambda module, args, out: convs.append(out.requires_grad))
    metrics = agent.update(agent.augment(batch), index=1)
    assert convs == [False, True]  # next action, critic; nothing computed for an actor that is not due
    assert "cody_loss" not in metrics and "auxiliary_grad_norm" not in metrics
    convs.clear()
    agent.update(agent.augment(batch), index=2)
    assert convs == [False, True, False]  # and without gradient for the actor


@pytest.mark.parametrize("layers", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("size", [64, 84, 100])
@pytest.mark.parametrize("agent", ["cody_sac", "sac_ae"])
def test_layers_and_sizes_without_a_table(random_batch, layers, size, agent):
    from agent import make_agent

    flags = f"--agent {agent} --num_layers {layers} --image_size {size} --hidden_dim 16 --num_filters 4"
    made = make_agent(parse(flags.split()), (9, size, size), 2, torch.device("cpu"))
    obs = torch.randint(0, 256, (2, 9, size, size), dtype=torch.uint8)
    assert made.encoder(obs).shape == (2, 50)
    if agent == "sac_ae":
        assert made.auxiliary.decoder(made.encoder(obs)).shape == (2, 9, size, size)


def test_diagnostics(small_agent, random_batch):
    """Instability made visible: each number against its definition."""
    from utils import effective_rank

    torch.manual_seed(0)
    z = torch.randn(64, 3, dtype=torch.float64) @ torch.randn(3, 10, dtype=torch.float64)
    assert 2 < effective_rank(z) <= 3.001
    s = torch.tensor([4.0, 2.0, 2.0])
    share = s / s.sum()
    orthonormal = torch.linalg.qr(torch.cat([torch.ones(9, 1), torch.randn(9, 3)], 1))[0][:, 1:]
    expected = math.exp(-(share * share.log()).sum())
    assert math.isclose(effective_rank(orthonormal * s).item(), expected, rel_tol=1e-4)

    assert effective_rank(torch.full((8, 4), float("nan"))).isnan()  # and does not raise

    agent, batch = prepared(small_agent, ""), random_batch(B)
    z = agent.encoder(batch.obs)
    _, metrics = agent.auxiliary.loss(batch, z, agent.encoder, agent.target_encoder, detailed=True)
    assert metrics["kl_per_dim"].shape == (U,)
    torch.testing.assert_close(metrics["kl_per_dim"].sum(), metrics["kl"])
    p = gaussian(agent.auxiliary.posterior, agent.encoder(batch.obs), batch.action, True)
    q = gaussian(agent.auxiliary.prior, agent.target_encoder(batch.obs_prev), batch.action_prev, True)
    dims = kl_divergence(p, q).mean(0)
    torch.testing.assert_close(metrics["kl"], dims.sum())
    for name in ("min", "median", "max"):
        torch.testing.assert_close(metrics[f"kl_dim_{name}"], getattr(dims, name)())
    torch.testing.assert_close(metrics["latent_rank"], effective_rank(agent.encoder(batch.obs)))
    assert metrics["posterior_std_extreme"] == ((p.scale > math.e**3) | (p.scale < math.e**-3)).float().mean()
    agent.auxiliary.posterior.ln.bias.data[U:] = 9.0
    _, metrics = agent.auxiliary.loss(batch, z, agent.encoder, agent.target_encoder)
    assert metrics["posterior_std_extreme"] == 1 and "latent_rank" not in metrics

    agent = small_agent()
    metrics = agent.update(batch, 1)
    ratio = metrics["auxiliary_encoder_grad_norm"] / metrics["critic_encoder_grad_norm"]
    torch.testing.assert_close(metrics["encoder_grad_ratio"], ratio)
    norm_now = sum(p.grad.square().sum() for p in agent.encoder.parameters()).sqrt()
    torch.testing.assert_close(metrics["auxiliary_encoder_grad_norm"], norm_now)


@pytest.mark.parametrize(
    "flags, line",
    [
        ("--agent sac --kl_prior none", "--kl_prior none: has no effect without --agent cody_sac"),
        ("--agent sac_ae --projection none", "--projection none: has no effect without --agent cody_sac"),
        ("--decoder_lr 0.1", "--decoder_lr 0.1: has no effect without --agent sac_ae"),
        (
            "--cody_objective published --predictor_layers 3",
            "--predictor_layers 3: has no effect without --cody_objective dynamics_kl",
        ),
        ("--agent sac --omega_cody_loss 0.1", "--omega_cody_loss 0.1: has no effect without --agent cody_sac"),
        (
            "--agent sac --encoder_lr 0.1",
            "--encoder_lr 0.1: has no effect without --agent cody_sac, --agent sac_ae or --update_mode joint",
        ),
        ("--kl_prior none --omega_cody_loss 0.1", "--omega_cody_loss 0.1: has no effect without a --kl_prior"),
        (
            "--agent sac --encoder_type identity --pre_transform_image_size 100",
            "--pre_transform_image_size 100: has no effect without --encoder_type pixel or protorl",
        ),
        (
            "--agent sac_ae --image_size 5 --num_layers 1",
            "--image_size 5: must be at least 7 for the SSIM of --agent sac_ae",
        ),
        ("--beta_cody_loss 2", "--beta_cody_loss 2.0: has no effect without --cody_objective published"),
        (
            "--kl_prior unit_gaussian --kl_encoder online",
            "--kl_encoder online: has no effect without --kl_prior learned or shared",
        ),
        (
            "--reward_prediction none --reward_norm none",
            "--reward_norm none: has no effect without --reward_prediction contrastive or regression",
        ),
        (
            "--agent sac --encoder_type identity --num_layers 2",
            "--num_layers 2: has no effect without --encoder_type pixel or protorl",
        ),
        (
            "--agent sac_ae --encoder_type protorl",
            "--agent sac_ae: reconstructs pixels, not with --encoder_type protorl",
        ),
        (
            "--agent sac_ae --pre_transform_image_size 100",
            "--pre_transform_image_size 100: --agent sac_ae has no augmentation, so it must be --image_size 84",
        ),
        (
            "--encoder_type identity",
            "--encoder_type identity: --agent cody_sac has no encoder to train; needs --agent sac",
        ),
        (
            "--agent sac --encoder_type identity --encoder_tau 0.1",
            "--encoder_tau 0.1: has no effect without --encoder_type pixel or protorl",
        ),
        (
            "--agent sac --encoder_type identity --precision bf16",
            "--precision bf16: has no effect without --encoder_type pixel or protorl",
        ),
        (
            "--agent sac --encoder_type identity --update_mode joint",
            "--update_mode joint: has no effect without --encoder_type pixel or protorl",
        ),
        ("--updates_per_step 0", "--updates_per_step 0: must be at least 1"),
        ("--divergence_factor 1", "--divergence_factor 1.0: must be above 1"),
    ],
)
def test_combinations_without_sense(flags, line):
    with pytest.raises(Refused) as error:
        parse(flags.split())
    assert str(error.value) == line


def test_every_choice_of_the_method_space_is_tried_here():
    """A new choice in config.py needs a line above."""
    import dataclasses
    import typing

    from config import Config

    hints = typing.get_type_hints(Config)
    tried = " ".join(VARIANTS.values())
    for field in dataclasses.fields(Config):
        if field.name in ("kl_prior", "kl_encoder", "key_encoder", "reward_prediction", "reward_norm", "projection"):
            for choice in typing.get_args(hints[field.name]):
                assert choice == field.default or f"--{field.name} {choice}" in tried
