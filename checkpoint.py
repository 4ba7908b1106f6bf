"""Save and restore the networks of a run."""

import dataclasses
import json
import os
import pathlib
import pickle

import torch

from config import Config, ConfigError


def save_model(agent, folder, step):
    """Write all networks of `agent` to <folder>/<step>.pt; the file appears complete or not at all."""
    path = pathlib.Path(folder) / f"{step}.pt"
    temporary = path.with_suffix(".tmp")
    torch.save(agent.state_dict(), temporary)
    os.replace(temporary, path)


def load_model(agent, folder, step=None):
    """Restore what `save_model` wrote at `step`, the last one if None; returns the step.

    Raises:
        ConfigError: there is no such file.
    """
    saved = sorted(int(path.stem) for path in pathlib.Path(folder).glob("*.pt") if path.stem.isdigit())
    if not saved:
        raise ConfigError(f"{folder}: no saved model; train with --save_model")
    step = saved[-1] if step is None else step
    if step not in saved:
        raise ConfigError(f"--step {step}: not in {folder}, which has {', '.join(map(str, saved))}")
    path = pathlib.Path(folder) / f"{step}.pt"
    try:
        agent.load_state_dict(torch.load(path, map_location=agent.device))
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ConfigError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from None
    return step


def load_config(run):
    """The config of the run in folder `run`, from its args.json; flags that are newer than the run have their defaults.

    Raises:
        ConfigError: the folder holds no run.
    """
    try:
        args = json.loads((pathlib.Path(run) / "args.json").read_text())
        names = {field.name for field in dataclasses.fields(Config)}
        return Config(**{name: value for name, value in args.items() if name in names})
    except (OSError, AttributeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{run}: not the folder of a run ({type(error).__name__}: {error})") from None
