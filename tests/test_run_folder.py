"""A run's folder: its lock, its state, and the flags that may change on resume. Runs on states, which start fast."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time

import pytest
from test_resume import STATES, curves, rows

import train
from config import NO_EFFECT_ON_RESULTS, Config, parse
from dashboard import Dashboard
from endings import Refused, RunEnded
from logger import Logger
from replay_buffer import ReplayBuffer
from storage import run_folder
from storage.run_folder import RunFolder, find_runs, is_written, load_state, load_status, parse_run

SHORT = STATES.replace("--num_train_steps 26", "--num_train_steps 16").replace(" --keep_checkpoint", "")


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """Folders of three runs: finished and kept, finished, and stopped in the middle."""
    parent = tmp_path_factory.mktemp("begun")
    command = [sys.executable, train.__file__]
    for name, flags in (("kept", f"{SHORT} --keep_checkpoint"), ("finished", SHORT)):
        subprocess.run([*command, *flags.split(), "--run_dir", str(parent / name)], check=True, capture_output=True)
    return parent


def test_a_finished_run_says_so(begun, call):
    before = {path: path.stat().st_mtime_ns for path in begun.rglob("*")}
    for flags in ("", SHORT):
        result = call("train.py", f"{flags} --run_dir {begun}/finished")
        assert (result.returncode, result.stdout) == (0, "")
        assert result.stderr == f"{begun}/finished: finished, 16 steps\n"
    assert {path: path.stat().st_mtime_ns for path in begun.rglob("*")} == before


def test_a_run_grows(begun, tmp_path, monkeypatch, call):
    """If it was kept: to the result of a run that was as long from the beginning, its old last evaluation aside.

    (That one also ends an interval of readings, which here is at its end anyhow.)
    """
    shutil.copytree(begun, tmp_path / "copy")
    longer = "--num_train_steps 26"
    monkeypatch.chdir(tmp_path)  # a long path would cut the line
    result = call("train.py", f"{longer} --run_dir copy/finished")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "finished and kept no checkpoint; --keep_checkpoint keeps it" in result.stderr
    result = call("train.py", f"{longer} --run_dir {tmp_path}/copy/kept")
    assert result.returncode == 0 and "resumes at step 16" in result.stdout
    assert call("train.py", f"{SHORT} {longer} --run_dir {tmp_path}/whole").returncode == 0
    grown, whole = tmp_path / "copy" / "kept", tmp_path / "whole"
    assert rows(grown / "train.log") == rows(whole / "train.log")
    assert [row for row in rows(grown / "eval.log") if row["step"] != 16] == rows(whole / "eval.log")
    assert json.loads((grown / "args.json").read_text())["num_train_steps"] == 26


def test_which_flags_may_change(begun, monkeypatch):
    run_dir = f"--run_dir {begun}/kept"
    args = json.loads((begun / "kept" / "args.json").read_text())
    assert set(NO_EFFECT_ON_RESULTS) <= {*Config.__dataclass_fields__} <= set(args)
    for flags in ("", SHORT, "--seed -1", "--batch_size 4 --save_tb --log_interval 7 --env_worker --device cpu"):
        with pytest.raises(RunEnded, match="kept: finished, 16 steps"):
            parse_run(f"{flags} {run_dir}".split())
    config, resumes = parse_run(f"--num_train_steps 20 --save_video {run_dir}".split())
    assert resumes and config.save_video and config.batch_size == 4 and config.num_train_steps == 20
    for flags, line in (
        ("--batch_size 8", f"--batch_size 8: the run has 4 and flags of an existing run cannot change: {begun}/kept"),
        ("--num_train_steps 15", f"--num_train_steps 15: the run has 16 and it may only grow: {begun}/kept"),
        (
            "--agent cody_sac",
            f"--agent cody_sac: the run has sac and flags of an existing run cannot change: {begun}/kept",
        ),
        ("--omega_cody_loss 0.1", "--omega_cody_loss 0.1: the run has 0.001 and flags of"),
        ("--work_dir a", "--work_dir a: has no effect with --run_dir"),
    ):
        with pytest.raises(Refused) as error:
            parse_run(f"{flags} {run_dir}".split())
        assert str(error.value).startswith(line)


def test_a_run_of_a_sweep_without_its_events(begun, tmp_path):
    """A sweep adds --no_tb_media, which has no effect without --save_tb."""
    args = json.loads((begun / "kept" / "args.json").read_text())
    (tmp_path / "args.json").write_text(json.dumps({**args, "save_tb": True, "tb_media": False, "wandb": "p"}))
    shutil.copy(begun / "kept" / "run.json", tmp_path)
    shutil.copytree(begun / "kept" / "checkpoint", tmp_path / "checkpoint")
    config, resumes = parse_run(f"--num_train_steps 20 --no_save_tb --run_dir {tmp_path}".split())
    assert resumes and (config.save_tb, config.tb_media, config.wandb) == (False, True, None)


def test_a_run_that_cannot_resume_stays_as_it_is(begun, tmp_path):
    shutil.copytree(begun / "kept", tmp_path / "kept")
    before = {path: path.read_bytes() for path in (tmp_path / "kept").glob("*.json")}
    config, resumes = parse_run(f"--num_train_steps 20 --run_dir {tmp_path}/kept".split())
    RunFolder(config, resumes).undo(OSError(errno.ENOSPC, "No space left on device"))
    assert {path: path.read_bytes() for path in (tmp_path / "kept").glob("*.json")} == before


def test_a_run_that_could_not_write_its_args_can_start_again(tmp_path):
    """A full disk may still take the smaller run.json."""
    flags = f"--num_train_steps 2000 --run_dir {tmp_path}/a".split()
    folder = RunFolder(*parse_run(flags))
    folder.undo(OSError(errno.ENOSPC, "No space left on device"))
    folder._lock.close()
    assert (tmp_path / "a" / "run.json").exists() and parse_run(flags)[1] is False


def test_what_is_no_run(tmp_path, call):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("a")
    (tmp_path / "old").mkdir()
    what = "holds thesis.tex and no run (no args.json); name a new or an empty folder"
    for folder, line in (
        ("full", f"train.py: error: --run_dir {tmp_path}/full: {what}\n"),
        ("full/thesis.tex", f"train.py: error: --run_dir {tmp_path}/full/thesis.tex: Not a directory\n"),
    ):
        result = call("train.py", f"{SHORT} --run_dir {tmp_path}/{folder}")
        assert (result.returncode, result.stderr) == (2, line)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]


def test_a_run_whose_checkpoint_is_gone(begun, tmp_path, call):
    """As those of results/, and those from before there were any: their logs are not touched."""
    folder = tmp_path / "run"
    shutil.copytree(begun / "finished", folder)
    (folder / "run.json").unlink()
    logs = [(folder / name).read_bytes() for name in ("train.log", "eval.log")]
    result = call("train.py", f"--run_dir {folder}")
    assert result.returncode == 2
    assert result.stderr.endswith(": no checkpoint is left; start a new run in another folder\n")
    assert logs == [(folder / name).read_bytes() for name in ("train.log", "eval.log")]


def holder(folder):
    """A process that holds the lock of a folder."""
    script = f"import fcntl, sys, time; lock = open({str(folder / 'lock')!r}, 'a')\n"
    script += "fcntl.lockf(lock, fcntl.LOCK_EX); print(flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    process.stdout.readline()
    return process


def test_one_writer(begun, tmp_path, call):
    """The lock ends with its process; a refused process changes nothing in the folder."""
    folder = tmp_path / "run"
    shutil.copytree(begun / "kept", folder)
    process = holder(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    flags = f"--num_train_steps 20 --run_dir {folder}"
    result = call("train.py", flags)
    recorded = load_status(folder)
    who = f"another process (pid {recorded['pid']} on {recorded['host']}) is writing this run"
    assert (result.returncode, result.stderr) == (2, f"train.py: error: --run_dir {folder}: {who}\n")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    process.kill()
    process.wait()
    assert call("train.py", flags).returncode == 0


def test_a_run_that_another_process_finishes_meanwhile(begun, tmp_path, monkeypatch, call):
    """Between the check of the folder and the lock: its logs do not change."""
    shutil.copytree(begun / "kept", tmp_path / "run")
    build = train.build

    def build_slowly(config, device):
        parts = build(config, device)
        shutil.rmtree(tmp_path / "run")
        shutil.copytree(begun / "finished", tmp_path / "run")
        recorded = load_status(tmp_path / "run") | {"num_train_steps": 20}
        (tmp_path / "run" / "run.json").write_text(json.dumps(recorded))
        return parts

    monkeypatch.setattr(train, "build", build_slowly)
    result = call("train.py", f"--num_train_steps 20 --run_dir {tmp_path}/run")
    assert (result.returncode, result.stderr) == (0, f"{tmp_path}/run: finished, 16 steps\n")
    assert rows(tmp_path / "run" / "train.log") == rows(begun / "finished" / "train.log")


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    """One warning, and no lock."""

    def no_locks(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    monkeypatch.setattr(fcntl, "fcntl", no_locks)
    config, _ = parse_run(f"{SHORT} --run_dir {tmp_path}/run".split())
    RunFolder(config, resumes=False).begin(0, {})
    assert capsys.readouterr().out == (
        f"warning: {tmp_path}/run: this file system has no file locks; do not start a second process on this run\n"
    )
    assert not is_written(tmp_path / "run") and load_state(tmp_path / "run") == "died"
    RunFolder(config, resumes=True)


def test_state_of_a_run(begun, tmp_path):
    """From its folder alone; the lock shows whether a process writes there, and is queried without being taken."""
    folder = tmp_path / "run"
    assert load_state(folder) == "missing"
    shutil.copytree(begun / "kept", folder)
    assert load_state(folder) == "finished"
    recorded = load_status(folder)
    for state, seen in (("stopped", "stopped"), ("diverged", "diverged"), ("running", "died")):
        (folder / "run.json").write_text(json.dumps({**recorded, "state": state}))
        assert load_state(folder) == seen
    process = holder(folder)
    assert is_written(folder) and load_state(folder) == "running"
    process.kill()
    process.wait()
    assert not is_written(folder) and load_state(folder) == "died"
    (folder / "run.json").unlink()  # only the logs are left
    assert load_state(folder) == "finished"
    (folder / "eval.log").write_text((folder / "eval.log").read_text().splitlines(keepends=True)[0])
    assert load_state(folder) == "stopped"


def test_the_runs_of_a_folder(tmp_path, capsys):
    """First those of sweep.json in its order, started or not, then all others."""
    for name in ("a/x/s1", "a/x/s2", "b"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "args.json").write_text("{}")
    (tmp_path / "a" / "sweep.json").write_text(
        json.dumps({"runs": [{"folder": f"x/s{n}", "flags": []} for n in (3, 2)]})
    )
    assert [str(run.relative_to(tmp_path)) for run in find_runs(tmp_path)] == ["a/x/s3", "a/x/s2", "a/x/s1", "b"]
    (tmp_path / "a" / "sweep.json").write_text("{")
    assert [str(run.relative_to(tmp_path)) for run in find_runs(tmp_path)] == ["a/x/s1", "a/x/s2", "b"]
    assert "sweep.json: cannot be read" in capsys.readouterr().err


def test_a_diverged_run_says_it_again(tmp_path, call):
    flags = f"{SHORT} --critic_lr 1e30 --run_dir {tmp_path}/run"
    first = call("train.py", flags)
    assert first.returncode == 3 and first.stderr.startswith(f"{tmp_path}/run: stopped: ")
    again = call("train.py", flags)
    assert (again.returncode, again.stdout, again.stderr) == (3, "", first.stderr)
    assert load_status(tmp_path / "run")["state"] == "diverged"


def test_a_full_disk_in_the_middle_of_a_row(begun, tmp_path, monkeypatch, call):
    """Resuming the run removes the torn row."""
    row = Logger._row
    torn = []

    def tear(self, kind, step, values, columns, colour):
        if kind == "train" and not torn:
            torn.append(step)
            with open(self._folder / "train.log", "a") as log:
                log.write('{"step": 1')
            raise OSError(errno.ENOSPC, "No space left on device")
        row(self, kind, step, values, columns, colour)

    monkeypatch.setattr(Logger, "_row", tear)
    result = call("train.py", f"{SHORT} --run_dir {tmp_path}/run")
    assert (result.returncode, torn) == (1, [10])
    assert result.stderr == f"{tmp_path}/run: stopped: [Errno 28] No space left on device\n"
    assert call("train.py", f"--run_dir {tmp_path}/run").returncode == 0
    assert rows(tmp_path / "run" / "train.log") == rows(begun / "finished" / "train.log")


def test_the_end_of_memory(begun, tmp_path, monkeypatch, call):
    """The run saves a checkpoint and stops before the kernel would kill it; with more memory it resumes."""
    flags = f"{SHORT} --replay_storage lz4 --run_dir {tmp_path}/run"
    room = iter([10**10] * 8)
    with monkeypatch.context() as patch:
        patch.setattr("replay_buffer.MEMORY_CHECK_FRAMES", 1)
        patch.setattr("replay_buffer.available_memory", lambda: next(room, 10**8))
        result = call("train.py", flags)
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert "stopped: 0.1 GB of memory are left and the replay has grown to 0.0 GB; --run_dir " in result.stderr
    assert call("train.py", flags).returncode == 0
    assert rows(tmp_path / "run" / "train.log") == rows(begun / "finished" / "train.log")


@pytest.mark.parametrize("killed_in", ["finish", "grow"])
def test_no_room_for_run_json(begun, tmp_path, monkeypatch, call, killed_in):
    """If run.json cannot record the end or the resumption of a run, the run keeps its checkpoint and can resume."""
    flags = f"{SHORT} --run_dir {tmp_path}/run"
    if killed_in == "grow":
        shutil.copytree(begun / "kept", tmp_path / "run")
        flags = f"--num_train_steps 26 --run_dir {tmp_path}/run"
    write = run_folder.write_json

    def no_room(path, value):
        if value.get("state") == ("finished" if killed_in == "finish" else "running"):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "write_json", no_room)
        result = call("train.py", flags)
    assert result.returncode == 1 and "No space left" in result.stderr
    result = call("train.py", f"--run_dir {tmp_path}/run")
    assert result.returncode == 0 and "resumes at step 16" in result.stdout, result.stderr
    assert load_status(tmp_path / "run")["step"] == (16 if killed_in == "finish" else 26)


@pytest.mark.parametrize("text", ["null", "[]", '{"state": "finished"}', '{"state": "diverged"}', '{"sta', ""])
def test_an_odd_status(begun, tmp_path, call, text):
    """A damaged run.json is ignored, and the run resumes from its checkpoint."""
    shutil.copytree(begun / "kept", tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text(text)
    result = call("train.py", f"--run_dir {tmp_path}/run")
    assert result.returncode == 0 and "resumes at step 16" in result.stdout


def test_a_folder_that_was_moved(tmp_path, monkeypatch, call):
    flags = f"{SHORT} --save_tb"
    assert call("train.py", f"{flags} --run_dir {tmp_path}/whole").returncode == 0
    room = iter(range(12))
    with monkeypatch.context() as patch:
        patch.setattr(ReplayBuffer, "check_memory", lambda self: next(room))
        with pytest.raises(StopIteration):
            call("train.py", f"{flags} --run_dir {tmp_path}/a")
    time.sleep(1)  # event files sort by their second, then by a counter of the process as text: 10 before 9
    shutil.move(tmp_path / "a", tmp_path / "elsewhere" / "b")
    result = call("train.py", f"--run_dir {tmp_path}/elsewhere/b")
    assert result.returncode == 0 and "resumes at step 11" in result.stdout
    moved = tmp_path / "elsewhere" / "b"
    assert rows(moved / "train.log") == rows(tmp_path / "whole" / "train.log")
    assert curves(moved / "tb") == curves(tmp_path / "whole" / "tb") and len(list((moved / "tb").iterdir())) == 2


def test_another_thread_count(begun, tmp_path, monkeypatch, call):
    shutil.copytree(begun / "kept", tmp_path / "run")
    made = train.provenance
    monkeypatch.setattr(train, "provenance", lambda *of: {**made(*of), "threads": 77})
    result = call("train.py", f"--num_train_steps 20 --run_dir {tmp_path}/run")
    assert result.returncode == 0
    assert (
        "warning: results may no longer be bit-identical: threads was " in result.stdout and ", is 77" in result.stdout
    )


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of its own, of 100 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_fills_up(begun, small_disk, call):
    """In the middle of the second checkpoint; with more room the run resumes."""
    flags = f"{SHORT} --run_dir {small_disk}/run"
    result = call("train.py", flags)
    assert result.returncode == 1 and result.stderr.startswith(f"{small_disk}/run: stopped: ")
    assert "No space left on device" in result.stderr  # where torch says "unexpected pos 64 vs 0"
    assert result.stderr.count("\n") == 1 and not list((small_disk / "run").rglob("*.tmp"))
    assert load_status(small_disk / "run")["state"] in ("running", "stopped")  # its file may not fit either
    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
    result = call("train.py", flags)
    assert result.returncode == 0, result.stderr
    assert rows(small_disk / "run" / "train.log") == rows(begun / "finished" / "train.log")


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_events_on_a_full_disk(begun, small_disk, capfd):
    """One error, without the traceback of TensorBoard's thread."""
    shutil.copy(begun / "kept" / "args.json", small_disk)
    dashboard = Dashboard(small_disk, parse(["--save_tb"]))
    dashboard.open()
    with pytest.raises(OSError):
        (small_disk / "full").write_bytes(bytes(200_000))
    with pytest.raises(OSError):
        for step in range(1000):
            dashboard.scalars(step, {"kl": 1.0})
            dashboard.lengths()
    assert capfd.readouterr().err == ""


def test_a_folder_that_is_read_only(begun, monkeypatch, call):
    """train.py still reports that a finished run has finished."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert call("train.py", f"--run_dir {begun}/kept").returncode == 0
    result = call("train.py", f"--num_train_steps 20 --run_dir {begun}/kept")
    line = f"train.py: error: --run_dir {begun}/kept: {begun}/kept is not writable\n"
    assert (result.returncode, result.stderr) == (2, line)
