"""The default update of CoDy + SAC written in the plainest way: an oracle for the tests.

The equations of docs/algorithm.md with the published sizes, and none of the project's code: contiguous NCHW float32,
every network computes its own features, two Adams step the encoder for CoDy.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn


def mlp(*sizes):
    layers = []
    for a, b in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Encoder(nn.Module):
    def __init__(self, channels, size, filters, latent_dim):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(channels, filters, 3, stride=2)])
        self.convs.extend(nn.Conv2d(filters, filters, 3) for _ in range(3))
        out = (size - 3) // 2 + 1 - 6
        self.fc, self.ln = nn.Linear(filters * out * out, latent_dim), nn.LayerNorm(latent_dim)

    def forward(self, obs):
        h = obs / 255
        for conv in self.convs:
            h = torch.relu(conv(h))
        return self.ln(self.fc(h.flatten(1)))


class Actor(nn.Module):
    def __init__(self, encoder, latent_dim, hidden, actions):
        super().__init__()
        self.encoder, self.trunk = encoder, mlp(latent_dim, hidden, hidden, 2 * actions)

    def forward(self, obs):
        mu, log_std = self.trunk(self.encoder(obs)).chunk(2, dim=-1)
        log_std = -10 + 6 * (torch.tanh(log_std) + 1)
        noise = torch.randn_like(mu)
        pi = torch.tanh(mu + noise * log_std.exp())
        log_pi = (-0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)).sum(-1, keepdim=True)
        return pi, log_pi - torch.log(F.relu(1 - pi**2) + 1e-6).sum(-1, keepdim=True)


class Critic(nn.Module):
    def __init__(self, encoder, latent_dim, hidden, actions):
        super().__init__()
        self.encoder = encoder
        self.Q1 = mlp(latent_dim + actions, hidden, hidden, 1)
        self.Q2 = mlp(latent_dim + actions, hidden, hidden, 1)

    def forward(self, obs, action):
        z_a = torch.cat([self.encoder(obs), action], dim=1)
        return self.Q1(z_a), self.Q2(z_a)


class Dynamics(nn.Module):
    def __init__(self, latent_dim, hidden, actions):
        super().__init__()
        self.net = mlp(latent_dim + actions, hidden, hidden, 2 * (latent_dim + 1))
        self.ln = nn.LayerNorm(2 * (latent_dim + 1))

    def forward(self, z, action):
        return self.ln(self.net(torch.cat([z, action], dim=1))).chunk(2, dim=-1)


class PlainAgent:
    """The networks and one update; sizes as in config.py, `repeat` physics steps per decision."""

    def __init__(self, channels, size, actions, repeat, device, filters=32, latent_dim=50, hidden=1024, omega=1e-3):
        d = latent_dim
        self.critic = Critic(Encoder(channels, size, filters, d), d, hidden, actions).to(device)
        self.actor = Actor(Encoder(channels, size, filters, d), d, hidden, actions).to(device)
        self.actor.encoder.convs = self.critic.encoder.convs  # tied
        self.critic_target = copy.deepcopy(self.critic)
        self.posterior, self.prior = (Dynamics(d, hidden, actions).to(device) for _ in range(2))
        self.projection = mlp(d + 1, hidden, d + 1).to(device)
        self.predictor = mlp(d + 1, hidden, d).to(device)
        self.predictor_target = copy.deepcopy(self.predictor)
        self.W = nn.Parameter(torch.rand(d, d, device=device))
        self.log_alpha = nn.Parameter(torch.tensor(math.log(0.1), device=device))
        self.repeat, self.omega, self.target_entropy = repeat, omega, -actions

        cody = [*self.posterior.parameters(), *self.prior.parameters(), *self.projection.parameters()]
        cody += [*self.predictor.parameters(), self.W]
        encoder = list(self.critic.encoder.parameters())
        of_actor = [p for name, p in self.actor.named_parameters() if "convs" not in name]
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), 1e-3)
        self.actor_optimizer = torch.optim.Adam(of_actor, 1e-3)
        self.alpha_optimizer = torch.optim.Adam([self.log_alpha], 1e-4, (0.5, 0.999))
        self.encoder_optimizer = torch.optim.Adam(encoder, 1e-3)
        self.cody_optimizer = torch.optim.Adam([*encoder, *cody], 1e-4)

    def update(self, batch, index):
        """One update on (obs_prev, action_prev, obs, action, reward, next_obs, not_done); returns the losses.

        obs and next_obs are lists of augmentations.
        """
        obs_prev, action_prev, all_obs, action, reward, all_next_obs, not_done = batch
        losses = {}

        values = []
        with torch.no_grad():
            for next_obs in all_next_obs:
                next_action, log_pi = self.actor(next_obs)
                q1, q2 = self.critic_target(next_obs, next_action)
                values.append(torch.min(q1, q2) - self.log_alpha.exp() * log_pi)
            target_q = reward + 0.99 * not_done * sum(values) / len(values)
        losses["critic_loss"] = 0
        for obs in all_obs:
            q1, q2 = self.critic(obs, action)
            losses["critic_loss"] += (F.mse_loss(q1, target_q) + F.mse_loss(q2, target_q)) / len(all_obs)
        self.critic_optimizer.zero_grad()
        losses["critic_loss"].backward()
        self.critic_optimizer.step()

        obs, next_obs = all_obs[0], all_next_obs[0]
        if index % 2 == 0:
            pi, log_pi = self.actor(obs)
            alpha = self.log_alpha.exp()
            losses["actor_loss"] = (alpha.detach() * log_pi - torch.min(*self.critic(obs, pi))).mean()
            self.actor_optimizer.zero_grad()
            losses["actor_loss"].backward(inputs=self.actor_optimizer.param_groups[0]["params"])
            self.actor_optimizer.step()
            alpha_loss = (alpha * (-log_pi - self.target_entropy).detach()).mean()
            self.alpha_optimizer.zero_grad()
            alpha_loss.backward()
            self.alpha_optimizer.step()

            self.soft_update(self.critic.Q1, self.critic_target.Q1, 0.01)
            self.soft_update(self.critic.Q2, self.critic_target.Q2, 0.01)
            self.soft_update(self.critic.encoder, self.critic_target.encoder, 0.05)
            self.soft_update(self.predictor, self.predictor_target, 0.05)

        mu_p, log_std_p = self.posterior(self.critic.encoder(obs), action)
        u = mu_p + log_std_p.exp() * torch.randn_like(mu_p)
        query = self.predictor(self.projection(u))
        with torch.no_grad():
            z_next = self.critic_target.encoder(next_obs)
            key = self.predictor_target(torch.cat([z_next, reward / self.repeat], dim=1))
            z_prev = self.critic_target.encoder(obs_prev)
        logits = query @ self.W @ key.T
        logits = logits - logits.max(1, keepdim=True)[0]
        nce = F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))
        mu_q, log_std_q = self.prior(z_prev, action_prev)
        variances = (log_std_p.exp() ** 2 + (mu_p - mu_q) ** 2) / (2 * log_std_q.exp() ** 2)
        kl = (log_std_q - log_std_p + variances - 0.5).sum(-1).mean()
        losses["cody_loss"] = nce + self.omega * kl
        self.encoder_optimizer.zero_grad()
        self.cody_optimizer.zero_grad()
        losses["cody_loss"].backward()
        self.encoder_optimizer.step()
        self.cody_optimizer.step()
        return losses

    @staticmethod
    def soft_update(net, target, tau):
        for p, t in zip(net.parameters(), target.parameters(), strict=True):
            t.data.copy_(tau * p.data + (1 - tau) * t.data)
