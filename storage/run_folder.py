"""A run's folder: its name, flags, lock and state. train.py writes it; the other commands read it.

args.json    every flag, the provenance of the run, and an entry for each time that it was resumed
run.json     one small object, replaced atomically: `state` (running, stopped, finished, diverged), `step`, `env_step`,
             `num_train_steps`, `time` of the last update (seconds since 1970), `host`, `pid`, `reason` for stopping
lock         held by the process that writes here
train.log, eval.log, tb/, wandb/, video/, model/, checkpoint/; in a sweep also output.log and exit_code.json

A sweep's folder also holds sweep.json, the list of its planned runs.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import importlib.metadata
import itertools
import json
import os
import pathlib
import shutil
import socket
import struct
import subprocess
import sys
import time

import endings
import rendering
from command_line import parse_flags, shorten
from config import NO_EFFECT_ON_RESULTS, Config, check, complete
from endings import Refused, RunEnded, signals_kept_from_children

CHECKPOINT = "checkpoint"  # the folder's name
OUTPUT = "output.log"  # stdout and stderr of a sweep's run
EXIT_CODE = "exit_code.json"  # exit code of a sweep's run that failed before it wrote args.json
STATES = ("running", "stopped", "finished", "diverged")  # in run.json
HEARTBEAT_SECONDS = 10  # minimum interval between updates of run.json
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


def write_whole(path, write):
    """Write a file atomically: readers see the old or the new version, even after a power cut.

    `write` gets an open binary file. Raises `OSError` if writing fails; the old version is still there.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError on a full disk, after an OSError
        temporary.unlink(missing_ok=True)
        cause = error
        while cause.__context__ and not isinstance(cause, OSError):
            cause = cause.__context__
        reason = getattr(cause, "strerror", None) or str(error).splitlines()[0][:80]
        raise OSError(f"{path}: not written ({reason})") from None
    with contextlib.suppress(OSError):  # CIFS and some FUSE file systems refuse to sync a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # makes the rename durable too
        finally:
            os.close(folder)


def write_json(path, value):
    """`write_whole` of a value as JSON."""
    write_whole(path, lambda file: file.write(json.dumps(value, indent=1).encode() + b"\n"))


def sync(path):
    """Flush a file to disk; returns its length in bytes."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size


def load_args(run):
    """args.json of the run in folder `run`, a dict; raises `Refused` if the folder holds no run."""
    try:
        args = json.loads((pathlib.Path(run) / "args.json").read_text())
        if lacking := {"domain_name", "task_name", "agent", "seed", "num_train_steps"} - set(args):
            raise ValueError(f"no {min(lacking)} in it")
        return args
    except (OSError, TypeError, ValueError) as error:
        raise _no_run(run, error) from None


def run_id(run):
    """A unique 16-character name of the run in folder `run`; resuming the run or moving its folder keeps it."""
    args = load_args(run)
    return hashlib.sha256(json.dumps([args["time"], args["command"], args["seed"]]).encode()).hexdigest()[:16]


def load_config(run):
    """The config of the run in folder `run`, with defaults for flags newer than the run; `Refused` without a run."""
    args = load_args(run)
    names = {field.name for field in dataclasses.fields(Config)}
    try:
        config = complete(parse_flags(Config, [_as_flag(name, value) for name, value in args.items() if name in names]))
        check(config)
        return config
    except Refused as error:
        raise _no_run(run, error) from None


def _as_flag(name, value):
    return f"--{name}={value}" if not isinstance(value, bool) else f"--{name}" if value else f"--no_{name}"


def _no_run(run, error):
    reason = getattr(error, "strerror", None) or str(error)
    return Refused(f"{run}: not the folder of a run (args.json: {reason[:100]})")


def load_status(run):
    """run.json of the run in folder `run`, a dict; empty if the file is missing or damaged."""
    try:
        status = json.loads((pathlib.Path(run) / "run.json").read_text())
        whole = all(isinstance(status[name], int) for name in ("step", "num_train_steps", "pid"))
        return status if whole and status["state"] in STATES and "host" in status else {}
    except (OSError, TypeError, ValueError, KeyError):
        return {}


def load_rows(run, name):
    """Rows of train.log or eval.log in folder `run`, a list of dicts; leaves out damaged lines, as after a crash."""
    try:
        lines = (pathlib.Path(run) / name).read_bytes().splitlines()
    except FileNotFoundError:
        return []
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    needed = ("step", "env_step", "episode_reward") if name == "eval.log" else ("step",)
    return [row for row in rows if isinstance(row, dict) and all(isinstance(row.get(n), (int, float)) for n in needed)]


def keep_rows(run, name, last_step):
    """Remove all rows after `last_step` from train.log or eval.log in folder `run`."""
    path = pathlib.Path(run) / name
    if path.exists():
        rows = [json.dumps(row) + "\n" for row in load_rows(run, name) if row["step"] <= last_step]
        write_whole(path, lambda file: file.write("".join(rows).encode()))


def load_sweep(folder):
    """sweep.json of a folder: (runs, {a run's folder in it: list of flags}; list of jobs), both empty without the file.

    Raises `Refused` if the file cannot be read.
    """
    path = pathlib.Path(folder) / "sweep.json"
    try:
        content = json.loads(path.read_text())
        runs = {str(run["folder"]): list(run["flags"]) for run in content["runs"]}
        return runs, [{**job, "elements": list(job["elements"])} for job in content.get("jobs", [])]
    except FileNotFoundError:
        return {}, []
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = getattr(error, "strerror", None) or f"not what sweep.py writes: {error}"
        raise Refused(f"{path}: cannot be read ({reason[:80]})") from None


def find_runs(folder):
    """{run folder: flags in its sweep.json or None} in `folder` at any depth.

    First come the runs of a sweep.json, started or not, then others, then folders that cannot be read. Warns of a
    sweep.json that cannot be read.
    """
    planned, others, unreadable = {}, [], []

    def keep(error):
        if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
            unreadable.append(pathlib.Path(error.filename))

    for place, folders, files in os.walk(folder, onerror=keep):
        folders[:] = [] if "args.json" in files else sorted(folders)
        if "sweep.json" in files:
            try:
                planned |= {pathlib.Path(place, name): flags for name, flags in load_sweep(place)[0].items()}
            except Refused as error:
                print(f"warning: {error}", file=sys.stderr)
        if "args.json" in files:
            others.append(pathlib.Path(place))
    return planned | {run: None for run in [*others, *unreadable] if run not in planned}


def load_state(run):
    """State of the run in folder `run`: missing, running, died, stopped, diverged or finished.

    "died": run.json says running but no process holds the lock, or the process failed before it wrote args.json.
    "stopped": by a signal or an error; run.json has the reason. Without run.json, a run whose last evaluation is at
    its last step counts as finished.
    """
    run = pathlib.Path(run)
    if not (run / "args.json").exists():
        try:
            code = json.loads((run / EXIT_CODE).read_text())
        except (OSError, ValueError):
            return "missing"
        return "missing" if code in endings.EXIT_CODES.values() else "died"
    if status := load_status(run):
        return status["state"] if status["state"] != "running" or is_written(run) else "died"
    rows = load_rows(run, "eval.log")
    return "finished" if rows and rows[-1]["step"] >= load_args(run)["num_train_steps"] else "stopped"


def last_line(run):
    """The last line in the output.log of a sweep's run, "" if there is none."""
    path = pathlib.Path(run) / OUTPUT
    lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
    return lines[-1] if lines else ""


def is_written(run):
    """Whether a process on any host is writing folder `run`; queries the lock without taking it."""
    try:
        with open(pathlib.Path(run) / "lock", "rb") as lock:
            question = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)  # struct flock
            return struct.unpack("hhqqi", fcntl.fcntl(lock, fcntl.F_GETLK, question))[0] != fcntl.F_UNLCK
    except OSError as error:
        if error.errno not in (errno.ENOENT, *NO_LOCKS):
            raise
        return False


def parse_run(args=None):
    """Command line of train.py -> (config, whether it resumes the run in --run_dir).

    A resumed run keeps its flags. A given flag that differs is refused, unless it does not affect results
    (`config.NO_EFFECT_ON_RESULTS`) or is a larger --num_train_steps. Raises `Refused`, or `RunEnded` if the run there
    is over.
    """
    config = parse_flags(Config, args)
    if config.run_dir is None or not _holds_run(config.run_dir):
        config = complete(config)
        check(config)
        return config, False
    before = dataclasses.replace(load_config(config.run_dir), run_dir=config.run_dir, work_dir=config.work_dir)
    config = parse_flags(Config, args, default=before)
    if before.save_tb and not config.save_tb:  # what the run has of --save_tb's flags would have no effect
        config = dataclasses.replace(config, tb_media=Config.tb_media, wandb=None)
    if config.seed == -1:  # keep the seed that the first start drew
        config = dataclasses.replace(config, seed=before.seed)
    config = complete(config)
    for field in dataclasses.fields(Config):
        old, new = getattr(before, field.name), getattr(config, field.name)
        grows = field.name == "num_train_steps" and new > old
        if old != new and field.name not in NO_EFFECT_ON_RESULTS and not grows:
            right = "it may only grow" if field.name == "num_train_steps" else "flags of an existing run cannot change"
            raise Refused(f"--{field.name} {shorten(new)}: the run has {shorten(old)} and {right}: {config.run_dir}")
    check(config)
    check_resumable(config)
    return config, True


def check_resumable(config):
    """Raise `RunEnded` if the run in --run_dir is finished or has diverged, `Refused` if its checkpoint is gone."""
    folder, status = pathlib.Path(config.run_dir), load_status(config.run_dir)
    finished = status.get("state") == "finished"
    if status.get("state") == "diverged":
        raise RunEnded(f"{folder}: stopped: {status.get('reason', 'diverged')}", endings.DIVERGED)
    if finished and config.num_train_steps <= status["num_train_steps"]:
        raise RunEnded(f"{folder}: finished, {status['step']} steps", 0)
    if any((folder / CHECKPOINT).glob("*.json")):
        return
    if finished:
        raise Refused(
            f"--num_train_steps {config.num_train_steps}: the run in {folder} is finished and kept no checkpoint; "
            "--keep_checkpoint keeps it"
        )
    if load_rows(folder, "train.log"):
        raise Refused(f"--run_dir {folder}: no checkpoint is left; start a new run in another folder")


def _holds_run(run_dir):
    """Whether a folder holds a run; `Refused` if it holds anything but one or the caller's logs."""
    try:
        names = sorted(os.listdir(run_dir))
    except FileNotFoundError:
        return False
    except OSError as error:
        raise Refused(f"--run_dir {run_dir}: {error.strerror}") from None
    if "args.json" in names:
        return True
    # files of a run that ended before it wrote args.json, and logs such as Slurm's --output
    known = {"lock", "args.json.tmp", "run.json", "run.json.tmp", OUTPUT, EXIT_CODE, f"{EXIT_CODE}.tmp"}
    for name in names:
        if name in ("train.log", "eval.log") or not (name in known or name.endswith((".log", ".out", ".err", ".txt"))):
            raise Refused(f"--run_dir {run_dir}: holds {name} and no run (no args.json); name a new or an empty folder")
    return False


def check_writable(flag, folder):
    """Raise `Refused` unless `folder`, the value of `flag`, is or can become a writable folder; creates nothing."""
    path = pathlib.Path(folder).absolute()
    existing = next(p for p in [path, *path.parents] if os.path.lexists(p))
    if not existing.is_dir():
        raise Refused(f"--{flag} {folder}: {existing} is not a folder")
    longest = os.pathconf(existing, "PC_NAME_MAX")
    if any(len(os.fsencode(part)) > longest for part in path.parts):
        raise Refused(f"--{flag} {folder[:60]}...: no name in it may be longer than {longest} bytes")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise Refused(f"--{flag} {folder}: {existing} is not writable")


class RunFolder:
    """The folder for its single writer, who holds the lock until the process exits.

    --run_dir names the folder, otherwise RunFolder creates one below --work_dir; `resumes`: whether it already holds a
    run. Raises `Refused` if the folder cannot be created or another process is writing it.
    """

    def __init__(self, config, resumes):
        flag, value = ("work_dir", config.work_dir) if config.run_dir is None else ("run_dir", config.run_dir)
        check_writable(flag, value)
        self._config, self._resumes = config, resumes
        self._status, self._time = {"state": "running", "step": 0}, 0.0
        try:
            self.path = self._new() if config.run_dir is None else pathlib.Path(config.run_dir)
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = self._locked()
        except OSError as error:  # check_writable cannot see everything, such as a file system that rejects mkdir
            raise Refused(f"--{flag} {value}: {error}") from None
        if resumes != (self.path / "args.json").exists():
            self._lock.close()
            raise Refused(f"--run_dir {value}: another process has just started a run there")
        if resumes:  # another process may have finished the run since parse_run
            check_resumable(config)

    def _new(self):
        """Create <work_dir>/<domain>-<task>/<agent>-<time>-s<seed>/, with a number appended if that exists."""
        config = self._config
        parent = pathlib.Path(config.work_dir) / f"{config.domain_name}-{config.task_name}"
        parent.mkdir(parents=True, exist_ok=True)
        name = f"{config.agent}-{time.strftime('%Y%m%d-%H%M%S')}-s{config.seed}"
        for number in itertools.count(1):
            folder = parent / (name if number == 1 else f"{name}-{number}")
            with contextlib.suppress(FileExistsError):  # another run with this seed started in the same second
                folder.mkdir()
                return folder

    def _locked(self):
        """The open lock file; the system releases the lock when this process exits, even after SIGKILL."""
        lock = open(self.path / "lock", "a")
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (PermissionError, BlockingIOError):  # EACCES and EAGAIN: it is held
            lock.close()
            status = load_status(self.path)
            who = f" (pid {status['pid']} on {status['host']})" if status else ""
            raise Refused(f"--run_dir {self.path}: another process{who} is writing this run") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            advice = "this file system has no file locks; do not start a second process on this run"
            print(f"warning: {self.path}: {advice}", flush=True)
        return lock

    def begin(self, step, made_with):
        """Record in args.json that the run starts, or resumes at `step`; `made_with`: see `provenance`."""
        now = {"time": time.time(), "command": [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]], **made_with}
        args = dataclasses.asdict(self._config)
        if self._resumes:
            before = load_args(self.path)
            args = {**before, **args, "continued": [*before.get("continued", []), {"step": step, **now}]}
        else:
            args |= now
        write_json(self.path / "args.json", args)
        self.report(step=step)

    def undo(self, error):
        """Undo a failed start: delete the folder, unless --run_dir named it; a run that cannot resume stays as is."""
        if self._config.run_dir is None:
            self._lock.close()
            shutil.rmtree(self.path)
        elif not self._resumes:
            with contextlib.suppress(OSError):
                self.report(state="stopped", reason=f"before it began: {error}")

    def tick(self, step):
        """Write the step to run.json every HEARTBEAT_SECONDS; ignores a full disk."""
        if time.monotonic() - self._time >= HEARTBEAT_SECONDS:
            with contextlib.suppress(OSError):
                self.report(step=step)

    def report(self, **status):
        """Update `state`, `step`, `reason` or another key in run.json."""
        self._status.update(status)
        self._time = time.monotonic()
        here = {"time": time.time(), "host": socket.gethostname(), "pid": os.getpid()}
        env_step, total = self._status["step"] * self._config.action_repeat, self._config.num_train_steps
        write_json(self.path / "run.json", {**self._status, "env_step": env_step, "num_train_steps": total, **here})


def git_commit():
    """The code's commit hash, with "+" if tracked files have changed; None outside a git checkout."""
    here = pathlib.Path(__file__).resolve().parent.parent
    git = ["git", "--no-optional-locks", "-C", here]  # a lock would make a concurrent `git add` fail
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # set by hooks
    asked = [[*git, "rev-parse", "--show-toplevel", "HEAD"], [*git, "status", "--porcelain", "-uno"]]
    try:
        with signals_kept_from_children():
            answers = [subprocess.run(words, capture_output=True, env=environment, check=True) for words in asked]
    except (OSError, subprocess.CalledProcessError):
        return None
    top, commit = os.fsdecode(answers[0].stdout).splitlines()
    return commit + "+" * bool(answers[1].stdout) if pathlib.Path(top) == here else None


def provenance(device, background, eval_background):
    """Versions, hardware and background frames of this process for args.json.

    Bit-identical results need all of them to match.
    """
    import torch

    packages = ("torch", "mujoco", "dm_control", "gymnasium", "numpy")
    cuda = device.type == "cuda"
    backend = os.environ.get("MUJOCO_GL")
    return {
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "python": sys.version.split()[0],
        "device_used": str(device),
        "processor": torch.cuda.get_device_name(device) if cuda else torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "mujoco_gl": backend,
        "renderer": rendering.renderer(backend),
        "background_sha256": background and background.sha256,
        "eval_background_sha256": eval_background and eval_background.sha256,
        "git_commit": git_commit(),
    }
