"""Replay of consecutive transitions in which every frame is stored once.

A ring of slots. A slot holds one frame and, unless the frame is the last of its episode, the transition that starts
from it: action, summed reward and `not_done`. An episode of T transitions takes T + 1 slots, so its final
observation is kept exactly. Stacked observations are rebuilt by index. Slots are named by their position in the
whole stream of frames; position p lies at `p % slots`.
"""

import math
import pathlib
from typing import NamedTuple

import numpy as np
import torch

from machine import available_memory


class Batch(NamedTuple):
    """B pairs of consecutive transitions; C = frame_stack * channels of a frame.

    Observations of a task's state are (B, C) float32 with C = frame_stack * state size.
    """

    obs_prev: torch.Tensor  # (B, C, H, W) uint8, o_{t-1}
    action_prev: torch.Tensor  # (B, A) float32, a_{t-1}
    obs: torch.Tensor  # (B, C, H, W) uint8, o_t
    action: torch.Tensor  # (B, A) float32, a_t
    reward: torch.Tensor  # (B, 1) float32, r_t summed over the action repeat
    next_obs: torch.Tensor  # (B, C, H, W) uint8, o_{t+1}
    not_done: torch.Tensor  # (B, 1) float32, 0 after a true termination
    second_obs: torch.Tensor | None = None  # another augmentation of o_t, where the auxiliary task asks for one


def _moved(tensor, device):
    """`tensor` on `device`, without waiting for the copy."""
    if tensor.device.type == device.type:
        return tensor
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


class ReplayBuffer:
    """Ring buffer of single frames.

    Args:
        config: see config.py. It holds `replay_buffer_capacity` transitions, no more than the run makes; with episodes
            that end early the final frames take more slots than planned and it holds a little less.
        obs_space: of the stacked observations, uint8 (C, H, W), or float32 (C,) of a state.
        action_dim: |A|.
        device: where batches go. The frames lie where `--replay_device` says.

    Raises:
        MemoryError: the frames do not fit in the memory that is available now; one line.
    """

    def __init__(self, config, obs_space, action_dim, device):
        capacity = min(config.replay_buffer_capacity, config.num_train_steps)
        self.slots = capacity + capacity // config.max_episode_steps + 2
        self.frame_stack = config.frame_stack
        self.device = device
        self._rng = np.random.default_rng(config.seed)
        self._stream = 0  # frames written since the start
        self._first = 0  # first of them that was stored; not 0 after `load` of a part
        self._saved = 0  # frames written to disk by `save`

        frame_shape = (obs_space.shape[0] // config.frame_stack, *obs_space.shape[1:])
        dtype = torch.uint8 if obs_space.dtype == np.uint8 else torch.float32
        size = self.slots * math.prod(frame_shape) * dtype.itemsize
        storage = config.replay_device
        if storage == "auto":
            storage = device if size < available_memory(device) / 2 else "cpu"
        storage = torch.device(storage)
        available = available_memory(storage)
        too_large = (
            f"--replay_buffer_capacity {config.replay_buffer_capacity}: its frames take {size / 1e9:.1f} GB and "
            f"{available / 1e9:.1f} GB of memory are available on {storage}"
        )
        if size > available:
            raise MemoryError(too_large)
        try:
            self._frames = torch.empty((self.slots, *frame_shape), dtype=dtype, device=storage)
            self._frames.zero_()  # touches every page now, so that the run cannot meet the end of memory later
        except RuntimeError as error:  # torch's way of saying that the allocation was refused
            raise MemoryError(too_large) from error
        self._actions = np.zeros((self.slots, action_dim), np.float32)
        self._rewards = np.zeros(self.slots, np.float32)
        self._not_dones = np.zeros(self.slots, np.float32)
        self._ages = np.zeros(self.slots, np.int32)  # frames before this one in its episode
        self._finals = np.ones(self.slots, bool)  # no transition starts here (yet)

    @property
    def nbytes(self):
        """Bytes of everything stored."""
        arrays = (self._actions, self._rewards, self._not_dones, self._ages, self._finals)
        return self._frames.nbytes + sum(array.nbytes for array in arrays)

    def begin_episode(self, obs):
        """Store the first frame of an episode: the newest of the stacked `obs` (C, H, W)."""
        self._write_frame(obs, age=0)

    def add(self, action, reward, next_obs, terminated):
        """Store the transition from the newest frame, and the newest frame of `next_obs` (C, H, W)."""
        slot = (self._stream - 1) % self.slots
        self._actions[slot] = action
        self._rewards[slot] = reward
        self._not_dones[slot] = not terminated
        self._finals[slot] = False
        self._write_frame(next_obs, age=self._ages[slot] + 1)

    def _write_frame(self, obs, age):
        slot = self._stream % self.slots
        frame = torch.as_tensor(obs[-self._frames.shape[1] :]).contiguous()
        self._frames[slot].copy_(_moved(frame, self._frames.device), non_blocking=True)
        self._ages[slot] = age
        self._finals[slot] = True
        self._stream += 1

    @property
    def _oldest(self):
        return max(self._first, self._stream - self.slots)

    def _is_legal(self, positions):
        """Whether o_{t-1} to o_{t+1} of each position t are of one episode and all their frames are still there."""
        slots = positions % self.slots
        ages = self._ages[slots]
        first_frame = positions - np.minimum(ages, self.frame_stack)
        return (ages >= 1) & ~self._finals[slots] & (first_frame >= self._oldest)

    def legal_positions(self):
        """Every position t in the stream whose pair of transitions (t-1, t) can be sampled, (N,) int64."""
        positions = np.arange(self._oldest, self._stream)
        return positions[self._is_legal(positions)]

    def sample(self, batch_size):
        """A `Batch` of pairs drawn uniformly, with replacement, from `legal_positions`.

        Raises:
            ValueError: no pair of transitions is stored.
        """
        # Redrawing the few illegal ones costs the same however much is stored; listing the legal ones would not.
        newest = max(self._stream, 1)
        positions = self._rng.integers(self._oldest, newest, batch_size)
        for _ in range(20):
            illegal = ~self._is_legal(positions)
            if not illegal.any():
                return self.gather(positions)
            positions[illegal] = self._rng.integers(self._oldest, newest, illegal.sum())
        legal = self.legal_positions()
        if not len(legal):
            raise ValueError("the replay buffer holds no pair of consecutive transitions")
        return self.gather(self._rng.choice(legal, batch_size))

    def gather(self, positions):
        """The `Batch` at these legal positions (B,)."""
        slots = positions % self.slots
        previous = (positions - 1) % self.slots
        k = self.frame_stack
        # k + 2 frames hold all three observations; those before the episode's start repeat its first frame
        back = np.minimum(np.arange(k, -2, -1), self._ages[slots][:, None])  # (B, k + 2)
        window = (positions[:, None] - back) % self.slots

        def stack(first):
            slots = _moved(torch.as_tensor(window[:, first : first + k].ravel()), self._frames.device)
            frames = _moved(self._frames.index_select(0, slots), self.device)
            return frames.view(len(positions), -1, *self._frames.shape[2:])

        def floats(values):
            return _moved(torch.as_tensor(values.reshape(len(positions), -1)), self.device)

        return Batch(
            obs_prev=stack(0),
            action_prev=floats(self._actions[previous]),
            obs=stack(1),
            action=floats(self._actions[slots]),
            reward=floats(self._rewards[slots]),
            next_obs=stack(2),
            not_done=floats(self._not_dones[slots]),
        )

    def save(self, folder):
        """Write what came since the last `save` to <folder>/<first>_<last>.npz, for `load`.

        The newest frame is left to the next chunk while its transition is still missing.
        """
        first, last = max(self._saved, self._oldest), self._stream - 1
        if first >= last:
            return
        slots = np.arange(first, last) % self.slots
        np.savez(
            pathlib.Path(folder) / f"{first:09d}_{last:09d}.npz",
            frames=self._frames[torch.as_tensor(slots)].cpu().numpy(),
            actions=self._actions[slots],
            rewards=self._rewards[slots],
            not_dones=self._not_dones[slots],
            ages=self._ages[slots],
            finals=self._finals[slots],
        )
        self._saved = last

    def load(self, folder):
        """Fill an empty buffer with the chunks that `save` wrote to `folder`, in their order."""
        for chunk in sorted(pathlib.Path(folder).glob("*_*.npz")):
            arrays = np.load(chunk)
            first, last = map(int, chunk.stem.split("_"))
            if first != self._stream:  # what lay between was overwritten before it was saved
                self._first = first
            for name in ("frames", "actions", "rewards", "not_dones", "ages", "finals"):
                values = arrays[name][-self.slots :]
                slots = np.arange(last - len(values), last) % self.slots
                store = getattr(self, f"_{name}")
                store[slots] = torch.as_tensor(values, device=store.device) if name == "frames" else values
            self._stream = self._saved = last
        self._finals[(self._stream - 1) % self.slots] = True  # the frame after it is in no chunk (yet)
