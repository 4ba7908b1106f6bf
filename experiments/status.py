"""The status of runs, read from their folders alone, and a table of it."""

import collections
import os
import sys
from typing import NamedTuple

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from storage.run_folder import last_line, load_args, load_rows, load_state, load_status

DISPLAY_ORDER = ["running", "died", "stopped", "diverged", "waiting", "finished"]


class RunStatus(NamedTuple):
    """The status of a run."""

    state: str  # in DISPLAY_ORDER
    step: int  # decisions so far
    total: int | None  # decisions of the complete run
    last_return: float | None  # return of the last evaluation
    seconds: float | None  # remaining time at the speed of the last episodes
    note: str  # the reason or last output line of a run that stopped, diverged or died


def run_status(run):
    """`RunStatus` of the run in folder `run`."""
    state, recorded = load_state(run), load_status(run)
    if not (run / "args.json").exists():
        return RunStatus("died" if state == "died" else "waiting", 0, None, None, None, last_line(run))
    args = load_args(run)
    evaluations = load_rows(run, "eval.log") or [{"step": 0, "episode_reward": None}]
    step, total = max(recorded.get("step", 0), evaluations[-1]["step"]), args["num_train_steps"]
    seconds = None
    rows = [row for row in load_rows(run, "train.log") if row["step"] > args["init_steps"] and "wall_seconds" in row]
    timed = rows[-20:]
    if state == "running" and len(timed) > 1:
        pace = (timed[-1]["wall_seconds"] - timed[0]["wall_seconds"]) / (timed[-1]["step"] - timed[0]["step"])
        seconds = pace * (total - step)
    note = last_line(run) if state == "died" else recorded.get("reason", "")
    return RunStatus(state, step, total, evaluations[-1]["episode_reward"], seconds, note)


def status_table(statuses):
    """{name: RunStatus} as a printable table, followed by the notes and the number of runs in each state."""
    table = Table(box=None, pad_edge=False)
    table.add_column("run", overflow="fold")  # a narrow terminal wraps only the names
    table.add_column("state", no_wrap=True)
    for title in ("step", "return", "left"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, s in statuses.items():
        step = f"{s.step:,} of {s.total:,}" if s.total else ""
        table.add_row(name, s.state, step, return_text(s), hours(s.seconds))
    notes = [Text(f"{name}: {s.note}") for name, s in statuses.items() if s.note]
    counts = collections.Counter(s.state for s in statuses.values())
    return Group(table, *notes, Text(", ".join(f"{count} {state}" for state, count in counts.items())))


class LossProofConsole(Console):
    """A console on stdout that drops all output after the reader is gone, as with `| head` or a closed terminal."""

    def __init__(self):
        super().__init__(highlight=False, markup=False, width=None if sys.stdout.isatty() else 500)

    def __exit__(self, *error):
        try:
            super().__exit__(*error)  # writes, in all of rich's methods
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def on_broken_pipe(self):
        """Raise, where rich's own method would exit the program."""
        raise BrokenPipeError


def return_text(status):
    """The last return as text, "" if there is none."""
    return "" if status.last_return is None else f"{status.last_return:.0f}"


def plural(number, noun):
    """1, "run" -> "1 run"; 2, "run" -> "2 runs"."""
    return f"{number} {noun}{'s' * (number != 1)}"


def hours(seconds):
    """Seconds as 1:05 h, "" for None."""
    return "" if seconds is None else f"{int(seconds // 3600)}:{int(seconds % 3600 // 60):02d} h"
