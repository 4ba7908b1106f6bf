"""The reconstruction task of SAC+AE."""

import torch
import torch.nn.functional as F

from decoder import image_quality, quantise


def test_quantise_gives_32_levels():
    obs = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    h = quantise(obs, torch.zeros(1, 1, 16, 16)).flatten()
    assert h.unique().numel() == 32 and h.min() == -0.5 and h.max() == 31 / 32 - 0.5
    assert all(h[i] == (i // 8) / 32 - 0.5 for i in range(256))
    noisy = quantise(obs, torch.full((1, 1, 16, 16), 0.5)).flatten()
    torch.testing.assert_close(noisy - h, torch.full((256,), 0.5 / 32))


def test_loss(small_agent, random_batch):
    agent, batch = small_agent("--agent sac_ae --decoder_latent_lambda 0.01"), random_batch(8)
    task = agent.auxiliary
    torch.manual_seed(3)
    z = agent.encoder(batch.obs)
    loss, metrics = task.loss(batch, z, agent.encoder, agent.target_encoder, detailed=True)
    torch.manual_seed(3)
    target = (batch.obs // 8).float() / 32 + torch.rand(8, 9, 20, 20) / 32 - 0.5
    assert z.abs().max() < 1  # tanh
    expected = F.mse_loss(task.decoder(z), target) + 0.01 * 0.5 * z.pow(2).sum(1).mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    for name, p in agent.named_parameters():
        assert (p.grad is not None) == name.startswith(("encoder.", "auxiliary.")), name
    assert {"psnr", "ssim"} <= set(metrics)


def test_rates_weight_decay_and_frequency(small_agent, random_batch):
    flags = "--encoder_lr 0.002 --decoder_lr 0.003 --decoder_weight_lambda 0.1 --decoder_update_freq 3"
    agent, batch = small_agent(f"--agent sac_ae {flags}"), random_batch(8)
    decoder, encoder = agent.auxiliary_optimizer.param_groups
    assert (encoder["lr"], encoder["weight_decay"]) == (0.002, 0)
    assert (decoder["lr"], decoder["weight_decay"]) == (0.003, 0.1)
    assert ["reconstruction_loss" in agent.update(batch, i) for i in range(4)] == [True, False, False, True]


def test_no_augmentation(small_agent, random_batch):
    agent, batch = small_agent("--agent sac_ae"), random_batch(8)
    assert all(torch.equal(a, b) for a, b in zip(agent.augment(batch)[:7], batch[:7], strict=True))


def test_image_quality():
    obs = torch.randint(0, 256, (4, 9, 20, 20), dtype=torch.uint8)
    perfect = obs.float() / 255 - 0.5
    off = perfect + 0.1 * torch.where(perfect > 0, -1, 1)
    assert image_quality(obs, perfect + 1e-4)["ssim"] > 0.999
    torch.testing.assert_close(image_quality(obs, off)["psnr"].float(), torch.tensor(20.0))  # 10 log10(1 / 0.01)


def test_images_show_pixels_beside_reconstructions(small_agent, random_batch):
    agent, batch = small_agent("--agent sac_ae"), random_batch(8)
    pair = agent.images(batch)["reconstruction"]
    assert pair.shape == (4, 3, 20, 40) and pair.min() >= 0 and pair.max() <= 1
    torch.testing.assert_close(pair[..., :20], batch.obs[:4, -3:] / 255)
    with torch.no_grad():
        decoded = agent.auxiliary.decoder(agent.encoder(batch.obs[:4]))[:, -3:] + 0.5
    torch.testing.assert_close(pair[..., 20:], decoded.clamp(0, 1))


def test_it_learns_to_reconstruct(small_agent):
    """Overfits a batch of simple pictures: squares on a plain ground."""
    from replay_buffer import Batch

    agent = small_agent("--agent sac_ae", seed=3)
    obs = torch.full((8, 9, 20, 20), 60, dtype=torch.uint8)
    for i in range(8):
        obs[i, :, i : i + 8, i : i + 8] = 200
    nothing = torch.zeros(8, 1)
    batch = Batch(obs, nothing.expand(8, 2), obs, nothing.expand(8, 2), nothing, obs, nothing)
    losses = [agent.update(batch, i)["reconstruction_loss"].item() for i in range(400)]
    assert losses[-1] < 0.2 * losses[0]
