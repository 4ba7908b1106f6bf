"""A run's log: metrics from the device, rows of train.log and eval.log, the console, and warnings."""

import collections
import contextlib
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
from tqdm import tqdm

from dashboard import Dashboard
from endings import Diverged
from machine import bf16_time_ratio
from rendering import renderer
from storage.run_folder import keep_rows, sync

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
EVAL_COLUMNS = {"episode": "E", "step": "S", "episode_reward": "R", "duration": "D"}
MEDIAN_WINDOW = 20  # fetches in the running median; no divergence warning before half of them
COLLAPSED = {"latent_std": 0.05, "latent_rank": 3}  # latents below either value have collapsed
COLLAPSE_AFTER = 2_000  # updates; new encoders look collapsed, healthy runs stay above 0.3 and 17 from then on


class Logger:
    """Collects metrics on the device and writes them to the logs, the console and the dashboard of a run's folder."""

    def __init__(self, folder, config):
        self._folder = pathlib.Path(folder)
        self._config = config
        self._dashboard = Dashboard(folder, config)
        self.open = self._dashboard.open
        self._unread = []  # (step, metrics still on the device)
        self._means = []  # per fetch since the last train row: {metric: (number of values, mean)}
        self._last = "none"  # the last metrics fetched, for the message when a run diverges
        self._step = 0
        self._evaluated, self._best = -1, -math.inf  # step of the last evaluation, highest return so far
        self._row_time = time.monotonic()  # immune to clock changes
        self._start = self._row_time - (time.time() - psutil.Process().create_time())
        self._row_step, self._row_updates = 0, 0  # decisions at the last train row, updates since
        self._physics_errors = 0
        self._watched = {name: collections.deque(maxlen=MEDIAN_WINDOW) for name in ("kl", "critic_loss")}
        self._warned = False  # whether in this episode
        self._collapsed = 0  # consecutive fetches with collapsed latents; 2: warned
        # without a terminal, print only rows, no progress bar
        self._bar = tqdm(total=config.num_train_steps, unit="step", disable=None, dynamic_ncols=True, smoothing=0.05)

    def record(self, step, metrics):
        """Keep an update's metrics (tensors) on their device until `fetch`."""
        self._unread.append((step, metrics))
        self._row_updates += 1

    def fetch(self):
        """Copy the recorded metrics to the host; their means go to the dashboard and into the next train row.

        Raises `Diverged` if a loss is not finite; the message names the first one, its step and the last metrics.
        """
        if not self._unread:
            return
        updates, self._unread = self._unread, []
        columns = {}  # name -> tensors
        for _, metrics in updates:
            for name, value in metrics.items():
                columns.setdefault(name, []).append(value)
        means = {}
        for name, values in columns.items():
            device = values[-1].device  # metrics from a checkpoint are on the CPU
            means[name] = torch.stack([value.to(device) for value in values]).double().mean(dim=0).tolist()
        scalars = [name for name, mean in means.items() if isinstance(mean, float)]
        losses = [name for name in scalars if name.endswith("loss")]
        if not all(math.isfinite(means[name]) for name in losses):
            self._last = ", ".join(f"{name} {columns[name][-1]:.6g}" for name in scalars)
            found = ((s, n, m[n]) for s, m in updates for n in losses if n in m and not m[n].isfinite())
            step, name, value = next(found)
            raise Diverged(f"{name} is {value.item()} at step {step}; last metrics: {self._last}")
        self._last = ", ".join(f"{name} {means[name]:.6g}" for name in scalars)
        self._means.append({name: (len(columns[name]), mean) for name, mean in means.items()})
        step = updates[-1][0]
        self._dashboard.scalars(step, means)
        self._watch_losses(step, means)
        self._watch_latents(step, means)

    def explain(self, error):
        """`Diverged` for a FloatingPointError; its message names the non-finite loss, if there is one."""
        try:
            self.fetch()
        except Diverged as loss:
            return loss
        return Diverged(f"{error} at step {self._step}; last metrics: {self._last}")

    def announce(self, device, replay, resumed_at):
        """Print a run's first line: folder, steps, seed, device, threads, precision, renderer, replay memory."""
        c, backend = self._config, os.environ.get("MUJOCO_GL")
        drawn = f"drawn by {backend}, {renderer(backend)}"
        sees = f"frames {drawn}"
        if c.encoder_type == "identity":
            sees = f"states, videos {drawn}" if c.save_video else "states"
        threads = torch.get_num_threads()
        begins = f"new run of {c.num_train_steps} steps" if resumed_at is None else f"resumes at step {resumed_at}"
        on = f"on {device} with {threads} thread{'s' if threads > 1 else ''} in {c.precision}"
        on += ", deterministic" * c.deterministic
        self.message(f"{self._folder}: {begins}, seed {c.seed}, {on}, {sees}, {replay.description}")
        if c.precision == "bf16" and device.type == "cpu" and (ratio := bf16_time_ratio()) >= 1:
            self.message(
                f"warning: --precision bf16: convolutions take {ratio:.2f} times as long as in fp32 on this machine"
            )

    def _watch_losses(self, step, means):
        """Warn, once per episode, when KL or the critic loss exceeds a multiple of its running median."""
        factor = self._config.divergence_factor
        for name, window in self._watched.items():
            if name not in means:
                continue
            usual = statistics.median(window) if len(window) >= MEDIAN_WINDOW // 2 else math.inf
            if means[name] > factor * usual and not self._warned:
                self._warned = True
                self.message(
                    f"warning: {name} {means[name]:.4g} at step {step} is more than {factor:g} times its running "
                    f"median {usual:.4g}; see docs/troubleshooting.md"
                )
            window.append(means[name])

    def _watch_latents(self, step, means):
        """Warn, once per run, when two fetches in a row show collapsed latents of the pixel encoder.

        The other encoders have no LayerNorm, so their latents have no fixed scale.
        """
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
        self._dashboard.scalars(step, {"train_episode_reward": values["episode_reward"], **rates})

    def physics_error(self, step, episode):
        """Warn that the physics diverged and ended an episode; the train rows count these."""
        self._physics_errors += 1
        self.message(f"warning: the physics diverged at step {step}: episode {episode} ends there")

    def eval_row(self, step, **values):
        """Log an evaluation, which took `values["duration"]` seconds."""
        self.fetch()  # a non-finite loss stops the run here at the latest
        self._row_time += values["duration"]  # the training episode paused meanwhile
        self._row("eval", step, values, EVAL_COLUMNS, "green")
        self._evaluated, self._best = step, max(self._best, values["episode_reward"])
        scalars = {name: value for name, value in values.items() if isinstance(value, float)}
        scalars["episode_reward_best"] = self._best
        self._dashboard.scalars(step, {f"eval_{name}": value for name, value in scalars.items()})

    def media(self, step, images, named_parameters):
        """Show images {name: (N, 3, H, W)} and histograms of parameters on the dashboard."""
        self.fetch()  # histograms fail on non-finite parameters; the loss gives a better message
        self._dashboard.media(step, images, named_parameters)

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

    def flush(self):
        """Flush all logs and events to disk; returns {event file: length in bytes}."""
        for path in (self._folder / "train.log", self._folder / "eval.log"):
            if path.exists():
                sync(path)
        return self._dashboard.lengths()

    def state_dict(self):
        """Metrics not yet written, state of the warnings, and lengths of the event files; flushes the logs."""
        now = time.monotonic()
        return {
            "lengths": self.flush(),
            "seconds": now - self._start,
            "row_seconds": now - self._row_time,
            "step": self._step,
            "evaluations": [self._evaluated, self._best],
            "row": [self._row_step, self._row_updates, self._physics_errors, self._warned, self._collapsed],
            "unread": self._unread,
            "means": self._means,
            "last": self._last,
            "watched": {name: list(window) for name, window in self._watched.items()},
        }

    def load_state_dict(self, state):
        """Resume from `state_dict`; drops what was logged after it, which the resumed run logs again."""
        self._evaluated, self._best = state["evaluations"]
        self._start -= state["seconds"]
        self._row_time = time.monotonic() - state["row_seconds"]
        self._row_step, self._row_updates, self._physics_errors, self._warned, self._collapsed = state["row"]
        self._unread, self._means, self._last = state["unread"], state["means"], state["last"]
        for name, window in self._watched.items():
            window.extend(state["watched"][name])
        self.progress(state["step"])
        self.drop_newer(state["lengths"])

    def drop_newer(self, lengths):
        """Drop the rows after this logger's step and evaluation, and events beyond `lengths`; see `flush`."""
        keep_rows(self._folder, "train.log", self._step)
        keep_rows(self._folder, "eval.log", self._evaluated)
        self._dashboard.cut(lengths, self._step)

    def close(self):
        """Close everything; drops data that cannot be written, as after the error that stopped the run."""
        with contextlib.suppress(OSError):
            self._bar.close()
        self._dashboard.close(self._step >= self._config.num_train_steps, self.message)

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


def _finite_or_null(value):
    """None for a non-finite float, such as the rank of a constant latent, since JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(name, value):
    if name in ("duration", "wall_seconds"):
        return f"{value:.1f} s"
    return str(value) if isinstance(value, int) else f"{value:.4f}"
