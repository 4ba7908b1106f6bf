"""Runs as a Slurm job array, submitted with sbatch and queried with squeue."""

import os
import pathlib
import shlex
import shutil
import subprocess
import sys

from endings import Refused
from experiments.grid import HERE, Run, command, is_over, locked, merge, store
from experiments.status import plural
from storage.run_folder import load_sweep


def fill(path, **values):
    """The batch script at `path` with its @NAME@ placeholders replaced.

    Raises:
        Refused: the script cannot be read or lacks a placeholder, or a value has characters unsafe in a batch script.
    """
    try:
        script = pathlib.Path(path).read_text()
    except (OSError, ValueError) as error:
        raise Refused(f"--slurm_script {path}: {getattr(error, 'strerror', 'not a text')}") from None
    for name, value in values.items():
        place = f"@{name.upper()}@"
        if place not in script:
            raise Refused(f"--slurm_script {path}: {place} is missing in it")
        cannot = "\n" if name == "options" else '\n"$`\\' + "%" * (name == "folder")  # Slurm reads % as a number
        if bad := set(str(value)) & set(cannot):
            raise Refused(f"--slurm: {value} has {''.join(bad)!r} in it, which a batch script cannot hold")
        script = script.replace(place, str(value))
    return script


def check():
    """Raise `Refused` if there is no sbatch."""
    if not shutil.which("sbatch"):
        raise Refused("--slurm: there is no sbatch here; without --slurm the sweep runs on this machine")


def sbatch(script):
    """Submit a batch script; returns the job's number, a string.

    Raises:
        Refused: Slurm rejects the script; the message is Slurm's.
    """
    done = _run("sbatch", "--parsable", input=script)
    if done.returncode:
        raise _refused(done)
    return done.stdout.strip().split(";")[0]


def waiting_or_running(job):
    """Indices of a job array's queued or running elements, a list of int.

    Raises:
        Refused: squeue fails.
    """
    done = _run("squeue", "--noheader", "--array", "--jobs", job, "--format=%K")
    if done.returncode and "Invalid job id" not in done.stderr:  # squeue forgets jobs that ended long ago
        raise _refused(done)
    return [int(word) for word in done.stdout.split()]


def _refused(done):
    """`Refused` with a command's stderr, the last line first because it has the reason."""
    lines = [" ".join(line.split()) for line in reversed(done.stderr.splitlines()) if line.strip()]
    return Refused(f"--slurm: {'; '.join(lines) or f'{done.args[0]} fails without a word'}")


def _run(*words, input=None):
    """Run a Slurm command without the SLURM_ variables of an enclosing job."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_") or k == "SLURM_CONF"}
    try:
        return subprocess.run(words, input=input, capture_output=True, text=True, env=environment)
    except FileNotFoundError:
        raise Refused(f"--slurm: there is no {words[0]} here, and this sweep was submitted before") from None


def submit(folder, runs, args):
    """Submit those of `runs` that are neither over nor queued; --dry_run prints them instead."""
    if args.dry_run:
        script, elements = batch(folder, runs, load_sweep(folder)["jobs"], args)
        if elements:
            print(script)
        for i, element in enumerate(elements):
            print(f"# element {i}", *(shlex.join(command(folder, run)) for run in element), sep="\n")
        count = sum(map(len, elements))
        print(f"{in_elements(elements)} to submit, {len(runs) - count} over or in the queue", file=sys.stderr)
        return
    check()
    batch(folder, runs, [], args)  # refuse a bad script before creating files
    is_new = not folder.exists()
    with locked(folder):
        before = load_sweep(folder)
        everything, jobs = merge(folder, runs), before["jobs"]
        script, elements = batch(folder, runs, jobs, args)
        names = [[run.folder for run in element] for element in elements]
        if elements:
            store(folder, everything, [*jobs, {"id": None, "elements": names}])  # an element may start at once
            (folder / "slurm").mkdir(exist_ok=True)  # Slurm does not create it
            try:
                jobs = [*jobs, {"id": sbatch(script), "elements": names}]
            except Refused:
                if is_new and not before["runs"]:  # another command may have added runs meanwhile
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
    """The number of runs and of elements, as in "6 runs in 3 elements"."""
    return f"{plural(sum(map(len, elements)), 'run')} in {plural(len(elements), 'element')}"


def batch(folder, runs, jobs, args):
    """The batch script for those of `runs` still to do, and its array elements, each a list of runs."""
    submitted = [job for job in jobs if job["id"]]  # None: sweep.py was killed while it submitted
    queued = {name for job in submitted for i in waiting_or_running(job["id"]) for name in job["elements"][i]}
    todo = [run for run in runs if run.folder not in queued and not is_over(folder, run)]
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
