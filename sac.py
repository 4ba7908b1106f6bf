"""Soft actor-critic from pixels (Haarnoja et al., arXiv 1812.05905; Yarats et al., arXiv 1910.01741).

`SAC` owns the encoder and trains it with the critic's loss and with the loss of one auxiliary task. The auxiliary
is a module with
    loss(batch, features, encoder, target_encoder) -> (loss, metrics)
    parameter_groups(encoder) -> groups for Adam: what its loss trains, and at which rates
    update_targets() -> EMA step of its own targets
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

from encoder import Encoder, LatentHead
from utils import grad_norm, mlp, soft_update, weight_init


class Actor(nn.Module):
    """Policy pi(a|o) on the shared conv features, with its own linear + LayerNorm.

    Args:
        feature_dim: of the conv features; latent_dim: d; action_dim: |A|; hidden_dim: of the two hidden layers.
        log_std_min, log_std_max: range of the log standard deviation.
    """

    def __init__(self, feature_dim, latent_dim, action_dim, hidden_dim, log_std_min, log_std_max):
        super().__init__()
        self.head = LatentHead(feature_dim, latent_dim)
        self.trunk = mlp(latent_dim, hidden_dim, 2 * action_dim, hidden_layers=2)
        self.log_std_min, self.log_std_max = log_std_min, log_std_max

    def forward(self, features):
        """Conv features (B, feature_dim) -> mu and log sigma of the Gaussian before tanh, each (B, |A|)."""
        mu, log_std = self.trunk(self.head(features)).chunk(2, dim=-1)
        span = self.log_std_max - self.log_std_min
        return mu, self.log_std_min + 0.5 * span * (torch.tanh(log_std) + 1)


def squashed_sample(mu, log_std, noise):
    """a = tanh(mu + sigma * noise) and its log probability, (B, |A|) and (B, 1)."""
    pi = torch.tanh(mu + noise * log_std.exp())
    log_pi = (-0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1, keepdim=True)
    # d tanh(u)/du = 1 - tanh(u)^2; the released code's guard against its log at saturation
    log_pi = log_pi - torch.log(F.relu(1 - pi.square()) + 1e-6).sum(-1, keepdim=True)
    return pi, log_pi


class Critic(nn.Module):
    """Two Q networks on the latent: (B, d), (B, |A|) -> (B, 1), (B, 1)."""

    def __init__(self, latent_dim, action_dim, hidden_dim):
        super().__init__()
        self.Q1 = mlp(latent_dim + action_dim, hidden_dim, 1, hidden_layers=2)
        self.Q2 = mlp(latent_dim + action_dim, hidden_dim, 1, hidden_layers=2)

    def forward(self, z, action):
        z_a = torch.cat([z, action], dim=-1)
        return self.Q1(z_a), self.Q2(z_a)


class SAC(nn.Module):
    """The agent: acting, and one gradient update per batch.

    Args:
        config: see config.py.
        obs_shape: (C, H, W) that the encoder sees.
        action_dim: |A|.
        auxiliary: see the module's docstring.
        augment: random augmentation of a (B, C, H, W) batch for training.
        crop: deterministic crop of the same for acting.
        device: where everything runs.
    """

    def __init__(self, config, obs_shape, action_dim, auxiliary, augment, crop, device):
        super().__init__()
        self.config = config
        self.device = device
        self._augment, self._crop = augment, crop
        latent_dim = config.encoder_feature_dim

        self.encoder = Encoder(obs_shape, latent_dim, config.num_layers, config.num_filters)
        self.critic = Critic(latent_dim, action_dim, config.hidden_dim)
        self.actor = Actor(
            self.encoder.convs.feature_dim,
            latent_dim,
            action_dim,
            config.hidden_dim,
            config.actor_log_std_min,
            config.actor_log_std_max,
        )
        self.log_alpha = nn.Parameter(torch.tensor(math.log(config.init_temperature)))
        self.auxiliary = auxiliary
        for module in (self.encoder, self.critic, self.actor):
            module.apply(weight_init)
        # after the initialisation, so that targets start equal to their online networks
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.target_entropy = -action_dim
        self.to(device)

        critic_parameters = [*self.encoder.parameters(), *self.critic.parameters()]
        betas = (config.critic_beta, 0.999)
        self.critic_optimizer = torch.optim.Adam(critic_parameters, config.critic_lr, betas)
        betas = (config.actor_beta, 0.999)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), config.actor_lr, betas)
        betas = (config.alpha_beta, 0.999)
        self.alpha_optimizer = torch.optim.Adam([self.log_alpha], config.alpha_lr, betas)
        self.auxiliary_optimizer = torch.optim.Adam(auxiliary.parameter_groups(self.encoder))

    @torch.no_grad()
    def act(self, obs, sample):
        """Action (|A|,) float32 in [-1, 1] for one observation (C, H, W) uint8: sampled, or tanh of the mean."""
        obs = self._crop(torch.as_tensor(obs, device=self.device)[None])
        mu, log_std = self.actor(self.encoder.convs(obs))
        action = squashed_sample(mu, log_std, torch.randn_like(mu))[0] if sample else torch.tanh(mu)
        return action[0].cpu().numpy()

    def augment(self, batch):
        """The batch with each of its three observations augmented independently."""
        return batch._replace(
            obs_prev=self._augment(batch.obs_prev),
            obs=self._augment(batch.obs),
            next_obs=self._augment(batch.next_obs),
        )

    def update(self, batch, index):
        """One update on an augmented batch; `index` counts updates. Returns metrics, 0-d tensors on the device."""
        metrics = {"batch_reward": batch.reward.mean()}
        metrics.update(self._update_critic(batch))
        # The critic's step has changed the convolutions; actor and auxiliary see the same new features.
        features = self.encoder.convs(batch.obs)
        if index % self.config.actor_update_freq == 0:
            metrics.update(self._update_actor(features.detach()))
        if index % self.config.critic_target_update_freq == 0:
            soft_update(self.critic, self.target_critic, self.config.critic_tau)
            soft_update(self.encoder, self.target_encoder, self.config.encoder_tau)
            self.auxiliary.update_targets()
        metrics.update(self._update_auxiliary(batch, features))
        return {name: value.detach() for name, value in metrics.items()}

    @torch.no_grad()
    def target_q(self, batch):
        """y = r + gamma * not_done * (min Q_target(o', a') - alpha * log pi(a'|o')), (B, 1)."""
        mu, log_std = self.actor(self.encoder.convs(batch.next_obs))
        next_action, log_pi = squashed_sample(mu, log_std, torch.randn_like(mu))
        q1, q2 = self.target_critic(self.target_encoder(batch.next_obs), next_action)
        value = torch.min(q1, q2) - self.log_alpha.exp() * log_pi
        return batch.reward + self.config.discount * batch.not_done * value

    def _update_critic(self, batch):
        target_q = self.target_q(batch)
        features = self.encoder.convs(batch.obs)
        if self.config.detach_encoder:
            features = features.detach()
        q1, q2 = self.critic(self.encoder.head(features), batch.action)
        critic_loss = F.mse_loss(q1, target_q) + F.mse_loss(q2, target_q)
        norm = self._step(self.critic_optimizer, critic_loss)
        return {"critic_loss": critic_loss, "q": q1.mean(), "target_q": target_q.mean(), "critic_grad_norm": norm}

    def _update_actor(self, features):
        """Actor and temperature, on conv features (B, feature_dim) without gradient."""
        mu, log_std = self.actor(features)
        pi, log_pi = squashed_sample(mu, log_std, torch.randn_like(mu))
        with torch.no_grad():
            z = self.encoder.head(features)
        alpha = self.log_alpha.exp()
        actor_loss = (alpha.detach() * log_pi - torch.min(*self.critic(z, pi))).mean()
        norm = self._step(self.actor_optimizer, actor_loss)
        alpha_loss = (alpha * (-log_pi - self.target_entropy).detach()).mean()
        self._step(self.alpha_optimizer, alpha_loss)
        return {
            "actor_loss": actor_loss,
            "alpha_loss": alpha_loss,
            "alpha": alpha,
            "entropy": -log_pi.mean(),
            "actor_grad_norm": norm,
        }

    def _update_auxiliary(self, batch, features):
        loss, metrics = self.auxiliary.loss(batch, features, self.encoder, self.target_encoder)
        metrics["auxiliary_grad_norm"] = self._step(self.auxiliary_optimizer, loss)
        return metrics

    @staticmethod
    def _step(optimizer, loss):
        """One optimizer step on its own parameters only; returns the norm of their gradient."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        optimizer.zero_grad()
        loss.backward(inputs=parameters)
        optimizer.step()
        return grad_norm(parameters)
