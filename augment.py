"""Image augmentation: random shift, random crop and centre crop of (B, C, H, W) batches, any dtype, any device.

Random shift and random crop return (times * B, C, size, size), ordered by augmentation, then image. They move all
channels of an image together.
"""

import torch


def random_shift(images, times=1, pad=4):
    """Shift each image by up to `pad` pixels each way, repeating its border: DrQ's replicate-pad and random crop."""
    return _random_windows(images, images.shape[-1], -pad, pad, times)


def random_crop(images, size, times=1):
    """`times` random `size` x `size` windows of each image."""
    return _random_windows(images, size, 0, images.shape[-1] - size, times)


def center_crop(images, size):
    """View of the central `size` x `size` window: (..., H, W) -> (..., size, size)."""
    top, left = (images.shape[-2] - size) // 2, (images.shape[-1] - size) // 2
    return images[..., top : top + size, left : left + size]


def _random_windows(images, size, lowest, highest, times):
    """Cut window i from image i % B, its top left pixel drawn from [lowest, highest]; pixels outside repeat the border.

    One gather of whole pixels: their channels are contiguous in the channels-last result.
    """
    (B, C, H, W), device = images.shape, images.device
    n = times * B
    corners = torch.randint(lowest, highest + 1, (n, 2), device=device)
    steps = torch.arange(size, device=device)
    rows = (corners[:, :1] + steps).clamp(0, H - 1)  # (n, size)
    columns = (corners[:, 1:] + steps).clamp(0, W - 1)
    first = (torch.arange(n, device=device) % B * H * W).view(n, 1, 1)  # index of each image's first pixel
    indices = first + rows[:, :, None] * W + columns[:, None, :]  # (n, size, size)
    pixels = images.permute(0, 2, 3, 1).reshape(B * H * W, C)
    return pixels.index_select(0, indices.view(-1)).view(n, size, size, C).permute(0, 3, 1, 2)
