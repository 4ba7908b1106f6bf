"""From comma-separated flags to the runs of a sweep, and to sweep.json, which lists them."""

import contextlib
import dataclasses
import fcntl
import itertools
import pathlib
import re
import shlex
import sys
from typing import NamedTuple

import dashboard
import dmc2gym
from config import UNCHANGING, Config, parse, shorten
from endings import Refused, RunEnded
from machine import check_machine, choose_device
from storage.run_folder import check_writable, load_sweep, parse_run, write_json

HERE = pathlib.Path(__file__).resolve().parent.parent
OWN_FOLDERS = {"domain_name", "task_name", "seed"}  # flags with a folder level of their own
MACHINE = ("device", "replay_device", "compile", "wandb")  # flags that this machine may not support
TASK_CHECKS = ("camera_id", "pre_transform_image_size", "save_video", *MACHINE)  # flags checked with task and machine


class Run(NamedTuple):
    """A run of a sweep: its folder relative to the sweep's, and its flags, a list of command-line tokens."""

    folder: str
    flags: list


def parse_grid(flags):
    """Flags of train.py -> {name: list of values}; a flag without a value has [None]."""
    switches = {field.name for field in dataclasses.fields(Config) if field.type is bool}
    grid, tokens = {}, list(flags)
    while tokens:
        flag, equals, value = tokens.pop(0).partition("=")
        if not re.fullmatch(r"--[a-zA-Z].*", flag):
            raise Refused(f"{shorten(flag)}: flags of train.py and their values come after the --")
        if not equals:
            value = tokens.pop(0) if tokens and not tokens[0].startswith("--") else None
        name = flag[2:].replace("-", "_")
        if name in grid:
            raise Refused(f"--{name}: given twice; values with commas between them make a grid")
        if name in ("work_dir", "run_dir"):
            raise Refused(f"--{name}: a sweep names the folders of its runs; --work_dir before the -- is its own")
        values = [None] if value is None else value.split(",")
        if "" in values:
            raise Refused(f"--{name} {shorten(value)}: an empty value")
        if name in switches and value is not None and not set(values) <= {"true", "false"}:
            raise Refused(f"--{name} {shorten(value)}: takes no value, or true and false for a grid")
        grid[name] = values
    return grid


def parse_variants(args):
    """--variant, --variants and --only -> {name: grid of single values}; {None: {}} without variants."""
    lines = list(args.variant)
    if args.variants:
        try:
            lines += pathlib.Path(args.variants).read_text().splitlines()
        except (OSError, ValueError) as error:
            raise Refused(f"--variants {args.variants}: {getattr(error, 'strerror', 'not a text')}") from None
    variants = {}
    for line in lines:
        if not line.strip() or line.strip().startswith("#"):
            continue
        name, colon, flags = line.partition(":")
        name = name.strip()
        if not colon or not re.fullmatch(r"[\w.+-]+", name) or not name.strip("."):
            raise Refused(f"--variant {shorten(line.strip())}: must be 'name: flags', a name of letters, digits, _.+-")
        if name in variants:
            raise Refused(f"--variant {name}: two of that name")
        try:
            variants[name] = parse_grid(shlex.split(flags, comments=True))
        except ValueError as error:
            raise Refused(f"--variant {name}: {error}") from None
        if any(len(values) > 1 for values in variants[name].values()):
            raise Refused(f"--variant {name}: contains a grid; grids come after the --")
    if args.only is not None:
        for name in args.only.split(","):
            if name not in variants:
                raise Refused(f"--only {shorten(name)}: no such variant; there are {', '.join(variants) or 'none'}")
        variants = {name: variants[name] for name in args.only.split(",")}
    return variants or {None: {}}


def combinations(variants, grid):
    """Yield (variant, values of the multi-valued flags, flags) for all variants and grid points, seed by seed."""
    axes = sorted(grid, key=lambda name: name == "seed", reverse=True)  # the first axis varies slowest
    several = [name for name in grid if len(grid[name]) > 1 and name not in OWN_FOLDERS | {"task"}]
    for values in itertools.product(*(grid[name] for name in axes)):
        point = dict(zip(axes, values, strict=True))
        for variant, own in variants.items():
            if clash := [name for name in own if len(grid.get(name, [])) > 1]:
                raise Refused(f"--{clash[0]}: has several values after the -- and one in --variant {variant}")
            flags = {**point, **{name: value for name, (value,) in own.items()}}
            yield variant, [f"{name}={point[name]}" for name in several], flags


def as_flags(point):
    """{name: value} -> a list of command-line tokens for train.py."""
    point = dict(point)
    if "task" in point:
        domain, dash, task = (point.pop("task") or "").partition("-")
        if not dash or {"domain_name", "task_name"} & set(point):
            raise Refused(f"--task {domain}: must be domain-task, such as cartpole-swingup, in place of both flags")
        point = {"domain_name": domain, "task_name": task, **point}
    if "save_tb" not in point and "no_save_tb" not in point:
        point["save_tb"] = None
    if "save_tb" in point and point["save_tb"] != "false" and "tb_media" not in point:
        point["no_tb_media"] = None  # media dominate TensorBoard's load time with many runs
    words = []
    for name, value in point.items():
        if value in ("true", "false"):
            words += [f"--{name}" if value == "true" else f"--no_{name}"]
        else:
            words += [f"--{name}"] if value is None else [f"--{name}", value]
    return words


def plan(args, flags, folder):
    """The runs of a command; runs that `folder` already has keep their folders. Creates nothing.

    Raises:
        Refused: a run's flags are invalid, or this machine cannot run it.
    """
    runs, checked = {}, set()
    for variant, values, point in combinations(parse_variants(args), parse_grid(flags)):
        if point.get("seed") == "-1":
            raise Refused("--seed -1: the seeds of a sweep are names of folders; give them")
        words = as_flags(point)
        try:
            config = parse(words)
        except Refused as error:
            raise Refused(f"{error} (in variant {variant})" if variant else error) from None
        task = f"{config.domain_name}-{config.task_name}"
        differs = ",".join([variant, *values] if variant else values) or config.agent
        run = Run(f"{differs}/{task}/s{config.seed}", words)
        if (twin := runs.setdefault(_result(config), run)) is not run:
            raise Refused(f"{twin.folder} and {run.folder}: the same run twice")
        check_writable("name", str(folder / run.folder))
        needs = {name: getattr(config, name) for name in TASK_CHECKS}
        if (scene := (task, config.encoder_type, *needs.values())) not in checked:
            checked.add(scene)
            dmc2gym.check_task(config)
            if args.slurm is None and any(needs[name] not in (None, False, "auto", "cpu") for name in MACHINE):
                check_machine(config, choose_device(config.device))
    for run in load_runs(folder):
        result = _result(parse(run.flags))
        if twin := runs.get(result):  # its name may differ, as an earlier grid varied fewer flags
            runs[result] = Run(run.folder, twin.flags)
    return list(runs.values())


def _result(config):
    """The values of all flags that affect a run's result."""
    return tuple(value for name, value in dataclasses.asdict(config).items() if name not in UNCHANGING)


def is_over(folder, run):
    """Whether a run is finished or has diverged.

    Raises:
        Refused: with its flags it can neither start nor resume.
    """
    try:
        parse_run([*run.flags, "--run_dir", str(folder / run.folder)])
    except RunEnded:
        return True
    return False


def load_runs(folder):
    """The runs in a folder's sweep.json."""
    return [Run(**run) for run in load_sweep(folder)["runs"]]


def merge(folder, runs):
    """The runs of a command added to those in sweep.json; removes none.

    Raises:
        Refused: sweep.json has a run with flags that give another result.
    """
    before = {run.folder: run.flags for run in load_runs(folder)}
    for run in runs:
        if run.folder in before and before[run.folder] != run.flags:
            ours, theirs = parse(run.flags), parse(before[run.folder])
            for name, value in dataclasses.asdict(ours).items():
                if name not in UNCHANGING and (old := getattr(theirs, name)) != value:
                    if name != "num_train_steps" or value < old:
                        right = f"{folder / run.folder} was planned with {shorten(old)}; give the sweep another --name"
                        raise Refused(f"--{name} {shorten(value)}: {right}")
    return [Run(*item) for item in (before | dict(runs)).items()]


def store(folder, runs, jobs):
    """Write sweep.json and, for TensorBoard's HParams page, the flags that differ."""
    write_json(folder / "sweep.json", {"runs": [run._asdict() for run in runs], "jobs": jobs})
    dashboard.write_hparams_config(folder, differing([parse_grid(run.flags) for run in runs]))


@contextlib.contextmanager
def locked(folder):
    """Create the folder and hold its lock: one process at a time changes sweep.json."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "sweep.lock", "a") as lock:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.lockf(lock, fcntl.LOCK_EX)
        yield


def differing(points):
    """Names of the flags that differ between these grids of single values."""
    names = dict.fromkeys(name for point in points for name in point)
    return [name for name in names if any(point.get(name) != points[0].get(name) for point in points)]


def command(folder, run):
    """A run's command, a list of tokens."""
    return [sys.executable, str(HERE / "train.py"), *run.flags, "--run_dir", str(folder / run.folder)]
