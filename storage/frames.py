"""Frames of a replay in memory: as they are, or packed without loss.

Two stores with one interface, `write` a frame and `read` frames by slot. A frame is packed as lz4 of its difference
from the first frame of its episode, byte by byte: most of a DeepMind Control scene stands still. What does not become
shorter so is kept as it is.
"""

import sys

import lz4.block
import numpy as np
import torch


def flat(frame):
    """The bytes of an array (C, H, W), or (n,), as a copy; those of a pixel together, which packs a third smaller."""
    return np.array(np.moveaxis(frame, 0, -1), order="C").reshape(-1).view(np.uint8)


def pack(frame, first):
    """Bytes of `frame`, at most as many as it has; `first`: `flat` of another array of its shape and dtype."""
    own = flat(frame)
    packed = lz4.block.compress(np.subtract(own, first), store_size=False)  # uint8 wraps around
    return packed if len(packed) < len(own) else own.tobytes()


def unpack(packed, first, out):
    """Write the frame that `pack` was given with this `first` into `out`, an array of its shape and dtype."""
    if len(packed) == len(first):
        own = np.frombuffer(packed, np.uint8)
    else:
        own = np.frombuffer(lz4.block.decompress(packed, uncompressed_size=len(first)), np.uint8) + first
    out[...] = np.moveaxis(own.view(out.dtype).reshape(*out.shape[1:], out.shape[0]), -1, 0)


def to_device(tensor, device):
    """`tensor` on `device`, without waiting for the copy."""
    if tensor.device.type == device.type:
        return tensor
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


class RawFrames:
    """One tensor (slots, *frame_shape) on `device`, every page of it touched at once.

    Raises:
        RuntimeError: torch's, the memory was refused.
    """

    name = "raw"

    def __init__(self, slots, frame_shape, dtype, device):
        self._frames = torch.empty((slots, *frame_shape), dtype=dtype, device=device)
        self._frames.zero_()  # so that the run cannot meet the end of memory later

    @property
    def nbytes(self):
        """Bytes of the frames."""
        return self._frames.nbytes

    def write(self, slot, frame, first):
        """Put the array `frame` into `slot`."""
        self._frames[slot].copy_(to_device(torch.as_tensor(frame), self._frames.device), non_blocking=True)

    def read(self, slots):
        """Frames at `slots` (n,) int64, a tensor (n, *frame_shape) on the store's device."""
        return self._frames.index_select(0, to_device(torch.as_tensor(slots), self._frames.device))


class PackedFrames:
    """Packed frames in the memory of this process; they grow with the run."""

    name = "lz4"

    def __init__(self, slots, frame_shape, dtype, device):
        self._shape = tuple(frame_shape)
        self._dtype = dtype
        self._frames = [None] * slots  # (bytes, first frame of the episode), which lives as long as it is pointed to

    @property
    def nbytes(self):
        """Bytes of the frames and of the objects that hold them."""
        stored = [pair for pair in self._frames if pair]
        firsts = {id(first): first.nbytes for _, first in stored}
        return sum(sys.getsizeof(packed) + sys.getsizeof((0, 0)) for packed, _ in stored) + sum(firsts.values())

    def write(self, slot, frame, first):
        """Put the array `frame` into `slot`; `first`: `flat` of the first of its episode, which must not change."""
        self._frames[slot] = pack(frame, first), first

    def read(self, slots):
        """Frames at `slots` (n,) int64, a tensor (n, *frame_shape)."""
        frames = torch.empty((len(slots), *self._shape), dtype=self._dtype)
        for slot, out in zip(slots.tolist(), frames.numpy(), strict=True):
            unpack(*self._frames[slot], out)
        return frames
