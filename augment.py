"""Image augmentation: random shift, random crop and centre crop of (B, C, H, W) batches, any dtype, any device."""

import torch


def random_shift(images, times=1, pad=4):
    """Shift each image by up to `pad` pixels each way, repeating its border, like DrQ's replicate-pad and random crop.

    Args:
        images: (B, C, H, W).
        times: augmentations per image.
        pad: largest shift in pixels.

    Returns:
        (times * B, C, H, W) of the same dtype, ordered by augmentation, then image; all channels of an image share one
        shift.
    """
    corners = torch.randint(-pad, pad + 1, (times * len(images), 2), device=images.device)
    return _crop_at(images, images.shape[-1], corners)


def random_crop(images, size, times=1):
    """`times` random `size` x `size` windows of each image: (B, C, H, W) -> (times * B, C, size, size)."""
    corners = torch.randint(0, images.shape[-1] - size + 1, (times * len(images), 2), device=images.device)
    return _crop_at(images, size, corners)


def center_crop(images, size):
    """View of the central `size` x `size` window: (..., H, W) -> (..., size, size)."""
    top, left = (images.shape[-2] - size) // 2, (images.shape[-1] - size) // 2
    return images[..., top : top + size, left : left + size]


def _crop_at(images, size, corner):
    """Window i of image i % B with its top left pixel at `corner[i]`, (n, 2); pixels outside repeat the border.

    One gather of whole pixels: their channels are contiguous in the channels-last result.
    """
    (B, C, H, W), n = images.shape, len(corner)
    steps = torch.arange(size, device=images.device)
    rows = (corner[:, :1] + steps).clamp(0, H - 1)  # (n, size)
    columns = (corner[:, 1:] + steps).clamp(0, W - 1)
    first = (torch.arange(n, device=images.device) % B * H * W).view(n, 1, 1)  # index of each image's first pixel
    places = first + rows[:, :, None] * W + columns[:, None, :]  # (n, size, size)
    pixels = images.permute(0, 2, 3, 1).reshape(B * H * W, C)
    return pixels.index_select(0, places.view(-1)).view(n, size, size, C).permute(0, 3, 1, 2)
