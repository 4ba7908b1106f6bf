"""The CoDy auxiliary task: contrastive learning with dynamic models (You et al., arXiv 2203.01810).

Symbols as in docs/algorithm.md: z = f(o) latent, z_bar target latent, p posterior, q prior, u sample of the posterior,
which predicts the next latent and the reward (d + 1 numbers). sac.py describes the interface of both objectives.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

from utils import mlp, soft_update, weight_init

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


def action_code(action_dim, hidden_dim=512, code_dim=16):
    """Action encoder u(a): (B, |A|) -> (B, code_dim)."""
    return nn.Sequential(
        nn.Linear(action_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, code_dim), nn.LayerNorm(code_dim)
    )


def unit_gaussian(batch, encoders):
    """The prior N(0, 1): broadcastable mu and log sigma."""
    zero = batch.reward.new_zeros(1)
    return zero, zero


def kl_divergence(mu_p, log_std_p, mu_q, log_std_q):
    """KL(N_p || N_q) of diagonal Gaussians, per dimension: (B, n) each -> (B, n)."""
    variance_ratio = (2 * (log_std_p - log_std_q)).exp()
    distance = ((mu_p - mu_q) / log_std_q.exp()).square()
    return log_std_q - log_std_p + 0.5 * (variance_ratio + distance - 1)


def contrastive_logits(query, W, key):
    """query W key^T, minus the row maximum for stability: (B, n), (n, m), (B, m) -> (B, B)."""
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


def latent_metrics(z, detailed):
    """Norm and standard deviation of the latents (B, d); if detailed, also their effective rank."""
    metrics = {"latent_norm": z.norm(dim=-1).mean(), "latent_std": z.std(dim=0).mean()}
    if detailed:
        metrics["latent_rank"] = effective_rank(z.detach())
    return metrics


def effective_rank(z):
    """exp of the entropy of the normalised singular values of the centred batch (B, d) (Roy and Vetterli, 2007)."""
    # svdvals raises on non-finite values, of which the loss gives the better message
    singular_values = torch.linalg.svdvals(torch.nan_to_num(z - z.mean(dim=0)))
    return torch.special.entr(singular_values / singular_values.sum()).sum().exp()


class _Auxiliary(nn.Module):
    """Common part of both objectives.

    The released code steps the encoder with two Adams on the same gradient; one Adam at the summed rate is the same.
    """

    update_freq = 1

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder_lr = config.encoder_lr + config.cody_lr
        self.beta2 = config.cody_beta2
        self.warmup_updates, self.max_grad_norm = config.cody_warmup_updates, config.cody_max_grad_norm
        self.grad_ratio = config.cody_grad_ratio

    def parameter_groups(self):
        return [{"params": [p for p in self.parameters() if p.requires_grad], "lr": self.config.cody_lr}]

    def images(self, batch, encoder):
        return {}


class CoDy(_Auxiliary):
    """InfoNCE + omega * KL; the constructor chooses its parts by the flags.

    Args:
        config: see config.py.
        latent_dim: d.
        action_dim: |A|.
    """

    def __init__(self, config, latent_dim, action_dim):
        super().__init__(config)
        c = config
        d, hidden_dim = latent_dim, c.hidden_dim
        u_dim = d + (c.reward_prediction == "contrastive")
        self.action_encoder = action_code(action_dim) if c.action_encoder else nn.Identity()
        a_dim = 16 if c.action_encoder else action_dim

        self.posterior = GaussianDynamics(d, a_dim, hidden_dim, u_dim, c.dynamics_layer_norm)
        if c.kl_prior == "learned":
            self.prior = GaussianDynamics(d, a_dim, hidden_dim, u_dim, c.dynamics_layer_norm)
        elif c.kl_prior == "shared":
            self.prior = self.posterior
        looks_back = c.kl_prior in ("learned", "shared")
        self._q = self._dynamics_prior if looks_back else {"unit_gaussian": unit_gaussian, "none": None}[c.kl_prior]
        # augment and encode o_{t-1} only if the prior uses it
        self.augmented = {"obs_prev": "obs_prev"} if looks_back else {}

        self.projection = {
            "mlp": lambda: mlp(u_dim, hidden_dim, u_dim, hidden_layers=1),
            "linear": lambda: nn.Linear(u_dim, u_dim),
            "none": nn.Identity,
        }[c.projection]()
        self.predictor = mlp(u_dim, hidden_dim, d, hidden_layers=c.predictor_layers - 1)
        self.W = nn.Parameter(torch.rand(d, d))
        if c.reward_prediction == "regression":
            self.reward_head = mlp(u_dim, hidden_dim, 1, hidden_layers=1)
        repeat = c.action_repeat
        self.normalised_reward = {
            "per_step": lambda reward: reward / repeat,
            "symmetric": lambda reward: 2 * reward / repeat - 1,
            "none": lambda reward: reward,
        }[c.reward_norm]
        self.apply(weight_init)
        self.target_predictor = copy.deepcopy(self.predictor).requires_grad_(False)

    def update_targets(self):
        """EMA step of the target predictor."""
        soft_update(self.predictor, self.target_predictor, self.config.encoder_tau)

    def _dynamics_prior(self, batch, encoders):
        """q(u | z_bar_{t-1}, a_{t-1}), with gradient to the prior's weights but not to the encoder."""
        with torch.no_grad():
            z_bar_prev = encoders[self.config.kl_encoder](batch.obs_prev)
        return self.prior(z_bar_prev, self.action_encoder(batch.action_prev))

    def loss(self, batch, z, encoder, target_encoder, *, detailed=False, noise=None):
        """InfoNCE + omega * KL.

        Args:
            batch: augmented `Batch` of B pairs.
            z: latents of `batch.obs`, (B, d), with gradient.
            encoder, target_encoder: f and its EMA.
            detailed: whether to also compute the expensive metrics.
            noise: epsilon of the posterior sample, (B, d + 1); None: drawn here.

        Returns:
            The loss and a dictionary of metrics, all 0-d except `kl_per_dim` (d + 1,).
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

        if self._q is not None:
            mu_q, log_std_q = self._q(batch, encoders)
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


class PublishedCoDy(_Auxiliary):
    """The objective of the 2022 paper: L1 + omega * L2 + beta * L3; see docs/algorithm.md.

    Takes the same arguments as `CoDy`.
    """

    augmented = {"second_obs": "obs"}

    def __init__(self, config, latent_dim, action_dim):
        super().__init__(config)
        d = latent_dim
        self.action_encoder = action_code(action_dim)
        self.dynamics = nn.Sequential(mlp(d + 16, config.hidden_dim, d, hidden_layers=2), nn.LayerNorm(d))
        self.W1 = nn.Parameter(torch.rand(d, d))
        self.W2 = nn.Parameter(torch.rand(16 + d, d))
        self.apply(weight_init)
        self.target_action_encoder = copy.deepcopy(self.action_encoder).requires_grad_(False)
        self.target_dynamics = copy.deepcopy(self.dynamics).requires_grad_(False)

    def update_targets(self):
        """EMA step of the target action encoder and the target dynamics."""
        soft_update(self.action_encoder, self.target_action_encoder, PUBLISHED_TAU)
        soft_update(self.dynamics, self.target_dynamics, PUBLISHED_TAU)

    def loss(self, batch, z, encoder, target_encoder, *, detailed=False):
        """Same interface as `CoDy.loss`; `batch.obs` and `batch.second_obs` are two augmentations of o_t."""
        code = self.action_encoder(batch.action)  # (B, 16)
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
        metrics = {
            **contrastive_metrics(logits, invariance),
            **latent_metrics(z, detailed),
            "temporal_nce": linearity,
            "dynamics_loss": regression,
            "cody_loss": cody_loss,
        }
        return cody_loss, metrics
