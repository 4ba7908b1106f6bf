"""Runs as parallel processes on this machine."""

import collections
import contextlib
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
ATTEMPTS = 3  # times to start a run that keeps crashing
POLL = 0.2  # seconds between polls of the processes
REFRESH = 2  # seconds between reads of their folders


def job_environments(jobs):
    """Yield the environment variables of each of `jobs` processes: an equal share of the cores, GPUs round-robin.

    Each run renders on its training GPU if EGL sees that GPU; in many containers only Mesa can render.
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
    """Indices of the GPUs that nvidia-smi lists."""
    try:
        ask = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
        return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return []


class Processes:
    """Scheduler of a sweep's runs on this machine.

    Args:
        folder: the sweep's folder.
        runs: the runs to do.
        jobs: the number of parallel runs.
        say: function that prints a line for the user.
    """

    def __init__(self, folder, runs, jobs, say):
        self._folder, self._say = folder, say
        self._waiting = collections.deque(runs)
        self._places = list(job_environments(jobs))
        self._active = {}  # index in _places -> (run, process)
        self._deaths = collections.Counter()
        self.watched = set()  # folders of runs that this or another process has started
        self.failed = []  # runs without attempts left

    def step(self):
        """Handle exited processes and start waiting runs in their places; False when none is left."""
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
            # runs that outlived a killed sweep on this host still occupy a place
            left = [run for run in elsewhere if load_status(self._folder / run.folder).get("host") == HOST]
            ready = [run for run in self._waiting if run not in elsewhere]
            for place, run in zip(free[len(left) :], ready, strict=False):
                self._waiting.remove(run)
                self._active[place] = (run, self._start(run, self._places[place]))
        return bool(self._active or self._waiting)

    def _done_elsewhere(self):
        """Waiting runs that another process is writing."""
        return [run for run in self._waiting if is_written(self._folder / run.folder)]

    def _who(self, run):
        status = load_status(self._folder / run.folder)
        return f"process {status['pid']} on {status['host']}" if status else "another process"

    def _start(self, run, environment):
        self.watched.add(run.folder)
        path = self._folder / run.folder
        path.mkdir(parents=True, exist_ok=True)
        with open(path / OUTPUT, "ab") as output:
            # its own session: Ctrl-C and SIGHUP reach only the sweep, which then terminates its runs
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
            with contextlib.suppress(OSError):  # a full disk must not stop the other runs
                write_json(path / EXIT_CODE, code)
        if code == 0:
            self._say(f"{run.folder}: finished, return {return_text(run_status(path))}")
        elif code == DIVERGED:
            self._say(f"{run.folder}: diverged: {run_status(path).note}")
        elif code == REFUSED and is_written(path):
            self._waiting.append(run)  # another sweep started it first
            self.watched.discard(run.folder)
        else:
            self._deaths[run.folder] += 1
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            again = code != REFUSED and self._deaths[run.folder] < ATTEMPTS
            self._say(f"{run.folder}: {how}: {last_line(path)}; {'started again' if again else 'given up'}")
            (self._waiting.appendleft if again else self.failed.append)(run)

    def stop(self):
        """Terminate all processes, which save checkpoints first, and wait until they exit."""
        if self._active:
            self._say(f"stopping: saving {plural(len(self._active), 'run')}")
        for _, process in self._active.values():
            process.terminate()
        for _, process in self._active.values():
            process.wait()
        for run in self._done_elsewhere():
            self._say(f"{run.folder}: still running in {self._who(run)}, which this sweep did not start")


def run_here(folder, runs, jobs, todo):
    """Do the runs `todo`, a subset of `runs`, on this machine; returns the exit code."""
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
                        continue  # its logs have nothing new
                    before, statuses[run.folder] = statuses[run.folder], run_status(folder / run.folder)
                    if not screen and (line := _news(before, statuses[run.folder])):
                        say(f"{run.folder}: {line}")
                if screen:
                    with lost_console():
                        screen.update(status_table(_by_state(statuses)), refresh=True)
            time.sleep(POLL)
            endings.check_signals()  # before step() would restart a run that the same signal stopped
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
    """A line about a run that has started or has a new evaluation, otherwise None."""
    if now.state != "running" or now.last_return == before.last_return and before.state == "running":
        return None
    parts = [f"step {now.step:,} of {now.total:,}"]
    parts += [f"return {return_text(now)}"] if now.last_return is not None else []
    parts += [f"{hours(now.seconds)} left"] if now.seconds is not None else []
    return ", ".join(parts)


def _by_state(statuses):
    """Statuses sorted by state, so a small screen cuts off the least urgent."""
    return dict(sorted(statuses.items(), key=lambda item: STATES.index(item[1].state)))
