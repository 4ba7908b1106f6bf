"""From comma-separated flags to the runs of a sweep, and to sweep.json, which lists them."""

import contextlib
import dataclasses
import fcntl
import itertools
import pathlib
import re
import shlex
import sys

import background
import dashboard
import dmc2gym
from command_line import shorten
from config import NO_EFFECT_ON_RESULTS, Config, parse
from endings import Refused, RunEnded
from machine import check_machine, choose_device
from storage.run_folder import check_writable, load_status, load_sweep, parse_run, write_json
from video import check_ffmpeg

HERE = pathlib.Path(__file__).resolve().parent.parent
OWN_FOLDERS = ("task", "domain_name", "task_name", "seed")  # flags with a folder level of their own
CHECKED = (  # flags that decide whether the suite has the task and this machine can run it
    "domain_name task_name encoder_type camera_id pre_transform_image_size save_video background eval_background "
    "device replay_device compile wandb precision"
).split()


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
            raise Refused(f"--{name}: given twice; separate values with commas")
        if name in ("work_dir", "run_dir"):
            raise Refused(f"--{name}: a sweep names the folders of its runs; use --work_dir before the --")
        values = [None] if value is None else value.split(",")
        if "" in values:
            raise Refused(f"--{name} {shorten(value)}: an empty value")
        if name in switches and not set(values) <= {None, "true", "false"}:
            raise Refused(f"--{name} {shorten(value)}: takes no value, or true and false for a grid")
        grid[name] = values
    return grid


def parse_variants(args):
    """--variant, --variants and --only -> {name: grid of single values}; {None: {}} without variants."""
    lines = list(args.variant)
    if args.variants:
        lines += read_text("variants", args.variants).splitlines()
    variants = {}
    for line in map(str.strip, lines):
        if not line or line.startswith("#"):
            continue
        name, colon, flags = line.partition(":")
        name = name.strip()
        if not colon or not re.fullmatch(r"[\w.+-]+", name) or not name.strip("."):
            raise Refused(f"--variant {shorten(line)}: must be 'name: flags', a name of letters, digits, _.+-")
        if name in variants:
            raise Refused(f"--variant {name}: two variants have this name")
        try:
            variants[name] = parse_grid(shlex.split(flags, comments=True))
        except ValueError as error:
            raise Refused(f"--variant {name}: {error}") from None
        if any(len(values) > 1 for values in variants[name].values()):
            raise Refused(f"--variant {name}: contains a grid; grids come after the --")
    chosen = list(variants) if args.only is None else args.only.split(",")
    for name in chosen:
        if name not in variants:
            raise Refused(f"--only {shorten(name)}: no such variant; there are {', '.join(variants) or 'none'}")
    return {name: variants[name] for name in chosen} or {None: {}}


def read_text(flag, path):
    """The text of the file that `--flag` names; `Refused` if it cannot be read."""
    try:
        text = pathlib.Path(path).read_text("utf-8-sig")  # without a byte-order mark
        if "\0" in text:  # UTF-16
            raise ValueError
        return text
    except (OSError, ValueError) as error:
        raise Refused(f"--{flag} {path}: {getattr(error, 'strerror', 'not a text file')}") from None


def combinations(variants, grid):
    """Yield (variant, values of the multi-valued flags, flags) for all variants and grid points, seed by seed."""
    axes = sorted(grid, key=lambda name: name != "seed")  # the first axis varies slowest
    several = [name for name in grid if len(grid[name]) > 1 and name not in OWN_FOLDERS]
    for values in itertools.product(*(grid[name] for name in axes)):
        point = dict(zip(axes, values, strict=True))
        for variant, own in variants.items():
            if clash := [name for name in own if len(grid.get(name, [])) > 1]:
                raise Refused(f"--{clash[0]}: has several values after the -- and one in --variant {variant}")
            flags = {**point, **{name: value for name, (value,) in own.items()}}
            yield variant, [f"{name}={point[name]}".replace("/", "_") for name in several], flags


def as_flags(point):
    """{name: value} -> a list of command-line tokens for train.py."""
    if "task" in point:
        value = point.pop("task") or ""
        domain, dash, task = value.partition("-")
        if not dash:
            raise Refused(f"--task {value}: must be domain-task, such as cartpole-swingup")
        if {"domain_name", "task_name"} & set(point):
            raise Refused(f"--task {value}: not together with --domain_name or --task_name")
        point = {"domain_name": domain, "task_name": task, **point}
    if "save_tb" not in point and "no_save_tb" not in point:
        point["save_tb"] = None
    if "save_tb" in point and point["save_tb"] != "false" and "tb_media" not in point:
        point["no_tb_media"] = None  # media dominate TensorBoard's load time with many runs
    words = []
    for name, value in point.items():
        if value in (None, "true"):
            words.append(f"--{name}")
        elif value == "false":
            words.append(f"--no_{name}")
        else:
            words += [f"--{name}", value]
    return words


def plan(args, flags, folder):
    """The runs of a command; creates nothing. `Refused` if flags are invalid or this machine cannot run with them."""
    runs, checked = {}, set()
    for variant, values, point in combinations(parse_variants(args), parse_grid(flags)):
        if point.get("seed") == "-1":
            raise Refused("--seed -1: a sweep needs explicit seeds, which name its folders")
        words = as_flags(point)
        try:
            config = parse(words)
        except Refused as error:
            raise Refused(f"{error} (in variant {variant})" if variant else error) from None
        task = f"{config.domain_name}-{config.task_name}"
        differs = ",".join([variant, *values] if variant else values) or config.agent
        name = f"{differs}/{task}/s{config.seed}"
        result = _result(config)
        if result in runs:
            raise Refused(f"{runs[result][0]} and {name}: identical runs")
        runs[result] = (name, words)
        check_writable("name", str(folder / name))
        needs = tuple(getattr(config, flag) for flag in CHECKED)
        if needs not in checked:
            checked.add(needs)
            dmc2gym.check_task(config)
            background.check_folders(config)
            if config.save_video and args.slurm is None:
                check_ffmpeg("save_video")
            uses_cuda = "cuda" in (config.device, config.replay_device) or config.precision == "tf32"
            if args.slurm is None and (uses_cuda or config.compile or config.wandb):
                check_machine(config, choose_device(config.device))
    for name, words in load_sweep(folder)[0].items():
        result = _result(parse(words))
        if result in runs:  # keep its old name, which is another if the earlier grid varied fewer flags
            runs[result] = (name, runs[result][1])
    names = [name for name, _ in runs.values()]
    if twice := [name for name in names if names.count(name) > 1]:
        raise Refused(f"{twice[0]}: two runs would share this folder; use --variant to name them")
    return dict(runs.values())


def _result(config):
    """The values of all flags that affect a run's result."""
    return tuple(value for name, value in dataclasses.asdict(config).items() if name not in NO_EFFECT_ON_RESULTS)


def is_over(path, flags):
    """Whether the run in folder `path` has finished, diverged or been extended by hand, beyond what the sweep asks for.

    Raises `Refused` if it can neither start nor resume.
    """
    if load_status(path).get("num_train_steps", 0) > parse(flags).num_train_steps:
        return True
    try:
        parse_run([*flags, "--run_dir", str(path)])
    except RunEnded:
        return True
    return False


def merge(folder, runs):
    """The runs of a command added to those in sweep.json; raises `Refused` if a run there has other flags."""
    planned, _ = load_sweep(folder)
    for name, flags in runs.items():
        if planned.get(name, flags) == flags:
            continue
        before = parse(planned[name])
        for flag, value in dataclasses.asdict(parse(flags)).items():
            old = getattr(before, flag)
            grows = flag == "num_train_steps" and value > old
            if value != old and flag not in NO_EFFECT_ON_RESULTS and not grows:
                right = f"{folder / name} was planned with {shorten(old)}; give the sweep another --name"
                raise Refused(f"--{flag} {shorten(value)}: {right}")
    return planned | runs


def store(folder, runs, jobs):
    """Write sweep.json and, for TensorBoard's HParams page, the flags that differ."""
    listed = [{"folder": name, "flags": flags} for name, flags in runs.items()]
    write_json(folder / "sweep.json", {"runs": listed, "jobs": jobs})
    points = [parse_grid(flags) for flags in runs.values()]
    names = dict.fromkeys(name for point in points for name in point)
    differ = [name for name in names if any(point.get(name) != points[0].get(name) for point in points)]
    dashboard.write_hparams_config(folder, differ)


@contextlib.contextmanager
def locked(folder):
    """Create the folder and hold its lock: one process at a time changes sweep.json."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "sweep.lock", "a") as lock:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.lockf(lock, fcntl.LOCK_EX)
        yield


def train_command(path, flags):
    """The command that executes the run in folder `path`, a list of tokens."""
    return [sys.executable, str(HERE / "train.py"), *flags, "--run_dir", str(path)]
