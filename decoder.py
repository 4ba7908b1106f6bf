"""Reconstruction, the auxiliary task of SAC+AE (Yarats et al., arXiv 1910.01741)."""

import torch
import torch.nn.functional as F
from torch import nn

from auxiliary import AuxiliaryTask
from utils import latent_metrics, weight_init

BITS = 5  # pixels are quantised to 2^5 levels


class Decoder(nn.Module):
    """Latent to pixels: a linear layer, then deconvolutions that mirror the encoder's convolutions.

    (B, latent_dim) -> (B, C, H, W), H = W, where -1/2 is black and 1/2 is white.
    """

    def __init__(self, obs_shape, latent_dim, num_layers, num_filters):
        super().__init__()
        channels, size = obs_shape[0], obs_shape[-1]
        first = (size - 3) // 2 + 1  # size after the convolution with stride 2
        last = first - 2 * (num_layers - 1)
        self.fc = nn.Linear(latent_dim, num_filters * last * last)
        self.unflatten = nn.Unflatten(1, (num_filters, last, last))
        self.deconvs = nn.ModuleList(nn.ConvTranspose2d(num_filters, num_filters, 3) for _ in range(num_layers - 1))
        # the row and column that the stride skips if the size is even
        padding = size - (2 * (first - 1) + 3)
        self.last = nn.ConvTranspose2d(num_filters, channels, 3, stride=2, output_padding=padding)

    def forward(self, z):
        h = self.unflatten(torch.relu(self.fc(z)))
        for deconv in self.deconvs:
            h = torch.relu(deconv(h))
        return self.last(h)


def quantise(obs, noise):
    """(B, C, H, W) uint8 -> float32 in [-1/2, 1/2): 2^5 levels, plus uniform noise within a level."""
    levels = 2**BITS
    h = torch.floor(obs.float() / 2 ** (8 - BITS)) / levels
    return h + noise / levels - 0.5


class Reconstruction(AuxiliaryTask):
    """MSE of the decoded latent to the quantised pixels + lambda * |z|^2 / 2."""

    def __init__(self, config, obs_shape, latent_dim):
        super().__init__(config, config.decoder_lr, config.encoder_lr)
        self.update_freq, self.weight_decay = config.decoder_update_freq, config.decoder_weight_lambda
        self.decoder = Decoder(obs_shape, latent_dim, config.num_layers, config.num_filters)
        self.apply(weight_init)

    def loss(self, batch, z, encoder, target_encoder, *, detailed=False):
        """The loss and its metrics; `detailed` adds PSNR (dB) and SSIM of eight reconstructions."""
        reconstruction = self.decoder(z)
        noise = torch.rand(batch.obs.shape, device=batch.obs.device)
        reconstruction_loss = F.mse_loss(reconstruction, quantise(batch.obs, noise))
        latent_loss = 0.5 * z.square().sum(dim=-1).mean()
        loss = reconstruction_loss + self.config.decoder_latent_lambda * latent_loss
        metrics = {"reconstruction_loss": reconstruction_loss, "latent_loss": latent_loss, **latent_metrics(z)}
        if detailed:
            metrics.update(image_quality(batch.obs[:8], reconstruction[:8]))
        return loss, metrics

    @torch.no_grad()
    def images(self, batch, encoder):
        """Newest frames of four observations next to their reconstructions: (4, 3, H, 2 W) in [0, 1]."""
        reconstruction = self.decoder(encoder(batch.obs[:4]))
        pair = torch.cat([batch.obs[:4].float() / 255, as_pixels(reconstruction)], dim=-1)
        return {"reconstruction": pair[:, -3:]}


def as_pixels(reconstruction):
    """Decoder output -> pixels in [0, 1]."""
    return (reconstruction + 0.5).clamp(0, 1)


def image_quality(obs, reconstruction):
    """Mean PSNR (dB) and SSIM of (N, C, H, W) reconstructions against uint8 observations, computed on the host."""
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity  # imported here: takes a second or more

    pairs = list(zip(obs.cpu().numpy() / 255, as_pixels(reconstruction.detach()).cpu().double().numpy(), strict=True))
    psnr = [peak_signal_noise_ratio(a, b, data_range=1) for a, b in pairs]
    ssim = [structural_similarity(a, b, data_range=1, channel_axis=0) for a, b in pairs]
    return {"psnr": torch.tensor(psnr).mean(), "ssim": torch.tensor(ssim).mean()}
