"""A run to disk and back: networks for evaluate.py, and checkpoints from which train.py goes on.

    model/<step>.pt                   the networks
    checkpoint/<number>.json          names the files of a checkpoint with their lengths and SHA-256 sums
    checkpoint/<number>.pt            {part: its state_dict()}
    checkpoint/<position>.replay      the replay, see journal.py; only appended to, shared by the checkpoints

A checkpoint is whole when its .json is there, the last file to be written; the one before is kept until then. What has
a state gives it as `state_dict()` and takes it back with `load_state_dict()`; this file does not look inside.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import pickle
import re
import time

import torch

from endings import Refused
from storage.run_folder import CHECKPOINT, write_json, write_whole

CHECKPOINT_INTERVAL_RATIO = 50  # after an evaluation, time since the last checkpoint over the time that it took


def save_model(agent, folder, step):
    """Write all networks of `agent` to <folder>/<step>.pt; the file appears complete or not at all.

    Raises:
        OSError: it cannot be written, as on a full disk.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(exist_ok=True)
    _save(agent.state_dict(), folder / f"{step}.pt")


def _save(state, path):
    write_whole(path, lambda file: torch.save(state, file))


def load_model(agent, folder, step=None):
    """Restore what `save_model` wrote at `step`, the last one if None; returns the step.

    Raises:
        Refused: there is no such file, or it is no model of such an agent.
    """
    saved = sorted(int(path.stem) for path in pathlib.Path(folder).glob("*.pt") if path.stem.isdigit())
    if not saved:
        raise Refused(
            f"{folder}: no saved model; one comes when the run is finished, or with --save_model at each evaluation"
        )
    step = saved[-1] if step is None else step
    if step not in saved:
        raise Refused(f"--step {step}: not in {folder}, which has {', '.join(map(str, saved))}")
    path = pathlib.Path(folder) / f"{step}.pt"
    try:  # weights_only: a file from elsewhere runs no code
        agent.load_state_dict(torch.load(path, map_location=agent.device, weights_only=True))
    except Exception as error:  # a foreign file can fail anywhere in there
        reason = (str(error).splitlines() or [""])[0][:80]
        raise Refused(f"{path}: no model of this run ({type(error).__name__}: {reason})") from None
    return step


class Checkpoints:
    """Those of one run.

    Args:
        folder: of the run.
        parts: {name: what has a state}; `replay` is one of them and writes its files by itself.
        minutes: between checkpoints.
        made_with: dict of what bit equality depends on: versions, threads, processor.
        message: takes a line for the user.
    """

    def __init__(self, folder, parts, minutes, made_with, message):
        self._folder = pathlib.Path(folder) / CHECKPOINT
        self._folder.mkdir(exist_ok=True)
        self._parts, self._made_with, self._message = parts, made_with, message
        self._seconds = 60 * minutes
        self._kept = {}  # number -> names of its files, of the last checkpoint and the one before
        self._number = max(self._numbers(), default=0)
        self._time, self._duration = time.monotonic(), 0.0

    def _numbers(self):
        return [int(path.stem) for path in self._folder.glob("*.json") if path.stem.isdigit()]

    def save_if_due(self, evaluated=False):
        """Save where the last time is long enough ago; the parts must be between two decisions."""
        since = time.monotonic() - self._time
        if since >= self._seconds or (evaluated and since >= CHECKPOINT_INTERVAL_RATIO * self._duration):
            self.save()

    def save(self):
        """Write a checkpoint, then remove those before the last.

        Raises:
            OSError: it cannot be written; the last one is still there.
        """
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
        """Remove all of them."""
        self._remove(but=())

    def _remove(self, but):
        """Remove our files from the folder, but those of these names; one that is in use or is none can stay."""
        # a .json goes before what it names
        for path in sorted(self._folder.iterdir(), key=lambda path: (path.suffix != ".json", path.name)):
            if path.name not in but and re.fullmatch(r"\d+\.(json|pt|replay)(\.tmp)?", path.name):
                with contextlib.suppress(OSError):
                    path.unlink()

    def load(self):
        """Restore the last checkpoint that is whole; whether there was any.

        Raises:
            Refused: there are some and none is whole.
        """
        damaged = []
        for number in sorted(self._numbers(), reverse=True):
            try:
                files, made_with, state = self._read(number)
            except (OSError, ValueError, KeyError, TypeError, RuntimeError, pickle.UnpicklingError) as error:
                damaged.append(str(error))
                continue
            if damaged:
                self._message(f"warning: {damaged[0]}: going on from the checkpoint before")
            replay = {name: entry for name, entry in files.items() if not name.endswith(".pt")}
            try:
                self._parts["replay"].read(self._folder, replay)
                for part, what in self._parts.items():
                    what.load_state_dict(state[part])
            except (KeyError, RuntimeError, TypeError, ValueError) as error:
                reason = (str(error).splitlines() or [""])[0][:80]
                raise Refused(f"{self._folder}: made by another version of this code ({reason})") from None
            before, now = _flat(made_with), _flat(self._made_with)
            changes = [
                f"{name} {before.get(name)} then, {now[name]} now" for name in now if before.get(name) != now[name]
            ]
            if changes:
                self._message(f"warning: no longer bit for bit an uninterrupted run: {', '.join(changes)}")
            self._kept = {number: {*files, f"{number:06d}.json"}}
            return True
        if damaged:
            raise Refused(f"{damaged[0]}; no checkpoint is whole, so the run must be started anew elsewhere")
        return False

    def _read(self, number):
        """The checked ({file name: [bytes, sum]}, what it was made with, {part: state})."""
        path = self._folder / f"{number:06d}.json"
        try:
            manifest = json.loads(path.read_text())
            if manifest.pop("sum") != _sum_of_json(manifest):
                raise ValueError("its sum is wrong")
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}: damaged ({error})") from None
        for name, (size, expected) in manifest["files"].items():
            path = self._folder / name
            try:
                right = _sum(path, size) == expected
            except OSError as error:
                raise ValueError(f"{path}: damaged ({error.strerror})") from None
            if not right:
                raise ValueError(f"{path}: damaged (its sum is wrong)")
        state = torch.load(self._folder / f"{number:06d}.pt", map_location="cpu", weights_only=True)
        return manifest["files"], manifest["made_with"], state


def _flat(made_with):
    """The dict with those in it opened up."""
    return {
        k: v
        for name, value in made_with.items()
        for k, v in (value if isinstance(value, dict) else {name: value}).items()
    }


def _sum(path, size=None):
    """SHA-256 of the first `size` bytes of a file, or of all."""
    sums = hashlib.sha256()
    with open(path, "rb") as file:
        left = os.fstat(file.fileno()).st_size if size is None else size
        while left and (block := file.read(min(left, 1 << 20))):
            sums.update(block)
            left -= len(block)
    return sums.hexdigest()


def _sum_of_json(body):
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
