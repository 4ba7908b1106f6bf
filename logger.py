"""Logging of a run's metrics: console, JSON lines (train.log, eval.log), TensorBoard and Weights & Biases."""

import collections
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import statistics
import sys
import time

import numpy as np
import psutil
import torch
from termcolor import colored
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import dashboard
from endings import Diverged
from machine import bf16_time_ratio
from rendering import renderer
from storage.run_folder import load_rows, run_id

# name in the logs -> console column, as in the released code's logger
TRAIN_COLUMNS = {
    "episode": "E",
    "step": "S",
    "episode_reward": "R",
    "batch_reward": "BR",
    "actor_loss": "A_LOSS",
    "critic_loss": "CR_LOSS",
    "cody_loss": "CODY",
    "mi_bound": "MI",
    "kl": "KL",
    "duration": "D",
    "decisions_per_s": "D/S",
    "updates_per_s": "U/S",
    "wall_seconds": "T",
}
MEDIAN_WINDOW = 20  # reads in the running median of the divergence warning, which needs at least half of them
COLLAPSED = {"latent_std": 0.05, "latent_rank": 3}  # latents below either value have collapsed
COLLAPSE_AFTER = 2_000  # updates; new encoders look collapsed, healthy runs stay above 0.6 and 20 from then on
WANDB_SECONDS = 20  # limit for uploads at a run's end; a cluster may kill a job after 30
EVAL_COLUMNS = {"episode": "E", "step": "S", "episode_reward": "R", "duration": "D"}


class Logger:
    """Collects metrics on the device and writes them to all logs.

    Args:
        folder: the run's folder, for train.log, eval.log and tb/.
        config: see config.py.
    """

    def __init__(self, folder, config):
        self._folder = pathlib.Path(folder)
        self._config = config
        self._writer = self._wandb = None
        self._purge_step = 0  # environment step from which TensorBoard discards earlier events
        self._unread = []  # (step, metrics still on the device)
        self._means = []  # per read since the last train row: {metric: (number of values, mean)}
        self._last = "none"  # the last metrics read, for the message when a run diverges
        self._step = 0
        self._row_time = time.monotonic()  # immune to clock changes
        self._start = self._row_time - (time.time() - psutil.Process().create_time())
        self._row_step, self._row_updates = 0, 0  # decisions at the last train row, updates since
        self._physics_errors = 0
        self._divergence_factor = config.divergence_factor
        self._watched = {name: collections.deque(maxlen=MEDIAN_WINDOW) for name in ("kl", "critic_loss")}
        self._warned = False  # whether in this episode
        self._collapsed = 0  # consecutive reads with collapsed latents; 2: warned
        # without a terminal, print only rows, no progress bar
        self._bar = tqdm(total=config.num_train_steps, unit="step", disable=None, dynamic_ncols=True, smoothing=0.05)

    def open(self):
        """Start the TensorBoard events if --save_tb; needs the run's args.json.

        The event file records the step at which a run resumes.

        Raises:
            OSError: Weights & Biases refused the run.
        """
        if not self._config.save_tb:
            return
        run, number = run_id(self._folder), len(self._event_files())
        if self._config.wandb:
            self._wandb = _open_wandb(self._folder, self._config, run)
        # a running TensorBoard ignores the purge step of a run's first file, so that file has one too
        # the number keeps names apart: host and process id may repeat, as in a restarted container
        self._writer = SummaryWriter(self._folder / "tb", purge_step=self._purge_step, filename_suffix=f".{number}")
        if number == 0:
            self._writer.add_custom_scalars(dashboard.LAYOUT)
            row = f"{self._folder} {run}"  # unique, sortable and readable
            self._writer.file_writer.add_summary(dashboard.hparams(self._config, row))

    def record(self, step, metrics):
        """Keep an update's metrics (tensors) on their device until `read`."""
        self._unread.append((step, metrics))
        self._row_updates += 1

    def read(self):
        """Copy the recorded metrics to the host; their means go to TensorBoard and into the next train row.

        Raises:
            Diverged: a loss is not finite; the message names the first one, its step and the last metrics.
        """
        if not self._unread:
            return
        columns = {}  # name -> [(step, tensor)]
        for step, metrics in self._unread:
            for name, value in metrics.items():
                columns.setdefault(name, []).append((step, value))
        last_step = self._unread[-1][0]
        self._unread = []
        bad, means = [], {}
        for name, column in columns.items():
            device = column[-1][1].device  # metrics from a checkpoint are on the CPU
            values = torch.stack([value.to(device) for _, value in column]).double()
            means[name] = values.mean(dim=0).tolist()
            if name.endswith("loss") and not math.isfinite(means[name]):
                bad += [(s, name, v) for (s, _), v in zip(column, values.tolist(), strict=True) if not math.isfinite(v)]
        if bad:
            step, name, value = min(bad, key=lambda entry: entry[0])
            self._last = ", ".join(f"{n} {c[-1][1]:.6g}" for n, c in columns.items() if c[-1][1].dim() == 0)
            raise Diverged(f"{name} is {value} at step {step}; last metrics: {self._last}")
        self._last = ", ".join(f"{n} {mean:.6g}" for n, mean in means.items() if isinstance(mean, float))
        self._means.append({name: (len(columns[name]), mean) for name, mean in means.items()})
        self._events(last_step, means)
        self._watch(last_step, means)
        self._watch_latents(last_step, means)

    def explain(self, error):
        """`Diverged` for a FloatingPointError; its message names the non-finite loss, if there is one."""
        try:
            self.read()
        except Diverged as loss:
            return loss
        return Diverged(f"{error} at step {self._step}; last metrics: {self._last}")

    def announce(self, folder, device, replay, resumed_at):
        """Print a run's first line: folder, seed, device, threads, precision, renderer, replay memory."""
        c, backend = self._config, os.environ.get("MUJOCO_GL")
        drawn = f"drawn by {backend}, {renderer(backend)}"
        sees = f"frames {drawn}"
        if c.encoder_type == "identity":
            sees = f"states, videos {drawn}" if c.save_video else "states"
        threads = torch.get_num_threads()
        resumes = "" if resumed_at is None else f"resumes at step {resumed_at}, "
        on = f"on {device} with {threads} thread{'s' if threads > 1 else ''} in {c.precision}"
        self.message(f"{folder}: {resumes}seed {c.seed}, {on}, {sees}, {replay.description}")
        if c.precision == "bf16" and device.type == "cpu" and (ratio := bf16_time_ratio()) >= 1:
            self.message(
                f"warning: --precision bf16: a convolution takes {ratio:.2f} times as long in it as in fp32 here"
            )

    def _watch(self, step, means):
        """Warn, once per episode, when KL or the critic loss exceeds a multiple of its running median."""
        for name, window in self._watched.items():
            if name not in means:
                continue
            usual = statistics.median(window) if len(window) >= MEDIAN_WINDOW // 2 else math.inf
            if means[name] > self._divergence_factor * usual and not self._warned:
                self._warned = True
                self.message(
                    f"warning: {name} {means[name]:.4g} at step {step} is more than {self._divergence_factor:g} times "
                    f"its running median {usual:.4g}; see docs/troubleshooting.md"
                )
            window.append(means[name])

    def _watch_latents(self, step, means):
        """Warn, once per run, when two reads in a row show collapsed latents; only LayerNorm fixes their scale."""
        c = self._config
        updates = (step - c.init_steps) * c.updates_per_step
        if self._collapsed == 2 or updates < COLLAPSE_AFTER or (c.agent, c.encoder_type) != ("cody_sac", "pixel"):
            return
        low = [f"{name} {means[name]:.3g}" for name, bound in COLLAPSED.items() if means.get(name, bound) < bound]
        if low:
            self._collapsed += 1
        elif "latent_rank" in means:  # absent between detailed updates, as before an evaluation
            self._collapsed = 0
        if self._collapsed == 2:
            self.message(
                f"warning: {', '.join(low)} at step {step}: latents have collapsed; see docs/troubleshooting.md"
            )

    def train_row(self, step, **values):
        """Log the end of a training episode: its values, its speed, and the mean metrics since the last row."""
        now = time.monotonic()
        seconds = now - self._row_time  # excludes evaluations
        rates = {
            "duration": seconds,
            "decisions_per_s": (step - self._row_step) / seconds,
            "updates_per_s": self._row_updates / seconds,
            "wall_seconds": now - self._start,
        }
        values.update(rates, physics_errors=self._physics_errors)
        self._row_time, self._row_step, self._row_updates = now, step, 0
        for name in dict.fromkeys(name for means in self._means for name in means):
            weighted = [(means[name][0], np.array(means[name][1])) for means in self._means if name in means]
            values[name] = (sum(n * mean for n, mean in weighted) / sum(n for n, _ in weighted)).tolist()
        self._means = []
        self._warned = False
        self._row("train", step, values, TRAIN_COLUMNS, "yellow")
        self._events(step, {"train_episode_reward": values["episode_reward"], **rates})

    def physics_error(self, step, episode):
        """Warn that the physics diverged and ended an episode; the train rows count these."""
        self._physics_errors += 1
        self.message(f"warning: the physics diverged at step {step}: episode {episode} ends there")

    def eval_row(self, step, **values):
        """Log an evaluation, which took `values["duration"]` seconds."""
        self.read()  # a non-finite loss stops the run here at the latest
        self._row_time += values["duration"]  # the training episode paused meanwhile
        self._row("eval", step, values, EVAL_COLUMNS, "green")
        if self._writer:
            best = max(row["episode_reward"] for row in load_rows(self._folder, "eval.log"))
            scalars = {name: value for name, value in values.items() if isinstance(value, float)}
            scalars["episode_reward_best"] = best
            self._events(step, {f"eval_{name}": value for name, value in scalars.items()})

    def media(self, step, images, named_parameters):
        """Write images {name: (N, 3, H, W)} and histograms of parameters to TensorBoard."""
        self.read()  # histograms fail on non-finite parameters; the loss gives a better message
        if not (self._writer and self._config.tb_media):
            return
        env_step = step * self._config.action_repeat
        for name, value in images.items():
            self._writer.add_images(f"visual/{name}", value.cpu(), env_step)
        for name, parameter in named_parameters:
            self._writer.add_histogram(f"weights/{name}", parameter.detach().cpu(), env_step)

    def progress(self, step):
        """Move the progress bar to `step`."""
        with contextlib.suppress(OSError):
            self._bar.update(step - self._step)
        self._step = step

    def message(self, text):
        """Print a line on the console, above the progress bar.

        A console that disappears, such as a closed terminal or a pipe into `head -1`, does not stop the run.
        """
        with contextlib.suppress(OSError):
            tqdm.write(text)
            sys.stdout.flush()  # for tail -f on redirected output

    def state_dict(self):
        """Lengths of the log files, metrics not yet written, and state of the warnings; flushes the logs."""
        lengths = self.flush()
        now = time.monotonic()
        return {
            "lengths": lengths,
            "seconds": now - self._start,
            "row_seconds": now - self._row_time,
            "step": self._step,
            "row": [self._row_step, self._row_updates, self._physics_errors, self._warned, self._collapsed],
            "unread": self._unread,
            "means": self._means,
            "last": self._last,
            "watched": {name: list(window) for name, window in self._watched.items()},
        }

    def load_state_dict(self, state):
        """Resume from `state_dict`; cuts the rows written after it, which the resumed run writes again."""
        self.cut_logs(state["lengths"])
        self._start -= state["seconds"]
        self._row_time = time.monotonic() - state["row_seconds"]
        self._row_step, self._row_updates, self._physics_errors, self._warned, self._collapsed = state["row"]
        self._unread, self._means, self._last = state["unread"], state["means"], state["last"]
        for name, window in self._watched.items():
            window.extend(state["watched"][name])
        self._purge_step = state["step"] * self._config.action_repeat + 1
        self.progress(state["step"])

    def cut_logs(self, lengths):
        """Truncate each log and event file to its length in bytes, 0 if not given."""
        there = dict.fromkeys(lengths, 0)
        for path in self._files():
            key = _key(path)
            there[key] = min(lengths.get(key, 0), path.stat().st_size)
            if path.suffix == ".log" or there[key]:
                os.truncate(path, there[key])
            else:
                path.unlink()
        for key, length in lengths.items():
            if there[key] < length:
                self.message(f"warning: {key} has {there[key]} bytes of {length}: rows before this step are gone")
        self._put_events_in_the_past()

    def _put_events_in_the_past(self):
        """Rename event files from the future: TensorBoard reads them in order of time, and clocks may be set back."""
        files = self._event_files()
        if files and int(files[-1].name.split(".")[3]) >= int(time.time()):
            for number, path in enumerate(files):
                path.rename(path.with_name(f"events.out.tfevents.{number:010d}.{_key(path)}"))

    def _files(self):
        """The append-only files: logs and events."""
        logs = [path for path in (self._folder / "train.log", self._folder / "eval.log") if path.exists()]
        return logs + self._event_files()

    def flush(self):
        """Flush all logs and events to disk; returns {file key: length in bytes}.

        Raises:
            OSError: a write failed.
        """
        if self._writer:
            self._writer.flush()
        return {_key(path): _on_disk(path) for path in self._files()}

    def close(self):
        """Close everything; drops data that cannot be written, as after the error that stopped the run."""
        for what in (self._bar, self._writer):
            if what:
                with contextlib.suppress(OSError):
                    what.close()
        if self._wandb:
            self._close_wandb()

    def _close_wandb(self):
        """Wait for the upload; its process may already be gone, as after a TERM to all processes of a job."""
        import wandb

        code = int(self._step < self._config.num_train_steps)  # an unfinished run has not succeeded
        try:
            try:
                self._wandb.finish(code)
            finally:
                wandb.teardown(code)  # else wandb tries again when this process exits
        except Exception as error:  # of many types; none should fail the run
            self.message(f"warning: --wandb: it lacks what is newest in tb/ ({type(error).__name__})")

    def _row(self, kind, step, values, columns, colour):
        row = {"step": step, "env_step": step * self._config.action_repeat, **values}
        path = self._folder / f"{kind}.log"
        try:
            with open(path, "a") as log:
                log.write(json.dumps({name: _finite_or_null(value) for name, value in row.items()}) + "\n")
        except OSError as error:
            raise OSError(f"{path}: not written ({error.strerror})") from None
        cells = [f"{label}: {_cell(name, row[name])}" for name, label in columns.items() if name in row]
        self.message(" | ".join([colored(f"| {kind:5}", colour), *cells]))

    def _event_files(self):
        return sorted((self._folder / "tb").glob("events.out.tfevents.*"))

    def _events(self, step, values):
        """Write scalars, and lists as histograms, to TensorBoard."""
        if self._writer:
            env_step = step * self._config.action_repeat
            for name, value in values.items():
                if not isinstance(value, list):
                    self._writer.add_scalar(dashboard.tag(name), value, env_step)
                elif self._config.tb_media:
                    self._writer.add_histogram(f"weights/{name}", np.array(value), env_step)


def _open_wandb(folder, config, run):
    """A Weights & Biases run that uploads all event files created from now on; it writes only to `folder`.

    Its process has a session of its own, so that Ctrl-C in a terminal does not reach it.

    Raises:
        OSError: Weights & Biases refused the run.
    """
    for name in ("CACHE", "DATA"):
        os.environ.setdefault(f"WANDB_{name}_DIR", str(folder.resolve() / "wandb"))
    import wandb  # takes seconds, and is not in requirements.txt

    try:
        return wandb.init(
            project=config.wandb,
            name=str(folder),
            id=run,
            resume="allow",
            config=dataclasses.asdict(config),
            dir=folder,
            sync_tensorboard=True,
            settings=wandb.Settings(console="off", quiet=True, finish_timeout=WANDB_SECONDS),
        )
    except wandb.Error as error:
        raise OSError(f"--wandb {config.wandb}: {str(error).splitlines()[0]}") from None


def prepare_console():
    """Make stdout and stderr writable even if they are closed or cannot encode a path's characters."""
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:  # closed: the next open file must not get this descriptor
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
            setattr(sys, name, os.fdopen(descriptor, "w"))
        getattr(sys, name).reconfigure(errors="backslashreplace")


def _key(path):
    """Key of a file: a log's name, or the part of an event file's name after the time."""
    return path.name if path.suffix == ".log" else path.name.split(".", 4)[4]


def _on_disk(path):
    """Sync a file to disk and return its length in bytes."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size


def _finite_or_null(value):
    """None for a non-finite float, such as the rank of a constant latent, since JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(name, value):
    if name in ("duration", "wall_seconds"):
        return f"{value:.1f} s"
    return str(value) if isinstance(value, int) else f"{value:.4f}"
