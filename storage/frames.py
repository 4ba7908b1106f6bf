"""Replay frames in memory, raw or losslessly compressed.

Two stores share one interface: `write` a frame, `read` frames by slot. A packed frame is the lz4-compressed bytewise
difference from its episode's first frame, since most of a DeepMind Control scene does not move. A frame that lz4 cannot
shrink stays raw.
"""

import sys

import lz4.block
import numpy as np
import torch


def flat(frame):
    """A copy of the bytes of an array (C, H, W) or (n,), channels last: in this order lz4 output is a third smaller."""
    return np.array(np.moveaxis(frame, 0, -1), order="C").reshape(-1).view(np.uint8)


def pack(frame, first):
    """Compressed bytes of `frame`, never more than raw; `first`: `flat` of an array of the same shape and dtype."""
    own = flat(frame)
    packed = lz4.block.compress(np.subtract(own, first), store_size=False)  # uint8 wraps around
    return packed if len(packed) < len(own) else own.tobytes()


def unpack(packed, first, out):
    """Inverse of `pack`: write the frame into `out`, an array of its shape and dtype."""
    if len(packed) == len(first):
        own = np.frombuffer(packed, np.uint8)
    else:
        own = np.frombuffer(lz4.block.decompress(packed, uncompressed_size=len(first)), np.uint8) + first
    out[...] = np.moveaxis(own.view(out.dtype).reshape(*out.shape[1:], out.shape[0]), -1, 0)


def to_device(tensor, device):
    """`tensor` on `device`, copied asynchronously."""
    if tensor.device.type == device.type:
        return tensor
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


class RawFrames:
    """One tensor (slots, *frame_shape) on `device`; RuntimeError if torch cannot allocate it."""

    def __init__(self, slots, frame_shape, dtype, device):
        self._frames = torch.empty((slots, *frame_shape), dtype=dtype, device=device)
        self._frames.zero_()  # touches every page, so the run cannot run out of memory later

    @property
    def nbytes(self):
        """Bytes of the frames."""
        return self._frames.nbytes

    def write(self, slot, frame, first):
        """Put the array `frame` into `slot`."""
        self._frames[slot].copy_(to_device(torch.as_tensor(frame), self._frames.device), non_blocking=True)

    def read(self, slots):
        """Frames at `slots` (n,) int64 as a tensor (n, *frame_shape) on the store's device."""
        return self._frames.index_select(0, to_device(torch.as_tensor(slots), self._frames.device))


class PackedFrames:
    """Packed frames in process memory; usage grows with the run."""

    def __init__(self, slots, frame_shape, dtype, device):
        self._shape, self._dtype = frame_shape, dtype
        self._frames = [None] * slots  # (bytes, first frame of the episode); the frames of an episode share it

    @property
    def nbytes(self):
        """Bytes of the frames and of the Python objects that hold them."""
        stored = [pair for pair in self._frames if pair]
        firsts = {id(first): first.nbytes for _, first in stored}
        return sum(sys.getsizeof(packed) + sys.getsizeof((0, 0)) for packed, _ in stored) + sum(firsts.values())

    def write(self, slot, frame, first):
        """Put the array `frame` into `slot`; `first`: `flat` of its episode's first frame; must not change later."""
        self._frames[slot] = pack(frame, first), first

    def read(self, slots):
        """Frames at `slots` (n,) int64 as a tensor (n, *frame_shape)."""
        frames = torch.empty((len(slots), *self._shape), dtype=self._dtype)
        for slot, out in zip(slots.tolist(), frames.numpy(), strict=True):
            unpack(*self._frames[slot], out)
        return frames
