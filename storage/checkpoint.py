"""Saved models, which evaluate.py loads, and checkpoints, from which train.py resumes.

    model/<step>.pt                   the networks
    checkpoint/<number>.json          the manifest: a checkpoint's files with their lengths and SHA-256 checksums
    checkpoint/<number>.pt            {part: its state_dict()}
    checkpoint/<position>.replay      the replay (see journal.py): append-only, shared by the checkpoints

A checkpoint is complete once its .json, written last, exists; the last two are kept. Every part implements
`state_dict()` and `load_state_dict()`; this file does not look inside.
"""

import contextlib
import hashlib
import json
import mmap
import pathlib
import pickle
import re
import time

import torch

from endings import Refused, out_of_memory
from storage.run_folder import CHECKPOINT, write_json, write_whole

CHECKPOINT_INTERVAL_RATIO = 50  # after an evaluation: minimum ratio of time since the last checkpoint to its duration


def save_model(state, folder, step):
    """Write a state_dict to <folder>/<step>.pt atomically; raises `OSError` if the disk is full."""
    folder = pathlib.Path(folder)
    folder.mkdir(exist_ok=True)
    _save(state, folder / f"{step}.pt")


def _save(state, path):
    write_whole(path, lambda file: torch.save(state, file))


def load_policy(agent, folder, step=None):
    """Load the policy of the model saved at `step` (None: the latest) into `agent`.

    Returns the step and the policy's parameters; raises `Refused` if there is none.
    """
    saved = sorted(int(path.stem) for path in pathlib.Path(folder).glob("*.pt") if path.stem.isdigit())
    if not saved:
        raise Refused(
            f"{folder}: no saved model yet; a run saves one when it finishes, or with --save_model at each evaluation"
        )
    step = saved[-1] if step is None else step
    if step not in saved:
        raise Refused(f"--step {step}: not in {folder}, which has {', '.join(map(str, saved))}")
    path = pathlib.Path(folder) / f"{step}.pt"
    try:  # weights_only: a file from elsewhere cannot execute code
        saved = torch.load(path, map_location=agent.device, weights_only=True)
        policy = {name: saved[name] for name in agent.state_dict() if name.startswith(agent.POLICY)}
        agent.load_state_dict(policy, strict=False)
    except Exception as error:  # a foreign file can raise anything here
        reason = (str(error).splitlines() or [""])[0][:80]
        raise Refused(f"{path}: no model of this run ({type(error).__name__}: {reason})") from None
    return step, policy


class Checkpoints:
    """The checkpoints of one run, saved every `minutes`.

    `parts` are {name: object with a state_dict}; one is `replay`, which also writes its own files. `made_with` holds
    everything that bit-exact results depend on, see `provenance`; `message` prints a line for the user.
    """

    def __init__(self, folder, parts, minutes, made_with, message):
        self._folder = pathlib.Path(folder) / CHECKPOINT
        self._folder.mkdir(exist_ok=True)
        self._parts, self._made_with, self._message = parts, made_with, message
        self._seconds = 60 * minutes
        self._kept = {}  # number -> file names, for the last two checkpoints
        self._number = max(self._numbers(), default=0)
        self._time, self._duration = time.monotonic(), 0.0

    def _numbers(self):
        return [int(path.stem) for path in self._folder.glob("*.json") if path.stem.isdigit()]

    def save_if_due(self, evaluated=False):
        """Save if the last checkpoint is old enough; call only between two decisions."""
        since = time.monotonic() - self._time
        if since >= self._seconds or (evaluated and since >= CHECKPOINT_INTERVAL_RATIO * self._duration):
            self.save()

    def save(self):
        """Write a checkpoint, then remove all but the last two; if writing fails (`OSError`), these remain."""
        start = time.monotonic()
        number = self._number + 1
        name = f"{number:06d}.pt"
        files = self._parts["replay"].commit()
        _save({part: what.state_dict() for part, what in self._parts.items()}, self._folder / name)
        files[name] = ((self._folder / name).stat().st_size, _sum(self._folder / name))
        body = {"files": files, "made_with": self._made_with}
        write_json(self._folder / f"{number:06d}.json", {"sum": _sum_of_json(body), **body})
        self._number = number
        self._kept = dict([*self._kept.items(), (number, {*files, f"{number:06d}.json"})][-2:])
        self._remove(but=set().union(*self._kept.values()))
        self._time, self._duration = time.monotonic(), time.monotonic() - start

    def free(self):
        """Remove all checkpoints, and the folder unless it has foreign files."""
        self._remove(but=())
        with contextlib.suppress(OSError):
            self._folder.rmdir()

    def _remove(self, but):
        """Remove checkpoint files except those named `but`; leave foreign files, and files that cannot be deleted."""
        # delete each manifest before the files that it names
        for path in sorted(self._folder.iterdir(), key=lambda path: (path.suffix != ".json", path.name)):
            if path.name not in but and re.fullmatch(r"\d+\.(json|pt|replay)(\.tmp)?", path.name):
                with contextlib.suppress(OSError):
                    path.unlink()

    def load(self):
        """Restore the last intact checkpoint; returns False if the run has no checkpoint.

        Raises `Refused` if every checkpoint is damaged or another version of the code wrote it.
        """
        damaged = []
        for number in sorted(self._numbers(), reverse=True):
            try:
                files, made_with, state = self._read(number)
            except ValueError as error:
                damaged.append(error)
                continue
            if damaged:
                self._message(f"warning: {damaged[0]}: resuming from the checkpoint before it")
            replay = {name: entry for name, entry in files.items() if not name.endswith(".pt")}
            try:
                self._parts["replay"].read(self._folder, replay)
                for part, what in self._parts.items():
                    what.load_state_dict(state[part])
            except (KeyError, RuntimeError, TypeError, ValueError) as error:
                if ending := out_of_memory(error):
                    raise ending from None
                reason = (str(error).splitlines() or [""])[0][:80]
                raise Refused(f"{self._folder}: made by another version of this code ({reason})") from None
            before, now = _flat(made_with), _flat(self._made_with)
            changes = [f"{k} was {before.get(k)}, is {now[k]}" for k in now if before.get(k) != now[k]]
            if changes:
                self._message(f"warning: results may no longer be bit-identical: {', '.join(changes)}")
            self._kept = {number: {*files, f"{number:06d}.json"}}
            return True
        if damaged:
            raise Refused(f"{damaged[0]}; no intact checkpoint; start a new run in another folder")
        return False

    def _read(self, number):
        """({file name: [bytes, checksum]}, made_with, {part: state}) of a checkpoint; `ValueError` if it is damaged."""
        path = self._folder / f"{number:06d}.json"
        try:
            manifest = json.loads(path.read_text())
            if manifest.pop("sum") != _sum_of_json(manifest):
                raise ValueError("checksum mismatch")
            for name, (size, expected) in manifest["files"].items():
                path = self._folder / name
                if _sum(path, size) != expected:
                    raise ValueError("checksum mismatch")
            path = self._folder / f"{number:06d}.pt"
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, ValueError, KeyError, AttributeError, RuntimeError, pickle.UnpicklingError) as error:
            raise ValueError(f"{path}: damaged ({getattr(error, 'strerror', None) or error})") from None
        return manifest["files"], manifest["made_with"], state


def _flat(made_with):
    """`provenance` with each package's version at the top level."""
    return {name: value for name, value in made_with.items() if name != "versions"} | made_with.get("versions", {})


def _sum(path, size=None):
    """SHA-256 of a file's first `size` bytes (None: of the whole file)."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return hashlib.sha256(memoryview(data)[:size]).hexdigest()


def _sum_of_json(body):
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
