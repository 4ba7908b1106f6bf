"""Soft actor-critic from pixels (Haarnoja et al., arXiv 1812.05905; Yarats et al., arXiv 1910.01741).

`SAC` owns the encoder and trains it with the critic's loss and, optionally, the loss of one `auxiliary.AuxiliaryTask`.
"""

import copy
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from encoder import CachedEncoder, make_encoder
from utils import grad_norm, mlp, orthogonal_convs, soft_update, weight_init

MAX_GRAD_SCALE = 1e4  # bound of --cody_grad_ratio's factor, as in VQGAN's adaptive weight (arXiv 2012.09841)


class Actor(nn.Module):
    """Policy pi(a|o): `head` maps the shared conv features to the actor's own latent, two hidden layers follow."""

    def __init__(self, head, latent_dim, action_dim, hidden_dim, log_std_min, log_std_max):
        super().__init__()
        self.head = head
        self.trunk = mlp(latent_dim, hidden_dim, 2 * action_dim, hidden_layers=2)
        self.log_std_min, self.log_std_max = log_std_min, log_std_max

    def forward(self, features):
        """Conv features (B, feature_dim) -> mu and log sigma of the pre-tanh Gaussian, each (B, |A|)."""
        mu, log_std = self.trunk(self.head(features)).chunk(2, dim=-1)
        span = self.log_std_max - self.log_std_min
        return mu, self.log_std_min + 0.5 * span * (torch.tanh(log_std) + 1)


def squashed_sample(mu, log_std, noise):
    """a = tanh(mu + sigma * noise) and its log probability, (B, |A|) and (B, 1)."""
    pi = torch.tanh(mu + noise * log_std.exp())
    log_pi = (-0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1, keepdim=True)
    # d tanh(u)/du = 1 - tanh(u)^2; relu and 1e-6 guard the log at saturation, as released
    log_pi = log_pi - torch.log(F.relu(1 - pi.square()) + 1e-6).sum(-1, keepdim=True)
    return pi, log_pi


class Critic(nn.Module):
    """Two Q networks on the latent: (B, d), (B, |A|) -> (B, 1), (B, 1). `latent_input` is applied to the latent."""

    def __init__(self, latent_input, latent_dim, action_dim, hidden_dim):
        super().__init__()
        self.latent_input = latent_input
        self.Q1 = mlp(latent_dim + action_dim, hidden_dim, 1, hidden_layers=2)
        self.Q2 = mlp(latent_dim + action_dim, hidden_dim, 1, hidden_layers=2)

    def forward(self, z, action):
        z_a = torch.cat([self.latent_input(z), action], dim=-1)
        return self.Q1(z_a), self.Q2(z_a)


class SAC(nn.Module):
    """The agent: acts, and takes one gradient update per batch.

    `obs_shape` is the encoder's input, (C, H, W), or (n,) for states. `make_auxiliary` maps the latent dimension to an
    `AuxiliaryTask` or None. `augment` draws `times` augmentations of each image of a (B, C, H, W) batch for training;
    `crop` is the deterministic crop of such a batch for acting.
    """

    POLICY = ("encoder.convs.", "actor.")  # prefixes of the parameters that `act` uses

    def __init__(self, config, obs_shape, action_dim, make_auxiliary, augment, crop, device):
        super().__init__()
        self.config, self.device = config, device
        self._augment, self._crop = augment, crop
        self.encoder, actor_head, critic_input = make_encoder(config, obs_shape)
        latent_dim = self.encoder.latent_dim
        self.critic = Critic(critic_input, latent_dim, action_dim, config.hidden_dim)
        std_range = (config.actor_log_std_min, config.actor_log_std_max)
        self.actor = Actor(actor_head, latent_dim, action_dim, config.hidden_dim, *std_range)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(config.init_temperature)))
        self.auxiliary = make_auxiliary(latent_dim)
        for module in (self.encoder, self.critic, self.actor):
            module.apply(weight_init)
        if config.conv_init == "orthogonal":
            self.encoder.apply(orthogonal_convs)
        # copied after initialisation, so that targets equal their online networks
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.target_entropy = -action_dim
        self.to(device)

        further = self.auxiliary.augmented if self.auxiliary else {}
        self._augmented = {**further, "obs": "obs", "next_obs": "next_obs"}
        self._encoder_parameters = list(self.encoder.parameters())  # none with the identity encoder
        self._update = {"sequential": self._sequential, "joint": self._joint}[config.update_mode]
        self._make_optimizers(joint=config.update_mode == "joint")
        if config.compile:
            self._compile()

    @torch.no_grad()
    def act(self, obs, sample):
        """Action (|A|,) float32 in [-1, 1], sampled or tanh(mu), for one observation, (C, H, W) uint8 or (n,) float32.

        Raises FloatingPointError if the policy diverged: a non-finite action would break the physics.
        """
        self._begin()
        obs = self._crop(torch.as_tensor(obs, device=self.device)[None])
        mu, log_std = self.actor(self.encoder.convs(obs))
        action = squashed_sample(mu, log_std, torch.randn_like(mu))[0] if sample else torch.tanh(mu)
        action = action[0].cpu().numpy()
        if not np.isfinite(action).all():
            raise FloatingPointError(f"the policy's action is {action}")
        return action

    def augment(self, batch):
        """The batch with each observation that the losses use augmented independently.

        `obs` and `next_obs` get `--critic_augmentations` and `--target_augmentations` times B images, ordered by
        augmentation.
        """
        times = {"obs": self.config.critic_augmentations, "next_obs": self.config.target_augmentations}
        fields = {}
        for field, source in self._augmented.items():
            fields[field] = self._augment(getattr(batch, source), times=times.get(field, 1))
        return batch._replace(**fields)

    def update(self, batch, index, detailed=False):
        """One update on the result of `augment`; returns metrics, a dictionary of tensors that stay on their device.

        A run's first `index` is init_steps * updates_per_step, as in the released code. `detailed` adds the expensive
        metrics.
        """
        self._begin()
        B = len(batch.reward)
        first = batch._replace(obs=batch.obs[:B], next_obs=batch.next_obs[:B])
        metrics = self._update(batch, first, index, detailed)
        metrics["batch_reward"] = batch.reward.mean()
        return {name: value.detach() for name, value in metrics.items()}

    def _sequential(self, batch, first, index, detailed):
        """The released order: critic; actor, temperature and targets; auxiliary task. Each sees the previous steps.

        `batch` has all augmentations, for the critic and its target; `first` only the first of each.
        """
        actor_due, targets_due, auxiliary_due = self._due(index)
        target_encoder = CachedEncoder(self.target_encoder)
        target_q = self.target_q(batch, self.encoder, target_encoder)
        z = self._critic_latent(self.encoder.convs(batch.obs))
        loss, metrics = self._critic_loss(z, batch.action, target_q)
        metrics["critic_grad_norm"] = self._step(loss, self.critic_optimizer)
        critic_norm = metrics["critic_encoder_grad_norm"] = grad_norm(self._encoder_parameters)

        with torch.set_grad_enabled(auxiliary_due):  # after the critic's step; the actor's gradient stays out of it
            features = self.encoder.convs(first.obs) if actor_due or auxiliary_due else None
        if actor_due:
            metrics.update(self._update_actor(features.detach()))
        if targets_due:
            self._update_targets()
            target_encoder = CachedEncoder(self.target_encoder)

        if auxiliary_due:
            z = self.encoder.head(features)
            loss, auxiliary_metrics = self.auxiliary.loss(first, z, self.encoder, target_encoder, detailed=detailed)
            metrics.update(auxiliary_metrics)
            metrics["auxiliary_grad_norm"] = self._backward(loss, self.auxiliary_optimizer)
            norm = metrics["auxiliary_encoder_grad_norm"] = grad_norm(self._encoder_parameters)
            metrics["encoder_grad_ratio"] = norm / critic_norm
            self._auxiliary_step(index, metrics["auxiliary_grad_norm"])
        return metrics

    @torch.no_grad()
    def target_q(self, batch, encoder, target_encoder):
        """y = r + gamma * not_done * mean_k(min Q_target(o'_k, a'_k) - alpha * log pi(a'_k|o'_k)), (B, 1)."""
        mu, log_std = self.actor(encoder.convs(batch.next_obs))
        next_action, log_pi = squashed_sample(mu, log_std, torch.randn_like(mu))
        q1, q2 = self.target_critic(target_encoder(batch.next_obs), next_action)
        value = (torch.min(q1, q2) - self.log_alpha.exp() * log_pi).view(-1, len(batch.reward), 1).mean(dim=0)
        return batch.reward + self.config.discount * batch.not_done * value

    def _critic_latent(self, features):
        """Conv features (B, feature_dim) -> the critic's z (B, d)."""
        return self.encoder.head(features.detach() if self.config.detach_encoder else features)

    def _critic_loss(self, z, action, target_q):
        """Critic loss averaged over the M augmentations in z (M * B, d), all with the same target; and its metrics."""
        times = len(z) // len(action)
        action, target_q = action.repeat(times, 1), target_q.repeat(times, 1)
        q1, q2 = self.critic(z, action)
        critic_loss = F.mse_loss(q1, target_q) + F.mse_loss(q2, target_q)
        return critic_loss, {"critic_loss": critic_loss, "q": q1.mean(), "target_q": target_q.mean()}

    def _update_actor(self, features):
        """Step actor and temperature on conv features (B, feature_dim) without gradient; returns metrics."""
        mu, log_std = self.actor(features)
        pi, log_pi = squashed_sample(mu, log_std, torch.randn_like(mu))
        with torch.no_grad():
            z = self.encoder.head(features)
        alpha = self.log_alpha.exp()
        actor_loss = (alpha.detach() * log_pi - torch.min(*self.critic(z, pi))).mean()
        alpha_loss = (alpha * (-log_pi - self.target_entropy).detach()).mean()
        metrics = {"actor_loss": actor_loss, "alpha_loss": alpha_loss, "alpha": alpha, "entropy": -log_pi.mean()}
        metrics["actor_grad_norm"] = self._step(actor_loss, self.actor_optimizer)
        metrics["alpha_grad_norm"] = self._step(alpha_loss, self.alpha_optimizer)
        return metrics

    def _update_targets(self):
        soft_update(self.critic, self.target_critic, self.config.critic_tau)
        soft_update(self.encoder, self.target_encoder, self.config.encoder_tau)
        if self.auxiliary:
            self.auxiliary.update_targets()

    def _joint(self, batch, first, index, detailed):
        """Unlike the released code (docs/algorithm.md): one encoder step for the critic and auxiliary losses together.

        All share one forward of o_t. Backward runs from each loss to its latent, then once through the encoder with
        both gradients. The actor steps after that, on the features from before the encoder step, then the targets.
        """
        actor_due, targets_due, auxiliary_due = self._due(index)
        encoder, target_encoder = CachedEncoder(self.encoder), CachedEncoder(self.target_encoder)
        target_q = self.target_q(batch, encoder, target_encoder)
        all_features = self.encoder.convs(batch.obs)
        features = all_features[: len(first.obs)]
        latents = [self._critic_latent(all_features)]
        leaves = [latents[0].detach().requires_grad_()]
        loss, metrics = self._critic_loss(leaves[0], batch.action, target_q)
        metrics["critic_grad_norm"] = self._step(loss, self.critic_optimizer, leaves[0])

        if auxiliary_due:
            latents.append(self.encoder.head(features) if self.config.detach_encoder else latents[0][: len(features)])
            leaves.append(latents[1].detach().requires_grad_())
            loss, auxiliary_metrics = self.auxiliary.loss(first, leaves[1], encoder, target_encoder, detailed=detailed)
            metrics.update(auxiliary_metrics)
            metrics["auxiliary_grad_norm"] = self._backward(loss, self.auxiliary_optimizer, leaves[1])
            if detailed:
                critic_norm = self._head_grad_norm(all_features, leaves[0])
                metrics["head_grad_ratio"] = self._head_grad_norm(features, leaves[1]) / critic_norm
            metrics.update(self._balance(*leaves))
            self._auxiliary_step(index, metrics["auxiliary_grad_norm"], leaves[1])

        self.encoder_optimizer.zero_grad()
        torch.autograd.backward(latents, [leaf.grad for leaf in leaves], inputs=self._encoder_parameters)
        self.encoder_optimizer.step()
        metrics["encoder_grad_norm"] = grad_norm(self._encoder_parameters)
        if actor_due:
            metrics.update(self._update_actor(features.detach()))
        if targets_due:
            self._update_targets()
        return metrics

    def _balance(self, z_critic, z_auxiliary):
        """Scale the auxiliary loss's gradient at the latent to the task's `grad_ratio` times the norm of the critic's.

        Norms are over the whole batch. Returns metrics: the ratio of the norms before scaling, and the scale.
        """
        ratio = self.auxiliary.grad_ratio
        critic_norm, auxiliary_norm = z_critic.grad.norm(), z_auxiliary.grad.norm()
        metrics = {"latent_grad_ratio": auxiliary_norm / critic_norm}
        if ratio is not None:
            auxiliary_norm = auxiliary_norm.clamp_min(torch.finfo().tiny)  # avoid 0 / 0
            scale = (ratio * critic_norm / auxiliary_norm).clamp_max(MAX_GRAD_SCALE)
            z_auxiliary.grad.mul_(scale)
            metrics["cody_grad_scale"] = scale
            metrics["cody_grad_scale_at_bound"] = (scale == MAX_GRAD_SCALE).float()
        return metrics

    def _head_grad_norm(self, features, z):
        """Norm of a loss's gradient at the encoder head's weights, from its gradient at the latents `z`."""
        head = self.encoder.head
        latents = head.forward(features.detach())  # the compiled head frees its graph after one backward
        return nn.utils.get_total_norm(torch.autograd.grad(latents, list(head.parameters()), z.grad))

    def _due(self, index):
        """Whether update `index` steps the actor (with the temperature), the targets and the auxiliary task."""
        c = self.config
        auxiliary_due = self.auxiliary is not None and index % self.auxiliary.update_freq == 0
        return index % c.actor_update_freq == 0, index % c.critic_target_update_freq == 0, auxiliary_due

    def _auxiliary_step(self, index, norm, *leaves):
        """Step the auxiliary task's optimizer, with the clip of its gradient and the warm-up of its rates.

        The clip bounds the norm of all gradients of the task's loss together: `norm` is that over the optimizer's
        parameters; those of the `leaves` go on to the encoder's optimizer, so the warm-up scales them like a rate.
        """
        c, task, groups = self.config, self.auxiliary, self.auxiliary_optimizer.param_groups
        if task.max_grad_norm is not None:
            parameters = [p for group in groups for p in group["params"]]
            total = nn.utils.get_total_norm([norm, *(leaf.grad for leaf in leaves)])
            nn.utils.clip_grads_with_norm_([*parameters, *leaves], task.max_grad_norm, total)
        if task.warmup_updates:
            done = index - c.init_steps * c.updates_per_step  # updates before this one
            share = min(1.0, (done + 1) / task.warmup_updates)
            for group, rate in zip(groups, self._auxiliary_rates, strict=True):
                group["lr"] = share * rate
            for leaf in leaves:
                leaf.grad.mul_(share)
        self.auxiliary_optimizer.step()

    def _step(self, loss, optimizer, *leaves):
        """`_backward`, then step the optimizer; returns the gradient norm."""
        norm = self._backward(loss, optimizer, *leaves)
        optimizer.step()
        return norm

    @staticmethod
    def _backward(loss, optimizer, *leaves):
        """Backpropagate to the optimizer's parameters and the `leaves` only; returns the norm over the parameters."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        optimizer.zero_grad()
        loss.backward(inputs=[*parameters, *leaves])
        return grad_norm(parameters)

    def _make_optimizers(self, joint):
        """One Adam per loss. The critic's and the auxiliary task's both step the encoder; if `joint`, its own does."""
        c = self.config
        shared = [] if joint else self._encoder_parameters

        def adam(groups, lr, beta=0.9, beta2=0.999):
            return torch.optim.Adam(groups, lr, (beta, beta2), fused=True)

        if joint:
            self.encoder_optimizer = adam(self._encoder_parameters, c.encoder_lr, c.critic_beta)
        self.critic_optimizer = adam([*shared, *self.critic.parameters()], c.critic_lr, c.critic_beta)
        self.actor_optimizer = adam(self.actor.parameters(), c.actor_lr, c.actor_beta)
        self.alpha_optimizer = adam([self.log_alpha], c.alpha_lr, c.alpha_beta)
        if task := self.auxiliary:
            own = [p for p in task.parameters() if p.requires_grad]
            groups = [{"params": own, "lr": task.lr, "weight_decay": task.weight_decay}]
            if not joint:
                groups.append({"params": shared, "lr": task.encoder_lr})
            self.auxiliary_optimizer = adam(groups, task.lr, beta2=task.beta2)
            self._auxiliary_rates = [group["lr"] for group in groups]

    @property
    def optimizers(self):
        """{name: optimizer}; with the networks they are the agent's whole state."""
        return {name: value for name, value in vars(self).items() if isinstance(value, torch.optim.Optimizer)}

    def images(self, batch):
        """Augmented inputs and the auxiliary task's images: {name: (N, 3, H, W)}; none for states."""
        if batch.obs.dim() != 4:
            return {}
        images = {f"augmented/{field}": getattr(batch, field)[:4, -3:] for field in self._augmented}  # newest frames
        if self.auxiliary:
            images.update(self.auxiliary.images(batch, self.encoder))
        return images

    def _compile(self):
        """torch.compile every network, on CUDA with CUDA graphs."""
        mode = "reduce-overhead" if self.device.type == "cuda" else None
        networks = [self.encoder.convs, self.encoder.head, self.target_encoder.convs, self.target_encoder.head]
        networks += [self.actor, self.critic, self.target_critic]
        networks += self.auxiliary.children() if self.auxiliary else []
        for network in networks:
            network.compile(dynamic=False, mode=mode)

    def _begin(self):
        """Tell CUDA graphs that they may overwrite all earlier outputs of the networks."""
        if self.config.compile:
            torch.compiler.cudagraph_mark_step_begin()
