"""Runs as parallel processes on this machine."""

import collections
import contextlib
import math
import os
import signal
import socket
import subprocess
import time

from rich.live import Live

import endings
from experiments.grid import train_command
from experiments.status import DISPLAY_ORDER, LossProofConsole, hours, plural, return_text, run_status, status_table
from machine import available_cores
from storage.run_folder import EXIT_CODE, OUTPUT, is_written, last_line, load_status, write_json

ATTEMPTS = 3  # times to start a run that keeps crashing
POLL = 1  # seconds between polls of the processes and their folders


def job_environments(jobs):
    """Yield the environment variables of each of `jobs` processes: an equal share of the cores, GPUs round-robin."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = _installed_gpus() if visible is None else [gpu.strip() for gpu in visible.split(",") if gpu.strip()]
    for job in range(jobs):
        environment = {"OMP_NUM_THREADS": str(max(1, available_cores() // jobs)), **os.environ}
        environment["CODY_RUNS_PER_GPU"] = str(math.ceil(jobs / max(1, len(gpus))))  # for --replay_device auto
        if jobs > 1:
            environment.setdefault("LP_NUM_THREADS", "0")  # Mesa draws in the calling thread: the same pixels
        if len(gpus) > 1:
            environment["CUDA_VISIBLE_DEVICES"] = gpus[job % len(gpus)]
            if visible is None:
                environment.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # as nvidia-smi numbers them
        yield environment


def _installed_gpus():
    """Indices of the GPUs that nvidia-smi lists."""
    try:
        ask = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
        return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return []


class Scheduler:
    """Executes the runs named in `todo`, a subset of a sweep's `runs`, in at most `jobs` processes at once."""

    def __init__(self, folder, runs, todo, jobs):
        self._folder, self._runs, self._console = folder, runs, LossProofConsole()
        self._waiting = list(todo)
        self._elsewhere = {}  # waiting runs that another process is writing: folder -> run.json
        self._active = {}  # process -> (name, environment)
        self._free = list(job_environments(jobs))  # environments that no process uses
        self._deaths = collections.Counter()
        self._failed = []  # runs without attempts left
        self._statuses = {name: run_status(folder / name) for name in runs}

    def run(self):
        """Execute the runs and report on them; returns the exit code of the sweep."""
        with Live(console=self._console, auto_refresh=False, transient=True) as screen:  # draws only on a terminal
            try:
                while self._step():
                    self._refresh()
                    # a small screen cuts off the end: the least urgent
                    urgent_first = sorted(self._statuses.items(), key=lambda item: DISPLAY_ORDER.index(item[1].state))
                    screen.update(status_table(dict(urgent_first)), refresh=True)
                    time.sleep(POLL)
                    endings.check_signals()  # before _step() would restart a run that the same signal stopped
                code = 1 if self._failed else 0
            except endings.Stopped as stop:
                code = stop.code
            finally:
                self._stop()
        self._console.print(status_table(self._statuses))
        return code

    def _step(self):
        """Handle exited processes and start waiting runs in their place; False when all runs are done."""
        for process in list(self._active):
            if process.poll() is not None:
                name, environment = self._active.pop(process)
                self._free.append(environment)
                self._handle_exit(name, process.returncode)
        written = [name for name in self._waiting if is_written(self._folder / name)]
        before, self._elsewhere = self._elsewhere, {name: load_status(self._folder / name) for name in written}
        for name, owner in self._elsewhere.items():
            if name not in before:
                self._console.print(f"{name}: waiting for {_process(owner)}, which is already running it")
        # runs that outlived a killed sweep on this host still occupy its cores
        outlived = sum(owner.get("host") == socket.gethostname() for owner in self._elsewhere.values())
        ready = [name for name in self._waiting if name not in self._elsewhere]
        for name in ready[: max(0, len(self._free) - outlived)]:
            self._waiting.remove(name)
            environment = self._free.pop(0)
            try:
                self._start(name, environment)
            except OSError as error:  # a full disk must not stop the other runs
                self._free.append(environment)
                self._count_death(name, str(error))
        return bool(self._active or self._waiting)

    def _start(self, name, environment):
        path = self._folder / name
        path.mkdir(parents=True, exist_ok=True)
        with open(path / OUTPUT, "ab") as output:
            process = subprocess.Popen(
                train_command(path, self._runs[name]),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C and SIGHUP reach only the sweep, which then terminates its runs
            )
        self._active[process] = (name, environment)

    def _handle_exit(self, name, code):
        path = self._folder / name
        if not (path / "args.json").exists():
            with contextlib.suppress(OSError):  # a full disk must not stop the other runs
                write_json(path / EXIT_CODE, code)
        status = self._statuses[name] = run_status(path)
        if code == 0:
            self._console.print(f"{name}: finished, return {return_text(status)}")
        elif code == endings.DIVERGED:
            self._console.print(f"{name}: diverged: {status.note}")
        elif code == endings.REFUSED and is_written(path):
            self._waiting.append(name)  # another sweep started it first
        else:
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            self._count_death(name, f"{how}: {last_line(path)}", retry=code != endings.REFUSED)

    def _count_death(self, name, reason, retry=True):
        """Start a run again that has died, unless it has no attempts left."""
        self._deaths[name] += 1
        if retry and self._deaths[name] < ATTEMPTS:
            self._waiting.insert(0, name)
            outcome = "started again"
        else:
            self._failed.append(name)
            outcome = "given up"
        self._console.print(f"{name}: {reason}; {outcome}")

    def _refresh(self):
        """Read the folders of the runs in progress; report starts and evaluations where there is no live table."""
        for name in [*(name for name, _ in self._active.values()), *self._elsewhere]:
            before, now = self._statuses[name], run_status(self._folder / name)
            self._statuses[name] = now
            changed = before.state != "running" or now.last_return != before.last_return
            if now.state == "running" and changed and not self._console.is_terminal:
                line = f"{name}: step {now.step:,} of {now.total:,}"
                if now.last_return is not None:
                    line += f", return {return_text(now)}"
                if now.seconds is not None:
                    line += f", {hours(now.seconds)} left"
                self._console.print(line)

    def _stop(self):
        """Terminate all processes, which save checkpoints first, and wait until they exit."""
        if self._active:
            self._console.print(f"stopping: saving {plural(len(self._active), 'run')}")
        for process in self._active:
            process.terminate()
        for process, (name, _) in self._active.items():
            process.wait()
            self._statuses[name] = run_status(self._folder / name)
        for name, owner in self._elsewhere.items():
            self._console.print(f"{name}: still running in {_process(owner)}, which this sweep did not start")


def _process(owner):
    """The process that wrote a run.json, in words."""
    return f"process {owner['pid']} on {owner['host']}" if owner else "another process"
