"""Replay of consecutive transitions in which every frame is stored once.

A ring of slots. A slot holds one frame and, unless the frame is the last of its episode, the transition that starts
from it: action, summed reward and `not_done`. An episode of T transitions takes T + 1 slots, so its final
observation is kept exactly. Stacked observations are rebuilt by index. Slots are named by their position in the
whole stream of frames; position p lies at `p % slots`.

The frames themselves lie in a store of frames.py. With a journal (journal.py) everything that comes in is also written
to disk, and read from there into another buffer.
"""

import dataclasses
import math
import pathlib
from typing import NamedTuple

import gymnasium
import numpy as np
import torch

from endings import Refused, Stopped, check_signals
from machine import available_memory
from storage import journal
from storage.frames import PackedFrames, RawFrames, flat, to_device
from storage.run_folder import CHECKPOINT, load_config

PACKED_BYTES = 5_000  # of a packed frame: an estimate, cartpole has 1,600 and walker 11,000
MEMORY_CHECK_FRAMES = 100  # frames between two looks at the memory that is left
RESERVE_BYTES = 200_000_000  # of memory that must stay free


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


class ReplayBuffer:
    """Ring buffer of single frames.

    Args:
        config: see config.py. It holds `replay_buffer_capacity` transitions, no more than the run makes; with episodes
            that end early the final frames take more slots than planned and it holds a little less.
        obs_space: of the stacked observations, uint8 (C, H, W), or float32 (C,) of a state.
        action_dim: |A|.
        device: where batches go. The frames lie where `--replay_device` says.

    Raises:
        Refused: the frames do not fit in the memory that is available now; one line.
    """

    def __init__(self, config, obs_space, action_dim, device):
        capacity = min(config.replay_buffer_capacity, config.num_train_steps)
        self.slots = capacity + capacity // config.max_episode_steps + 2
        self.frame_stack = config.frame_stack
        self.device = device
        self._rng = np.random.default_rng(config.seed)
        self._stream = 0  # frames written since the start
        self._journal = None

        self._frame_shape = (obs_space.shape[0] // config.frame_stack, *obs_space.shape[1:])
        # of batches: as the encoders look at pixels
        self._layout = torch.channels_last if len(self._frame_shape) == 3 else torch.contiguous_format
        self._dtype = np.dtype(np.uint8 if obs_space.dtype == np.uint8 else np.float32)
        self._frames = self._make_store(config)
        self._actions = np.zeros((self.slots, action_dim), np.float32)
        self._rewards = np.zeros(self.slots, np.float32)
        self._not_dones = np.zeros(self.slots, np.float32)
        self._ages = np.zeros(self.slots, np.int32)  # frames before this one in its episode
        self._finals = np.ones(self.slots, bool)  # no transition starts here (yet)

    def _make_store(self, config):
        """Where the frames go: raw where they take less than half of what is free, unless a flag says otherwise."""
        raw = self.slots * math.prod(self._frame_shape) * self._dtype.itemsize
        packed = self.slots * PACKED_BYTES
        kind, place = config.replay_storage, config.replay_device
        if place == "auto":
            fits = kind != "lz4" and raw < _available(self.device) / 2
            place = self.device if fits else "cpu"
        place = torch.device(place)
        available = _available(place)
        if kind == "auto":
            kind = "raw" if raw < available / 2 or place.type == "cuda" else "lz4"
        size = raw if kind == "raw" else min(raw, packed)
        too_large = (
            f"--replay_buffer_capacity {config.replay_buffer_capacity}: its frames take {size / 1e9:.1f} GB "
            f"({kind}) and {available / 1e9:.1f} GB of memory are available on {place}"
        )
        if size > available:
            raise Refused(too_large)
        self._estimate = size
        dtype = torch.from_numpy(np.empty(0, self._dtype)).dtype
        try:
            return {"raw": RawFrames, "lz4": PackedFrames}[kind](self.slots, self._frame_shape, dtype, place)
        except RuntimeError as error:  # torch's way of saying that the allocation was refused
            raise Refused(too_large) from error

    @property
    def nbytes(self):
        """Bytes of everything stored."""
        arrays = (self._actions, self._rewards, self._not_dones, self._ages, self._finals)
        return self._frames.nbytes + sum(array.nbytes for array in arrays)

    @property
    def description(self):
        """What a run says of its replay: how its frames are stored, and the memory they take when it is full."""
        about = "about " if self._frames.name == "lz4" else ""
        return f"replay of {about}{self._estimate / 1e9:.2f} GB ({self._frames.name})"

    def check_memory(self):
        """Raise `Stopped` while there is still room to save the run, if the frames grow out of the memory."""
        if self._frames.name == "raw" or self._stream % MEMORY_CHECK_FRAMES:
            return
        if (free := available_memory()) < RESERVE_BYTES:
            size = self.nbytes / 1e9
            raise Stopped(f"{free / 1e9:.1f} GB of memory are left and the replay has grown to {size:.1f} GB", 1)

    def begin_episode(self, obs):
        """Store the first frame of an episode: the newest of the stacked `obs` (C, H, W)."""
        self._write(obs, 0, 0.0, 0.0, False)

    def add(self, action, reward, next_obs, terminated):
        """Store the transition from the newest frame, and the newest frame of `next_obs` (C, H, W)."""
        slot = (self._stream - 1) % self.slots
        self._actions[slot] = action
        self._rewards[slot] = reward
        self._not_dones[slot] = not terminated
        self._finals[slot] = False
        self._write(next_obs, self._ages[slot] + 1, action, reward, terminated)

    def _write(self, obs, age, action, reward, terminated):
        """The newest frame of `obs` into the next slot, and into the journal with what led to it."""
        frame = np.asarray(obs)[-self._frame_shape[0] :].copy()  # the environment's is drawn over
        if age == 0:
            self._first = flat(frame)
        slot = self._stream % self.slots
        self._frames.write(slot, frame, self._first)
        self._ages[slot] = age
        self._finals[slot] = True
        if self._journal:
            self._journal.append(self._stream, frame, self._first, age, action, reward, terminated)
        self._stream += 1

    @property
    def _oldest(self):
        return max(0, self._stream - self.slots)

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

        frames = to_device(self._frames.read(window.ravel()), self.device)
        frames = frames.view(len(positions), -1, *self._frame_shape[1:])  # (B, (k + 2) * C, H, W)
        frames = frames.contiguous(memory_format=self._layout)  # turned here once, not in each of the three stacks
        channels = self._frame_shape[0]

        def stack(first):
            return frames[:, first * channels : (first + k) * channels]

        def floats(values):
            return to_device(torch.as_tensor(values.reshape(len(positions), -1)), self.device)

        return Batch(
            obs_prev=stack(0),
            action_prev=floats(self._actions[previous]),
            obs=stack(1),
            action=floats(self._actions[slots]),
            reward=floats(self._rewards[slots]),
            next_obs=stack(2),
            not_done=floats(self._not_dones[slots]),
        )

    def open_journal(self, folder):
        """From now on write what comes in to `folder` as well."""
        self._journal = journal.Journal(folder, self._frame_shape, self._dtype, self._actions.shape[1])

    def commit(self):
        """Bring the journal to the disk: {file name: (bytes, sha256)} of all that this buffer could be read from."""
        return self._journal.commit(self._oldest)

    def state_dict(self):
        """What the journal does not hold."""
        return {"rng": self._rng.bit_generator.state, "stream": self._stream}

    def load_state_dict(self, state):
        """Restore what `state_dict` gave; after `read`."""
        if state["stream"] != self._stream:
            raise ValueError(f"the journal has {self._stream} frames and the checkpoint {state['stream']}")
        self._rng.bit_generator.state = state["rng"]

    def read(self, folder, files=None):
        """Fill this empty buffer with the stream that a journal wrote to `folder`; see `journal.read`."""
        begun, self._journal, self._stream = self._journal, None, 0
        for position, frame, age, action, reward, terminated in journal.read(folder, files):
            if self._stream == 0:
                self._stream = position
            if position % 1000 == 0:  # a million take most of a minute
                check_signals()
            if age == 0:
                self.begin_episode(frame)
            else:
                self.add(action, reward, frame, terminated)
        self._journal = begun
        if begun and files:
            begun.resume(files)

    @classmethod
    def load(cls, run, device="cpu"):
        """The replay of the run in folder `run`, which is not finished or was made with --keep_checkpoint.

        Raises:
            Refused: the folder holds no run. FileNotFoundError: it holds no replay.
        """
        config = dataclasses.replace(load_config(run), replay_device="auto")
        folder = pathlib.Path(run) / CHECKPOINT
        header = journal.header_of(folder)
        shape = (header["frame_shape"][0] * config.frame_stack, *header["frame_shape"][1:])
        space = gymnasium.spaces.Box(0, 255, shape, np.dtype(header["dtype"]))
        replay = cls(config, space, header["action_dim"], torch.device(device))
        replay.read(folder)
        return replay


def _available(device):
    """Bytes that are free on a device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
