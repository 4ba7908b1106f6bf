"""A sweep on a real Slurm cluster of one node, interrupted in every way that a cluster knows, beside one left alone."""

import os
import pathlib
import subprocess
import sys

import pytest
from conftest import SMALL
from slurm_cluster import cluster, missing

from storage.run_folder import find_runs, load_rows, load_state

ROOT = pathlib.Path(__file__).parent.parent
TIMES = ("duration", "decisions_per_s", "updates_per_s", "wall_seconds")
FLAGS = SMALL.replace("--action_repeat 4", "--action_repeat 50")
FLAGS = f"{FLAGS} --batch_size 4 --num_train_steps 1200 --init_steps 20 --eval_freq 200 --num_eval_episodes 1"
FLAGS = f"{FLAGS} --no_env_worker --omega_cody_loss 0.1,0.01 --seed 0,1"

pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=f"no Slurm here: {missing()}")]


def sweep(folder, *words, env=os.environ):
    """Output of sweep.py, run in `folder`."""
    command = [sys.executable, ROOT / "sweep.py", *words]
    done = subprocess.run(command, cwd=folder, env={**env, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def result(folder):
    """The CSV that plot.py makes of the runs, and every row of their logs, without times."""
    subprocess.run([sys.executable, ROOT / "plot.py", folder], check=True)
    return (folder / "curves.csv").read_bytes(), {
        (run.relative_to(folder), log): [
            {key: value for key, value in row.items() if key not in TIMES} for row in load_rows(run, log)
        ]
        for run in find_runs(folder)
        for log in ("train.log", "eval.log")
    }


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The same sweep on this machine, without Slurm."""
    folder = tmp_path_factory.mktemp("here")
    sweep(folder, "--name", "a", "--jobs", "2", "--", *FLAGS.split())
    return result(folder / "runs" / "a")


@pytest.fixture
def one(tmp_path):
    (tmp_path / "cluster").mkdir()
    with cluster(tmp_path / "cluster") as one:
        yield one


def submit(folder, one, *options):
    """Submit the sweep; the job's number and sweep.py's output."""
    words = ["--name", "a", "--slurm", "--time=10", *options, "--", *FLAGS.split()]
    said = sweep(folder, *words, env=one.env)
    return said.split()[1].rstrip(":"), said


def settle(one, runs, states, seconds=600):
    """Wait until the queue is empty; then the runs are in these states."""
    one.wait(lambda: not one.run("squeue", "--noheader").strip(), seconds)
    assert [load_state(run) for run in runs] == states


def at_work(one, *runs):
    """Wait until one of the runs trains."""

    def trains(run):
        return load_state(run) == "running" and any(row["step"] > 30 for row in load_rows(run, "train.log"))

    one.wait(lambda: any(map(trains, runs)), 120)


def element(one, job, index):
    """Slurm's record of an element, {name: value}."""
    said = one.run("scontrol", "show", "job", "-o", f"{job}_{index}")
    return dict(word.partition("=")[::2] for word in said.split())


def test_interrupted_in_every_way(tmp_path, one, here):
    job, said = submit(tmp_path, one, "--jobs", "2")
    assert f"job {job}: 4 runs in 4 elements" in said
    folder = tmp_path / "runs" / "a"
    runs = list(find_runs(folder))
    at_work(one, runs[0])
    at_work(one, runs[1])
    assert element(one, job, 2)["JobState"] == "PENDING"  # --jobs at once
    # as Slurm does ahead of the time limit; scancel itself keeps trying when the element is in the queue again
    with subprocess.Popen(["scancel", "--batch", "--signal=USR1", f"{job}_0"], env=one.env) as signalling:
        one.wait(lambda: element(one, job, 0)["Restarts"] == "1", 60)
        signalling.kill()

    one.run("scontrol", "requeue", f"{job}_1")
    one.wait(lambda: element(one, job, 1)["Restarts"] == "1", 60)

    assert submit(tmp_path, one)[1] == "runs/a: nothing to submit\n"  # queued runs are not submitted again
    at_work(one, runs[2])
    one.run("scancel", f"{job}_2")
    one.wait(lambda: load_state(runs[2]) == "stopped", 60)

    one.wait(lambda: "running" in [load_state(run) for run in (runs[0], runs[1], runs[3])], 120)
    one.node_down()
    one.node_up()
    settle(one, runs, ["finished", "finished", "stopped", "finished"])  # cancelled is cancelled

    again, said = submit(tmp_path, one)
    assert f"job {again}: 1 run in 1 element" in said
    settle(one, runs, ["finished"] * 4)
    assert result(folder) == here
    assert sum("continued" in (run / "args.json").read_text() for run in runs) >= 3


def test_the_time_limit_and_a_more_urgent_job(tmp_path, one, here):
    """Runs that reach the time limit or are preempted are requeued until they finish; two runs per element."""
    job, said = submit(tmp_path, one, "--runs_per_job", "2")
    assert f"job {job}: 4 runs in 2 elements" in said
    folder = tmp_path / "runs" / "a"
    runs = list(find_runs(folder))

    def come_back(times):
        one.wait(lambda: [element(one, job, index)["Restarts"] for index in (0, 1)] == [times] * 2, 120)

    at_work(one, *runs[:2])
    at_work(one, *runs[2:])
    one.run("scontrol", "update", f"jobid={job}", "timelimit=2")  # due now, seen within 30 s; a run may be over by then
    come_back("1")
    one.run("scontrol", "update", f"jobid={job}", "timelimit=10")
    at_work(one, *runs[:2])
    at_work(one, *runs[2:])
    one.run("sbatch", "--partition=urgent", "--ntasks=2", "--output=/dev/null", "--wrap=sleep 1")
    come_back("2")
    settle(one, runs, ["finished"] * 4)
    assert result(folder) == here
