"""Layout of the TensorBoard page: tags in reading order, charts, and the HPARAMS table.

Importable without torch, and without TensorFlow, which `tensorboard.plugins.hparams.summary` would need.
"""

import dataclasses
import io
import pathlib

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.plugins.hparams import summary_v2 as hp
from tensorboard.summary.writer.record_writer import RecordWriter

from config import UNCHANGING
from storage.run_folder import write_whole

# TensorBoard sorts groups by name: charts, losses, metrics, speed, then the slow visual and weights
CHARTS = ("eval_episode_reward", "train_episode_reward", "mi_bound", "kl")
SPEED = ("duration", "eval_duration", "decisions_per_s", "updates_per_s", "wall_seconds")


def tag(metric):
    """TensorBoard tag of a scalar: its group and its name in the logs."""
    if metric in CHARTS:
        return f"charts/{metric}"
    if metric in SPEED:
        return f"speed/{metric}"
    return f"losses/{metric}" if metric.endswith(("_loss", "_nce")) else f"metrics/{metric}"


# custom scalars page, {category: {chart: ...}}; the same in every run, since the page merges all runs' layouts
LAYOUT = {
    "CoDy": {
        "evaluation return": ["Multiline", [tag("eval_episode_reward")]],
        "training return": ["Multiline", [tag("train_episode_reward")]],
        "MI bound": ["Multiline", [tag("mi_bound")]],
        "KL": ["Multiline", [tag("kl")]],
        "critic loss": ["Multiline", [tag("critic_loss")]],
        "actor loss": ["Multiline", [tag("actor_loss")]],
        "CoDy loss": ["Multiline", [tag("cody_loss")]],
    }
}

METRICS = {  # columns of the HPARAMS table: {tag: heading}
    tag("eval_episode_reward"): "final evaluation return",
    tag("eval_episode_reward_best"): "best evaluation return",
}


def hparams(config, row):
    """Summary of the flags that affect results, for the run's own events; the table sorts its rows by `row`."""
    flags = {name: value for name, value in dataclasses.asdict(config).items() if name not in UNCHANGING}
    return hp.hparams_pb({name: "None" if value is None else value for name, value in flags.items()}, row)


def write_hparams_config(folder, flags):
    """Restrict the HPARAMS table of the runs below `folder` to these flags and the returns.

    Writes one event file, always at the same path and only if it changes.

    Raises:
        OSError: the write failed.
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
