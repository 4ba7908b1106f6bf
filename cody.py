"""The CoDy auxiliary task: contrastive learning with dynamic models (You et al., arXiv 2203.01810).

Symbols as in docs/algorithm.md: z = f(o) latent, z_bar target latent, u sample of the posterior, which predicts the
next latent and the reward (d + 1 numbers), p posterior, q prior.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

from utils import mlp, soft_update, weight_init


class GaussianDynamics(nn.Module):
    """N(mu, sigma) over u given a latent and an action; LayerNorm over all its outputs.

    (B, d), (B, |A|) -> mu and log sigma, each (B, d + 1).
    """

    def __init__(self, latent_dim, action_dim, hidden_dim):
        super().__init__()
        output_dim = 2 * (latent_dim + 1)
        self.net = mlp(latent_dim + action_dim, hidden_dim, output_dim, hidden_layers=2)
        self.ln = nn.LayerNorm(output_dim)

    def forward(self, z, action):
        return self.ln(self.net(torch.cat([z, action], dim=-1))).chunk(2, dim=-1)


def kl_divergence(mu_p, log_std_p, mu_q, log_std_q):
    """KL(N_p || N_q) of diagonal Gaussians, summed over dimensions: (B, n) each -> (B,)."""
    variance_ratio = (2 * (log_std_p - log_std_q)).exp()
    distance = ((mu_p - mu_q) / log_std_q.exp()).square()
    return (log_std_q - log_std_p + 0.5 * (variance_ratio + distance - 1)).sum(-1)


def contrastive_logits(query, W, key):
    """query W key^T, less its row maximum for stability: (B, n), (n, n), (B, n) -> (B, B)."""
    logits = query @ W @ key.T
    return logits - logits.max(dim=1, keepdim=True).values


def info_nce(logits):
    """InfoNCE with the positives on the diagonal: (B, B) -> scalar."""
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))


class CoDy(nn.Module):
    """The auxiliary task; see sac.py for the interface.

    Args:
        config: see config.py.
        action_dim: |A|.
    """

    def __init__(self, config, action_dim):
        super().__init__()
        self.config = config
        d, hidden_dim = config.encoder_feature_dim, config.hidden_dim
        self.posterior = GaussianDynamics(d, action_dim, hidden_dim)
        self.prior = GaussianDynamics(d, action_dim, hidden_dim)
        self.projection = mlp(d + 1, hidden_dim, d + 1, hidden_layers=1)
        self.predictor = mlp(d + 1, hidden_dim, d, hidden_layers=1)
        self.W = nn.Parameter(torch.rand(d, d))
        self.apply(weight_init)
        self.target_predictor = copy.deepcopy(self.predictor).requires_grad_(False)

    def parameter_groups(self, encoder):
        """The released code steps the encoder with two Adams on this gradient; one at the summed rate is the same."""
        own = [p for p in self.parameters() if p.requires_grad]
        c = self.config
        return [
            {"params": list(encoder.parameters()), "lr": c.encoder_lr + c.cody_lr},
            {"params": own, "lr": c.cody_lr},
        ]

    def update_targets(self):
        """EMA step of the target predictor."""
        soft_update(self.predictor, self.target_predictor, self.config.encoder_tau)

    def loss(self, batch, features, encoder, target_encoder, noise=None):
        """InfoNCE + omega * KL.

        Args:
            batch: `Batch` of B pairs, augmented.
            features: conv features of `batch.obs`, (B, feature_dim), with gradient.
            encoder, target_encoder: f and its EMA.
            noise: epsilon of the posterior sample, (B, d + 1); drawn if None.

        Returns:
            The loss and a dictionary of 0-d metrics.
        """
        z = encoder.head(features)  # (B, d)
        with torch.no_grad():
            z_bar_prev = target_encoder(batch.obs_prev)
            z_bar_next = target_encoder(batch.next_obs)

        mu_p, log_std_p = self.posterior(z, batch.action)  # (B, d + 1)
        mu_q, log_std_q = self.prior(z_bar_prev, batch.action_prev)
        kl = kl_divergence(mu_p, log_std_p, mu_q, log_std_q).mean()

        noise = torch.randn_like(mu_p) if noise is None else noise
        u = mu_p + log_std_p.exp() * noise
        query = self.predictor(self.projection(u))  # (B, d)
        with torch.no_grad():
            reward = batch.reward / self.config.action_repeat
            key = self.target_predictor(torch.cat([z_bar_next, reward], dim=-1))
        logits = contrastive_logits(query, self.W, key)
        nce = info_nce(logits)
        cody_loss = nce + self.config.omega_cody_loss * kl

        positives = torch.arange(len(z), device=z.device)
        return cody_loss, {
            "cody_loss": cody_loss,
            "info_nce": nce,
            "mi_bound": math.log(len(z)) - nce,
            "contrastive_accuracy": (logits.argmax(dim=1) == positives).float().mean(),
            "kl": kl,
            "posterior_mu": mu_p.mean(),
            "posterior_std": log_std_p.exp().mean(),
            "prior_mu": mu_q.mean(),
            "prior_std": log_std_q.exp().mean(),
            "latent_norm": z.norm(dim=-1).mean(),
            "latent_std": z.std(dim=0).mean(),
        }
