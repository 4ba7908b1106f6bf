"""Runs as processes of this machine, some of them at once."""

import collections
import os
import signal
import socket
import subprocess
import time

from rich.live import Live

import endings
import rendering
from endings import DIVERGED, REFUSED
from experiments.grid import command
from experiments.status import STATES, hours, lost_console, make_console, plural, return_text, run_status, status_table
from machine import available_cores
from storage.run_folder import EXIT_CODE, OUTPUT, is_written, last_line, load_status, write_json

HOST = socket.gethostname()
ATTEMPTS = 3  # of a run that dies
POLL = 0.2  # seconds between two looks at the processes
REFRESH = 2  # seconds between two looks at their folders


def job_environments(jobs):
    """Environment variables of each of `jobs` processes: an equal share of the cores, and the GPUs in turn.

    A GPU draws for the runs that it trains, where it can: in many containers the GPUs compute and only Mesa draws.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        gpus = [gpu for gpu in visible.split(",") if gpu]
    else:
        gpus = _installed_gpus()
    drawing = rendering.egl_devices() if len(gpus) > 1 else 0
    share = {"OMP_NUM_THREADS": str(max(1, available_cores() // jobs)), **os.environ}
    for job in range(jobs):
        place = dict(share)
        if len(gpus) > 1:
            place["CUDA_VISIBLE_DEVICES"] = gpu = gpus[job % len(gpus)]
            if gpu.isdigit():
                place = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", **place}
                if int(gpu) < drawing:
                    place = {"MUJOCO_EGL_DEVICE_ID": gpu, **place}
        yield place


def _installed_gpus():
    """Indices of the GPUs that the driver knows of."""
    try:
        ask = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
        return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return []


class Processes:
    """The runs of a sweep on this machine, some of them at once.

    Args:
        folder: of the sweep.
        runs: those that are to be done.
        jobs: how many at once.
        say: takes a line for the user.
    """

    def __init__(self, folder, runs, jobs, say):
        self._folder, self._say = folder, say
        self._waiting = collections.deque(runs)
        self._places = list(job_environments(jobs))
        self._active = {}  # index of a place -> (run, process)
        self._deaths = collections.Counter()
        self.watched = set()  # folders of the runs that were started here or are done elsewhere
        self.failed = []  # runs that were given up

    def step(self):
        """Take note of processes that have ended and start others in their places; False if none is left."""
        for place, (run, process) in list(self._active.items()):
            if process.poll() is not None:
                del self._active[place]
                self._ended(run, process.returncode)
        free = [place for place in range(len(self._places)) if place not in self._active]
        if free and self._waiting:
            elsewhere = self._done_elsewhere()
            for run in elsewhere:
                if run.folder not in self.watched:
                    self.watched.add(run.folder)
                    self._say(f"{run.folder}: waiting for {self._who(run)}, which does this run already")
            # what a sweep has left behind that was killed takes its place still
            left = [run for run in elsewhere if load_status(self._folder / run.folder).get("host") == HOST]
            ready = [run for run in self._waiting if run not in elsewhere]
            for place, run in zip(free[len(left) :], ready, strict=False):
                self._waiting.remove(run)
                self._active[place] = (run, self._start(run, self._places[place]))
        return bool(self._active or self._waiting)

    def _done_elsewhere(self):
        """Runs that wait here and that another process is writing."""
        return [run for run in self._waiting if is_written(self._folder / run.folder)]

    def _who(self, run):
        word = load_status(self._folder / run.folder)
        return f"process {word['pid']} on {word['host']}" if word else "another process"

    def _start(self, run, environment):
        self.watched.add(run.folder)
        path = self._folder / run.folder
        path.mkdir(parents=True, exist_ok=True)
        with open(path / OUTPUT, "ab") as output:
            # a session of its own: Ctrl-C and a terminal that hangs up reach the sweep, which passes them on
            return subprocess.Popen(
                command(self._folder, run),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def _ended(self, run, code):
        path = self._folder / run.folder
        if not (path / "args.json").exists():
            write_json(path / EXIT_CODE, code)
        if code == 0:
            self._say(f"{run.folder}: finished, return {return_text(run_status(path))}")
        elif code == DIVERGED:
            self._say(f"{run.folder}: diverged: {run_status(path).note}")
        elif code == REFUSED and is_written(path):
            self._waiting.append(run)  # another sweep was faster
            self.watched.discard(run.folder)
        else:
            self._deaths[run.folder] += 1
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            again = code != REFUSED and self._deaths[run.folder] < ATTEMPTS
            self._say(f"{run.folder}: {how}: {last_line(path)}; {'started again' if again else 'given up'}")
            (self._waiting.appendleft if again else self.failed.append)(run)

    def stop(self):
        """Tell every process to save its run and to end, and wait for that."""
        if self._active:
            self._say(f"stopping: saving {plural(len(self._active), 'run')}")
        for _, process in self._active.values():
            process.terminate()
        for _, process in self._active.values():
            process.wait()
        for run in self._done_elsewhere():
            self._say(f"{run.folder}: goes on in {self._who(run)}, which this sweep has not started")


def run_here(folder, runs, jobs, todo):
    """Do the runs `todo` of `runs` on this machine; the exit code."""
    console = make_console()

    def say(line):
        with lost_console():
            console.print(line)

    statuses = {run.folder: run_status(folder / run.folder) for run in runs}
    processes = Processes(folder, todo, jobs, say)
    code, next_look = 0, 0.0
    screen = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
    if screen:
        screen.start()
    try:
        while processes.step():
            if time.monotonic() >= next_look:
                next_look = time.monotonic() + REFRESH
                for run in todo:
                    if run.folder not in processes.watched or statuses[run.folder].state in ("finished", "diverged"):
                        continue  # which reads its logs for nothing
                    before, statuses[run.folder] = statuses[run.folder], run_status(folder / run.folder)
                    if not screen and (line := _news(before, statuses[run.folder])):
                        say(f"{run.folder}: {line}")
                if screen:
                    with lost_console():
                        screen.update(status_table(_by_state(statuses)), refresh=True)
            time.sleep(POLL)
            endings.check_signals()  # before a process that the same signal has ended could be started again
        code = 1 if processes.failed else 0
    except endings.Stopped as stop:
        code = stop.code
    finally:
        processes.stop()
        if screen:
            with lost_console():
                screen.stop()
    with lost_console():
        console.print(status_table({run.folder: run_status(folder / run.folder) for run in runs}))
    return code


def _news(before, now):
    """A line about a run that has begun, or was evaluated since, or None."""
    if now.state != "running" or now.last_return == before.last_return and before.state == "running":
        return None
    parts = [f"step {now.step:,} of {now.total:,}"]
    parts += [f"return {return_text(now)}"] if now.last_return is not None else []
    parts += [f"{hours(now.seconds)} left"] if now.seconds is not None else []
    return ", ".join(parts)


def _by_state(statuses):
    """What may not fit on a screen comes last."""
    return dict(sorted(statuses.items(), key=lambda item: STATES.index(item[1].state)))
