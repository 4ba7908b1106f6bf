"""The stream of a replay on disk, only ever appended to.

Segments <position>.replay, each beginning with an episode: one line of JSON (`frame_shape`, `dtype`, `action_dim`,
`position` of its first frame in the stream), then for each frame a `record_type` and `size` bytes of the packed
frame (see frames.py; the first frame of an episode is packed against zeros). A record holds what led to its frame,
so it is complete when it is written.
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
    """NumPy dtype of what stands before a packed frame."""
    return np.dtype(
        [
            ("size", "<u4"),  # bytes of the packed frame
            ("age", "<i4"),  # frames before it in its episode
            ("reward", "<f4"),  # of the transition that led to it, as the action and `terminated`; 0 at age 0
            ("terminated", "u1"),
            ("action", "<f4", (action_dim,)),
        ]
    )


class Journal:
    """Appends to segments in `folder`, which exists.

    Args:
        folder: of the segments.
        frame_shape, dtype: of a frame, a NumPy array.
        action_dim: |A|.
    """

    def __init__(self, folder, frame_shape, dtype, action_dim):
        self._folder = pathlib.Path(folder)
        self._header = {"frame_shape": list(frame_shape), "dtype": np.dtype(dtype).name, "action_dim": action_dim}
        self._record = np.zeros((), record_type(action_dim))
        self._zeros = flat(np.zeros(frame_shape, dtype))
        self._full = {}  # file name -> (bytes, sha256) of the segments before the one that is written
        self._file = None

    def append(self, position, frame, first, age, action, reward, terminated):
        """Add the frame at this position of the stream, with `flat` of its episode's first and what led to it."""
        if self._file is None or (age == 0 and self._size > SEGMENT_BYTES):
            self._begin_segment(position)
        packed = pack(frame, first if age else self._zeros)
        record = self._record
        record["size"], record["age"], record["reward"], record["terminated"] = len(packed), age, reward, terminated
        record["action"] = action
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
        """Bring it all to the disk: {file name: (bytes, sha256)} of the segments with positions from `oldest` on."""
        if self._file is None:
            return {}
        self._file.flush()
        os.fsync(self._file.fileno())
        files = {**self._full, pathlib.Path(self._file.name).name: (self._size, self._sum.hexdigest())}
        for name, following in zip(sorted(files), sorted(files)[1:], strict=False):
            if _position(following) <= oldest:
                del files[name], self._full[name]
        return files

    def resume(self, files):
        """Go on behind these files, as `commit` gave them; what was written after them will come again and goes."""
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


def _position(name):
    return int(name.removesuffix(SUFFIX))


def header_of(folder):
    """The header of the first segment in `folder`, a dict.

    Raises:
        FileNotFoundError: there is none.
    """
    paths = sorted(pathlib.Path(folder).glob(f"*{SUFFIX}"))
    if not paths:
        raise FileNotFoundError(f"{folder}: no {SUFFIX} file; --keep_checkpoint keeps those of a finished run")
    with open(paths[0], "rb") as file:
        line = file.readline()
    if not line.endswith(b"\n"):
        raise FileNotFoundError(f"{paths[0]}: nothing is written yet")
    return json.loads(line)


def read(folder, files=None):
    """Every frame of the stream: (position, frame, age, action, reward, terminated), in its order.

    Args:
        folder: of the segments.
        files: as `commit` gave them; None: all that is there, up to the last whole record.
    """
    folder = pathlib.Path(folder)
    if files is None:
        files = {path.name: (path.stat().st_size, None) for path in folder.glob(f"*{SUFFIX}")}
    for name in sorted(files):
        data = (folder / name).read_bytes()[: files[name][0]]
        start = data.find(b"\n") + 1
        if not start:  # of a run that is writing it
            break
        header = json.loads(data[:start])
        kind = record_type(header["action_dim"])
        shape, dtype, position = header["frame_shape"], header["dtype"], header["position"]
        first = zeros = flat(np.zeros(shape, dtype))
        while len(data) >= start + kind.itemsize:
            record = np.frombuffer(data, kind, 1, start)[0]
            start, end = start + kind.itemsize, start + kind.itemsize + int(record["size"])
            if end > len(data):
                break
            frame = np.empty(shape, dtype)
            unpack(data[start:end], first if record["age"] else zeros, frame)
            first = first if record["age"] else flat(frame)
            yield (
                position,
                frame,
                int(record["age"]),
                record["action"],
                float(record["reward"]),
                bool(record["terminated"]),
            )
            position, start = position + 1, end
