"""The CoDy auxiliary task: contrastive learning with dynamic models (You et al., arXiv 2203.01810).

Symbols as in docs/algorithm.md: z = f(o) latent, z_bar target latent, p posterior, q prior, u sample of the posterior,
which predicts the next latent and the reward (d + 1 numbers).

The released code steps the encoder with two Adams on the same gradient, at encoder_lr and at cody_lr. The sequential
update here has one Adam at the summed rate, which is the same.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

from auxiliary import AuxiliaryTask
from utils import latent_metrics, mlp, soft_update, weight_init

CODE_DIM = 16  # dimension of an encoded action
EXTREME_LOG_STD = 3.0  # a posterior dimension is extreme if its standard deviation is above e^3 or below e^-3
PUBLISHED_TAU = 0.005  # EMA rate of the published objective's own target networks


class GaussianDynamics(nn.Module):
    """N(mu, sigma) over u given a latent and an action, with LayerNorm over all outputs.

    (B, latent_dim), (B, action_dim) -> mu and log sigma, each (B, u_dim).
    """

    def __init__(self, latent_dim, action_dim, hidden_dim, u_dim, layer_norm):
        super().__init__()
        self.net = mlp(latent_dim + action_dim, hidden_dim, 2 * u_dim, hidden_layers=2)
        self.ln = nn.LayerNorm(2 * u_dim) if layer_norm else nn.Identity()

    def forward(self, z, action):
        return self.ln(self.net(torch.cat([z, action], dim=-1))).chunk(2, dim=-1)


def action_code(action_dim):
    """Action encoder: (B, |A|) -> (B, CODE_DIM)."""
    return nn.Sequential(*mlp(action_dim, 512, CODE_DIM, hidden_layers=1), nn.LayerNorm(CODE_DIM))


def kl_divergence(mu_p, log_std_p, mu_q, log_std_q):
    """KL(N_p || N_q) of diagonal Gaussians, per dimension: (B, n) each -> (B, n)."""
    variance_ratio = (2 * (log_std_p - log_std_q)).exp()
    distance = ((mu_p - mu_q) / log_std_q.exp()).square()
    return log_std_q - log_std_p + 0.5 * (variance_ratio + distance - 1)


def contrastive_logits(query, W, key):
    """query W key^T minus the row maximum, which shifts no loss: (B, n), (n, m), (B, m) -> (B, B)."""
    logits = query @ W @ key.T
    return logits - logits.max(dim=1, keepdim=True).values


def info_nce(logits):
    """InfoNCE with the positives on the diagonal: (B, B) -> scalar."""
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))


def contrastive_metrics(logits, nce):
    """InfoNCE, its bound on mutual information in nats, and the share of queries that rank their own key first."""
    positives = torch.arange(len(logits), device=logits.device)
    accuracy = (logits.argmax(dim=1) == positives).float().mean()
    return {"info_nce": nce, "mi_bound": math.log(len(logits)) - nce, "contrastive_accuracy": accuracy}


class CoDyTask(AuxiliaryTask):
    """The step that both objectives share."""

    def __init__(self, config):
        super().__init__(config, config.cody_lr, config.encoder_lr + config.cody_lr)
        self.beta2, self.warmup_updates = config.cody_beta2, config.cody_warmup_updates
        self.max_grad_norm, self.grad_ratio = config.cody_max_grad_norm, config.cody_grad_ratio


class CoDy(CoDyTask):
    """InfoNCE + omega * KL; the constructor chooses its parts by the flags."""

    def __init__(self, config, latent_dim, action_dim):
        super().__init__(config)
        c, d, hidden_dim = config, latent_dim, config.hidden_dim
        u_dim = d + (c.reward_prediction == "contrastive")
        self.action_encoder = action_code(action_dim) if c.action_encoder else nn.Identity()
        dynamics_sizes = (d, CODE_DIM if c.action_encoder else action_dim, hidden_dim, u_dim)

        self.posterior = GaussianDynamics(*dynamics_sizes, c.dynamics_layer_norm)
        if c.kl_prior == "learned":
            self.prior = GaussianDynamics(*dynamics_sizes, c.dynamics_layer_norm)
        elif c.kl_prior == "shared":
            self.prior = self.posterior
        # augment and encode o_{t-1} only if the prior uses it
        self.augmented = {"obs_prev": "obs_prev"} if c.kl_prior in ("learned", "shared") else {}

        self.projection = {
            "mlp": lambda: mlp(u_dim, hidden_dim, u_dim, hidden_layers=1),
            "linear": lambda: nn.Linear(u_dim, u_dim),
            "none": nn.Identity,
        }[c.projection]()
        self.predictor = mlp(u_dim, hidden_dim, d, hidden_layers=c.predictor_layers - 1)
        self.W = nn.Parameter(torch.rand(d, d))
        if c.reward_prediction == "regression":
            self.reward_head = mlp(u_dim, hidden_dim, 1, hidden_layers=1)
        self.normalised_reward = {
            "per_step": lambda reward: reward / c.action_repeat,
            "symmetric": lambda reward: 2 * reward / c.action_repeat - 1,
            "none": lambda reward: reward,
        }[c.reward_norm]
        self.apply(weight_init)
        self.target_predictor = copy.deepcopy(self.predictor).requires_grad_(False)

    def update_targets(self):
        """EMA step of the target predictor."""
        soft_update(self.predictor, self.target_predictor, self.config.encoder_tau)

    def _prior_moments(self, batch, encoders):
        """mu and log sigma of q(u | z_bar_{t-1}, a_{t-1}), without gradient to the encoder, or of N(0, 1)."""
        if self.config.kl_prior == "unit_gaussian":
            zero = batch.reward.new_zeros(1)  # broadcasts
            return zero, zero
        with torch.no_grad():
            z_bar_prev = encoders[self.config.kl_encoder](batch.obs_prev)
        return self.prior(z_bar_prev, self.action_encoder(batch.action_prev))

    def loss(self, batch, z, encoder, target_encoder, *, detailed=False, noise=None):
        """InfoNCE + omega * KL of an augmented `Batch` of B pairs, and metrics, all 0-d except `kl_per_dim`.

        z (B, d) are the latents of `batch.obs`, with gradient; `encoder` and `target_encoder` are f and its EMA.
        `detailed` adds the expensive metrics. `noise` is the posterior sample's epsilon; None draws it.
        """
        c = self.config
        mu_p, log_std_p = self.posterior(z, self.action_encoder(batch.action))  # (B, d + 1)
        noise = torch.randn_like(mu_p) if noise is None else noise
        u = mu_p + log_std_p.exp() * noise
        query = self.predictor(self.projection(u))  # (B, d)

        reward = self.normalised_reward(batch.reward)
        encoders = {"target": target_encoder, "online": encoder}
        with torch.no_grad():
            key = encoders[c.key_encoder](batch.next_obs)
            if c.reward_prediction == "contrastive":
                key = torch.cat([key, reward], dim=-1)
            key = self.target_predictor(key)
        logits = contrastive_logits(query, self.W, key)
        cody_loss = nce = info_nce(logits)
        metrics = contrastive_metrics(logits, nce)
        metrics.update(posterior_mu=mu_p.mean(), posterior_std=log_std_p.exp().mean())

        if c.kl_prior != "none":
            mu_q, log_std_q = self._prior_moments(batch, encoders)
            kl_dims = kl_divergence(mu_p, log_std_p, mu_q, log_std_q).mean(dim=0)  # (d + 1,)
            kl = kl_dims.sum()
            cody_loss = cody_loss + c.omega_cody_loss * kl
            metrics.update(kl=kl, prior_mu=mu_q.mean(), prior_std=log_std_q.exp().mean())
            metrics.update(kl_dim_min=kl_dims.min(), kl_dim_median=kl_dims.median(), kl_dim_max=kl_dims.max())
            if detailed:
                metrics["kl_per_dim"] = kl_dims
        if c.reward_prediction == "regression":
            reward_loss = F.mse_loss(self.reward_head(u), reward)
            cody_loss = cody_loss + reward_loss
            metrics["reward_loss"] = reward_loss

        metrics["posterior_std_extreme"] = (log_std_p.abs() > EXTREME_LOG_STD).float().mean()
        metrics.update(latent_metrics(z, detailed), cody_loss=cody_loss)
        return cody_loss, metrics


class PublishedCoDy(CoDyTask):
    """The objective of the 2022 paper: L1 + omega * L2 + beta * L3; see docs/algorithm.md."""

    augmented = {"second_obs": "obs"}

    def __init__(self, config, latent_dim, action_dim):
        super().__init__(config)
        d = latent_dim
        self.action_encoder = action_code(action_dim)
        self.dynamics = nn.Sequential(mlp(d + CODE_DIM, config.hidden_dim, d, hidden_layers=2), nn.LayerNorm(d))
        self.W1 = nn.Parameter(torch.rand(d, d))
        self.W2 = nn.Parameter(torch.rand(CODE_DIM + d, d))
        self.apply(weight_init)
        self.target_action_encoder = copy.deepcopy(self.action_encoder).requires_grad_(False)
        self.target_dynamics = copy.deepcopy(self.dynamics).requires_grad_(False)

    def update_targets(self):
        """EMA step of the target action encoder and the target dynamics."""
        soft_update(self.action_encoder, self.target_action_encoder, PUBLISHED_TAU)
        soft_update(self.dynamics, self.target_dynamics, PUBLISHED_TAU)

    def loss(self, batch, z, encoder, target_encoder, *, detailed=False):
        """Same interface as `CoDy.loss`; `batch.obs` and `batch.second_obs` are two augmentations of o_t."""
        code = self.action_encoder(batch.action)  # (B, CODE_DIM)
        prediction = self.dynamics(torch.cat([z, code], dim=-1))  # (B, d)
        with torch.no_grad():
            second = [target_encoder(batch.second_obs), self.target_action_encoder(batch.action)]
            second_prediction = self.target_dynamics(torch.cat(second, dim=-1))
            z_bar_next = target_encoder(batch.next_obs)
        logits = contrastive_logits(prediction, self.W1, second_prediction)
        invariance = info_nce(logits)  # L1
        linearity = info_nce(contrastive_logits(torch.cat([code, z], dim=-1), self.W2, z_bar_next))  # L2
        regression = F.mse_loss(prediction, z_bar_next)  # L3
        cody_loss = invariance + self.config.omega_cody_loss * linearity + self.config.beta_cody_loss * regression
        metrics = {**contrastive_metrics(logits, invariance), **latent_metrics(z, detailed)}
        metrics.update(temporal_nce=linearity, dynamics_loss=regression, cody_loss=cody_loss)
        return cody_loss, metrics
