"""The encoders f: observations to latents.

An encoder is two modules, `convs` and `head`, because actor and critic share the first and own one each of the second.
`make_encoder` also gives the two parts of actor and critic that depend on `--encoder_type`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class ConvNet(nn.Module):
    """Pixels to flat conv features: 3x3 convolutions, the first few with stride 2, a ReLU after each.

    Weights and features are channels-last, the layout in which CPUs and GPUs convolve fastest.

    Args:
        obs_shape: (C, H, W) of the observation.
        num_layers, num_filters: of the convolutions.
        num_strided: how many of the first have stride 2.
        offset: subtracted from the pixels after scaling to [0, 1].
        dtype: in which to convolve; parameters and results are float32.
    """

    def __init__(self, obs_shape, num_layers, num_filters, num_strided=1, offset=0.0, dtype=torch.float32):
        super().__init__()
        channels = [obs_shape[0]] + num_layers * [num_filters]
        self.layers = nn.ModuleList(
            nn.Conv2d(channels[i], channels[i + 1], 3, stride=2 if i < num_strided else 1) for i in range(num_layers)
        ).to(memory_format=torch.channels_last)
        self.offset, self.dtype = offset, dtype
        with torch.no_grad():
            self.feature_dim = self(torch.zeros(1, *obs_shape, dtype=torch.uint8)).shape[1]

    def forward(self, obs):
        """(B, C, H, W) uint8 -> (B, feature_dim) float32, in the order (H, W, C)."""
        h = obs.to(self.dtype, memory_format=torch.channels_last)  # integers up to 255 are exact also in bfloat16
        for i, layer in enumerate(self.layers):
            weight, bias = layer.weight, layer.bias
            if i == 0:  # scale and shift the few weights instead of the many pixels
                weight = weight / 255
                bias = bias - self.offset * layer.weight.sum(dim=(1, 2, 3))
            h = F.conv2d(h, weight.to(self.dtype), bias.to(self.dtype), layer.stride).relu_()
        return h.permute(0, 2, 3, 1).flatten(1).float()


class LatentHead(nn.Module):
    """Flat conv features to the latent: linear, LayerNorm, tanh if asked for. (B, feature_dim) -> (B, d)."""

    def __init__(self, feature_dim, latent_dim, tanh=False):
        super().__init__()
        self.fc = nn.Linear(feature_dim, latent_dim)
        self.ln = nn.LayerNorm(latent_dim)
        self.squash = nn.Tanh() if tanh else nn.Identity()

    def forward(self, h):
        return self.squash(self.ln(self.fc(h)))


class Encoder(nn.Module):
    """f: (B, *obs_shape) -> (B, latent_dim) float32, through conv features (B, feature_dim)."""

    def __init__(self, convs, head, feature_dim, latent_dim):
        super().__init__()
        self.convs, self.head = convs, head
        self.feature_dim, self.latent_dim = feature_dim, latent_dim

    def forward(self, obs):
        return self.head(self.convs(obs))


class CachedEncoder:
    """An encoder without gradient that computes the conv features and the latents of each tensor once.

    The first images of a tensor that it has seen are not computed again either. Right for as long as its parameters
    stand still: make a new one after each of their steps.
    """

    def __init__(self, encoder):
        self._encoder = encoder
        self._seen = []  # (function, its argument, its result)

    def convs(self, obs):
        """As `Encoder.convs`."""
        return self._once(self._encoder.convs, obs)

    def __call__(self, obs):
        """As `Encoder.forward`."""
        return self._once(self._encoder.head, self.convs(obs))

    @torch.no_grad()
    def _once(self, function, x):
        for known_function, known, result in self._seen:
            if known_function is function and known.data_ptr() == x.data_ptr() and len(x) <= len(known):
                return result[: len(x)]
        result = function(x)
        self._seen.append((function, x, result))
        return result


class EncoderParts(NamedTuple):
    """What `--encoder_type` decides."""

    encoder: Encoder  # the critic's, and the auxiliary task's
    actor_head: nn.Module  # the actor's own, from the shared conv features to its latent
    critic_input: nn.Module  # between the latent and the Q networks


def make_encoder(config, obs_shape):
    """The `EncoderParts` of a config, for observations of shape (C, H, W), or (n,) for identity."""
    return {"pixel": _pixel, "protorl": _protorl, "identity": _identity}[config.encoder_type](config, obs_shape)


def _convs(config, obs_shape, offset=0.0):
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.precision]
    return ConvNet(obs_shape, config.num_layers, config.num_filters, config.num_strided_layers, offset, dtype)


def _pixel(config, obs_shape):
    convs = _convs(config, obs_shape)
    sizes = (convs.feature_dim, config.encoder_feature_dim)
    tanh = config.agent == "sac_ae"  # SAC+AE bounds its latent, CoDy does not
    return EncoderParts(
        Encoder(convs, LatentHead(*sizes, tanh), *sizes),
        actor_head=LatentHead(*sizes, tanh),
        critic_input=nn.Identity(),
    )


def _protorl(config, obs_shape):
    """Yarats et al., Proto-RL (arXiv 2102.11271): a linear latent; LayerNorm and tanh belong to actor and critic."""
    convs = _convs(config, obs_shape, offset=0.5)
    sizes = (convs.feature_dim, config.encoder_feature_dim)
    return EncoderParts(
        Encoder(convs, nn.Linear(*sizes), *sizes),
        actor_head=LatentHead(*sizes, tanh=True),
        critic_input=nn.Sequential(nn.LayerNorm(sizes[1]), nn.Tanh()),
    )


def _identity(config, obs_shape):
    """The state is the latent: no parameters."""
    size = obs_shape[0]
    return EncoderParts(Encoder(nn.Identity(), nn.Identity(), size, size), nn.Identity(), nn.Identity())
