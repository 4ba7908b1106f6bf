"""A grid of runs, each a process of train.py: on this machine, or as a job array on a Slurm cluster.

    python sweep.py --name omega --jobs 2 -- --omega_cody_loss 0.1,0.01,0.001 --seed 0,1,2
    python sweep.py --name ablation --variants experiments/ablation.txt -- --task cartpole-swingup,walker-walk
    python sweep.py --name omega --slurm '--time=8:00:00 --gres=gpu:1' -- --omega_cody_loss 0.1,0.01,0.001 --seed 0,1,2
    python sweep.py --status runs/omega                          # how the runs stand
    python sweep.py --resume runs/omega --jobs 2                 # go on with what is not over, as the same command does

What stands behind the -- are flags of train.py; commas make the grid. A run lies in
<work_dir>/<name>/<what differs>/<task>/s<seed>/, and <work_dir>/<name>/sweep.json names them all.
"""

import dataclasses
import pathlib
import shlex
import sys
from typing import Annotated

import tyro

import endings
from config import Config, parse_flags, shorten
from endings import EXPECTED, Refused, end
from experiments.grid import HERE, command, is_over, load_runs, locked, merge, plan, store
from experiments.processes import run_here
from experiments.slurm import submit
from experiments.status import lost_console, make_console, plural, run_status, status_table
from storage.run_folder import find_runs, load_sweep

SLURM = ("slurm", "slurm_script", "runs_per_job")
MODES = {  # what the command does, and which flags go with it
    "name": ("work_dir", "variant", "variants", "only", "jobs", "dry_run", *SLURM),
    "resume": ("array", "element", "jobs", "dry_run", *SLURM),
    "status": (),
}
SCRIPT = str(HERE / "experiments" / "slurm.sh")


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
            raise Refused(f"{word.partition('=')[0]}: a flag of train.py; those stand behind a --")
    args = parse_flags(Args, own)
    if [getattr(args, mode) for mode in MODES].count(None) != 2:
        raise Refused("needs one of --name, --resume and --status")
    (mode,) = [mode for mode in MODES if getattr(args, mode) is not None]
    for field in dataclasses.fields(args):
        if field.name not in (mode, *MODES[mode]) and getattr(args, field.name) != field.default:
            raise Refused(f"--{field.name}: has no effect with --{mode}")
    if flags and args.name is None:
        raise Refused(f"{shorten(flags[0])}: --status and --resume take the runs of sweep.json, no others")
    if args.slurm is None and (args.runs_per_job != 1 or args.slurm_script != SCRIPT):
        raise Refused("--runs_per_job, --slurm_script: have no effect without --slurm")
    for flag in ("jobs", "runs_per_job"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise Refused(f"--{flag} {getattr(args, flag)}: must be at least 1")
    if (args.array is None) != (args.element is None):
        raise Refused("--array, --element: only together")
    if args.name is not None and (args.name in ("", "..") or pathlib.Path(args.name).name != args.name):
        raise Refused(f"--name {args.name}: must be a single folder's name")
    return args, flags


def main():
    """The command: `run`; endings.py lists the exit codes, 1 is that some runs have failed."""
    try:
        run(*parse_command(sys.argv[1:]))
    except EXPECTED as error:
        end(error)


def run(args, flags):
    """Do what the command asks for: a status, a submission, the commands alone, or the runs."""
    if args.status is not None:
        print_status(pathlib.Path(args.status))
        return
    folder = pathlib.Path(args.resume or pathlib.Path(args.work_dir) / args.name)
    if args.resume is None and not (folder / "sweep.json").exists() and any(folder.rglob("args.json")):
        raise Refused(f"--name {args.name}: {folder} holds runs that are of no sweep; choose another")
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
            print(f"{plural(len(todo), 'run')} to do, {len(runs) - len(todo)} over", flush=True)
    else:
        if args.resume is None:
            with locked(folder):
                store(folder, merge(folder, runs), load_sweep(folder)["jobs"])
        sys.exit(run_here(folder, runs, args.jobs or 1, todo))


def print_status(folder):
    """How all runs in a folder stand."""
    runs = find_runs(folder)
    if not runs:
        raise Refused(f"--status {folder}: holds no runs")
    statuses, unreadable = {}, []
    for run in runs:
        try:
            statuses[str(run.relative_to(folder))] = run_status(run)
        except Refused as error:
            unreadable.append(str(error))
    with lost_console():
        make_console().print(status_table(statuses), *unreadable, sep="\n")


def resumed(folder, args):
    """The runs of a sweep, or of one element of a job array of it."""
    runs, jobs = load_runs(folder), load_sweep(folder)["jobs"]
    if not runs:
        raise Refused(f"--resume {folder}: not the folder of a sweep")
    if args.element is None:
        return runs
    try:
        names = jobs[args.array]["elements"][args.element]
    except IndexError:
        raise Refused(f"--array {args.array} --element {args.element}: {folder} has submitted none such") from None
    return [run for run in runs if run.folder in names]


if __name__ == "__main__":
    endings.listen()
    main()
