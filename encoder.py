"""The encoders f: observations to latents.

An encoder has two modules, `convs` and `head`: actor and critic share the convs and have a head each.
"""

import torch
import torch.nn.functional as F
from torch import nn


class ConvNet(nn.Module):
    """Pixels to flat conv features: 3x3 convolutions, each followed by a ReLU; the first `num_strided` have stride 2.

    `offset` is subtracted from the pixels after scaling to [0, 1]. Convolutions are in `dtype`; parameters and results
    are float32. Weights and features are channels-last, the fastest layout for convolutions on CPUs and GPUs.
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
        h = obs.to(self.dtype, memory_format=torch.channels_last)  # bfloat16 represents integers up to 255 exactly
        for i, layer in enumerate(self.layers):
            weight, bias = layer.weight, layer.bias
            if i == 0:  # scale and shift the few weights instead of the many pixels
                weight = weight / 255
                bias = bias - self.offset * layer.weight.sum(dim=(1, 2, 3))
            h = F.conv2d(h, weight.to(self.dtype), bias.to(self.dtype), layer.stride).relu_()
        return h.permute(0, 2, 3, 1).flatten(1).float()


class LatentHead(nn.Module):
    """Flat conv features to the latent: linear, LayerNorm, optional tanh. (B, feature_dim) -> (B, d)."""

    def __init__(self, feature_dim, latent_dim, tanh):
        super().__init__()
        self.fc = nn.Linear(feature_dim, latent_dim)
        self.ln = nn.LayerNorm(latent_dim)
        self.squash = nn.Tanh() if tanh else nn.Identity()

    def forward(self, h):
        return self.squash(self.ln(self.fc(h)))


class Encoder(nn.Module):
    """f: (B, *obs_shape) -> (B, latent_dim) float32, through conv features (B, feature_dim)."""

    def __init__(self, convs, head, latent_dim):
        super().__init__()
        self.convs, self.head, self.latent_dim = convs, head, latent_dim

    def forward(self, obs):
        return self.head(self.convs(obs))


def make_encoder(config, obs_shape):
    """The modules that depend on `--encoder_type`; `obs_shape` is (C, H, W), or (n,) for identity.

    Returns the encoder; the actor's head, from the shared conv features to its own latent; and the module between the
    latent and the Q networks.
    """
    if config.encoder_type == "identity":  # the state itself is the latent; no parameters
        return Encoder(nn.Identity(), nn.Identity(), obs_shape[0]), nn.Identity(), nn.Identity()

    d = config.encoder_feature_dim
    protorl = config.encoder_type == "protorl"
    offset = 0.5 if protorl else 0.0
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    convs = ConvNet(obs_shape, config.num_layers, config.num_filters, config.num_strided_layers, offset, dtype)
    if protorl:  # Yarats et al., arXiv 2102.11271: a linear latent; actor and critic apply LayerNorm and tanh
        encoder = Encoder(convs, nn.Linear(convs.feature_dim, d), d)
        return encoder, LatentHead(convs.feature_dim, d, tanh=True), nn.Sequential(nn.LayerNorm(d), nn.Tanh())
    tanh = config.agent == "sac_ae"  # SAC+AE bounds its latent, CoDy does not
    encoder = Encoder(convs, LatentHead(convs.feature_dim, d, tanh), d)
    return encoder, LatentHead(convs.feature_dim, d, tanh), nn.Identity()


class CachedEncoder:
    """An encoder without gradient that computes the conv features and latents of each tensor only once.

    It also reuses them for a slice of a tensor's first images. Valid only while the encoder's parameters stay
    unchanged: make a new one after each optimizer or EMA step.
    """

    def __init__(self, encoder):
        self._encoder = encoder
        self._seen = []  # (function, argument, result)

    def convs(self, obs):
        """`Encoder.convs`, cached."""
        return self._once(self._encoder.convs, obs)

    def __call__(self, obs):
        """`Encoder.forward`, cached."""
        return self._once(self._encoder.head, self.convs(obs))

    @torch.no_grad()
    def _once(self, function, x):
        for known_function, known, result in self._seen:
            if known_function is function and known.data_ptr() == x.data_ptr() and len(x) <= len(known):
                return result[: len(x)]
        result = function(x)
        self._seen.append((function, x, result))
        return result
