"""The commands of a Slurm cluster that a sweep needs: sbatch and squeue."""

import os
import pathlib
import shutil
import subprocess

from config import ConfigError


def fill(path, **values):
    """The batch script at `path` with its @NAME@s replaced.

    Raises:
        ConfigError: it cannot be read, one of them is not in it, or a value cannot stand in a batch script.
    """
    try:
        script = pathlib.Path(path).read_text()
    except (OSError, ValueError) as error:
        raise ConfigError(f"--slurm_script {path}: {getattr(error, 'strerror', 'not a text')}") from None
    for name, value in values.items():
        place = f"@{name.upper()}@"
        if place not in script:
            raise ConfigError(f"--slurm_script {path}: {place} is missing in it")
        cannot = "\n" if name == "options" else '\n"$`\\' + "%" * (name == "folder")  # Slurm reads % as a number
        if bad := set(str(value)) & set(cannot):
            raise ConfigError(f"--slurm: {value} has {''.join(bad)!r} in it, which cannot stand in a batch script")
        script = script.replace(place, str(value))
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
        raise _refused(done)
    return done.stdout.strip().split(";")[0]


def waiting_or_running(job):
    """Elements of an array that are in the queue or run, a list of int.

    Raises:
        ConfigError: the cluster does not answer.
    """
    done = _run("squeue", "--noheader", "--array", "--jobs", job, "--format=%K")
    if done.returncode and "Invalid job id" not in done.stderr:  # which it says of one that is long over
        raise _refused(done)
    return [int(word) for word in done.stdout.split()]


def _refused(done):
    """`ConfigError` with what a command has said on stderr, its last line first: it has the reason."""
    lines = [" ".join(line.split()) for line in reversed(done.stderr.splitlines()) if line.strip()]
    return ConfigError(f"--slurm: {'; '.join(lines) or f'{done.args[0]} fails without a word'}")


def _run(*words, input=None):
    """A command of Slurm, without what an enclosing job has set."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_") or k == "SLURM_CONF"}
    try:
        return subprocess.run(words, input=input, capture_output=True, text=True, env=environment)
    except FileNotFoundError:
        raise ConfigError(f"--slurm: there is no {words[0]} here, and this sweep was submitted before") from None
