"""Image augmentation: random shift, random crop and centre crop of (B, C, H, W) batches, any dtype, any device."""

import torch


def random_shift(images, pad=4):
    """Shift each image by up to `pad` pixels each way, repeating its border: DrQ's replicate-pad and random crop.

    Args:
        images: (B, C, H, W).
        pad: largest shift in pixels.

    Returns:
        (B, C, H, W) of the same dtype; one shift per image, the same for all its channels.
    """
    return _crop_at(images, images.shape[-1], torch.randint(-pad, pad + 1, (len(images), 2), device=images.device))


def random_crop(images, size):
    """One random `size` x `size` window of each image: (B, C, H, W) -> (B, C, size, size)."""
    return _crop_at(images, size, torch.randint(0, images.shape[-1] - size + 1, (len(images), 2), device=images.device))


def center_crop(images, size):
    """The central `size` x `size` window: (..., H, W) -> (..., size, size), a view."""
    top, left = (images.shape[-2] - size) // 2, (images.shape[-1] - size) // 2
    return images[..., top : top + size, left : left + size]


def _crop_at(images, size, corner):
    """Windows whose top left pixels are at `corner` (B, 2); pixels outside the image repeat its border.

    Selecting whole rows of memory is far cheaper than selecting pixels. So: columns while the columns are the rows
    of memory, as the replay stores them, then the change to channels-last, then rows.
    """
    B, C, H, W = images.shape
    steps = torch.arange(size, device=images.device)
    rows = (corner[:, :1] + steps).clamp(0, H - 1)  # (B, size)
    columns = (corner[:, 1:] + steps).clamp(0, W - 1)

    def first(count, of):  # index of the first memory row of each block
        return torch.arange(0, count * of, of, device=images.device)

    columns = first(B * C, W).view(B, C, 1) + columns[:, None]  # (B, C, size)
    h = images.transpose(2, 3).reshape(B * C * W, H).index_select(0, columns.view(-1))
    h = h.view(B, C, size, H).permute(0, 3, 2, 1).reshape(B * H, size * C)
    h = h.index_select(0, (first(B, H).view(B, 1) + rows).view(-1))
    return h.view(B, size, size, C).permute(0, 3, 1, 2)
