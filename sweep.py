"""A grid of runs, each a process of train.py: on this machine, or as a job array on a Slurm cluster.

    python sweep.py --name omega --jobs 2 -- --omega_cody_loss 0.1,0.01,0.001 --seed 0,1,2
    python sweep.py --name ablation --variants experiments/ablation.txt -- --task cartpole-swingup,walker-walk
    python sweep.py --name omega --slurm '--time=8:00:00 --gres=gpu:1' -- --omega_cody_loss 0.1,0.01,0.001 --seed 0,1,2
    python sweep.py --status runs/omega                # the status of every run
    python sweep.py --resume runs/omega --jobs 2       # resume the unfinished runs, as repeating the command does

Arguments after the -- are flags of train.py; commas make the grid. Each run's folder is
<work_dir>/<name>/<flags that differ>/<task>/s<seed>/, and <work_dir>/<name>/sweep.json lists all runs.
"""

import endings

if __name__ == "__main__":
    endings.listen()  # before the other imports, which take a second

import dataclasses
import os
import pathlib
import shlex
import sys
from typing import Annotated

import tyro

from command_line import parse_flags, shorten
from config import Config
from endings import Refused
from experiments.grid import HERE, is_over, locked, merge, plan, store, train_command
from experiments.processes import Scheduler
from experiments.slurm import submit
from experiments.status import LossProofConsole, plural, run_status, status_table
from storage.run_folder import find_runs, load_sweep

SLURM = ("slurm", "slurm_script", "runs_per_job")
MODES = {  # the flag that selects the mode, and the flags it accepts
    "name": ("work_dir", "variant", "variants", "only", "jobs", "dry_run", *SLURM),
    "resume": ("jobs", "dry_run", *SLURM),
    "status": (),
}
SCRIPT = str(HERE / "experiments" / "slurm.sh")


@dataclasses.dataclass(frozen=True)
class Args:
    """Run a grid of train.py runs; its flags follow a --, and commas in a value make the grid."""

    name: str | None = None
    """Name of the sweep and of its folder in work_dir."""
    work_dir: str = "runs"
    """Folder for all sweeps."""
    variant: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A named variant, 'name: flags'; may be repeated. Its flags override those after the --."""
    variants: str | None = None
    """File of variants, one per line."""
    only: str | None = None
    """Comma-separated names of the variants to run. None: all."""
    jobs: int | None = None
    """Number of concurrent runs. None: one on this machine, no limit on a cluster."""
    slurm: str | None = None
    """Submit a Slurm job array with these sbatch options, such as '--time=8:00:00 --gres=gpu:1'."""
    slurm_script: str = SCRIPT
    """Template of the batch script."""
    runs_per_job: int = 1
    """Runs per array element, one after the other."""
    dry_run: bool = False
    """Print the commands and, with --slurm, the batch script; create nothing."""
    status: str | None = None
    """Print the status of the runs in this folder."""
    resume: str | None = None
    """Folder of the sweep to resume."""


def parse_command(argv):
    """Command line -> (Args, flags of train.py)."""
    own, flags = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (list(argv), [])
    if "--slurm" in own[:-1]:  # its value may look like a flag
        at = own.index("--slurm")
        own[at : at + 2] = [f"--slurm={own[at + 1]}"]
    own = ["--slurm= " if word == "--slurm=" else word for word in own]  # no options but those in the script
    of_runs = {field.name for field in dataclasses.fields(Config)} | {"task"}
    for flag in (word.partition("=")[0] for word in own if word.startswith("--")):
        name = flag[2:].replace("-", "_").removeprefix("no_")
        if name in of_runs and not hasattr(Args, name):
            raise Refused(f"{flag}: a flag of train.py, which comes after the --")
    args = parse_flags(Args, own)
    modes = [mode for mode in MODES if getattr(args, mode) is not None]
    if len(modes) != 1:
        raise Refused("needs one of --name, --resume and --status")
    for field in dataclasses.fields(args):
        if field.name not in (*modes, *MODES[modes[0]]) and getattr(args, field.name) != field.default:
            raise Refused(f"--{field.name}: has no effect with --{modes[0]}")
    if flags and args.name is None:
        raise Refused(f"{shorten(flags[0])}: --status and --resume take the runs of sweep.json, no others")
    if args.slurm is None and (args.runs_per_job != 1 or args.slurm_script != SCRIPT):
        raise Refused("--runs_per_job, --slurm_script: have no effect without --slurm")
    for flag in ("jobs", "runs_per_job"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise Refused(f"--{flag} {getattr(args, flag)}: must be at least 1")
    if args.name is not None and (args.name in ("", "..") or pathlib.Path(args.name).name != args.name):
        raise Refused(f"--name {args.name}: must be a single folder's name")
    return args, flags


def print_status(folder):
    """Print the status of all runs in a folder."""
    runs = find_runs(folder)
    if not runs:
        raise Refused(f"--status {folder}: holds no runs")
    statuses, unreadable = {}, []
    for run in runs:
        try:
            statuses[str(run.relative_to(folder))] = run_status(run)
        except (Refused, OSError) as error:
            unreadable.append(str(error))
    LossProofConsole().print(status_table(statuses), *unreadable, sep="\n")


def resumed(folder):
    """The runs of a sweep; in a job array, those of the element that the batch script names in SWEEP_ELEMENT."""
    runs, jobs = load_sweep(folder)
    if not runs:
        raise Refused(f"--resume {folder}: not the folder of a sweep")
    if "SWEEP_ELEMENT" not in os.environ:
        return runs
    try:
        array, element = map(int, os.environ["SWEEP_ELEMENT"].split(":"))
        names = jobs[array]["elements"][element]
    except (ValueError, IndexError):
        raise Refused(f"SWEEP_ELEMENT={os.environ['SWEEP_ELEMENT']}: no such array element in {folder}") from None
    return {name: words for name, words in runs.items() if name in names}


@endings.command()
def main():
    """Print the status, submit to Slurm, print the commands, or execute the runs; exit code 1 if some failed."""
    args, flags = parse_command(sys.argv[1:])
    if args.status is not None:
        print_status(pathlib.Path(args.status))
        return
    if args.resume is not None:
        folder = pathlib.Path(args.resume)
        runs = resumed(folder)
    else:
        folder = pathlib.Path(args.work_dir, args.name)
        if not (folder / "sweep.json").exists() and any(folder.rglob("args.json")):
            raise Refused(f"--name {args.name}: {folder} contains runs that do not belong to a sweep; choose another")
        runs = plan(args, flags, folder)
    merge(folder, runs)  # refuse contradictions before creating anything
    if args.slurm is not None:
        submit(folder, runs, args)
        return
    todo = [name for name, words in runs.items() if not is_over(folder / name, words)]
    if args.dry_run:
        for name in todo:
            LossProofConsole().out(shlex.join(train_command(folder / name, runs[name])))
        print(f"{plural(len(todo), 'run')} to do, {len(runs) - len(todo)} over", file=sys.stderr)
        return
    if args.resume is None:
        with locked(folder):
            store(folder, merge(folder, runs), load_sweep(folder)[1])
    sys.exit(Scheduler(folder, runs, todo, args.jobs or 1).run())


if __name__ == "__main__":
    main()
