"""The commands of a Slurm cluster that a sweep needs: sbatch and squeue."""

import itertools
import os
import shutil
import subprocess

from config import ConfigError


def fill(script, **values):
    """A batch script with its @NAME@s replaced."""
    for name, value in values.items():
        script = script.replace(f"@{name.upper()}@", str(value))
    return script


def check():
    """Raise `ConfigError` where there is no cluster."""
    if not shutil.which("sbatch"):
        raise ConfigError("--slurm: there is no sbatch here; without --slurm the sweep runs on this machine")


def submit(script):
    """Number of the job that a batch script has become, a string.

    Raises:
        ConfigError: Slurm refuses it, with its reason.
    """
    done = _run("sbatch", "--parsable", input=script)
    if done.returncode:
        raise ConfigError(f"--slurm: {(done.stderr.strip() or 'sbatch fails').splitlines()[-1]}")
    return done.stdout.strip().split(";")[0]


def waiting_or_running(job):
    """Elements of an array that are in the queue or run, a list of int."""
    if not shutil.which("squeue"):
        return []
    return [int(word) for word in _run("squeue", "--noheader", "--array", "--jobs", job, "--format=%K").stdout.split()]


def ranges(numbers):
    """Ascending numbers as Slurm writes them: 0-3,7."""
    words = []
    for _, group in itertools.groupby(enumerate(numbers), key=lambda item: item[1] - item[0]):
        first, *_, last = [number for _, number in group] * 2
        words.append(str(first) if first == last else f"{first}-{last}")
    return ",".join(words)


def _run(*words, input=None):
    """A command of Slurm, without what an enclosing job has set."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_") or k == "SLURM_CONF"}
    return subprocess.run(words, input=input, capture_output=True, text=True, env=environment)
