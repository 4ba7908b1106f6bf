"""A grid of runs, each a process of train.py: on this machine, or as a job array on a Slurm cluster.

    python sweep.py --name omega --jobs 2 -- --omega_cody_loss 0.1,0.01,0.001 --seed 0,1,2
    python sweep.py --name ablation --variants sweeps/ablation.txt -- --task cartpole-swingup,walker-walk --seed 0,1
    python sweep.py --name omega --slurm '--time=8:00:00 --gres=gpu:1' -- --omega_cody_loss 0.1,0.01,0.001 --seed 0,1,2
    python sweep.py --status runs/omega                          how the runs stand
    python sweep.py --resume runs/omega --jobs 2                 go on with what is not over, as the same command does

What stands behind the -- are flags of train.py; commas make the grid. A run lies in
<work_dir>/<name>/<what differs>/<task>/s<seed>/, and <work_dir>/<name>/sweep.json names them all.
"""

import collections
import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from typing import Annotated, NamedTuple

import tyro
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

import dashboard
import dmc2gym
import signals
from config import UNCHANGING, Config, ConfigError, exit_with, leave, parse, parse_flags, show
from machine import available_cores
from run_folder import (
    DIVERGED,
    OUTPUT,
    Over,
    check_writable,
    find_runs,
    is_written,
    load_args,
    load_rows,
    load_state,
    load_status,
    parse_run,
    write_json,
)

HOST = socket.gethostname()
HERE = pathlib.Path(__file__).resolve().parent
ATTEMPTS = 3  # of a run that dies
POLL = 0.2  # seconds between two looks at the processes
REFRESH = 2  # seconds between two looks at their folders
UNNAMED = {"domain_name", "task_name", "seed"}  # have folders of their own
REFUSED = 2  # exit code
# of run_folder.load_state -> what a person reads
STATES = {
    "running": "running",
    "killed": "killed",
    "stopped": "stopped",
    "diverged": "diverged",
    "missing": "waiting",
    "finished": "finished",
}


@dataclasses.dataclass(frozen=True)
class Args:
    """A grid of runs of train.py, whose flags stand behind a --; commas in a value make the grid."""

    name: str | None = None
    """Name of the sweep, a folder in work_dir."""
    work_dir: str = "runs"
    """Folder of all sweeps."""
    variant: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A row that is no grid: 'name: flags'. May be given several times; its flags win over those behind the --."""
    variants: str | None = None
    """A file of such rows, one in each line."""
    only: str | None = None
    """Names of the variants to run, with commas. None: all."""
    jobs: int | None = None
    """Runs at once. None: one on this machine, no limit on a cluster."""
    slurm: str | None = None
    """Submit a job array with these options of sbatch, such as '--time=8:00:00 --gres=gpu:1'."""
    slurm_script: str = str(HERE / "sweeps" / "slurm.sh")
    """Its batch script, with places that are filled in."""
    runs_per_job: int = 1
    """Runs in one element of the array, one after the other."""
    dry_run: bool = False
    """Print the commands, or the batch script, and create nothing."""
    status: str | None = None
    """Print how the runs in this folder stand."""
    resume: str | None = None
    """Go on with the sweep in this folder."""
    element: int | None = None
    """With --resume: only the runs of this element of the array."""


class Run(NamedTuple):
    """A run of a sweep: its folder in the sweep's own, and its flags, a list of words."""

    folder: str
    flags: list


# --- from a command line to runs


def parse_command(argv):
    """Command line -> (Args, flags of train.py)."""
    own, flags = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (list(argv), [])
    if "--slurm" in own[:-1]:  # its value may look like a flag
        at = own.index("--slurm")
        own[at : at + 2] = [f"--slurm={own[at + 1]}"]
    args = parse_flags(Args, own)
    if [args.name, args.status, args.resume].count(None) != 2:
        raise ConfigError("needs one of --name, --status and --resume")
    if args.name is None and (flags or args.variant or args.variants or args.only):
        raise ConfigError("--status and --resume take the runs of sweep.json, no others")
    for flag in ("jobs", "runs_per_job"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise ConfigError(f"--{flag} {getattr(args, flag)}: must be at least 1")
    if args.element is not None and (args.resume is None or args.element < 0):
        raise ConfigError(f"--element {args.element}: goes with --resume and is not negative")
    if args.name is not None and (args.name == ".." or pathlib.Path(args.name).name != args.name):
        raise ConfigError(f"--name {args.name}: must be a single folder's name")
    return args, flags


def parse_grid(flags):
    """Flags of train.py -> {name: list of its values}; None is the value of a flag that takes none."""
    switches = {field.name for field in dataclasses.fields(Config) if field.type is bool}
    grid, tokens = {}, list(flags)
    while tokens:
        flag, equals, value = tokens.pop(0).partition("=")
        if not re.fullmatch(r"--[a-zA-Z].*", flag):
            raise ConfigError(f"{show(flag)}: what stands behind the -- must be flags of train.py and their values")
        if not equals:
            value = tokens.pop(0) if tokens and not tokens[0].startswith("--") else None
        name = flag[2:].replace("-", "_")
        if name in grid:
            raise ConfigError(f"--{name}: given twice; values with commas between them make a grid")
        if name in ("work_dir", "run_dir"):
            raise ConfigError(f"--{name}: a sweep names the folders of its runs; --work_dir before the -- is its own")
        values = [None] if value is None else value.split(",")
        if "" in values:
            raise ConfigError(f"--{name} {show(value)}: an empty value")
        if name in switches and value is not None and not set(values) <= {"true", "false"}:
            raise ConfigError(f"--{name} {show(value)}: takes no value, or true and false for a grid")
        grid[name] = values
    return grid


def parse_variants(args):
    """--variant, --variants and --only -> {name: grid of single values}; one without a name if there are none."""
    lines = list(args.variant)
    if args.variants:
        try:
            lines += pathlib.Path(args.variants).read_text().splitlines()
        except (OSError, ValueError) as error:
            raise ConfigError(f"--variants {args.variants}: {getattr(error, 'strerror', 'not a text')}") from None
    variants = {}
    for line in lines:
        if not line.strip() or line.strip().startswith("#"):
            continue
        name, colon, flags = line.partition(":")
        name = name.strip()
        if not colon or not re.fullmatch(r"[\w.+-]+", name) or not name.strip("."):
            raise ConfigError(f"--variant {show(line.strip())}: must be 'name: flags', a name of letters, digits, _.+-")
        if name in variants:
            raise ConfigError(f"--variant {name}: two of that name")
        variants[name] = parse_grid(shlex.split(flags, comments=True))
        if any(len(values) > 1 for values in variants[name].values()):
            raise ConfigError(f"--variant {name}: has a grid in it; grids stand behind the --")
    if args.only is not None:
        for name in args.only.split(","):
            if name not in variants:
                raise ConfigError(f"--only {show(name)}: no such variant; there are {', '.join(variants) or 'none'}")
        variants = {name: variants[name] for name in args.only.split(",")}
    return variants or {None: {}}


def combinations(variants, grid):
    """Every (variant, values that differ, flags) of variants and grid, all of one seed before the next."""
    axes = sorted(grid, key=lambda name: name == "seed", reverse=True)  # the first varies slowest
    several = [name for name in grid if len(grid[name]) > 1 and name not in UNNAMED | {"task"}]
    for values in itertools.product(*(grid[name] for name in axes)):
        point = dict(zip(axes, values, strict=True))
        for variant, own in variants.items():
            if clash := [name for name in own if len(grid.get(name, [])) > 1]:
                raise ConfigError(f"--{clash[0]}: has several values behind the --, and one in --variant {variant}")
            flags = {**point, **{name: value for name, (value,) in own.items()}}
            yield variant, [f"{name}={point[name]}" for name in several], flags


def as_flags(point):
    """{name: value} -> a list of words for the command line of train.py."""
    point = dict(point)
    if "task" in point:
        domain, dash, task = (point.pop("task") or "").partition("-")
        if not dash or {"domain_name", "task_name"} & set(point):
            raise ConfigError(f"--task {domain}: must be domain-task, such as cartpole-swingup, in place of both flags")
        point = {"domain_name": domain, "task_name": task, **point}
    if "save_tb" not in point and "no_save_tb" not in point:
        point["save_tb"] = None
    if "save_tb" in point and "tb_media" not in point:
        point["no_tb_media"] = None  # which take most of the time that a page with many runs needs
    words = []
    for name, value in point.items():
        if value in ("true", "false"):
            words += [f"--{name}" if value == "true" else f"--no_{name}"]
        else:
            words += [f"--{name}"] if value is None else [f"--{name}", value]
    return words


def plan(args, flags, folder):
    """The runs of a command, those of an earlier command in `folder` in the places that they have; creates nothing.

    Raises:
        ConfigError, dmc2gym.EnvError: one of them cannot work, or contradicts what was begun in its place.
    """
    runs, tasks = {}, set()
    for variant, values, point in combinations(parse_variants(args), parse_grid(flags)):
        if point.get("seed") == "-1":
            raise ConfigError("--seed -1: the seeds of a sweep are names of folders; give them")
        words = as_flags(point)
        try:
            config = parse(words)
        except ConfigError as error:
            raise ConfigError(f"{error} (in variant {variant})" if variant else error) from None
        task = f"{config.domain_name}-{config.task_name}"
        differs = ",".join([variant, *values] if variant else values) or config.agent
        run = Run(f"{differs}/{task}/s{config.seed}", words)
        if (twin := runs.setdefault(_result(config), run)) is not run:
            raise ConfigError(f"{twin.folder} and {run.folder}: the same run twice")
        if (scene := (task, config.camera_id, config.pre_transform_image_size)) not in tasks:
            dmc2gym.check_task(config)
            tasks.add(scene)
    for run in load_sweep(folder)[0]:
        if twin := runs.get(_result(parse(run.flags))):  # perhaps named when less has differed
            runs[_result(parse(run.flags))] = Run(run.folder, twin.flags)
    for run in runs.values():
        check_writable("name", str(folder / run.folder))
        is_over(folder, run)
    return list(runs.values())


def _result(config):
    """What decides the result of a run."""
    return tuple(value for name, value in dataclasses.asdict(config).items() if name not in UNCHANGING)


def is_over(folder, run):
    """Whether a run is finished or has diverged.

    Raises:
        ConfigError: it can neither begin nor go on with its flags.
    """
    try:
        parse_run([*run.flags, "--run_dir", str(folder / run.folder)])
    except Over:
        return True
    return False


def load_sweep(folder):
    """sweep.json of a folder: a list of `Run` and a list of the jobs that were submitted; empty without such a file.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        content = json.loads((folder / "sweep.json").read_text())
        return [Run(run["folder"], run["flags"]) for run in content["runs"]], content["jobs"]
    except FileNotFoundError:
        return [], []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder / 'sweep.json'}: cannot be read ({error})") from None


def merge(before, runs):
    """Runs of sweep.json with those of a command: theirs in their places, the others behind; none is removed."""
    return [Run(*item) for item in ({run.folder: run.flags for run in before} | dict(runs)).items()]


def store(folder, runs, jobs):
    """Write sweep.json, and beside it for TensorBoard which flags differ."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "sweep.json", {"runs": [run._asdict() for run in runs], "jobs": jobs})
    dashboard.write_hparams_config(folder, differing([parse_grid(run.flags) for run in runs]))


def differing(points):
    """Names of the flags that are not the same in all of these grids of single values."""
    names = dict.fromkeys(name for point in points for name in point)
    return [name for name in names if any(point.get(name) != points[0].get(name) for point in points)]


# --- how the runs stand


class Standing(NamedTuple):
    """How a run stands, from its folder alone."""

    state: str  # see run_folder.load_state
    step: int  # decisions so far
    total: int | None  # decisions in all
    last_return: float | None  # of the last evaluation
    seconds: float | None  # to its end, at the speed of the last episodes
    note: str  # its last words, where it has not ended well


def look(run):
    """`Standing` of the run in folder `run`."""
    state, word = load_state(run), load_status(run)
    if state == "missing":
        return Standing(state, 0, None, None, None, last_line(run))
    evaluations, episodes = load_rows(run, "eval.log"), load_rows(run, "train.log")
    args = load_args(run)
    step = max(word.get("step", 0), evaluations[-1]["step"] if evaluations else 0)
    seconds = None
    timed = [row for row in episodes if row["step"] > args["init_steps"]][-20:]
    if state == "running" and len(timed) > 1:
        pace = (timed[-1]["wall_seconds"] - timed[0]["wall_seconds"]) / (timed[-1]["step"] - timed[0]["step"])
        seconds = pace * (args["num_train_steps"] - step)
    note = ""
    if state in ("stopped", "diverged"):
        note = word.get("message", "").split(": stopped: ")[-1]
    elif state == "killed":
        note = last_line(run)
    last = evaluations[-1]["episode_reward"] if evaluations else None
    return Standing(state, step, args["num_train_steps"], last, seconds, note)


def last_line(run):
    """The last line that a run has printed, "" if there is none."""
    try:
        with open(run / OUTPUT, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            lines = file.read().decode(errors="replace").strip().splitlines()
    except FileNotFoundError:
        return ""
    return lines[-1] if lines else ""


def report(standings):
    """{name: Standing} for a person: a table, last words, and how many runs are in which state."""
    table = Table(box=None, pad_edge=False)
    for title in ("run", "state", "step", "return", "left"):
        table.add_column(title, justify="left" if title in ("run", "state") else "right", no_wrap=True)
    for name, s in standings.items():
        step = f"{s.step:,} of {s.total:,}" if s.total else ""
        table.add_row(*map(escape, (name, STATES[s.state], step, _return(s), _hours(s.seconds))))
    notes = [Text(f"{name}: {s.note}") for name, s in standings.items() if s.note]
    counts = collections.Counter(STATES[s.state] for s in standings.values())
    return Group(table, *notes, Text(", ".join(f"{count} {state}" for state, count in counts.items())))


def _console():
    """stdout; lines of any length where it is no terminal."""
    return Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 500)


def _return(standing):
    return "" if standing.last_return is None else f"{standing.last_return:.0f}"


def _hours(seconds):
    return "" if seconds is None else f"{int(seconds // 3600)}:{int(seconds % 3600 // 60):02d} h"


# --- on this machine


def places(jobs):
    """Environment variables of each of `jobs` processes: an equal share of the cores, and the GPUs in turn."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        gpus = [gpu for gpu in visible.split(",") if gpu]
    else:
        gpus = _installed_gpus()
    share = {"OMP_NUM_THREADS": str(max(1, available_cores() // jobs)), **os.environ}
    for job in range(jobs):
        place = dict(share)
        if len(gpus) > 1:
            place["CUDA_VISIBLE_DEVICES"] = gpu = gpus[job % len(gpus)]
            if gpu.isdigit():
                place = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "MUJOCO_EGL_DEVICE_ID": gpu, **place}
        yield place


def _installed_gpus():
    """Indices of the GPUs that the driver knows of."""
    try:
        ask = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
        return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return []


def command(folder, run):
    """The command of a run, a list of words."""
    return [sys.executable, str(HERE / "train.py"), *run.flags, "--run_dir", str(folder / run.folder)]


class Sweep:
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
        self._places = list(places(jobs))
        self._active = {}  # index of a place -> (run, process)
        self._deaths = collections.Counter()
        self.failed = []  # runs that were given up

    def step(self):
        """Take note of processes that have ended and start others in their places; False if there is nothing left."""
        for place, (run, process) in list(self._active.items()):
            if process.poll() is not None:
                del self._active[place]
                self._ended(run, process.returncode)
        free = [place for place in range(len(self._places)) if place not in self._active]
        if free and self._waiting:
            elsewhere = [run for run in self._waiting if is_written(self._folder / run.folder)]
            # what a sweep has left behind that was killed takes its place still
            left = [run for run in elsewhere if load_status(self._folder / run.folder).get("host") == HOST]
            ready = [run for run in self._waiting if run not in elsewhere]
            for place, run in zip(free[len(left) :], ready, strict=False):
                self._waiting.remove(run)
                self._active[place] = (run, self._start(run, self._places[place]))
        return bool(self._active or self._waiting)

    def _start(self, run, environment):
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
        if code == 0:
            self._say(f"{run.folder}: finished, return {_return(look(path))}")
        elif code == DIVERGED:
            self._say(f"{run.folder}: diverged: {look(path).note}")
        elif code == REFUSED and is_written(path):
            self._waiting.append(run)  # another sweep was faster
        else:
            self._deaths[run.folder] += 1
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            again = code != REFUSED and self._deaths[run.folder] < ATTEMPTS
            self._say(f"{run.folder}: {how}: {last_line(path)}; {'started again' if again else 'given up'}")
            (self._waiting.appendleft if again else self.failed.append)(run)

    def stop(self):
        """Tell every process to save its run and to end, and wait for that."""
        if self._active:
            self._say(f"stopping: {len(self._active)} runs are being saved")
        for _, process in self._active.values():
            process.terminate()
        for _, process in self._active.values():
            process.wait()


def run_here(folder, runs, jobs):
    """Do what is not over of these runs on this machine; the exit code."""
    console = _console()

    def say(line):
        with contextlib.suppress(OSError):  # a console that goes away ends no sweep
            console.print(line)

    standings = {run.folder: look(folder / run.folder) for run in runs}
    todo = [run for run in runs if not is_over(folder, run)]
    sweep = Sweep(folder, todo, jobs, say)
    code, next_look = 0, 0.0
    screen = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
    with screen or contextlib.nullcontext():
        try:
            while sweep.step():
                if time.monotonic() >= next_look:
                    next_look = time.monotonic() + REFRESH
                    for run in todo:
                        before, standings[run.folder] = standings[run.folder], look(folder / run.folder)
                        if not screen and (line := _news(before, standings[run.folder])):
                            say(f"{run.folder}: {line}")
                    if screen:
                        with contextlib.suppress(OSError):
                            screen.update(report(_by_state(standings)), refresh=True)
                time.sleep(POLL)
                signals.check()  # before a process that the same signal has ended could be started again
            code = 1 if sweep.failed else 0
        except signals.Stopped as stop:
            code = stop.code
        finally:
            sweep.stop()
    with contextlib.suppress(OSError):
        console.print(report({run.folder: look(folder / run.folder) for run in runs}))
    return code


def _news(before, now):
    """A line about a run that has begun, or was evaluated since, or None."""
    if now.state != "running" or now.last_return == before.last_return and before.state == "running":
        return None
    parts = [f"step {now.step:,} of {now.total:,}"]
    parts += [f"return {_return(now)}"] if now.last_return is not None else []
    parts += [f"{_hours(now.seconds)} left"] if now.seconds is not None else []
    return ", ".join(parts)


def _by_state(standings):
    """What may not fit on a screen comes last."""
    order = list(STATES)
    return dict(sorted(standings.items(), key=lambda item: order.index(item[1].state)))


# --- on a cluster


def submit(folder, before, jobs, runs, args):
    """Submit the runs that are neither over nor in the queue as a job array; with --dry_run print its script."""
    todo = [run for run in runs if not is_over(folder, run)]
    everything = merge(before, runs)
    queued = _queued(jobs)
    position = {run.folder: index for index, run in enumerate(everything)}
    todo = [run for run in todo if position[run.folder] not in queued]
    elements = sorted({position[run.folder] // args.runs_per_job for run in todo})
    values = {
        "NAME": folder.name,
        "ARRAY": _ranges(elements) + (f"%{args.jobs}" if args.jobs else ""),
        "FOLDER": str(folder.absolute()),
        "OPTIONS": args.slurm,
        "HERE": os.getcwd(),
        "PYTHON": sys.executable,
        "SWEEP": str(HERE / "sweep.py"),
        "RUNS_PER_JOB": str(args.runs_per_job),
    }
    try:
        script = pathlib.Path(args.slurm_script).read_text()
    except (OSError, ValueError) as error:
        raise ConfigError(f"--slurm_script {args.slurm_script}: {error}") from None
    for name, value in values.items():
        script = script.replace(f"@{name}@", value)
    if args.dry_run:
        print(script)
        return
    if not todo:
        print(f"{folder}: nothing to submit")
        return
    if not shutil.which("sbatch"):
        raise ConfigError("--slurm: there is no sbatch here; without --slurm the sweep runs on this machine")
    (folder / "slurm").mkdir(parents=True, exist_ok=True)
    done = _slurm("sbatch", "--parsable", input=script)
    if done.returncode:
        with contextlib.suppress(OSError):
            (folder / "slurm").rmdir()
            folder.rmdir()
        raise ConfigError(f"--slurm {args.slurm}: {done.stderr.strip().splitlines()[-1]}")
    job = done.stdout.strip().split(";")[0]
    store(folder, everything, [*jobs, {"id": job, "runs_per_job": args.runs_per_job}])
    print(f"job {job}: {len(todo)} runs in {len(elements)} elements; how they stand: sweep.py --status {folder}")


def _queued(jobs):
    """Positions of the runs that are in the queue of the cluster, or run there."""
    positions = set()
    for job in jobs if shutil.which("squeue") else []:
        done = _slurm("squeue", "--noheader", "--array", "--jobs", job["id"], "--format=%K")
        size = job["runs_per_job"]
        positions |= {int(element) * size + k for element in done.stdout.split() for k in range(size)}
    return positions


def _ranges(numbers):
    """Ascending numbers as Slurm writes them: 0-3,7."""
    words = []
    for _, group in itertools.groupby(enumerate(numbers), key=lambda item: item[1] - item[0]):
        first, *_, last = [number for _, number in group] * 2
        words.append(str(first) if first == last else f"{first}-{last}")
    return ",".join(words)


def _slurm(*words, input=None):
    """A command of Slurm, without what an enclosing job has set."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_") or k == "SLURM_CONF"}
    return subprocess.run(words, input=input, capture_output=True, text=True, env=environment)


def main():
    """The command; exit code 0 done, 1 some runs have failed, 2 refused, 75 and 130 stopped by a signal."""
    try:
        args, flags = parse_command(sys.argv[1:])
        if args.status:
            runs = find_runs(args.status)
            if not runs:
                raise ConfigError(f"--status {args.status}: holds no runs")
            standings = {str(run.relative_to(args.status)): look(run) for run in runs}
            _console().print(report(standings))
            return
        folder = pathlib.Path(args.resume or pathlib.Path(args.work_dir) / args.name)
        before, jobs = load_sweep(folder)
        if args.resume:
            if not before:
                raise ConfigError(f"--resume {folder}: not the folder of a sweep")
            size = args.runs_per_job
            runs = before if args.element is None else before[args.element * size : (args.element + 1) * size]
        else:
            runs = plan(args, flags, folder)
        if args.slurm is not None:
            submit(folder, before, jobs, runs, args)
            return
        if args.dry_run:
            todo = [run for run in runs if not is_over(folder, run)]
            for run in todo:
                print(shlex.join(command(folder, run)))
            print(f"{len(todo)} runs, {len(runs) - len(todo)} more are over")
            return
        if not args.resume:
            store(folder, merge(before, runs), jobs)
        sys.exit(run_here(folder, runs, args.jobs or 1))
    except signals.Stopped as stop:
        leave(f"sweep.py: stopped before it began: {stop}", stop.code)
    except (ConfigError, dmc2gym.EnvError) as error:
        exit_with(error)
    except OSError as error:
        leave(f"sweep.py: {error}", 1)


if __name__ == "__main__":
    signals.listen()
    main()
