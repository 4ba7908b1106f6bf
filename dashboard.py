"""A run's TensorBoard events and their upload to Weights & Biases, and the layout of the TensorBoard page.

Importable without torch, and without TensorFlow, which `tensorboard.plugins.hparams.summary` would need.
"""

import contextlib
import dataclasses
import io
import os
import pathlib
import threading

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.plugins.hparams import summary_v2 as hp
from tensorboard.summary.writer.record_writer import RecordWriter

from config import NO_EFFECT_ON_RESULTS
from storage.run_folder import run_id, sync, write_whole

# TensorBoard sorts groups by name: charts, losses, metrics, speed, and last visual and weights, which load slowly
CHARTS = ("eval_episode_reward", "train_episode_reward", "mi_bound", "kl")
SPEED = ("duration", "eval_duration", "decisions_per_s", "updates_per_s", "wall_seconds")
WANDB_SECONDS = 20  # limit for uploads at a run's end; a cluster may kill a job after 30


def tag(metric):
    """TensorBoard tag of a scalar: its group and its name in the logs."""
    if metric in CHARTS:
        return f"charts/{metric}"
    if metric in SPEED:
        return f"speed/{metric}"
    return f"losses/{metric}" if metric.endswith(("_loss", "_nce")) else f"metrics/{metric}"


# custom scalars page, {category: {chart: ...}}; the same in every run, since the page merges all runs' layouts
TITLES = {
    "evaluation return": "eval_episode_reward",
    "training return": "train_episode_reward",
    "MI bound": "mi_bound",
    "KL": "kl",
    "critic loss": "critic_loss",
    "actor loss": "actor_loss",
    "CoDy loss": "cody_loss",
}
LAYOUT = {"CoDy": {title: ["Multiline", [tag(metric)]] for title, metric in TITLES.items()}}

METRICS = {  # columns of the HPARAMS table: {tag: heading}
    tag("eval_episode_reward"): "final evaluation return",
    tag("eval_episode_reward_best"): "best evaluation return",
}


class Dashboard:
    """Writer of a run's events; without --save_tb every method does nothing."""

    def __init__(self, folder, config):
        self._folder, self._config = pathlib.Path(folder), config
        self._writer = self._wandb = None
        self._purge_step = 0  # environment step from which TensorBoard discards earlier events

    def open(self):
        """Start a new event file, which tells TensorBoard where a run resumes; needs the run's args.json."""
        if not self._config.save_tb:
            return
        from torch.utils.tensorboard import SummaryWriter

        # a full disk fails in the writer's thread first; the next event raises the same error here, without a traceback
        threading.excepthook = lambda args: isinstance(args.exc_value, OSError) or threading.__excepthook__(args)
        number = len(self._event_files())
        if self._config.wandb:
            self._wandb = _open_wandb(self._folder, self._config)
        # a running TensorBoard ignores the purge step of a run's first file, so that file has one too
        # the number keeps names apart: host and process id may repeat, as in a restarted container
        self._writer = SummaryWriter(self._folder / "tb", purge_step=self._purge_step, filename_suffix=f".{number}")
        if number == 0:
            self._writer.add_custom_scalars(LAYOUT)
            row = f"{self._folder} {run_id(self._folder)}"  # unique, sortable and readable
            self._writer.file_writer.add_summary(hparams(self._config, row))

    def scalars(self, step, values):
        """Write {name: float}; a value that is a list becomes a histogram."""
        if self._writer:
            env_step = step * self._config.action_repeat
            for name, value in values.items():
                if not isinstance(value, list):
                    self._writer.add_scalar(tag(name), value, env_step)
                elif self._config.tb_media:
                    self._writer.add_histogram(f"weights/{name}", np.array(value), env_step)

    def media(self, step, images, named_parameters):
        """Write images {name: (N, 3, H, W)} and histograms of parameters, unless --no_tb_media."""
        if self._writer and self._config.tb_media:
            env_step = step * self._config.action_repeat
            for name, value in images.items():
                self._writer.add_images(f"visual/{name}", value.cpu(), env_step)
            for name, parameter in named_parameters:
                self._writer.add_histogram(f"weights/{name}", parameter.detach().cpu(), env_step)

    def lengths(self):
        """Flush the events to disk; returns {file name: length in bytes}."""
        if self._writer:
            self._writer.flush()
        return {path.name: sync(path) for path in self._event_files()}

    def cut(self, lengths, step):
        """Cut event files to `lengths` (at the checkpoint at `step`); TensorBoard discards events read beyond them."""
        for path in self._event_files():
            if length := lengths.get(path.name):
                os.truncate(path, length)
            else:
                path.unlink()
        self._purge_step = step * self._config.action_repeat + 1

    def close(self, finished, message):
        """Close the events and wait for the upload, which must not fail the run; `message` prints a line."""
        if self._writer:
            with contextlib.suppress(OSError):
                self._writer.close()
        if self._wandb:
            import wandb

            code = int(not finished)
            try:
                try:
                    self._wandb.finish(code)
                finally:
                    wandb.teardown(code)  # else wandb tries again when this process exits
            except Exception as error:  # of many types; its process may be gone, as after a TERM to all processes
                message(f"warning: --wandb: upload incomplete; only tb/ has the newest events ({type(error).__name__})")

    def _event_files(self):
        return sorted((self._folder / "tb").glob("events.out.tfevents.*"))


def _open_wandb(folder, config):
    """A Weights & Biases run that uploads all event files created from now on; it writes only to `folder`.

    Its process has a session of its own, so that Ctrl-C in a terminal does not reach it. Raises `OSError` if Weights &
    Biases refuses the run.
    """
    for name in ("CACHE", "DATA"):
        os.environ.setdefault(f"WANDB_{name}_DIR", str(folder.resolve() / "wandb"))
    import wandb  # takes seconds, and is not in requirements.txt

    try:
        return wandb.init(
            project=config.wandb,
            name=str(folder),
            id=run_id(folder),
            resume="allow",
            config=dataclasses.asdict(config),
            dir=folder,
            sync_tensorboard=True,
            settings=wandb.Settings(console="off", quiet=True, finish_timeout=WANDB_SECONDS),
        )
    except wandb.Error as error:
        raise OSError(f"--wandb {config.wandb}: {str(error).splitlines()[0]}") from None


def hparams(config, row):
    """Summary of the flags that affect results, for the run's own events; the table sorts its rows by `row`."""
    flags = {name: value for name, value in dataclasses.asdict(config).items() if name not in NO_EFFECT_ON_RESULTS}
    return hp.hparams_pb({name: "None" if value is None else value for name, value in flags.items()}, row)


def write_hparams_config(folder, flags):
    """Restrict the HPARAMS table of the runs below `folder` to these flags and the returns.

    Writes one event file, always at the same path and only if it changes.
    """
    metrics = [hp.Metric(name, display_name=heading) for name, heading in METRICS.items()]
    config = hp.hparams_config_pb([hp.HParam(flag) for flag in flags], metrics, time_created_secs=0)
    events = io.BytesIO()
    records = RecordWriter(events)
    for event in (Event(file_version="brain.Event:2"), Event(summary=config)):
        records.write(event.SerializeToString())  # no timestamp, so equal flags give equal bytes
    path = pathlib.Path(folder) / "events.out.tfevents.0000000000.hparams_config"
    if not path.exists() or path.read_bytes() != events.getvalue():
        write_whole(path, lambda file: file.write(events.getvalue()))
