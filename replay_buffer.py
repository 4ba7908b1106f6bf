"""Replay of consecutive transitions that stores every frame once.

The buffer is a ring of slots. A slot holds one frame and, unless the frame is the last of its episode, the transition
that starts from it: action, summed reward and `not_done`. An episode of T transitions takes T + 1 slots, so its final
observation is kept exactly. Stacked observations are rebuilt by index. Positions count all frames since the start of
the run; position p is in slot `p % slots`.

storage/frames.py stores the frames. storage/journal.py can write all incoming data to disk, from which another buffer
can be filled.
"""

import dataclasses
import math
import os
import pathlib
from typing import NamedTuple

import gymnasium
import numpy as np
import torch

from endings import Refused, Stopped, check_signals, out_of_memory
from machine import available_memory
from storage import journal
from storage.frames import PackedFrames, RawFrames, flat, to_device
from storage.run_folder import CHECKPOINT, load_config

PACKED_BYTES = 5_000  # estimated size of a packed frame; cartpole has 1,600 and walker 11,000
MEMORY_CHECK_FRAMES = 100  # frames between checks of the free memory
NETWORK_BYTES, BYTES_PER_IMAGE = 500_000_000, 4_000_000  # an update's on CUDA, rounded up from the CPU's
RESERVE_BYTES = 200_000_000  # memory that must stay free


class Batch(NamedTuple):
    """B pairs of consecutive transitions; C = frame_stack * channels per frame.

    State observations are (B, C) float32 with C = frame_stack * state size.
    """

    obs_prev: torch.Tensor  # (B, C, H, W) uint8, o_{t-1}
    action_prev: torch.Tensor  # (B, A) float32, a_{t-1}
    obs: torch.Tensor  # (B, C, H, W) uint8, o_t
    action: torch.Tensor  # (B, A) float32, a_t
    reward: torch.Tensor  # (B, 1) float32, r_t summed over the action repeat
    next_obs: torch.Tensor  # (B, C, H, W) uint8, o_{t+1}
    not_done: torch.Tensor  # (B, 1) float32, 0 after a true termination
    second_obs: torch.Tensor | None = None  # another augmentation of o_t, if the auxiliary task uses one


class ReplayBuffer:
    """Ring buffer of single frames.

    The capacity is `replay_buffer_capacity` transitions, at most num_train_steps; it is a little less when episodes end
    early, since their final frames take more slots than planned. `obs_space` describes the stacked observations, uint8
    (C, H, W), or states, float32 (C,). Batches are on `device`, frames on `--replay_device`.

    Raises Refused if the frames do not fit in the free memory.
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
        self._dtype = obs_space.dtype
        self._frames = self._make_store(config)
        self._actions = np.zeros((self.slots, action_dim), np.float32)
        self._rewards = np.zeros(self.slots, np.float32)
        self._not_dones = np.zeros(self.slots, np.float32)
        self._ages = np.zeros(self.slots, np.int32)  # frames before this one in its episode
        self._finals = np.ones(self.slots, bool)  # whether no transition starts here (yet)

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
        """Write the newest frame of `obs` to the next slot, and with its transition to the journal."""
        frame = np.asarray(obs)[-self._frame_shape[0] :].copy()  # the environment overwrites its own
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
        """Whether, per position t, o_{t-1} to o_{t+1} share an episode and all their frames are still stored."""
        slots = positions % self.slots
        ages = self._ages[slots]
        first_frame = positions - np.minimum(ages, self.frame_stack)
        return (ages >= 1) & ~self._finals[slots] & (first_frame >= self._oldest)

    def legal_positions(self):
        """All positions t whose pair of transitions (t-1, t) can be sampled, (N,) int64."""
        positions = np.arange(self._oldest, self._stream)
        return positions[self._is_legal(positions)]

    def sample(self, batch_size):
        """A `Batch` of pairs sampled uniformly, with replacement, from `legal_positions`; ValueError if it is empty."""
        # redrawing the few illegal positions costs the same at any buffer size; listing all legal ones does not
        end = max(self._stream, 1)
        positions = self._rng.integers(self._oldest, end, batch_size)
        for _ in range(20):
            illegal = ~self._is_legal(positions)
            if not illegal.any():
                return self.gather(positions)
            positions[illegal] = self._rng.integers(self._oldest, end, illegal.sum())
        legal = self.legal_positions()
        if not len(legal):
            raise ValueError("the replay buffer holds no pair of consecutive transitions")
        return self.gather(self._rng.choice(legal, batch_size))

    def gather(self, positions):
        """The `Batch` at the given legal positions (B,)."""
        slots = positions % self.slots
        previous = (positions - 1) % self.slots
        k = self.frame_stack
        # k + 2 frames hold all three observations; before the episode's start its first frame repeats
        back = np.minimum(np.arange(k, -2, -1), self._ages[slots][:, None])  # (B, k + 2)
        window = (positions[:, None] - back) % self.slots

        frames = to_device(self._frames.read(window.ravel()), self.device)
        frames = frames.view(len(positions), -1, *self._frame_shape[1:])  # (B, (k + 2) * C, H, W)
        if frames.dim() == 4:  # convert to the encoders' layout once, not per stack
            frames = frames.contiguous(memory_format=torch.channels_last)
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

    def _make_store(self, config):
        """The frame store; unless a flag says otherwise, raw if it takes less than half of the free memory."""
        raw = self.slots * math.prod(self._frame_shape) * self._dtype.itemsize
        kind, place = config.replay_storage, config.replay_device
        if place == "auto":
            fits = kind != "lz4" and raw < _available(self.device, config) / 2
            place = self.device if fits else "cpu"
        place = torch.device(place)
        available = _available(place, config)
        packs = config.background == "none"  # LZ4 saves only a few percent of frames with a background
        if kind == "auto":
            kind = "lz4" if packs and raw >= available / 2 and place.type == "cpu" else "raw"
        size = min(raw, self.slots * PACKED_BYTES) if kind == "lz4" and packs else raw
        too_large = (
            f"--replay_buffer_capacity {config.replay_buffer_capacity}: its frames take {size / 1e9:.1f} GB "
            f"({kind}) and {available / 1e9:.1f} GB of memory are available on {place}"
        )
        if size > available:
            raise Refused(too_large)
        self._storage, self._estimate = kind, size
        dtype = getattr(torch, self._dtype.name)
        try:
            return {"raw": RawFrames, "lz4": PackedFrames}[kind](self.slots, self._frame_shape, dtype, place)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            raise Refused(too_large) from error

    @property
    def nbytes(self):
        """Size of the stored data in bytes."""
        arrays = (self._actions, self._rewards, self._not_dones, self._ages, self._finals)
        return self._frames.nbytes + sum(array.nbytes for array in arrays)

    @property
    def description(self):
        """Text for the run's first line: how the frames are stored, and their memory when the buffer is full."""
        about = "about " if self._storage == "lz4" else ""
        return f"replay of {about}{self._estimate / 1e9:.2f} GB ({self._storage})"

    def check_memory(self):
        """Raise `Stopped` if packed frames fill the memory, early enough to still save a checkpoint."""
        if self._storage == "raw" or self._stream % MEMORY_CHECK_FRAMES:
            return
        if (free := available_memory()) < RESERVE_BYTES:
            size = self.nbytes / 1e9
            raise Stopped(f"{free / 1e9:.1f} GB of memory are left and the replay has grown to {size:.1f} GB", 1)

    def open_journal(self, folder):
        """From now on, also write incoming data to a journal in `folder`."""
        self._journal = journal.Journal(folder, self._frame_shape, self._dtype, self._actions.shape[1])

    def commit(self):
        """Flush the journal to disk; returns {file name: (bytes, sha256)} of the files that restore this buffer."""
        return self._journal.commit(self._oldest)

    def state_dict(self):
        """State that the journal does not hold."""
        return {"rng": self._rng.bit_generator.state, "stream": self._stream}

    def load_state_dict(self, state):
        """Restore the result of `state_dict`; call after `read`."""
        if state["stream"] != self._stream:
            raise ValueError(f"the journal has {self._stream} frames and the checkpoint {state['stream']}")
        self._rng.bit_generator.state = state["rng"]

    def read(self, folder, files=None):
        """Fill this empty buffer from the journal in `folder`, see `journal.read`; an open journal resumes after it."""
        own_journal, self._journal = self._journal, None  # frames that are read are not written again
        for position, frame, age, action, reward, terminated in journal.read(folder, files):
            if self._stream == 0:
                self._stream = position
            if position % 1000 == 0:  # a million frames take most of a minute
                check_signals()
            if age == 0:
                self.begin_episode(frame)
            else:
                self.add(action, reward, frame, terminated)
        self._journal = own_journal
        if own_journal and files:
            own_journal.resume(files)

    @classmethod
    def load(cls, run, device="cpu"):
        """The replay of the run in folder `run`, which is unfinished or used --keep_checkpoint.

        Raises Refused if the folder holds no run, FileNotFoundError if the run has no replay.
        """
        config = dataclasses.replace(load_config(run), replay_device="auto")
        folder = pathlib.Path(run) / CHECKPOINT
        header = journal.header_of(folder)
        shape = (header["frame_shape"][0] * config.frame_stack, *header["frame_shape"][1:])
        space = gymnasium.spaces.Box(0, 255, shape, np.dtype(header["dtype"]))
        replay = cls(config, space, header["action_dim"], torch.device(device))
        replay.read(folder)
        return replay


def _available(device, config):
    """Free memory of a device in bytes; of a GPU, this run's share beyond the networks' estimated need.

    Runs that a sweep starts together on one GPU would each find it free; the sweep says how many they are.
    """
    if device.type != "cuda":
        return available_memory()
    free, total = torch.cuda.mem_get_info(device)
    share = min(free, total / int(os.environ.get("CODY_RUNS_PER_GPU", "1")))
    images = config.batch_size * max(config.target_augmentations, config.critic_augmentations)
    return share - NETWORK_BYTES - BYTES_PER_IMAGE * images
