"""A grid of runs, each a process of train.py: on this machine, or as a job array on a Slurm cluster.

    python sweep.py --name omega --jobs 2 -- --omega_cody_loss 0.1,0.01,0.001 --seed 0,1,2
    python sweep.py --name ablation --variants sweeps/ablation.txt -- --task cartpole-swingup,walker-walk --seed 0,1
    python sweep.py --name omega --slurm '--time=8:00:00 --gres=gpu:1' -- --omega_cody_loss 0.1,0.01,0.001 --seed 0,1,2
    python sweep.py --status runs/omega                          # how the runs stand
    python sweep.py --resume runs/omega --jobs 2                 # go on with what is not over, as the same command does

What stands behind the -- are flags of train.py; commas make the grid. A run lies in
<work_dir>/<name>/<what differs>/<task>/s<seed>/, and <work_dir>/<name>/sweep.json names them all.
"""

import contextlib
import dataclasses
import fcntl
import itertools
import os
import pathlib
import re
import shlex
import shutil
import sys
from typing import Annotated

import tyro

import dashboard
import dmc2gym
import signals
import slurm
from config import UNCHANGING, Config, ConfigError, exit_with, leave, parse, parse_flags, show
from processes import HERE, Run, command, run_here
from run_folder import Over, check_writable, find_runs, load_sweep, parse_run, write_json
from standing import counted, look, lost_console, make_console, report

UNNAMED = {"domain_name", "task_name", "seed"}  # have folders of their own
SLURM = ("slurm", "slurm_script", "runs_per_job")
HOW = {  # what is asked for, and which flags go with it
    "name": ("work_dir", "variant", "variants", "only", "jobs", "dry_run", *SLURM),
    "resume": ("array", "element", "jobs", "dry_run", *SLURM),
    "status": (),
}
MACHINE = ("device", "replay_device", "compile", "wandb")  # flags that this machine may have nothing for
NEEDS = ("camera_id", "pre_transform_image_size", "save_video", *MACHINE)  # what is asked of task and machine
SCRIPT = str(HERE / "sweeps" / "slurm.sh")


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
    slurm_script: str = SCRIPT
    """Its batch script, with places that are filled in."""
    runs_per_job: int = 1
    """Runs in one element of the array, one after the other."""
    dry_run: bool = False
    """Print the commands, with --slurm the batch script before them, and create nothing."""
    status: str | None = None
    """Print how the runs in this folder stand."""
    resume: str | None = None
    """Go on with the sweep in this folder."""
    array: int | None = None
    """For the batch script: with --resume, only runs of this job array; the first that the sweep has submitted is 0."""
    element: int | None = None
    """For the batch script: of that array's runs, only those of this element."""


def parse_command(argv):
    """Command line -> (Args, flags of train.py)."""
    own, flags = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (list(argv), [])
    if "--slurm" in own[:-1]:  # its value may look like a flag
        at = own.index("--slurm")
        own[at : at + 2] = [f"--slurm={own[at + 1]}"]
    known, of_runs = ({field.name for field in dataclasses.fields(cls)} for cls in (Args, Config))
    for word in own:
        name = word.partition("=")[0].removeprefix("--").replace("-", "_").removeprefix("no_")
        if word.startswith("--") and name in (of_runs | {"task"}) - known:
            raise ConfigError(f"{word.partition('=')[0]}: a flag of train.py; those stand behind a --")
    args = parse_flags(Args, own)
    if [getattr(args, how) for how in HOW].count(None) != 2:
        raise ConfigError("needs one of --name, --resume and --status")
    (how,) = [how for how in HOW if getattr(args, how) is not None]
    for field in dataclasses.fields(args):
        if field.name not in (how, *HOW[how]) and getattr(args, field.name) != field.default:
            raise ConfigError(f"--{field.name}: has no effect with --{how}")
    if flags and args.name is None:
        raise ConfigError(f"{show(flags[0])}: --status and --resume take the runs of sweep.json, no others")
    if args.slurm is None and (args.runs_per_job != 1 or args.slurm_script != SCRIPT):
        raise ConfigError("--runs_per_job, --slurm_script: have no effect without --slurm")
    for flag in ("jobs", "runs_per_job"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise ConfigError(f"--{flag} {getattr(args, flag)}: must be at least 1")
    if (args.array is None) != (args.element is None):
        raise ConfigError("--array, --element: only together")
    if args.name is not None and (args.name in ("", "..") or pathlib.Path(args.name).name != args.name):
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
        try:
            variants[name] = parse_grid(shlex.split(flags, comments=True))
        except ValueError as error:
            raise ConfigError(f"--variant {name}: {error}") from None
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
    if "save_tb" in point and point["save_tb"] != "false" and "tb_media" not in point:
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
        ConfigError, dmc2gym.EnvError: one of them cannot work.
    """
    runs, checked = {}, set()
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
        check_writable("name", str(folder / run.folder))
        needs = {name: getattr(config, name) for name in NEEDS}
        if (scene := (task, config.encoder_type, *needs.values())) not in checked:
            checked.add(scene)
            dmc2gym.check_task(config)
            if args.slurm is None and any(needs[name] not in (None, False, "auto", "cpu") for name in MACHINE):
                from evaluate import check_machine, choose_device  # seconds, for torch

                check_machine(config, choose_device(config.device))
    for run in load_runs(folder):
        result = _result(parse(run.flags))
        if twin := runs.get(result):  # perhaps named when less has differed
            runs[result] = Run(run.folder, twin.flags)
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


def load_runs(folder):
    """The runs that sweep.json in a folder names."""
    return [Run(**run) for run in load_sweep(folder)["runs"]]


def merge(folder, runs):
    """The runs of a command and all that sweep.json names besides: none is removed.

    Raises:
        ConfigError: a run was planned with flags that give another result.
    """
    before = {run.folder: run.flags for run in load_runs(folder)}
    for run in runs:
        if run.folder in before and before[run.folder] != run.flags:
            ours, theirs = parse(run.flags), parse(before[run.folder])
            for name, value in dataclasses.asdict(ours).items():
                if name not in UNCHANGING and (old := getattr(theirs, name)) != value:
                    if name != "num_train_steps" or value < old:
                        right = f"{folder / run.folder} was planned with {show(old)}; give the sweep another --name"
                        raise ConfigError(f"--{name} {show(value)}: {right}")
    return [Run(*item) for item in (before | dict(runs)).items()]


def store(folder, runs, jobs):
    """Write sweep.json, and beside it for TensorBoard which flags differ."""
    write_json(folder / "sweep.json", {"runs": [run._asdict() for run in runs], "jobs": jobs})
    dashboard.write_hparams_config(folder, differing([parse_grid(run.flags) for run in runs]))


@contextlib.contextmanager
def locked(folder):
    """One process at a time changes sweep.json; the folder is made."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "sweep.lock", "a") as lock:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.lockf(lock, fcntl.LOCK_EX)
        yield


def differing(points):
    """Names of the flags that are not the same in all of these grids of single values."""
    names = dict.fromkeys(name for point in points for name in point)
    return [name for name in names if any(point.get(name) != points[0].get(name) for point in points)]


def submit(folder, runs, args):
    """Submit those of `runs` that are neither over nor in the queue; with --dry_run print what would be submitted."""
    if args.dry_run:
        script, elements = batch(folder, runs, load_sweep(folder)["jobs"], args)
        if elements:
            print(script)
        for i, element in enumerate(elements):
            print(f"# element {i}", *(shlex.join(command(folder, run)) for run in element), sep="\n")
        count = sum(map(len, elements))
        print(f"{in_elements(elements)} to submit, {len(runs) - count} over or in the queue")
        return
    slurm.check()
    batch(folder, runs, [], args)  # what is wrong with the script is found before anything is made
    is_new = not folder.exists()
    with locked(folder):
        before = load_sweep(folder)
        everything, jobs = merge(folder, runs), before["jobs"]
        script, elements = batch(folder, runs, jobs, args)
        names = [[run.folder for run in element] for element in elements]
        if elements:
            store(folder, everything, [*jobs, {"id": None, "elements": names}])  # an element may start at once
            (folder / "slurm").mkdir(exist_ok=True)  # Slurm makes no folder
            try:
                jobs = [*jobs, {"id": slurm.submit(script), "elements": names}]
            except ConfigError:
                if is_new and not before["runs"]:  # which another command may have put there meanwhile
                    shutil.rmtree(folder)
                else:
                    store(folder, [Run(**run) for run in before["runs"]], jobs)
                raise
        store(folder, everything, jobs)
    if elements:
        print(f"job {jobs[-1]['id']}: {in_elements(elements)}; sweep.py --status {folder} follows them")
    else:
        print(f"{folder}: nothing to submit")


def in_elements(elements):
    """How many runs are in how many elements, in words."""
    return f"{counted(sum(map(len, elements)), 'run')} in {counted(len(elements), 'element')}"


def batch(folder, runs, jobs, args):
    """The batch script for what is to be done of `runs`, and its elements, each a list of runs."""
    submitted = [job for job in jobs if job["id"]]  # None: a sweep that was killed in that moment
    queued = {name for job in submitted for i in slurm.waiting_or_running(job["id"]) for name in job["elements"][i]}
    todo = [run for run in runs if run.folder not in queued and not is_over(folder, run)]
    elements = [todo[i : i + args.runs_per_job] for i in range(0, len(todo), args.runs_per_job)]
    script = slurm.fill(
        args.slurm_script,
        name=folder.name,
        array=f"0-{len(elements) - 1}" + (f"%{args.jobs}" if args.jobs else ""),
        folder=folder.absolute(),
        options=args.slurm,
        here=os.getcwd(),
        python=sys.executable,
        sweep=HERE / "sweep.py",
        number=len(jobs),
    )
    return script, elements


def main():
    """The command; exit code 0 done, 1 some runs have failed, 2 refused, 75 and 130 stopped by a signal."""
    try:
        args, flags = parse_command(sys.argv[1:])
        if args.status is not None:
            print_status(pathlib.Path(args.status))
            return
        folder = pathlib.Path(args.resume or pathlib.Path(args.work_dir) / args.name)
        if args.resume is None and not (folder / "sweep.json").exists() and any(folder.rglob("args.json")):
            raise ConfigError(f"--name {args.name}: {folder} holds runs that are of no sweep; choose another")
        runs = plan(args, flags, folder) if args.resume is None else resumed(folder, args)
        merge(folder, runs)  # contradictions are found before anything is made
        if args.slurm is not None:
            submit(folder, runs, args)
            return
        todo = [run for run in runs if not is_over(folder, run)]
        if args.dry_run:
            with lost_console():
                for run in todo:
                    print(shlex.join(command(folder, run)))
                print(f"{counted(len(todo), 'run')} to do, {len(runs) - len(todo)} over", flush=True)
        else:
            if args.resume is None:
                with locked(folder):
                    store(folder, merge(folder, runs), load_sweep(folder)["jobs"])
            sys.exit(run_here(folder, runs, args.jobs or 1, todo))
    except signals.Stopped as stop:
        leave(f"sweep.py: stopped by {stop} before it began", stop.code)
    except (ConfigError, dmc2gym.EnvError) as error:
        exit_with(error)
    except OSError as error:
        leave(f"sweep.py: {error}", 1)


def print_status(folder):
    """How all runs in a folder stand."""
    runs = find_runs(folder)
    if not runs:
        raise ConfigError(f"--status {folder}: holds no runs")
    standings, unreadable = {}, []
    for run in runs:
        try:
            standings[str(run.relative_to(folder))] = look(run)
        except ConfigError as error:
            unreadable.append(str(error))
    with lost_console():
        make_console().print(report(standings), *unreadable, sep="\n")


def resumed(folder, args):
    """The runs of a sweep, or of one element of a job array of it."""
    runs, jobs = load_runs(folder), load_sweep(folder)["jobs"]
    if not runs:
        raise ConfigError(f"--resume {folder}: not the folder of a sweep")
    if args.element is None:
        return runs
    try:
        names = jobs[args.array]["elements"][args.element]
    except IndexError:
        raise ConfigError(f"--array {args.array} --element {args.element}: {folder} has submitted none such") from None
    return [run for run in runs if run.folder in names]


if __name__ == "__main__":
    signals.listen()
    main()
