"""Runs as a Slurm job array, submitted with sbatch and queried with squeue."""

import os
import shlex
import shutil
import subprocess
import sys

from endings import Refused
from experiments.grid import HERE, is_over, locked, merge, read_text, store, train_command
from experiments.status import plural
from storage.run_folder import load_sweep


def submit(folder, runs, args):
    """Submit those of `runs` that are neither over nor queued; --dry_run prints them instead."""
    if not args.dry_run and not shutil.which("sbatch"):
        raise Refused("--slurm: sbatch not found; without --slurm the sweep runs on this machine")
    script, elements = batch(folder, runs, load_sweep(folder)[1], args)  # refuse before creating files
    if args.dry_run:
        if elements:
            print(script)
        for i, element in enumerate(elements):
            print(
                f"# element {i}", *(shlex.join(train_command(folder / name, runs[name])) for name in element), sep="\n"
            )
        over = len(runs) - sum(map(len, elements))
        print(f"{in_elements(elements)} to submit, {over} over or in the queue", file=sys.stderr)
        return
    is_new = not folder.exists()
    with locked(folder):
        before, jobs = load_sweep(folder)
        everything = merge(folder, runs)
        script, elements = batch(folder, runs, jobs, args)  # another command may have submitted some meanwhile
        if elements:
            jobs.append({"id": None, "elements": elements})
            store(folder, everything, jobs)  # an element may start at once
            (folder / "slurm").mkdir(exist_ok=True)  # Slurm does not create it
            try:
                jobs[-1]["id"] = slurm("sbatch", "--parsable", input=script).strip().split(";")[0]
            except Refused:
                if is_new and not before:  # another command may have added runs meanwhile
                    shutil.rmtree(folder)
                else:
                    store(folder, before, jobs[:-1])
                raise
        store(folder, everything, jobs)
    if elements:
        print(f"job {jobs[-1]['id']}: {in_elements(elements)}; sweep.py --status {folder} follows them")
    else:
        print(f"{folder}: nothing to submit")


def in_elements(elements):
    """The number of runs and of elements, as in "6 runs in 3 elements"."""
    return f"{plural(sum(map(len, elements)), 'run')} in {plural(len(elements), 'element')}"


def batch(folder, runs, jobs, args):
    """The batch script for those of `runs` still to do, and its array elements, each a list of runs' names."""
    queued = set()
    for job in jobs:
        if job["id"]:  # None: sweep.py was killed while it submitted
            indices = slurm("squeue", "--noheader", "--array", "--jobs", job["id"], "--format=%K").split()
            elements = dict(enumerate(job["elements"]))  # the id may by now be another job's, with other indices
            queued |= {name for i in indices if i.isdigit() for name in elements.get(int(i), [])}
    todo = [name for name, flags in runs.items() if name not in queued and not is_over(folder / name, flags)]
    elements = [todo[i : i + args.runs_per_job] for i in range(0, len(todo), args.runs_per_job)]
    script = fill(
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


def fill(path, **values):
    """The batch script at `path` with its @NAME@s replaced; `Refused` if one is missing or a value is unsafe there."""
    script = read_text("slurm_script", path)
    for name, value in values.items():
        place = f"@{name.upper()}@"
        if place not in script:
            raise Refused(f"--slurm_script {path}: {place} is missing")
        cannot = "\n" if name == "options" else '\n"$`\\' + "%" * (name == "folder")  # Slurm reads % as a number
        if bad := set(str(value)) & set(cannot):
            raise Refused(f"--slurm: {value} contains {''.join(bad)!r}, which a batch script cannot contain")
        script = script.replace(place, str(value))
    return script


def slurm(*words, input=None):
    """Output of a Slurm command, run without the SLURM_ variables of an enclosing job; `Refused` if it fails."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_") or k == "SLURM_CONF"}
    try:
        done = subprocess.run(words, input=input, capture_output=True, text=True, env=environment)
    except FileNotFoundError:
        raise Refused(f"--slurm: {words[0]} not found, which a sweep with submitted jobs needs") from None
    forgotten = words[0] == "squeue" and "Invalid job id" in done.stderr  # a job that ended long ago
    if done.returncode and not forgotten:
        lines = done.stderr.strip().splitlines() or [f"{words[0]} failed"]
        raise Refused(f"--slurm: {'; '.join(reversed(lines))}")  # the last line has the reason
    return done.stdout
