"""Faults of other people's machines: file systems, notebooks, hooks, shared folders."""

import errno
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import pytest
from test_plot import make_run, noisy
from test_run_folder import begun, rows  # noqa: F401, begun is a fixture
from test_train import STATE

from endings import Refused
from storage.run_folder import find_runs, git_commit, load_rows, load_status, parse_run, write_json

ROOT = pathlib.Path(__file__).parent.parent


def command(script, flags, **kwargs):
    words = [sys.executable, str(ROOT / script), *flags.split()]
    return subprocess.run(words, capture_output=True, text=True, **kwargs)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF])
def test_a_file_system_that_cannot_sync_folders(tmp_path, monkeypatch, code):
    fsync = os.fsync

    def refuse(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    write_json(tmp_path / "a.json", {"b": 1})
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": 1}


@pytest.mark.parametrize("stray", [b"\x80\xf3", b"\x00" * 512, b"12\n", b'{"step": 3'])
def test_stray_bytes_in_a_log(tmp_path, call, stray):
    """After a power cut; every command leaves them out."""
    make_run(tmp_path / "s/v/cartpole-swingup/s1", "", noisy(1))
    run = tmp_path / "s/v/cartpole-swingup/s1"
    before = load_rows(run, "eval.log")
    with open(run / "eval.log", "ab") as log:
        log.write(stray)
    assert load_rows(run, "eval.log") == before
    assert call("sweep.py", f"--status {tmp_path}/s").returncode == 0
    assert call("plot.py", f"{tmp_path}/s").returncode == 0


def test_a_run_resumes_with_stray_bytes_in_its_logs(begun, tmp_path, call):  # noqa: F811
    shutil.copytree(begun / "kept", tmp_path / "run")
    before = rows(tmp_path / "run" / "train.log")
    for name in ("train.log", "eval.log"):
        with open(tmp_path / "run" / name, "ab") as log:
            log.write(b"\x80\xf3")
    assert call("train.py", f"--num_train_steps 26 --run_dir {tmp_path}/run").returncode == 0
    after = rows(tmp_path / "run" / "train.log")
    assert after[: len(before)] == before and len(after) > len(before)


def test_pictures_do_not_depend_on_the_environment(tmp_path):
    make_run(tmp_path / "a/v/cartpole-swingup/s1", "", noisy(1))
    rc = tmp_path / "matplotlibrc"
    rc.write_text("text.usetex: True\nfont.family: serif\nlines.linewidth: 5\nsavefig.bbox: tight\nbackend: Qt5Agg\n")
    plain = {name: value for name, value in os.environ.items() if name not in ("MPLBACKEND", "MATPLOTLIBRC")}
    for name, variable, value in (
        ("plain", "MPLBACKEND", ""),
        ("rc", "MATPLOTLIBRC", str(rc)),
        ("notebook", "MPLBACKEND", "module://matplotlib_inline.backend_inline"),
        ("qt", "MPLBACKEND", "Qt4Agg"),
    ):
        done = command("plot.py", f"{tmp_path}/a --out {tmp_path}/{name}", env={**plain, variable: value})
        assert done.returncode == 0, done.stderr
        for ending in (".png", ".pdf", ".csv"):
            assert (tmp_path / f"{name}{ending}").read_bytes() == (tmp_path / f"plain{ending}").read_bytes(), name


@pytest.fixture
def copied(tmp_path):
    """The code without its .git, in a folder of another repository."""
    other = tmp_path / "other"
    shutil.copytree(ROOT / "storage", other / "cody" / "storage")
    for name in ("config", "command_line", "endings", "rendering"):
        shutil.copy(ROOT / f"{name}.py", other / "cody")
    git = ["git", "-C", other, "-c", "user.name=n", "-c", "user.email=e"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "other"]):
        subprocess.run([*git, *words], check=True)
    return other


def test_the_commit_of_another_repository_is_not_ours(copied):
    code = "from storage.run_folder import git_commit; print(git_commit())"
    done = subprocess.run([sys.executable, "-c", code], cwd=copied / "cody", capture_output=True, text=True)
    assert done.stdout == "None\n", done.stderr


def test_a_hook_that_sets_git_dir(copied, monkeypatch):
    here = git_commit()
    monkeypatch.setenv("GIT_DIR", str(copied / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(copied))
    assert git_commit() == here


def test_no_lock_is_taken_in_the_repository(tmp_path, monkeypatch):
    """`git add` in another terminal would fail."""
    log = tmp_path / "log"
    (tmp_path / "git").write_text(f'#!/bin/sh\necho "$@" >> {log}\nexec {shutil.which("git")} "$@"\n')
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    git_commit()
    assert all("--no-optional-locks" in line for line in log.read_text().splitlines())


@pytest.fixture
def nobody(tmp_path, call):
    """Factory: `call` as a user who is not root, if this is root, with all modules imported before."""
    if os.geteuid() != 0:
        yield call
        return
    root = pathlib.Path(tempfile.gettempdir())
    for folder in (tmp_path, *tmp_path.parents):
        if root in folder.parents:
            folder.chmod(0o755)

    def as_nobody(script, flags):
        os.seteuid(65534)
        try:
            return call(script, flags)
        finally:
            os.seteuid(0)

    yield as_nobody


@pytest.mark.parametrize("hidden", ["lock", "eval.log", "args.json", "."])
def test_one_unreadable_run_of_a_shared_folder(tmp_path, call, nobody, hidden):
    """It is named, the others are shown."""
    for seed in (1, 2):
        make_run(tmp_path / f"a/v/cartpole-swingup/s{seed}", f"--seed {seed}", noisy(seed), "died")
        (tmp_path / f"a/v/cartpole-swingup/s{seed}/lock").touch()
    (tmp_path / "out").mkdir()
    (tmp_path / "out").chmod(0o777)
    for script, flags in (("sweep.py", "--status"), ("plot.py", f"--out {tmp_path}/out/x")):
        call(script, f"{flags} {tmp_path}/a" if script == "sweep.py" else f"{tmp_path}/a {flags}")
    for picture in (tmp_path / "out").iterdir():
        picture.unlink()
    (tmp_path / "a/v/cartpole-swingup/s2" / hidden).chmod(0)
    status = nobody("sweep.py", f"--status {tmp_path}/a")
    assert status.returncode == 0 and "cartpole-swingup/s1" in status.stdout, status
    assert "s2" in status.stdout and "Permission denied" in status.stdout
    plotted = nobody("plot.py", f"{tmp_path}/a --out {tmp_path}/out/x")
    assert plotted.returncode == 0 and (tmp_path / "out/x.png").exists(), plotted
    assert plotted.stderr.startswith("warning: left out: ") and "cartpole-swingup/s2" in plotted.stderr


def test_a_folder_with_only_logs_of_the_caller(tmp_path, call):
    for name in ("slurm-12.out", "slurm-12.err", "nohup.log", "notes.txt", "exit_code.json.tmp"):
        (tmp_path / name).touch()
    assert call("train.py", f"{STATE} --run_dir {tmp_path}").returncode == 0
    assert len(find_runs(tmp_path)) == 1 and load_status(tmp_path)["state"] == "finished"


@pytest.mark.parametrize("name", ["data.npz", "train.log", "eval.log", "checkpoint"])
def test_a_folder_with_anything_else_is_refused_by_its_name(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(Refused, match=f"^--run_dir {tmp_path}: holds {name} and no run"):
        parse_run(["--run_dir", str(tmp_path)])


def test_no_ffmpeg(tmp_path, call, monkeypatch):
    """Found before the run begins, and before the episodes of an evaluation."""
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/nonexistent/ffmpeg")
    result = call("train.py", f"{STATE} --save_video --work_dir {tmp_path}/runs")
    line = "--save_video: needs ffmpeg and finds none; IMAGEIO_FFMPEG_EXE=/nonexistent/ffmpeg does not work"
    assert (result.returncode, result.stderr) == (2, f"train.py: error: {line}\n") and not list(tmp_path.iterdir())
    result = call("evaluate.py", f"--run {tmp_path} --video {tmp_path}/e.mp4")
    assert result.returncode == 2 and "--video: needs ffmpeg" in result.stderr


@pytest.mark.parametrize("script", ["train.py", "sweep.py", "plot.py", "evaluate.py"])
def test_help_into_head(script):
    process = subprocess.Popen(
        [sys.executable, str(ROOT / script), "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()  # as `head` does after its lines
    assert process.communicate()[1] == ""


def test_files_with_a_byte_order_mark(tmp_path, call):
    (tmp_path / "variants.txt").write_bytes(b"\xef\xbb\xbfsac: --agent sac\n")
    result = call(
        "sweep.py", f"--name a --work_dir {tmp_path} --variants {tmp_path}/variants.txt --dry_run -- --seed 1"
    )
    assert result.returncode == 0 and "sac/cartpole-swingup/s1" in result.stdout, result.stderr


def test_frames_from_a_buffer_of_their_size():
    """An offscreen buffer of the drawn size gives the pixels that MuJoCo's 640x480 gives."""
    code = """
import numpy as np, rendering
rendering.select_gl_backend()
import dmc2gym
from config import parse
from env_worker import SerialEnv
for task in (("cartpole", "swingup"), ("walker", "walk")):
    ours = SerialEnv(parse(["--domain_name", task[0], "--task_name", task[1], "--frame_stack", "1"]), 3)
    theirs = dmc2gym.make(*task, seed=3, from_pixels=True, frame_skip=ours._env.unwrapped._frame_skip)
    assert theirs.physics.model.vis.global_.offwidth == 640
    assert ours._env.unwrapped.physics.model.vis.global_.offwidth == 84
    assert np.array_equal(ours.reset(), theirs.reset()[0])
    for _ in range(10):
        ours.start(np.full(ours.action_space.shape, 0.3))
        assert np.array_equal(ours.finish()[0], theirs.step(np.full(ours.action_space.shape, 0.3))[0])
print("equal")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "equal\n", done.stderr


def test_frames_do_not_depend_on_the_threads_that_draw():
    """A sweep with several jobs sets LP_NUM_THREADS=0."""
    code = """
import hashlib, rendering
rendering.select_gl_backend()
import dmc2gym
sums = hashlib.sha256()
for task in (("cartpole", "swingup"), ("walker", "walk"), ("ball_in_cup", "catch"), ("reacher", "easy")):
    env = dmc2gym.make(*task, seed=3, from_pixels=True, frame_skip=4)
    sums.update(env.reset()[0].tobytes())
    env.action_space.seed(3)
    for _ in range(5):
        sums.update(env.step(env.action_space.sample())[0].tobytes())
print(sums.hexdigest())
"""
    seen = set()
    for threads in ("0", "2"):
        environment = {**os.environ, "LP_NUM_THREADS": threads}
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        seen.add(done.stdout)
    assert len(seen) == 1


@pytest.mark.parametrize("name", ["train.log", "eval.log"])
@pytest.mark.parametrize(
    "line", ["{}", '{"a": 1}', '{"step": "x"}', '{"step": null, "episode_reward": null}', "", "[1]"]
)
def test_json_that_is_no_row(tmp_path, call, name, line):
    make_run(tmp_path / "v/cartpole-swingup/s1", "", noisy(1))
    make_run(tmp_path / "v/cartpole-swingup/s2", "--seed 2", noisy(2))
    with open(tmp_path / "v/cartpole-swingup/s1" / name, "a") as log:
        log.write(line + "\n")
    for command_line in (("sweep.py", f"--status {tmp_path}"), ("plot.py", str(tmp_path))):
        result = call(*command_line)
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "damaged, content",
    [
        ("foreign/args.json", b'{"lr": 1}'),
        ("other/sweep.json", b'\x80{"runs"'),
        (
            "v/cartpole-swingup/s1/run.json",
            b'{"state": "??", "step": "q", "num_train_steps": 1, "host": "h", "pid": 1}',
        ),
    ],
)
def test_a_damaged_file_in_a_shared_folder(tmp_path, call, damaged, content):
    """It does not hide the runs beside it."""
    make_run(tmp_path / "v/cartpole-swingup/s1", "", noisy(1))
    (tmp_path / damaged).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / damaged).write_bytes(content)
    status = call("sweep.py", f"--status {tmp_path}")
    assert status.returncode == 0 and "v/cartpole-swingup/s1" in status.stdout
    if "run.json" not in damaged:
        assert damaged in (status.stdout + status.stderr).replace("foreign: not the folder of a run (", "foreign/")
    plot = call("plot.py", str(tmp_path))
    assert plot.returncode == 0 and plot.stderr.count(damaged) == ("sweep.json" in damaged)


def test_logs_of_the_caller_are_left_alone(tmp_path, call):
    """A pipe would block a run that opened it, a broken link or a folder end it."""
    (tmp_path / "latest.log").symlink_to("/nonexistent/x")
    (tmp_path / "null.log").symlink_to("/dev/null")
    (tmp_path / "old.log").mkdir()
    os.mkfifo(tmp_path / "pipe.log")
    assert call("train.py", f"{STATE} --run_dir {tmp_path}").returncode == 0


def test_ffmpeg_that_does_not_work(tmp_path, call, monkeypatch):
    """In a sweep too, before anything is created."""
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/bin/false")
    for script, flags in (("train.py", f"{STATE} --save_video"), ("sweep.py", f"--name a -- {STATE} --save_video")):
        place = f"--work_dir {tmp_path}/runs"
        flags = flags.replace("--name a", f"--name a {place}") if script == "sweep.py" else f"{flags} {place}"
        result = call(script, flags)
        assert result.returncode == 2 and "--save_video: needs ffmpeg" in result.stderr and not list(tmp_path.iterdir())


def test_a_closed_stdout(tmp_path):
    make_run(tmp_path / "v/cartpole-swingup/s1", "", noisy(1))
    words = [sys.executable, str(ROOT / "sweep.py"), "--status", str(tmp_path)]
    done = subprocess.run(words, stderr=subprocess.PIPE, text=True, preexec_fn=lambda: os.close(1))
    assert (done.returncode, done.stderr) == (0, "")
