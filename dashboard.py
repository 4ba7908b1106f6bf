"""What a person sees in TensorBoard: names in the order to read them, charts, and the HPARAMS table.

Importable without torch. Needs no TensorFlow, as `tensorboard.plugins.hparams.summary` would.
"""

import dataclasses
import io
import pathlib

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.plugins.hparams import summary_v2 as hp
from tensorboard.summary.writer.record_writer import RecordWriter

from config import UNCHANGING
from storage.run_folder import write_whole

# a page sorts the groups by name: charts, losses, metrics, speed, then what is slow to load, visual and weights
CHARTS = ("eval_episode_reward", "train_episode_reward", "mi_bound", "kl")
SPEED = ("duration", "eval_duration", "decisions_per_s", "updates_per_s", "wall_seconds")


def tag(metric):
    """Tag of a scalar: the group that it is shown in, and its name in the logs."""
    if metric in CHARTS:
        return f"charts/{metric}"
    if metric in SPEED:
        return f"speed/{metric}"
    return f"losses/{metric}" if metric.endswith(("_loss", "_nce")) else f"metrics/{metric}"


# of the custom scalars page, the same in each run since the page merges those of all runs: {category: {chart: ...}}
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
    """Summary with the flags that make a run what it is, for its own events; rows are sorted by their name `row`."""
    flags = {name: value for name, value in dataclasses.asdict(config).items() if name not in UNCHANGING}
    return hp.hparams_pb({name: "None" if value is None else value for name, value in flags.items()}, row)


def write_hparams_config(folder, flags):
    """Restrict the HPARAMS table of the runs below `folder` to these flags and the returns.

    Writes one event file, at the same place each time and only if it changes.

    Raises:
        OSError: it cannot be written.
    """
    metrics = [hp.Metric(name, display_name=heading) for name, heading in METRICS.items()]
    config = hp.hparams_config_pb([hp.HParam(flag) for flag in flags], metrics, time_created_secs=0)
    events = io.BytesIO()
    records = RecordWriter(events)
    for event in (Event(file_version="brain.Event:2"), Event(summary=config)):
        records.write(event.SerializeToString())  # without a time: equal flags, equal bytes
    path = pathlib.Path(folder) / "events.out.tfevents.0000000000.hparams_config"
    if not path.exists() or path.read_bytes() != events.getvalue():
        write_whole(path, lambda file: file.write(events.getvalue()))
