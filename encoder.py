"""The conv encoder f: pixels -> convolutions -> linear -> LayerNorm -> latent.

Two modules, because actor and critic share the first and own one each of the second.
"""

import torch
from torch import nn


class ConvNet(nn.Module):
    """Pixels to flat conv features: 3x3 convolutions with strides 2, 1, 1, ..., a ReLU after each.

    Args:
        obs_shape: (C, H, W) of the observation.
        num_layers, num_filters: of the convolutions.
    """

    def __init__(self, obs_shape, num_layers, num_filters):
        super().__init__()
        channels = [obs_shape[0]] + num_layers * [num_filters]
        self.convs = nn.ModuleList(
            nn.Conv2d(channels[i], channels[i + 1], 3, stride=2 if i == 0 else 1) for i in range(num_layers)
        )
        with torch.no_grad():
            self.feature_dim = self(torch.zeros(1, *obs_shape, dtype=torch.uint8)).shape[1]

    def forward(self, obs):
        """(B, C, H, W) uint8 -> (B, feature_dim) float32."""
        h = obs.float() / 255  # (B, C, H, W)
        for conv in self.convs:
            h = torch.relu(conv(h))
        return h.flatten(1)


class LatentHead(nn.Module):
    """Flat conv features to the latent: linear, LayerNorm. (B, feature_dim) -> (B, d)."""

    def __init__(self, feature_dim, latent_dim):
        super().__init__()
        self.fc = nn.Linear(feature_dim, latent_dim)
        self.ln = nn.LayerNorm(latent_dim)

    def forward(self, h):
        return self.ln(self.fc(h))


class Encoder(nn.Module):
    """f: observations to latents. (B, C, H, W) uint8 -> (B, d) float32.

    `convs` is the part that the actor shares; `head` is the critic's and CoDy's own.
    """

    def __init__(self, obs_shape, latent_dim, num_layers, num_filters):
        super().__init__()
        self.convs = ConvNet(obs_shape, num_layers, num_filters)
        self.head = LatentHead(self.convs.feature_dim, latent_dim)

    def forward(self, obs):
        return self.head(self.convs(obs))
