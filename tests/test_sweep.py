"""sweep.py with runs that end in every way. The processes of most tests are a stand-in for train.py that learns nothing
and writes a run's folder as train.py does; what a real one needs is tested with real ones at the end."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import pty
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
from conftest import SMALL
from rich.console import Console

import sweep
from experiments import grid, processes, status
from experiments.slurm import fill
from storage.run_folder import find_runs, is_written, load_args, load_rows, load_state, load_status

ROOT = pathlib.Path(__file__).parent.parent
STAND_IN = """
import contextlib, json, os, sys, time
sys.path.insert(0, ROOT)
import endings
from endings import EXPECTED, Refused, end
from storage.run_folder import RunFolder, parse_run

endings.listen()
try:
    config, resumes = parse_run()
    folder = RunFolder(config, resumes)
except EXPECTED as error:
    end(error)
seed, begun = config.seed, time.time()
folder.begin(0, {})
with open(folder.path / "times", "a") as file:
    print(begun, os.environ["OMP_NUM_THREADS"], os.environ.get("CUDA_VISIBLE_DEVICES"),
          os.environ["CODY_RUNS_PER_GPU"], file=file)
print(f"seed {seed} begins", flush=True)
with open(folder.path / "eval.log", "w") as log:
    print(json.dumps({"step": 0, "env_step": 0, "episode_reward": 100.0 + seed}), file=log)
if seed == 1:
    folder.report(state="diverged", step=7, reason="kl is nan")
    sys.exit(3)
if seed == 2:
    sys.exit("Traceback: a bug")
if seed == 3 and not (folder.path / "again").exists():
    (folder.path / "again").touch()
    os.kill(os.getpid(), 9)
if seed == 4:
    end(Refused("--device cuda: there is none"))
while time.time() < begun + {5: 60, 6: 1, 7: 5}.get(seed, 0):  # 5: until it is told to stop
    try:
        endings.check_signals()
    except endings.Stopped as stop:
        folder.report(state="stopped", step=5, reason=str(stop))
        sys.exit(stop.code)
    time.sleep(0.02)
folder.report(state="finished", step=config.num_train_steps)
with open(folder.path / "times", "a") as file:
    print(time.time(), file=file)
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder, where sweep.py starts the stand-in; the folder of the sweep `a`."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "train.py").write_text(STAND_IN.replace("ROOT", repr(str(ROOT))))
    monkeypatch.setattr(grid, "HERE", tmp_path / "code")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs" / "a"


@pytest.fixture
def start(here):
    """Factory: sweep.py on the stand-in in its own process, as users run it; all its processes end with the test."""
    script = "import pathlib, endings, sweep; from experiments import grid; endings.listen()\n"
    script += "grid.HERE = pathlib.Path('code'); sweep.main()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    begun = []

    def start(*words, **kwargs):
        kwargs = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, **kwargs}
        command = [sys.executable, "-c", script, *words]
        begun.append(subprocess.Popen(command, cwd=here.parent.parent, env=environment, **kwargs))
        return begun[-1]

    yield start
    for process in begun:
        process.kill()
        process.wait()
    for run in find_runs(here):
        if is_written(run):
            os.kill(load_status(run)["pid"], signal.SIGKILL)


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def names(folder):
    return [run["folder"] for run in json.loads((folder / "sweep.json").read_text())["runs"]]


def commands(result):
    """The flags of each command that a dry run has printed, and its folder; a dry run prints nothing else."""
    return [line.split("train.py ")[1].split(" --run_dir ") for line in result.stdout.splitlines()]


def test_commas_make_a_grid(here, call):
    words = (
        "--name a --dry_run -- --omega_cody_loss 0.1,0.01 --task cartpole-swingup,walker-walk --seed=0,1 --save_video"
    )
    result = call("sweep.py", words)
    assert result.returncode == 0
    assert result.stderr == "8 runs to do, 0 over\n"  # stdout, which parallel reads, has only commands
    assert sorted(folder for _, folder in commands(result)) == sorted(
        f"runs/a/omega_cody_loss={omega}/{task}/s{seed}"
        for omega in ("0.1", "0.01")
        for task in ("cartpole-swingup", "walker-walk")
        for seed in (0, 1)
    )
    assert [folder[-1] for _, folder in commands(result)] == list("00001111")  # a curve of everything comes first
    flags, folder = commands(result)[-1]
    assert folder == "runs/a/omega_cody_loss=0.01/walker-walk/s1"
    words = "--domain_name walker --task_name walk --seed 1 --omega_cody_loss 0.01 --save_video --save_tb"
    assert set(flags.split(" --")) >= set(words.removeprefix("--").split(" --")[1:])
    assert not here.exists()


@pytest.mark.parametrize(
    "words, folders",
    [
        ("-- --agent sac", ["sac/cartpole-swingup/s1"]),  # nothing differs
        ("-- --agent sac,cody_sac --seed 3", ["agent=sac/cartpole-swingup/s3", "agent=cody_sac/cartpole-swingup/s3"]),
        (
            "-- --agent=sac --batch-size 8,9 --action_repeat 4,8",
            [f"batch_size={b},action_repeat={r}/cartpole-swingup/s1" for b in "89" for r in "48"],
        ),
        ("-- --action_encoder true,false", [f"action_encoder={v}/cartpole-swingup/s1" for v in ("true", "false")]),
        ("-- --domain_name walker --task_name walk,run", ["cody_sac/walker-walk/s1", "cody_sac/walker-run/s1"]),
        ("-- --actor_log_std_min -10,-9 --seed 2", [f"actor_log_std_min=-{v}/cartpole-swingup/s2" for v in (10, 9)]),
    ],
)  # fmt: skip
def test_folders_say_what_differs(here, call, words, folders):
    assert [folder for _, folder in commands(call("sweep.py", f"--name a --dry_run {words}"))] == [
        f"runs/a/{folder}" for folder in folders
    ]


def test_variants(here, call, monkeypatch):
    here.parent.parent.joinpath("rows.txt").write_text("# two rows\n\nplain:\nbig: --batch_size 512  # as the notes\n")
    monkeypatch.setattr(
        sys, "argv", ["sweep.py", "--name", "a", "--dry_run", "--variants", "rows.txt", "--variant", "x-1: --agent sac"]
    )
    words = [*sys.argv[1:], "--", "--batch_size", "128", "--seed", "0,1"]
    args, flags = sweep.parse_command(words)
    runs = sweep.plan(args, flags, here)
    assert list(runs) == [f"{name}/cartpole-swingup/s{seed}" for seed in (0, 1) for name in ("x-1", "plain", "big")]
    sizes = [words[words.index("--batch_size") + 1] for words in runs.values()]
    assert sizes == ["128", "128", "512"] * 2  # a variant's own flags win
    args, flags = sweep.parse_command([*words[:2], "--only", "big,plain", *words[2:]])
    assert [name.split("/")[0] for name in sweep.plan(args, flags, here)] == ["big", "plain"] * 2


@pytest.mark.parametrize("file", ["ablation.txt", "100k.txt"])
def test_shipped_variants(here, call, file):
    lines = [line for line in (ROOT / "experiments" / file).read_text().splitlines() if not line.startswith("#")]
    if file == "ablation.txt":  # SAC from states has no pixels to share
        result = call("sweep.py", f"--name a --dry_run --variants {ROOT / 'experiments' / file} -- --update_mode joint")
        assert result.returncode == 2 and result.stderr.startswith("sweep.py: error: --update_mode joint: ")
        assert result.stderr.endswith(" (in variant state)\n")
    result = call("sweep.py", f"--name a --dry_run --variants {ROOT / 'experiments' / file}")
    assert len(commands(result)) == len(lines) and result.stderr == f"{len(lines)} runs to do, 0 over\n"


@pytest.mark.parametrize(
    "words, line",
    [
        ("", "needs one of --name, --resume and --status"),
        ("--name a --status b", "needs one of --name, --resume and --status"),
        ("--name=", "--name: must not be empty"),
        ("--status=", "--status: must not be empty"),
        ("--name a --work_dir= ", "--work_dir: must not be empty"),
        ("--status b --jobs 2", "--jobs: has no effect with --status"),
        ("--resume b --variant x:", "--variant: has no effect with --resume"),
        ("--name a --runs_per_job 2", "--runs_per_job, --slurm_script: have no effect without --slurm"),
        ("--name a --seed 0,1", "--seed: a flag of train.py, which comes after the --"),
        ("--name a --dry_run --no-save-tb", "--no-save-tb: a flag of train.py, which comes after the --"),
        ("--name a --task=walker-walk", "--task: a flag of train.py, which comes after the --"),
        ("--name a --everything", "unrecognized flag --everything; --help lists them"),
        ("--name a --job 2", "unrecognized flag --job; the nearest is --jobs"),
        ("--name a --jobs 0", "--jobs 0: must be at least 1"),
        ("--name a/b", "--name a/b: must be a single folder's name"),
        ("--name ..", "--name ..: must be a single folder's name"),
        ("--name a -- --save_tb --wandb x", "--wandb x: the package is not installed"),
        ("--status runs", "--status runs: holds no runs"),
        ("--resume runs/a", "--resume runs/a: not the folder of a sweep"),
        ("--resume runs/a -- --seed 1", "--seed: --status and --resume take the runs of sweep.json, no others"),
        ("--name a --only x", "--only x: no such variant; there are none"),
        ("--name a --variants none.txt", "--variants none.txt: No such file or directory"),
        ("--name a -- --omega_cody_loss 0.1,-1", "--omega_cody_loss -1.0: must not be negative"),
        ("--name a -- --omga_cody_loss 0.1,1", "unrecognized flag --omga_cody_loss; the nearest is --omega_cody_loss"),
        ("--name a -- --omega_cody_loss 0.1,", "--omega_cody_loss 0.1,: an empty value"),
        ("--name a -- --omega_cody_loss 0.1,0.10", "omega_cody_loss=0.1/cartpole-swingup/s1 and omega_cody_loss=0.10/"),
        ("--name a -- --seed 1,1", "cody_sac/cartpole-swingup/s1 and cody_sac/cartpole-swingup/s1: identical runs"),
        ("--name a -- --seed 1 --seed 2", "--seed: given twice; separate values with commas"),
        ("--name a -- --seed -1", "--seed -1: a sweep needs explicit seeds, which name its folders"),
        ("--name a -- seed 1", "seed: flags of train.py and their values come after the --"),
        ("--name a -- --seed 1 2", "2: flags of train.py and their values come after the --"),
        ("--name a -- --run_dir x", "--run_dir: a sweep names the folders of its runs"),
        ("--name a -- --save_video yes", "--save_video yes: takes no value, or true and false for a grid"),
        ("--name a -- --task walker", "--task walker: must be domain-task, such as cartpole-swingup"),
        (
            "--name a -- --task walker-wolk,walker-walk",
            "--domain_name walker --task_name wolk: no such task; the nearest",
        ),
        ("--name a -- --camera_id 0,7", "--camera_id 7: must be from -1 to 1 on cartpole swingup"),
        ("--name a -- --task walker-walk --domain_name walker", "--task walker-walk: not together with --domain_name"),
        ("--name a --work_dir code/train.py", "--name code/train.py/a/cody_sac/cartpole-swingup/s1: "),
        (f"--name {'a' * 256}", f"--name {('runs/' + 'a' * 256)[:60]}...: no name in it may be longer than 255 bytes"),
    ],
)
def test_one_wrong_value_is_one_line_and_creates_nothing(here, call, words, line):
    result = call("sweep.py", words)
    assert result.returncode == 2 and result.stdout == ""
    (said,) = result.stderr.splitlines()
    assert said.startswith(f"sweep.py: error: {line}")
    assert not here.parent.exists()


@pytest.mark.parametrize(
    "variant, line",
    [
        ("x --agent sac", "--variant x --agent sac: must be 'name: flags'"),
        ("..: --agent sac", "--variant ..: --agent sac: must be 'name: flags'"),
        ("x: --batch_size 1,2", "--variant x: contains a grid; grids come after the --"),
        ('x: --agent "sac', "--variant x: No closing quotation"),
        ("y: --seed 3", "--seed: has several values after the -- and one in --variant y"),
    ],
)
def test_wrong_variants(here, variant, line):
    args, flags = sweep.parse_command(["--name", "a", "--variant", variant, "--", "--seed", "1,2"])
    with pytest.raises(sweep.Refused) as error:
        sweep.plan(args, flags, here)
    assert str(error.value).startswith(line)


def test_every_end_of_a_run(here, call):
    """Finished, diverged, repeatedly crashing, killed once, refused: each is reported, and retries are limited."""
    result = call("sweep.py", "--name a --jobs 3 -- --seed 0,1,2,3,4")
    assert result.returncode == 1
    said = result.stdout.splitlines()
    run = "cody_sac/cartpole-swingup/s"
    assert f"{run}0: finished, return 100" in said
    assert f"{run}1: diverged: kl is nan" in said
    assert said.count(f"{run}2: exit code 1: Traceback: a bug; started again") == 2
    assert said.count(f"{run}2: exit code 1: Traceback: a bug; given up") == 1
    assert said.count(f"{run}3: killed by SIGKILL: seed 3 begins; started again") == 1
    assert f"{run}3: finished, return 103" in said
    refused = f"{run}4: exit code 2: train.py: error: --device cuda: there is none"
    assert [line for line in said if line.startswith(refused)] == [f"{refused}; given up"]
    assert said[-1] == "2 finished, 1 diverged, 2 died"
    assert (here / f"{run}2/output.log").read_text().count("a bug") == 3  # nothing that a run has said is lost

    # the same command tries again what has failed, and nothing else
    before = {folder: (folder / "times").read_text() for folder in find_runs(here)}
    assert call("sweep.py", "--name a --jobs 3 -- --seed 0,1,2,3,4").returncode == 1
    changed = [folder.name for folder in before if (folder / "times").read_text() != before[folder]]
    assert changed == ["s2", "s4"]
    result = call("sweep.py", f"--status {here}")
    assert result.returncode == 0 and f"{run}2: Traceback: a bug" in result.stdout


def test_a_changed_grid_adds_and_never_removes(here, call):
    assert call("sweep.py", "--name a -- --omega_cody_loss 0.1 --seed 0").returncode == 0
    first = "cody_sac/cartpole-swingup/s0"
    assert names(here) == [first]
    result = call("sweep.py", "--name a -- --omega_cody_loss 1e-1,1e-2 --seed 0,1")
    assert result.returncode == 0  # seed 1 diverges: a result
    omegas = [
        f"omega_cody_loss={omega}/cartpole-swingup/s{seed}" for omega, seed in (("1e-2", 0), ("1e-1", 1), ("1e-2", 1))
    ]
    assert sorted(names(here)) == sorted([first, *omegas])
    assert len((here / first / "times").read_text().splitlines()) == 2  # it was there, and was not begun again
    assert call("sweep.py", "--name a -- --omega_cody_loss 1e-2 --seed 0").returncode == 0
    assert sorted(names(here)) == sorted([first, *omegas])

    for seeds in ("0", "0,4"):
        result = call("sweep.py", f"--name a -- --omega_cody_loss 1e-1,1e-2 --seed {seeds} --batch_size 8")
        assert result.returncode == 2 and "--batch_size 8: " in result.stderr and len(result.stderr.splitlines()) == 1
    assert sorted(names(here)) == sorted([first, *omegas])


def test_a_full_disk_stops_only_the_run_that_meets_it(here, call, monkeypatch):
    popen = subprocess.Popen

    def full(command, **kwargs):
        if command[-1].endswith("s0"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return popen(command, **kwargs)

    monkeypatch.setattr(processes.subprocess, "Popen", full)
    result = call("sweep.py", "--name a --jobs 2 -- --seed 0,6")
    assert result.returncode == 1
    said = result.stdout.splitlines()
    run = "cody_sac/cartpole-swingup/s"
    assert said.count(f"{run}0: [Errno 28] No space left on device; started again") == 2
    assert f"{run}0: [Errno 28] No space left on device; given up" in said
    assert f"{run}6: finished, return 106" in said


def test_signals_while_it_imports(here):
    """They are recorded; --status, which starts nothing, goes on."""
    script = (
        "import os, runpy, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(name, *rest): name == 'tyro' and os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder)\n"
        f"sys.argv = ['sweep.py', '--status', 'none']; runpy.run_path({str(ROOT / 'sweep.py')!r}, run_name='__main__')"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "sweep.py: error: --status none: holds no runs\n")


def test_a_name_that_another_run_has(here, call):
    """A run keeps its folder under a new name of its variant; the variant that now has the old name is refused."""
    file = here.parent.parent / "rows.txt"
    file.write_text("wide: --hidden_dim 2048")
    assert call("sweep.py", "--name a --variants rows.txt -- --seed 0").returncode == 0
    lines = ["wide: --hidden_dim 512", "wider: --hidden_dim 2048"]
    for order in (lines, lines[::-1]):
        file.write_text("\n".join(order))
        result = call("sweep.py", "--name a --variants rows.txt -- --seed 0")
        assert result.returncode == 2 and result.stderr.count("\n") == 1
        assert result.stderr.startswith("sweep.py: error: wide/cartpole-swingup/s0: two runs would share this folder")
    assert names(here) == ["wide/cartpole-swingup/s0"]


def test_a_run_that_was_extended_by_hand(here, call):
    """The sweep leaves it alone, also while it is unfinished, and executes the others."""
    words = "--name a -- --num_train_steps 2000 --seed"
    assert call("sweep.py", f"{words} 0").returncode == 0
    run = here / "cody_sac/cartpole-swingup/s0"
    for state in ("stopped", "finished"):
        for name, value in (("args.json", {"num_train_steps": 4000}), ("run.json", {"state": state})):
            path = run / name
            path.write_text(json.dumps({**json.loads(path.read_text()), "num_train_steps": 4000, **value}))
        result = call("sweep.py", f"--dry_run {words} 0,6")
        assert (result.returncode, result.stderr) == (0, "1 run to do, 1 over\n")
    assert call("sweep.py", f"{words} 0,6").returncode == 0
    assert len((run / "times").read_text().splitlines()) == 2  # it began once


def spans(folder):
    """[(begin, end)] of the stand-ins, from their `times`."""
    return [[float(line.split()[0]) for line in (run / "times").read_text().splitlines()] for run in find_runs(folder)]


def test_jobs_share_the_machine(here, call, monkeypatch):
    monkeypatch.setattr(processes, "available_cores", lambda: 7)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert call("sweep.py", "--name a --jobs 3 -- --seed 6 --omega_cody_loss 1,2,3,4,5").returncode == 0
    moments = sorted([(begin, 1) for begin, _ in spans(here)] + [(end, -1) for _, end in spans(here)])
    running = [sum(change for _, change in moments[: k + 1]) for k in range(len(moments))]
    assert max(running) == 3
    told = [tuple((run / "times").read_text().split()[1:4]) for run in find_runs(here)]
    assert {told[0], told[1]} == {("2", "4", "2"), ("2", "6", "2")} and told[2] == ("2", "4", "2")

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert [(p["OMP_NUM_THREADS"], p["LP_NUM_THREADS"]) for p in processes.job_environments(2)] == [("1", "0")] * 2
    assert [p.get("LP_NUM_THREADS") for p in processes.job_environments(1)] == [os.environ.get("LP_NUM_THREADS")]
    monkeypatch.setenv("LP_NUM_THREADS", "3")
    assert [p["LP_NUM_THREADS"] for p in processes.job_environments(2)] == ["3"] * 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8f6d")
    assert [p["CUDA_VISIBLE_DEVICES"] for p in processes.job_environments(2)] == ["GPU-8f6d"] * 2


def test_gpus_that_the_driver_knows_of(here, monkeypatch):
    driver = here.parent.parent / "bin" / "nvidia-smi"
    driver.parent.mkdir()
    driver.write_text("#!/bin/sh\nprintf '0\\n1\\n2\\n'\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", f"{driver.parent}:{os.environ['PATH']}")
    assert [p["CUDA_VISIBLE_DEVICES"] for p in processes.job_environments(4)] == ["0", "1", "2", "0"]
    driver.write_text("#!/bin/sh\nexit 9\n")  # no driver
    assert all("CUDA_VISIBLE_DEVICES" not in p for p in processes.job_environments(2))


@pytest.mark.parametrize("sent, code", [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_stopped_sweep_resumes(here, start, sent, code):
    command = ["--name", "a", "--jobs", "2", "--", "--seed", "5,0", "--omega_cody_loss", "1,2"]
    process = start(*command)
    waiting = [here / f"omega_cody_loss={omega}/cartpole-swingup/s5" for omega in (1, 2)]
    until(lambda: all(load_state(run) == "running" for run in waiting))
    process.send_signal(sent)
    said = process.communicate(timeout=30)[0].splitlines()
    assert process.returncode == code
    assert [load_state(run) for run in find_runs(here)] == ["stopped", "stopped", "missing", "missing"]
    assert "stopping: saving 2 runs" in said and said[-1] == "2 stopped, 2 waiting"

    process = start("--resume", "runs/a", "--jobs", "4")
    until(lambda: [load_state(run) for run in find_runs(here)] == ["running", "running", "finished", "finished"])
    process.send_signal(sent)
    process.communicate(timeout=30)


def test_runs_that_a_killed_sweep_has_left_behind(here, start):
    """They are neither started a second time nor joined by more than --jobs allows."""
    command = ["--name", "a", "--jobs", "1", "--", "--seed", "5,0"]
    process = start(*command)
    first = here / "cody_sac/cartpole-swingup/s5"
    until(lambda: load_state(first) == "running")
    process.kill()
    process.wait()
    stopped = start(*command)
    process = start(*command)
    pid = load_status(first)["pid"]
    who = f"cody_sac/cartpole-swingup/s5: {{}} process {pid} on {socket.gethostname()}, which {{}}\n"
    for each in (stopped, process):
        assert each.stdout.readline() == who.format("waiting for", "is already running it")
    time.sleep(2 * processes.POLL)
    stopped.send_signal(signal.SIGTERM)
    said = stopped.communicate(timeout=30)[0]
    assert who.format("still running in", "this sweep did not start") in said
    assert load_state(here / "cody_sac/cartpole-swingup/s0") == "missing" and load_state(first) == "running"
    assert (first / "times").read_text().count("\n") == 1
    os.kill(load_status(first)["pid"], signal.SIGTERM)
    until(lambda: (first / "times").read_text().count("\n") == 2)  # saved, and then begun by the second sweep
    assert load_status(first)["host"] == socket.gethostname()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)


def test_on_a_terminal_the_table_is_drawn_live(here, start):
    ours, theirs = pty.openpty()
    process = start("--name", "a", "--", "--seed", "7", stdout=theirs, stderr=theirs, text=False)
    os.close(theirs)
    shown = b""
    while select.select([ours], [], [], 30)[0]:
        try:
            shown += os.read(ours, 65536)
        except OSError:  # the end of a terminal
            break
    assert process.wait() == 0
    text = shown.decode()
    assert text.count("cody_sac/cartpole-swingup/s7") >= 2 and "running" in text and "\x1b[" in text
    assert "1 finished" in text.splitlines()[-1]


@pytest.mark.parametrize(
    "script, state, word",
    [
        ("raise ImportError('libcudart is missing')", "died", "ImportError: libcudart is missing"),
        ("import sys; sys.exit(75)", "missing", "waiting"),
    ],
)
def test_a_run_that_ends_before_it_begins(here, call, script, state, word):
    """It has no args.json; its exit code tells whether a second start can succeed."""
    (here.parent.parent / "code" / "train.py").write_text(script)
    assert call("sweep.py", "--name a -- --seed 0").returncode == 1
    result = call("sweep.py", f"--status {here}")
    assert [load_state(run) for run in find_runs(here)] == [state]
    assert word in result.stdout and result.stdout.endswith(f"1 {status.run_status(*find_runs(here)).state}\n")


def test_a_full_disk_under_a_run_that_cannot_begin_stops_no_other(here, call, monkeypatch):
    def full(path, value):
        raise OSError(errno.ENOSPC, "No space left on device")

    (here.parent.parent / "code" / "train.py").write_text("raise SystemExit(1)")
    monkeypatch.setattr(processes, "write_json", full)
    result = call("sweep.py", "--name a -- --seed 0,1")
    assert result.returncode == 1 and result.stdout.count("given up") == 2


def test_only_runs_that_change_are_read(here, call, monkeypatch):
    """Logs of many finished runs, read every second, would keep a core busy."""
    seen, real = [], status.run_status

    def noted(run):
        seen.append((run.name, real(run).state))
        return real(run)

    monkeypatch.setattr(processes, "run_status", noted)
    monkeypatch.setattr(processes, "POLL", 0.2)
    assert call("sweep.py", "--name a --jobs 2 -- --seed 20,21,7").returncode == 0
    for seed in (20, 21):  # when it ends, in the table that is drawn next, and in the last one
        assert seen.count((f"s{seed}", "finished")) <= 3
    assert seen.count(("s7", "running")) > 10


def test_a_folder_that_cannot_be_read_hides_no_other(here, call):
    call("sweep.py", "--name a -- --seed 20,21")
    (here / "cody_sac/cartpole-swingup/s20/args.json").write_text("")
    result = call("sweep.py", f"--status {here}")
    assert result.returncode == 0 and "s21  finished" in result.stdout
    assert "/s20: not the folder of a run (args.json: " in result.stdout


def test_runs_of_no_sweep_are_left_alone(here, call, cluster):
    """The folder may already hold runs that train.py started without a sweep."""
    own = here / "cody_sac-20260101-000000-s1"
    own.mkdir(parents=True)
    (own / "args.json").write_text("{}")
    for words in ("--name a", "--name a --slurm --time=1"):
        result = call("sweep.py", f"{words} -- --seed 0")
        assert result.returncode == 2
        assert (
            result.stderr
            == "sweep.py: error: --name a: runs/a contains runs that do not belong to a sweep; choose another\n"
        )
    assert list(here.parent.rglob("*")) == [here, own, own / "args.json"]


def test_status_needs_the_folders_alone(here, call):
    call("sweep.py", "--name a -- --seed 0,1")
    copy = here.parent / "copy"
    shutil.copytree(here, copy)
    (copy / "cody_sac/cartpole-swingup/s1/run.json").unlink()
    result = call("sweep.py", f"--status {here.parent}")
    assert result.returncode == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["a/cody_sac/cartpole-swingup/s0", "finished", "63,000", "of", "63,000", "100"] in lines
    assert ["a/cody_sac/cartpole-swingup/s1", "diverged", "7", "of", "63,000", "101"] in lines
    assert ["copy/cody_sac/cartpole-swingup/s1", "stopped", "0", "of", "63,000", "101"] in lines


# --- Slurm, as far as it goes without a cluster; test_slurm.py has one


@pytest.fixture
def cluster(here, monkeypatch):
    """Stand-ins for Slurm's commands that record their arguments."""
    folder = here.parent.parent / "bin"
    folder.mkdir()
    sbatch = f"#!/bin/sh\ncat > {folder}/script\nenv > {folder}/env\necho 17\n"
    for name, text in (("sbatch", sbatch), ("squeue", f"#!/bin/sh\ncat {folder}/queue\n")):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "queue").write_text("")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def slurm(call, rest):
    return call("sweep.py", f"--name a --slurm --time=1:00:00 {rest}")


def test_all_options_in_the_script(here, call, cluster, monkeypatch):
    words = ["sweep.py", "--name", "a", "--slurm", "", "--", "--seed", "0"]
    monkeypatch.setattr(sys, "argv", words)
    sweep.main()
    assert "#SBATCH --array=0-0\n" in (cluster / "script").read_text()


def test_a_job_id_that_is_now_another_jobs(here, call, cluster):
    assert slurm(call, "-- --seed 0,1").returncode == 0
    (cluster / "queue").write_text("N/A\n7\n1\n")
    done = slurm(call, "-- --seed 0,1")
    assert done.returncode == 0 and done.stdout.startswith("job 17: 1 run in 1 element")


def test_the_batch_script(here, call, cluster, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "3")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "64")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    monkeypatch.setenv("SBATCH_ACCOUNT", "lab")
    dry = slurm(call, "--dry_run --jobs 4 -- --seed 0,1,2")
    assert dry.returncode == 0 and not here.exists()
    done = slurm(call, "--jobs 4 -- --seed 0,1,2")
    assert done.returncode == 0 and done.stdout.startswith("job 17: 3 runs in 3 elements")
    script = (cluster / "script").read_text()
    assert dry.stdout.startswith(script)
    commands_of = dry.stdout.removeprefix(script).strip()
    assert commands_of.count("train.py ") == 3 and commands_of.splitlines()[4:5] == ["# element 2"]
    assert dry.stderr == "3 runs in 3 elements to submit, 0 over or in the queue\n"
    assert not re.search("@[A-Z_]+@", script)
    for line in (
        '--job-name="a"',
        "--array=0-2%4",
        "--requeue",
        "--signal=B:USR1@90",
        "--open-mode=append",
        "--time=1:00:00",
    ):
        assert f"#SBATCH {line}\n" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    told = dict(line.partition("=")[::2] for line in (cluster / "env").read_text().splitlines())
    assert {name for name in told if name.startswith("SLURM_")} == {"SLURM_CONF"} and told["SBATCH_ACCOUNT"] == "lab"
    assert (here / "slurm").is_dir()  # Slurm makes no folder for an output


def test_only_what_is_not_over_is_submitted_and_only_once(here, call, cluster):
    call("sweep.py", "--name a -- --seed 0")
    assert slurm(call, "--runs_per_job 2 -- --seed 0,1,2,3,4").stdout.startswith("job 17: 4 runs in 2 elements")
    assert "#SBATCH --array=0-1\n" in (cluster / "script").read_text()
    (cluster / "queue").write_text("1\n")
    assert slurm(call, "-- --seed 0,1,2,3,4,6").stdout.startswith("job 17: 3 runs in 3 elements")  # 1, 2 and the new 6
    (cluster / "queue").write_text("0\n1\n")
    assert slurm(call, "-- --seed 0,1,2,3,4").stdout == "runs/a: nothing to submit\n"
    result = slurm(call, "-- --seed 3 --batch_size 8")  # of a run that waits in the queue
    assert result.returncode == 2 and "--batch_size 8: runs/a/cody_sac/cartpole-swingup/s3 was planned" in result.stderr
    (cluster / "squeue").write_text("#!/bin/sh\necho 'slurm_load_jobs error: Unable to contact' >&2; exit 1\n")
    result = slurm(call, "-- --seed 0,1,2,3,4")
    assert result.returncode == 2 and "Unable to contact" in result.stderr


def test_an_element_does_its_own_runs(here, call, cluster, monkeypatch):
    slurm(call, "--runs_per_job 2 -- --seed 0,1,6")
    assert 'SWEEP_ELEMENT="0:$SLURM_ARRAY_TASK_ID"' in (cluster / "script").read_text()
    slurm(call, "-- --seed 9")
    monkeypatch.setenv("SWEEP_ELEMENT", "0:0")
    assert call("sweep.py", f"--resume {here}").returncode == 0
    assert [load_state(run) for run in find_runs(here)] == ["finished", "diverged", "missing", "missing"]
    monkeypatch.setenv("SWEEP_ELEMENT", "0:1")
    assert call("sweep.py", f"--resume {here}").returncode == 0
    assert load_args(here / "cody_sac/cartpole-swingup/s6")["seed"] == 6
    monkeypatch.setenv("SWEEP_ELEMENT", "0:2")
    result = call("sweep.py", f"--resume {here}")
    assert result.returncode == 2 and "SWEEP_ELEMENT=0:2: " in result.stderr


def test_sweeps_that_grow_at_the_same_time(here, start):
    """Each adds its own runs, and none is lost."""
    processes = [start("--name", "a", "--", "--seed", f"{seed},{seed + 10}") for seed in (20, 21, 22, 23)]
    for process in processes:
        assert process.communicate(timeout=120)[0].splitlines()[-1] == "2 finished"
    assert sorted(names(here)) == [f"cody_sac/cartpole-swingup/s{seed}" for seed in (20, 21, 22, 23, 30, 31, 32, 33)]


def test_one_process_at_a_time_changes_the_list(here, start):
    here.mkdir(parents=True)
    with open(here / "sweep.lock", "a") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        process = start("--name", "a", "--", "--seed", "20")
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=5)
        assert not (here / "sweep.json").exists()
        theirs = {"folder": "sac/cartpole-swingup/s1", "flags": ["--agent", "sac"]}
        (here / "sweep.json").write_text(json.dumps({"runs": [theirs], "jobs": []}))
    assert process.wait(timeout=60) == 0
    assert names(here) == ["sac/cartpole-swingup/s1", "cody_sac/cartpole-swingup/s20"]


def test_a_reader_that_goes_away(here, start):
    """As in `sweep.py ... | head -1`."""
    process = start("--name", "a", "--", "--seed", "20,6,21")
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert [load_state(run) for run in find_runs(here)] == ["finished"] * 3
    for flags, said in (("--status runs/a", ""), ("--name b --dry_run -- --seed 0,1,2", "3 runs to do, 0 over\n")):
        process = start(*flags.split(), stderr=subprocess.PIPE)
        process.stdout.close()
        assert process.wait(timeout=60) == 0 and process.stderr.read() == said


def test_a_narrow_terminal(capsys):
    """Only the names are wrapped."""
    run = status.RunStatus("finished", 63_000, 63_000, 1000.0, None, "")
    Console(width=60).print(
        status.status_table({f"omega_cody_loss=0.0{k},cody_lr=1e-4/ball_in_cup-catch/s1": run for k in (1, 2)})
    )
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 60
    assert sum("finished  63,000 of 63,000    1000" in line for line in lines) == 2


def test_no_cluster(here, call, monkeypatch):
    monkeypatch.setenv("PATH", str(here))
    result = slurm(call, "-- --seed 0")
    assert result.returncode == 2 and not here.exists()
    assert (
        result.stderr == "sweep.py: error: --slurm: sbatch not found; without --slurm the sweep runs on this machine\n"
    )


def test_batch_scripts_that_cannot_work(here, call, cluster):
    script = here.parent.parent / "mine.sh"
    script.write_text((ROOT / "experiments" / "slurm.sh").read_text().replace("@ARRAY@", "0-1"))
    for words, line in (
        ("--slurm_script mine.sh", "--slurm_script mine.sh: @ARRAY@ is missing"),
        ("--slurm_script none.sh", "--slurm_script none.sh: No such file or directory"),
        ("--work_dir runs%a", "--slurm: "),
    ):
        result = slurm(call, f"{words} -- --seed 0")
        assert result.returncode == 2 and result.stderr.startswith(f"sweep.py: error: {line}")
    assert not here.parent.exists() and not (here.parent.parent / "runs%a").exists()


def test_options_of_sbatch_may_be_quoted():
    values = dict.fromkeys(["name", "array", "folder", "here", "python", "sweep", "number"], "x")
    script = fill(ROOT / "experiments" / "slurm.sh", options='--constraint="a100|h100" --mem=8G', **values)
    assert '#SBATCH --constraint="a100|h100" --mem=8G\n' in script


def test_a_cluster_that_refuses(here, call, cluster):
    (cluster / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: Invalid job array specification' >&2\nexit 1\n")
    result = slurm(call, "-- --seed 0")
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert "Invalid job array specification" in result.stderr and not here.exists()

    here.mkdir(parents=True)  # existing files stay
    (here / "notes").write_text("mine")
    assert slurm(call, "-- --seed 0").returncode == 2
    assert (here / "notes").read_text() == "mine" and names(here) == []
    assert call("sweep.py", "--name a -- --seed 0").returncode == 0
    result = slurm(call, "-- --seed 0,1")
    assert result.returncode == 2 and names(here) == ["cody_sac/cartpole-swingup/s0"]  # none that was not submitted


def test_the_reason_comes_first(here, call, cluster):
    """The output of sbatch may be long, and a refusal is truncated."""
    (cluster / "sbatch").write_text("#!/bin/sh\nprintf 'sbatch: error: x\nsbatch: error: the reason\n' >&2\nexit 1\n")
    result = slurm(call, "-- --seed 0")
    assert result.stderr == "sweep.py: error: --slurm: sbatch: error: the reason; sbatch: error: x\n"


def test_a_copy_of_a_sweep_that_was_submitted_elsewhere(here, call, cluster, monkeypatch):
    slurm(call, "-- --seed 0")
    (cluster / "squeue").unlink()
    monkeypatch.setenv("PATH", str(cluster))
    result = slurm(call, "--dry_run -- --seed 0")
    assert result.returncode == 2
    assert result.stderr == ("sweep.py: error: --slurm: squeue not found, which a sweep with submitted jobs needs\n")


# --- real runs

TINY = (
    f"{SMALL} --batch_size 4 --num_train_steps 60 --init_steps 20 --eval_freq 30 --num_eval_episodes 1 --no_env_worker"
)
TINY = TINY.replace("--action_repeat 4", "--action_repeat 100")


def test_a_real_run(tmp_path):
    words = f"--name a --work_dir {tmp_path} -- {TINY} --task cartpole-balance --seed 3".split()
    done = subprocess.run([sys.executable, ROOT / "sweep.py", *words], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    run = tmp_path / "a/cody_sac/cartpole-balance/s3"
    assert list(find_runs(tmp_path)) == [run] and load_state(run) == "finished"
    assert [row["step"] for row in load_rows(run, "eval.log")] == [0, 30, 60]
    assert list((run / "tb").iterdir()) and "seed 3, on " in (run / "output.log").read_text()


@pytest.mark.slow
def test_kill_9_of_everything_changes_nothing(tmp_path):
    """A sweep of real runs, its process tree killed at several moments, gives plot.py the CSV of one left alone."""
    grid = f"-- {TINY} --checkpoint_minutes 0.01 --omega_cody_loss 0.1,0.01 --seed 0,1".split()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(name):
        words = ["--name", name, "--work_dir", tmp_path, "--jobs", "2", *grid]
        return subprocess.Popen([sys.executable, ROOT / "sweep.py", *words], env=environment, stdout=subprocess.DEVNULL)

    assert start("alone").wait() == 0
    for seconds in (25, 35, 45):
        process = start("killed")
        time.sleep(seconds)
        tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for each in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait()
    assert start("killed").wait() == 0
    for name in ("alone", "killed"):
        subprocess.run([sys.executable, ROOT / "plot.py", tmp_path / name], check=True)
    alone, killed = [(tmp_path / name / "curves.csv").read_bytes() for name in ("alone", "killed")]
    assert alone == killed and alone.count(b"\n") == 1 + 4 * 3
