"""Save and restore the networks of a run."""

import dataclasses
import json
import os
import pathlib

import torch

from config import Config, ConfigError, parse


def save_model(agent, folder, step):
    """Write all networks of `agent` to <folder>/<step>.pt; the file appears complete or not at all.

    Raises:
        OSError: it cannot be written, as on a full disk.
    """
    path = pathlib.Path(folder) / f"{step}.pt"
    temporary = path.with_suffix(".tmp")
    try:
        torch.save(agent.state_dict(), temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch's own of a full disk is a RuntimeError
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path}: not written ({str(error).splitlines()[0][:80]})") from None


def load_model(agent, folder, step=None):
    """Restore what `save_model` wrote at `step`, the last one if None; returns the step.

    Raises:
        ConfigError: there is no such file, or it is no model of such an agent.
    """
    saved = sorted(int(path.stem) for path in pathlib.Path(folder).glob("*.pt") if path.stem.isdigit())
    if not saved:
        raise ConfigError(f"{folder}: no saved model; train with --save_model")
    step = saved[-1] if step is None else step
    if step not in saved:
        raise ConfigError(f"--step {step}: not in {folder}, which has {', '.join(map(str, saved))}")
    path = pathlib.Path(folder) / f"{step}.pt"
    try:  # weights_only: a file from elsewhere runs no code
        agent.load_state_dict(torch.load(path, map_location=agent.device, weights_only=True))
    except Exception as error:  # a foreign file can fail anywhere in there
        reason = (str(error).splitlines() or [""])[0][:80]
        raise ConfigError(f"{path}: no model of this run ({type(error).__name__}: {reason})") from None
    return step


def load_config(run):
    """The config of the run in folder `run`: its args.json read as flags; those newer than it have their defaults.

    Raises:
        ConfigError: the folder holds no run.
    """
    try:
        args = json.loads((pathlib.Path(run) / "args.json").read_text())
        if args["encoder_type"] != "identity":
            args.setdefault("camera_id", 0)  # of every task, before that was a flag
        names = {field.name for field in dataclasses.fields(Config)}
        flags = [_as_flag(name, value) for name, value in args.items() if name in names]
        return parse(flags)
    except (OSError, KeyError, TypeError, ValueError) as error:  # ConfigError is a ValueError
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{run}: not the folder of a run (args.json: {reason[:100]})") from None


def _as_flag(name, value):
    return f"--{name}={value}" if not isinstance(value, bool) else f"--{name}" if value else f"--no_{name}"
