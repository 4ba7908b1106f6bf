"""Backgrounds: moving shapes, videos or pictures in place of everything behind the task.

An environment shows one clip per episode, and one frame of it per decision. A source holds the clips: `Moving`
computes them, `Films` plays frames that were decoded once and that all environments of a run share.
"""

import contextlib
import functools
import hashlib
import logging
import os
import pathlib
import tempfile

import imageio_ffmpeg
import numpy as np
from tqdm import tqdm

from endings import Refused, check_signals, signals_kept_from_children
from video import check_ffmpeg

VIDEOS = (".mp4", ".mov", ".avi", ".gif", ".mkv", ".webm")
PICTURES = (".png", ".jpg", ".jpeg", ".bmp")
SPLITS = ("train", "test")
CLIP_FRAMES = 50  # a clip's least share of the frames, so that many long videos do not become stills
TEST_EVERY = 4  # every fourth clip is for tests, in a folder without train/ and test/
BARE = {"shadow": False, "reflection": False, "skybox": False}  # not drawn: the background hides them
PLANE, GEOM, NOTHING = 0, 5, -1  # MuJoCo's mjGEOM_PLANE and mjOBJ_GEOM; no object in a segmentation


class Background:
    """The background of one environment, whose own random state chooses each episode's clip and first frame."""

    def __init__(self, source, seed):
        self._source = source
        self.seed(seed)
        self.begin()

    def seed(self, seed):
        """Reseed the random state."""
        self._random = np.random.default_rng([seed, 2])

    def begin(self, state=None):
        """Start an episode; `state` is the random state before an earlier one, which this one repeats."""
        if state:
            self._random.bit_generator.state = state
        self.state = self._random.bit_generator.state
        self._clip = int(self._random.integers(len(self._source.lengths)))
        self._first = int(self._random.integers(self._source.lengths[self._clip]))

    def draw(self, physics, height, width, camera_id, decisions):
        """The task in front of the background `decisions` decisions into the episode, (height, width, 3) uint8.

        Background is where MuJoCo's segmentation has no object, or a plane: floor, ground, reacher's walls.
        """
        image = physics.render(height, width, camera_id, render_flag_overrides=BARE)
        number, kind = np.moveaxis(physics.render(height, width, camera_id, segmentation=True), -1, 0)
        planes = np.flatnonzero(physics.model.geom_type == PLANE)
        behind = (number == NOTHING) | ((kind == GEOM) & np.isin(number, planes))
        index = (self._first + decisions) % self._source.lengths[self._clip]
        return np.where(behind[..., None], self._source.frame(self._clip, index, height, width), image)


class Moving:
    """Eight discs that move and bounce over a drifting texture of four waves: 200 clips for training, 50 for tests.

    A frame is a function of the clip's seed and of time, so all runs see the same clips. A clip of 1,000 frames
    repeats without a jump.
    """

    SEEDS = {"train": range(200), "test": range(200, 250)}
    PERIOD = 1000
    descriptors, sha256 = (), None

    def __init__(self, split):
        self._seeds = self.SEEDS[split]
        self.lengths = [self.PERIOD] * len(self._seeds)

    def frame(self, clip, index, height, width):
        """Frame `index` of a clip, (height, width, 3) uint8."""
        waves, discs = self._shapes(self._seeds[clip])
        y = np.linspace(0, 1, height, dtype=np.float32)[:, None]
        x = np.linspace(0, 1, width, dtype=np.float32)
        image = np.full((height, width, 3), 0.5, np.float32)
        for down, right, phase, turns, colour in waves:
            angle = 2 * np.pi * (phase + turns * index / self.PERIOD)
            image += np.sin(down * y + right * x + np.float32(angle))[..., None] * colour
        for start, laps, radius, colour in discs:
            centre = np.abs(1 - (start + 2 * laps * index / self.PERIOD) % 2)  # between the borders, there and back
            image[(y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2] = colour
        return (image.clip(0, 1) * 255).astype(np.uint8)

    @staticmethod
    @functools.lru_cache
    def _shapes(seed):
        """(waves, discs) of the clip with this seed; lengths in frame widths, colours in [0, 1], float32."""
        random = np.random.default_rng(seed)

        def uniform(low, high, count=None):
            return np.float32(random.uniform(low, high, count))

        waves = [
            (uniform(-25, 25), uniform(-25, 25), uniform(0, 1), random.integers(-15, 16), uniform(-0.2, 0.2, 3))
            for _ in range(4)
        ]
        discs = [
            (uniform(0, 2, 2), random.integers(-12, 13, 2), uniform(0.05, 0.15), uniform(0, 1, 3)) for _ in range(8)
        ]
        return waves, discs


class Films:
    """The clips of a folder, centre-cropped to squares of `size` pixels, at most `frames` frames in all.

    The frames lie in a file without a name and are mapped into memory, so workers, which inherit the descriptor, share
    one copy, and nothing remains when the last process is gone. Raises `Refused` if no clip can be decoded.
    """

    def __init__(self, flag, folder, split, frames, size, gray):
        clips, failed = find_split(flag, folder, split)
        self.lengths, self._size = [], size
        self._file = tempfile.TemporaryFile()
        enlarged, unused, left, digest = [], [], frames, hashlib.sha256()
        for number, name in enumerate(tqdm(clips, f"decoding {folder}", leave=False, disable=None)):
            # what short clips leave goes to those after them
            share = min(left, max(CLIP_FRAMES, left // (len(clips) - number)))
            if not share:
                unused = list(clips)[number:]
                break
            decoded, source_size = decode(clips[name], size, gray, share)
            if not len(decoded):
                failed.append(name)
                continue
            if min(source_size) < size:
                enlarged.append(f"{name} ({source_size[0]}x{source_size[1]})")
            self._file.write(decoded)
            self.lengths.append(len(decoded))
            digest.update(decoded)
            left -= len(decoded)
        if not self.lengths:
            raise Refused(f"--{flag} {folder}: none of the files to {split} with can be decoded: {_listed(failed)}")
        for names, what in (
            (failed, "left out, cannot be decoded"),
            (enlarged, f"enlarged to {size}x{size}"),
            (unused, f"not used, beyond --background_frames {frames}"),
        ):
            if names:
                print(f"warning: --{flag} {folder}: {what}: {_listed(names)}", flush=True)
        self._file.flush()
        digest.update(repr(self.lengths).encode())
        self.sha256 = digest.hexdigest()

    @property
    def descriptors(self):
        """What a worker process must inherit."""
        return (self._file.fileno(),)

    def __getstate__(self):
        return {"lengths": self.lengths, "sha256": self.sha256, "_size": self._size, "_file": self._file.fileno()}

    def __setstate__(self, state):
        vars(self).update(state, _file=os.fdopen(state["_file"], "rb"))

    @functools.cached_property
    def _frames(self):
        return np.memmap(self._file, np.uint8, "r", shape=(sum(self.lengths), self._size, self._size, 3))

    def frame(self, clip, index, height, width):
        """Frame `index` of a clip, (height, width, 3) uint8, each pixel the nearest one of the decoded frame."""
        decoded = self._frames[sum(self.lengths[:clip]) + index]
        rows, columns = (np.arange(n) * self._size // n for n in (height, width))
        return decoded[rows[:, None], columns]


def _listed(names):
    """The first three names and the number of the others."""
    return ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)


def decode(paths, size, gray, most):
    """At most `most` frames of a clip, (N, size, size, 3) uint8, none if it fails, and its own (width, height)."""
    shape = f"crop='min(iw,ih)':'min(iw,ih)',scale={size}:{size}"
    output = ["-vf", f"{shape},format=gray" if gray else shape, "-frames:v", str(most), "-fps_mode", "passthrough"]
    frames, source_size = [], (0, 0)
    logging.getLogger("imageio_ffmpeg").setLevel(logging.ERROR)  # it warns that the size changes
    for path in paths[:most]:
        with contextlib.suppress(OSError, RuntimeError):  # a damaged file: what was decoded
            with signals_kept_from_children():
                reader = imageio_ffmpeg.read_frames(path, output_params=output)
                source_size = next(reader)["source_size"]
            for frame in reader:
                check_signals()
                frames.append(frame)
    return np.frombuffer(b"".join(frames), np.uint8).reshape(-1, size, size, 3), source_size


def find_clips(folder):
    """({name of each clip in a folder, at any depth, in order: its files}, the names of the other files).

    Pictures with numbers as names, such as 00000.jpg and 00001.jpg, are the frames of one clip, in order of their
    numbers; any other is a clip of its own. Hidden files and folders do not count.
    """
    folder = folder.absolute()
    clips, sequences, others = {}, {}, []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (pathlib.Path(parent, name) for name in names if not name.startswith(".")):
            name, suffix = str(path.relative_to(folder)), path.suffix.lower()
            if suffix in PICTURES and path.stem.isdecimal():
                sequences.setdefault((parent, path.suffix), []).append(path)
            elif suffix in VIDEOS + PICTURES:
                clips[name] = [str(path)]
            else:
                others.append(name)
    for paths in sequences.values():
        paths.sort(key=lambda path: (int(path.stem), path.stem))
        clips[str(paths[0].relative_to(folder))] = [str(path) for path in paths]
    return dict(sorted(clips.items())), sorted(others)


def find_split(flag, folder, split):
    """`find_clips` of a folder, those for training ("train") or tests; raises `Refused` without clips."""
    root = pathlib.Path(folder)
    if not folder or not root.is_dir():
        raise Refused(f"--{flag} {folder}: must be none, moving or a folder of videos or pictures")
    folders = [root / name for name in SPLITS if (root / name).is_dir()]
    clips, others = find_clips(root / split if folders else root)
    if not clips:
        only = f", only {_listed(others)}" if others else ""
        raise Refused(f"--{flag} {folder}: no videos or pictures in {f'its {split}/' if folders else 'it'}{only}")
    if not folders:
        names = [name for i, name in enumerate(clips) if (i % TEST_EVERY == TEST_EVERY - 1) == (split == "test")]
        clips = {name: clips[name] for name in names}
    if not clips:
        right = f"needs folders train/ and test/, or {TEST_EVERY} clips or more (every fourth is for tests)"
        raise Refused(f"--{flag} {folder}: no clips for tests; {right}")
    return clips, others


def source_name(config, split):
    """(the flag, the source that it names, and which of its splits) for training ("train") or evaluation ("test")."""
    if split == "train":
        return "background", config.background, "train"
    if config.eval_background in (None, *SPLITS):
        return "background", config.background, config.eval_background or "test"
    return "eval_background", config.eval_background, "test"


def open_source(config, split):
    """The source that training ("train") or evaluation ("test") shows, or None; raises `Refused` for a bad folder."""
    flag, name, split = source_name(config, split)
    if name == "none":
        return None
    if name == "moving":
        return Moving(split)
    check_ffmpeg(flag)
    return Films(flag, name, split, config.background_frames, config.pre_transform_image_size, config.background_gray)


def check_folders(config):
    """Raise `Refused` if a folder that the flags name has no clips; decodes nothing."""
    for flag, name, split in (source_name(config, "train"), source_name(config, "test")):
        if name not in ("none", "moving"):
            find_split(flag, name, split)
