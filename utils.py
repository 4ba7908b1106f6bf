"""Network utilities: seeds, weight initialisation, soft update, MLPs, gradient norms, metrics of latents."""

import random

import numpy as np
import torch
from torch import nn


def seed_everything(seed):
    """Seed Python, NumPy and torch on all devices."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class GlobalRandomness:
    """State of the generators that `seed_everything` seeds (of GPUs, the one in use), for checkpoints."""

    def state_dict(self):
        kind, keys, *rest = np.random.get_state()
        return {
            "python": random.getstate(),
            "numpy": [kind, keys.tolist(), *rest],
            "torch": torch.get_rng_state(),
            "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, state):
        random.setstate(state["python"])
        kind, keys, *rest = state["numpy"]
        np.random.set_state((kind, np.array(keys, np.uint32), *rest))
        torch.set_rng_state(state["torch"])
        if torch.cuda.is_available() and state["cuda"]:  # empty if the run was on the CPU until now
            torch.cuda.set_rng_state(state["cuda"][0])


def mlp(input_dim, hidden_dim, output_dim, hidden_layers):
    """Linear layers with ReLUs in between: (B, input_dim) -> (B, output_dim)."""
    layers = []
    for _ in range(hidden_layers):
        layers += [nn.Linear(input_dim, hidden_dim), nn.ReLU()]
        input_dim = hidden_dim
    return nn.Sequential(*layers, nn.Linear(input_dim, output_dim))


def weight_init(module):
    """Orthogonal linears and delta-orthogonal convolutions, zero bias; for `module.apply`.

    Delta-orthogonal: gain sqrt(2) on the centre tap, zero elsewhere (Xiao et al., arXiv 1806.05393).
    """
    if isinstance(module, nn.Linear):
        nn.init.orthogonal_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.zeros_(module.weight)
        middle = module.weight.shape[-1] // 2
        # via a copy: orthogonal_ reshapes in place, which fails on a strided centre tap
        centre = nn.init.orthogonal_(torch.empty(module.weight.shape[:2]), gain=nn.init.calculate_gain("relu"))
        with torch.no_grad():
            module.weight[:, :, middle, middle] = centre
        nn.init.zeros_(module.bias)


def orthogonal_convs(module):
    """Convolutions orthogonal over the whole kernel, gain sqrt(2), as in DrQ; for `module.apply`."""
    if isinstance(module, nn.Conv2d):
        weight = torch.empty(module.weight.shape)  # contiguous, which orthogonal_ needs
        with torch.no_grad():
            module.weight.copy_(nn.init.orthogonal_(weight, gain=nn.init.calculate_gain("relu")))


@torch.no_grad()
def soft_update(net, target, tau):
    """EMA step: target <- (1 - tau) * target + tau * net."""
    targets = list(target.parameters())
    if targets:  # the identity encoder has none
        torch._foreach_lerp_(targets, list(net.parameters()), tau)


def grad_norm(parameters):
    """L2 norm over all gradients, a 0-d tensor; skips parameters without a gradient."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def latent_metrics(z, detailed=False):
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
