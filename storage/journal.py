"""The replay on disk, an append-only stream of frames.

A segment <position>.replay starts with an episode and has one line of JSON (`frame_shape`, `dtype`, `action_dim`,
`position` of its first frame in the stream), then a `record_type` and `size` bytes of packed data per frame (see
frames.py; an episode's first frame is packed against zeros). A record holds the transition that led to its frame, so
no record needs a later update.
"""

import hashlib
import json
import os
import pathlib

import numpy as np

from storage.frames import flat, pack, unpack

SEGMENT_BYTES = 1 << 26
SUFFIX = ".replay"


def record_type(action_dim):
    """NumPy dtype of the record before a packed frame."""
    return np.dtype(
        [
            ("size", "<u4"),  # bytes of the packed frame
            ("age", "<i4"),  # frames before it in its episode
            ("reward", "<f4"),  # like action and terminated, of the transition that led to the frame; 0 at age 0
            ("terminated", "u1"),
            ("action", "<f4", (action_dim,)),
        ]
    )


class Journal:
    """Writes the segments to `folder`, which must exist; `frame_shape` and `dtype` (NumPy) describe a frame."""

    def __init__(self, folder, frame_shape, dtype, action_dim):
        self._folder = pathlib.Path(folder)
        self._header = {"frame_shape": list(frame_shape), "dtype": np.dtype(dtype).name, "action_dim": action_dim}
        self._record_type = record_type(action_dim)
        self._zeros = flat(np.zeros(frame_shape, dtype))
        self._full = {}  # file name -> (bytes, sha256) of the closed segments
        self._file = None

    def append(self, position, frame, first, age, action, reward, terminated):
        """Append the frame at `position` and the transition that led to it; `first`: `flat` of its episode's first."""
        if self._file is None or (age == 0 and self._size > SEGMENT_BYTES):
            self._begin_segment(position)
        packed = pack(frame, first if age else self._zeros)
        record = np.array((len(packed), age, reward, terminated, action), self._record_type)
        self._write(record.tobytes() + packed)

    def _begin_segment(self, position):
        if self._file:
            self._full.update(self.commit(0))
            self._file.close()
        self._file = open(self._folder / f"{position:012d}{SUFFIX}", "wb")
        self._size, self._sum = 0, hashlib.sha256()
        self._write(json.dumps({**self._header, "position": position}).encode() + b"\n")

    def _write(self, data):
        self._file.write(data)
        self._size += len(data)
        self._sum.update(data)

    def commit(self, oldest):
        """Flush to disk; returns {file name: (bytes, sha256)} of the segments with positions from `oldest` on."""
        if self._file is None:
            return {}
        self._file.flush()
        os.fsync(self._file.fileno())
        files = {**self._full, pathlib.Path(self._file.name).name: (self._size, self._sum.hexdigest())}
        for name, following in zip(sorted(files), sorted(files)[1:], strict=False):
            if int(following.removesuffix(SUFFIX)) <= oldest:
                del files[name], self._full[name]
        return files

    def resume(self, files):
        """Append after `files`, as `commit` returned them; deletes later data, which the resumed run writes again."""
        last = max(files)
        for path in self._folder.glob(f"*{SUFFIX}"):
            if path.name > last:
                path.unlink()
        self._full = {name: tuple(entry) for name, entry in files.items() if name != last}
        self._file = open(self._folder / last, "r+b")
        self._size = files[last][0]
        self._file.truncate(self._size)
        self._sum = hashlib.sha256()
        while block := self._file.read(1 << 20):
            self._sum.update(block)


def header_of(folder):
    """The header of the first segment in `folder`, a dict; FileNotFoundError if there is none yet."""
    paths = sorted(pathlib.Path(folder).glob(f"*{SUFFIX}"))
    if not paths:
        raise FileNotFoundError(f"{folder}: no {SUFFIX} file; --keep_checkpoint keeps those of a finished run")
    with open(paths[0], "rb") as file:
        line = file.readline()
    if not line.endswith(b"\n"):
        raise FileNotFoundError(f"{paths[0]}: nothing is written yet")
    return json.loads(line)


def read(folder, files=None):
    """Yield (position, frame, age, action, reward, terminated) of every frame, in the order of the stream.

    `files` is the dict that `commit` returned, or None for all segments, up to the last complete record.
    """
    folder = pathlib.Path(folder)
    if files is None:
        files = {path.name: (path.stat().st_size, None) for path in folder.glob(f"*{SUFFIX}")}
    for name in sorted(files):
        data = (folder / name).read_bytes()[: files[name][0]]
        start = data.find(b"\n") + 1
        if not start:  # a run is still writing the header
            break
        header = json.loads(data[:start])
        kind = record_type(header["action_dim"])
        shape, dtype, position = header["frame_shape"], header["dtype"], header["position"]
        first = zeros = flat(np.zeros(shape, dtype))
        while len(data) >= start + kind.itemsize:
            size, age, reward, terminated, action = np.frombuffer(data, kind, 1, start)[0]
            start, end = start + kind.itemsize, start + kind.itemsize + int(size)
            if end > len(data):
                break
            frame = np.empty(shape, dtype)
            unpack(data[start:end], first if age else zeros, frame)
            first = first if age else flat(frame)
            yield position, frame, int(age), action, float(reward), bool(terminated)
            position, start = position + 1, end
