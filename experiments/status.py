"""The status of runs, read from their folders alone, and a table of it."""

import collections
import contextlib
import os
import sys
from typing import NamedTuple

from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from storage.run_folder import last_line, load_args, load_rows, load_state, load_status

STATES = ["running", "died", "stopped", "diverged", "waiting", "finished"]  # in display order


class RunStatus(NamedTuple):
    """The status of a run."""

    state: str  # in STATES
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
    evaluations, episodes = load_rows(run, "eval.log"), load_rows(run, "train.log")
    args = load_args(run)
    step = max(recorded.get("step", 0), evaluations[-1]["step"] if evaluations else 0)
    seconds = None
    timed = [row for row in episodes if row["step"] > args["init_steps"]][-20:]
    if state == "running" and len(timed) > 1:
        pace = (timed[-1]["wall_seconds"] - timed[0]["wall_seconds"]) / (timed[-1]["step"] - timed[0]["step"])
        seconds = pace * (args["num_train_steps"] - step)
    note = ""
    if state in ("stopped", "diverged"):
        note = recorded.get("reason", "")
    elif state == "died":
        note = last_line(run)
    last = evaluations[-1]["episode_reward"] if evaluations else None
    return RunStatus(state, step, args["num_train_steps"], last, seconds, note)


def status_table(statuses):
    """{name: RunStatus} as a printable table, followed by the notes and the number of runs in each state."""
    rows = [
        (name, s.state, f"{s.step:,} of {s.total:,}" if s.total else "", return_text(s), hours(s.seconds))
        for name, s in statuses.items()
    ]
    titles = ("run", "state", "step", "return", "left")
    table = Table(box=None, pad_edge=False)
    for i, title in enumerate(titles):
        if i == 0:
            table.add_column(title, overflow="fold")  # a narrow terminal wraps only the names
        else:
            width = max(len(row[i]) for row in [titles, *rows])
            table.add_column(title, justify="left" if i == 1 else "right", no_wrap=True, min_width=width)
    for row in rows:
        table.add_row(*map(escape, row))
    notes = [Text(f"{name}: {s.note}") for name, s in statuses.items() if s.note]
    counts = collections.Counter(s.state for s in statuses.values())
    return Group(table, *notes, Text(", ".join(f"{count} {state}" for state, count in counts.items())))


class PipeConsole(Console):
    """A console that raises on a broken pipe, such as `| head`, where rich's own would exit the program."""

    def on_broken_pipe(self):
        raise BrokenPipeError


def make_console():
    """A console on stdout; 500 characters wide if stdout is not a terminal."""
    return PipeConsole(highlight=False, markup=False, width=None if sys.stdout.isatty() else 500)


@contextlib.contextmanager
def lost_console():
    """Let a sweep survive the loss of its console, such as a closed terminal: drop all further output."""
    try:
        yield
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def return_text(status):
    """The last return as text, "" if there is none."""
    return "" if status.last_return is None else f"{status.last_return:.0f}"


def plural(number, noun):
    """1, "run" -> "1 run"; 2, "run" -> "2 runs"."""
    return f"{number} {noun}{'s' * (number != 1)}"


def hours(seconds):
    """Seconds as 1:05 h, "" for None."""
    return "" if seconds is None else f"{int(seconds // 3600)}:{int(seconds % 3600 // 60):02d} h"
