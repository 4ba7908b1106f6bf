"""Soft actor-critic from pixels (Haarnoja et al., arXiv 1812.05905; Yarats et al., arXiv 1910.01741).

`SAC` owns the encoder and trains it with the critic's loss and, optionally, the loss of one auxiliary task. The
auxiliary task is a module with
    loss(batch, z, encoder, target_encoder, detailed) -> (loss, metrics), where z = encoder(batch.obs) with gradient
    parameter_groups() -> Adam groups of its own parameters and their learning rates
    encoder_lr, beta2: the encoder's learning rate in the task's step; Adam's beta2 in that step
    warmup_updates, max_grad_norm, grad_ratio: see --cody_warmup_updates, --cody_max_grad_norm and --cody_grad_ratio
    update_targets(): EMA step of the task's own target networks
    update_freq: updates between the task's steps
    augmented: {field of Batch: the field it augments}, in addition to `obs` and `next_obs`
    images(batch, encoder) -> {name: (N, 3, H, W)} for TensorBoard
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
    """Policy pi(a|o) on the shared conv features.

    Args:
        head: the actor's own module from conv features to a latent of dimension `latent_dim`.
        action_dim, hidden_dim: |A|, and the width of the two hidden layers.
        log_std_min, log_std_max: range of the log standard deviation.
    """

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

    Args:
        config: see config.py.
        obs_shape: shape of the encoder's input, (C, H, W), or (n,) for states.
        action_dim: |A|.
        make_auxiliary: latent dimension -> auxiliary task or None; see the module's docstring.
        augment: random augmentation of a (B, C, H, W) batch for training, `times` per image.
        crop: deterministic crop of such a batch for acting.
        device: torch device of all networks.
    """

    def __init__(self, config, obs_shape, action_dim, make_auxiliary, augment, crop, device):
        super().__init__()
        self.config = config
        self.device = device
        self._augment, self._crop = augment, crop
        self.encoder, actor_head, critic_input = make_encoder(config, obs_shape)
        latent_dim = self.encoder.latent_dim
        self.critic = Critic(critic_input, latent_dim, action_dim, config.hidden_dim)
        std_range = (config.actor_log_std_min, config.actor_log_std_max)
        self.actor = Actor(actor_head, latent_dim, action_dim, config.hidden_dim, *std_range)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(config.init_temperature)))
        self.auxiliary = make_auxiliary(latent_dim)
        self._augmented = {"obs": "obs", "next_obs": "next_obs"}
        if self.auxiliary:
            self._augmented = {**self.auxiliary.augmented, **self._augmented}
        self._times = {"obs": config.critic_augmentations, "next_obs": config.target_augmentations}
        for module in (self.encoder, self.critic, self.actor):
            module.apply(weight_init)
        if config.conv_init == "orthogonal":
            self.encoder.apply(orthogonal_convs)
        # copied after initialization, so that targets equal their online networks
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.target_entropy = -action_dim
        self.to(device)

        self._update = {"sequential": self._sequential, "joint": self._joint}[config.update_mode]
        self._encoder_parameters = list(self.encoder.parameters())  # none with the identity encoder

        def adam(groups, lr=1e-3, beta=0.9, beta2=0.999):
            return torch.optim.Adam(groups, lr, (beta, beta2), fused=True)

        joint = config.update_mode == "joint"
        if joint:
            self.encoder_optimizer = adam(self._encoder_parameters, config.encoder_lr, config.critic_beta)
        critic_parameters = [*([] if joint else self._encoder_parameters), *self.critic.parameters()]
        self.critic_optimizer = adam(critic_parameters, config.critic_lr, config.critic_beta)
        self.actor_optimizer = adam(self.actor.parameters(), config.actor_lr, config.actor_beta)
        self.alpha_optimizer = adam([self.log_alpha], config.alpha_lr, config.alpha_beta)
        if self.auxiliary:
            groups = self.auxiliary.parameter_groups()
            if not joint:
                groups.append({"params": self._encoder_parameters, "lr": self.auxiliary.encoder_lr})
            self.auxiliary_optimizer = adam(groups, beta2=self.auxiliary.beta2)
            self._auxiliary_rates = [group["lr"] for group in groups]
        if config.compile:
            self._compile()

    @property
    def optimizers(self):
        """{name: optimizer}; with the networks they are the agent's whole state."""
        return {name: value for name, value in vars(self).items() if isinstance(value, torch.optim.Optimizer)}

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

    @torch.no_grad()
    def act(self, obs, sample):
        """Action for one observation: sampled, or tanh of the mean.

        Args:
            obs: (C, H, W) uint8, or a state, (n,) float32.
            sample: whether to sample.

        Returns:
            (|A|,) float32 in [-1, 1].

        Raises:
            FloatingPointError: the policy diverged; a non-finite action would break the physics.
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
        fields = {}
        for field, source in self._augmented.items():
            fields[field] = self._augment(getattr(batch, source), times=self._times.get(field, 1))
        return batch._replace(**fields)

    def images(self, batch):
        """Augmented inputs and the auxiliary task's images: {name: (N, 3, H, W)}; none for states."""
        if batch.obs.dim() != 4:
            return {}
        images = {f"augmented/{field}": getattr(batch, field)[:4, -3:] for field in self._augmented}  # newest frames
        if self.auxiliary:
            images.update(self.auxiliary.images(batch, self.encoder))
        return images

    def update(self, batch, index, detailed=False):
        """One update on an augmented batch.

        Args:
            batch: the result of `augment`.
            index: index of the update; a run's first is init_steps * updates_per_step, as in the released code.
            detailed: whether to also compute the expensive metrics.

        Returns:
            Metrics, a dictionary of tensors that stay on their device.
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

    def _joint(self, batch, first, index, detailed):
        """Unlike the released code (docs/algorithm.md): one encoder step for the critic and auxiliary losses together.

        All share one forward of o_t. Backward runs from each loss to its latent, then once through the encoder with
        both gradients. The actor steps last, as in the released order, on the features from before the encoder step.
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
                head_norms = [self._head_grad_norm(f, z) for f, z in zip((all_features, features), leaves, strict=True)]
                metrics["head_grad_ratio"] = head_norms[1] / head_norms[0]
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
        """Scale the auxiliary loss's gradient at the latent to `grad_ratio` times the norm of the critic's.

        Args:
            z_critic, z_auxiliary: latents with the respective loss's gradient; norms are over the whole batch.

        Returns:
            Metrics: the ratio of the norms before scaling, and the scale.
        """
        critic_norm, auxiliary_norm = z_critic.grad.norm(), z_auxiliary.grad.norm()
        metrics = {"latent_grad_ratio": auxiliary_norm / critic_norm}
        if self.auxiliary.grad_ratio is not None:
            auxiliary_norm = auxiliary_norm.clamp_min(torch.finfo().tiny)  # avoid 0 / 0
            scale = (self.auxiliary.grad_ratio * critic_norm / auxiliary_norm).clamp_max(MAX_GRAD_SCALE)
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

    def _critic_latent(self, features):
        """Conv features (B, feature_dim) -> the critic's z (B, d)."""
        return self.encoder.head(features.detach() if self.config.detach_encoder else features)

    def _update_targets(self):
        soft_update(self.critic, self.target_critic, self.config.critic_tau)
        soft_update(self.encoder, self.target_encoder, self.config.encoder_tau)
        if self.auxiliary:
            self.auxiliary.update_targets()

    @torch.no_grad()
    def target_q(self, batch, encoder, target_encoder):
        """y = r + gamma * not_done * mean_k(min Q_target(o'_k, a'_k) - alpha * log pi(a'_k|o'_k)), (B, 1)."""
        mu, log_std = self.actor(encoder.convs(batch.next_obs))
        next_action, log_pi = squashed_sample(mu, log_std, torch.randn_like(mu))
        q1, q2 = self.target_critic(target_encoder(batch.next_obs), next_action)
        value = (torch.min(q1, q2) - self.log_alpha.exp() * log_pi).view(-1, len(batch.reward), 1).mean(dim=0)
        return batch.reward + self.config.discount * batch.not_done * value

    def _critic_loss(self, z, action, target_q):
        """Critic loss averaged over the M augmentations in z (M * B, d), all with the same target."""
        times = len(z) // len(action)
        action, target_q = action.repeat(times, 1), target_q.repeat(times, 1)
        q1, q2 = self.critic(z, action)
        critic_loss = F.mse_loss(q1, target_q) + F.mse_loss(q2, target_q)
        return critic_loss, {"critic_loss": critic_loss, "q": q1.mean(), "target_q": target_q.mean()}

    def _update_actor(self, features):
        """Step actor and temperature on conv features (B, feature_dim) without gradient."""
        mu, log_std = self.actor(features)
        pi, log_pi = squashed_sample(mu, log_std, torch.randn_like(mu))
        with torch.no_grad():
            z = self.encoder.head(features)
        alpha = self.log_alpha.exp()
        actor_loss = (alpha.detach() * log_pi - torch.min(*self.critic(z, pi))).mean()
        norm = self._step(actor_loss, self.actor_optimizer)
        alpha_loss = (alpha * (-log_pi - self.target_entropy).detach()).mean()
        alpha_norm = self._step(alpha_loss, self.alpha_optimizer)
        return {
            "actor_loss": actor_loss,
            "alpha_loss": alpha_loss,
            "alpha": alpha,
            "entropy": -log_pi.mean(),
            "actor_grad_norm": norm,
            "alpha_grad_norm": alpha_norm,
        }

    def _auxiliary_step(self, index, norm, *leaves):
        """Step the auxiliary task's optimizer, with its clip and its warm-up.

        The clip bounds the norm over all gradients of the task's loss: `norm`, over the optimizer's own parameters, and
        the gradients of the `leaves`, which another optimizer applies. The warm-up scales the learning rates and the
        gradients of the leaves.
        """
        groups, task, c = self.auxiliary_optimizer.param_groups, self.auxiliary, self.config
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
        """Backpropagate to the optimizer's own parameters only; returns the norm of their gradient.

        `leaves`: further tensors that receive the gradient.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        optimizer.zero_grad()
        loss.backward(inputs=[*parameters, *leaves])
        return grad_norm(parameters)
