"""Augmentations against torch's own padding and plain slicing."""

import torch
import torch.nn.functional as F

from augment import center_crop, random_crop, random_shift


def images(n=64, size=20):
    return torch.randint(0, 256, (n, 9, size, size), dtype=torch.uint8)


def matches(window, source, size):
    """Corners at which `window` (C, size, size) occurs in `source` (C, H, W)."""
    span = source.shape[-1] - size + 1
    return [
        (y, x) for y in range(span) for x in range(span) if torch.equal(window, source[:, y : y + size, x : x + size])
    ]


def test_random_shift_is_a_crop_of_the_replicate_padded_image():
    x = images()
    shifted = random_shift(x)
    assert shifted.shape == x.shape and shifted.dtype == torch.uint8
    padded = F.pad(x.float(), (4, 4, 4, 4), mode="replicate").to(torch.uint8)
    corners = [matches(s, p, 20) for s, p in zip(shifted, padded, strict=True)]
    assert all(len(found) == 1 for found in corners)
    assert len({found[0] for found in corners}) > 20  # each image its own shift


def test_several_augmentations_of_each_image():
    """All images once, then all again, each with its own shift."""
    x = images(n=16)
    for shifted, source, size in (
        (random_shift(x, times=3), F.pad(x.float(), (4, 4, 4, 4), mode="replicate").to(torch.uint8), 20),
        (random_crop(x, 9, times=3), x, 9),
    ):
        corners = [[matches(s, p, size)[0] for s, p in zip(part, source, strict=True)] for part in shifted.split(16)]
        assert len(corners) == 3 and corners[0] != corners[1] != corners[2] != corners[0]


def test_random_shift_reaches_every_shift():
    x = torch.arange(9).view(1, 1, 9, 1) * 9 + torch.arange(9).view(1, 1, 1, 9)
    centre = random_shift(x.expand(5000, 1, 9, 9))[:, 0, 4, 4]
    assert centre.unique().numel() == 81


def test_random_crop():
    x = images(n=256, size=12)  # so many that each of the 16 corners is missing once in a million
    cropped = random_crop(x, 9)
    assert cropped.shape == (256, 9, 9, 9)
    corners = [matches(c, i, 9) for c, i in zip(cropped, x, strict=True)]
    assert all(len(found) == 1 for found in corners)
    assert {found[0] for found in corners} == {(y, x) for y in range(4) for x in range(4)}


def test_center_crop():
    x = images(size=12)
    assert torch.equal(center_crop(x, 8), x[:, :, 2:10, 2:10])
    assert torch.equal(center_crop(x, 12), x)
