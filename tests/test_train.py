"""Whole runs of `train.py` and `evaluate.py` as commands, on real pixels with small networks."""

import dataclasses
import fcntl
import io
import json
import math
import os
import pathlib
import pty
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time

import imageio.v3 as iio
import psutil
import pytest
import torch
from conftest import make_replay, run_loop
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import endings
import evaluate
import train
from agent import make_agent
from config import Config, parse
from episodes import eval_seed
from logger import Logger
from replay_buffer import ReplayBuffer
from sac import SAC
from storage import checkpoint, journal
from storage.checkpoint import Checkpoints
from storage.run_folder import RunFolder, load_config, load_status
from video import save_video

ROOT = pathlib.Path(__file__).parent.parent
# 10 decisions an episode
SMALL = (
    "--action_repeat 100 --batch_size 8 --init_steps 12 --num_train_steps 36 --eval_freq 15 --num_eval_episodes 2 "
    "--log_interval 4 --hidden_dim 32 --num_filters 4 --encoder_feature_dim 8 --seed 3 --no_env_worker"
)
WORKERS = SMALL.replace("--no_env_worker", "--env_worker")

STATE = SMALL.replace("--num_filters 4 --encoder_feature_dim 8", "--agent sac --encoder_type identity")


def command(script, flags, work_dir):
    return [sys.executable, str(ROOT / script), *flags.split(), *(["--work_dir", str(work_dir)] if work_dir else [])]


def run(flags, work_dir, script="train.py", **kwargs):
    return subprocess.run(command(script, flags, work_dir), capture_output=True, text=True, timeout=300, **kwargs)


def rows(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def only_run(work_dir):
    (folder,) = (work_dir / "cartpole-swingup").iterdir()
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One finished run with everything saved, and what it printed."""
    work_dir = tmp_path_factory.mktemp("trained")
    result = run(f"{WORKERS} --save_tb --save_video --save_model --keep_checkpoint", work_dir)
    assert result.returncode == 0, result.stderr
    return only_run(work_dir), result.stdout


def test_what_a_run_writes(trained):
    folder, _ = trained
    assert folder.name.startswith("cody_sac-") and folder.name.endswith("-s3")
    assert sorted(p.name for p in folder.iterdir()) == [
        "args.json", "checkpoint", "eval.log", "lock", "model", "run.json", "tb", "train.log", "video",
    ]  # fmt: skip
    args = json.loads((folder / "args.json").read_text())
    assert args["action_repeat"] == 100 and args["critic_lr"] == 1e-3 and args["seed"] == 3
    assert args["command"][:2] == ["train.py", "--action_repeat"]  # without the script's folder
    assert set(args["versions"]) == {"torch", "mujoco", "dm_control", "gymnasium", "numpy"}
    assert args["mujoco_gl"] in ("egl", "osmesa", "glfw")
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert (args["git_commit"] or "").startswith(commit)


def test_rows(trained):
    folder, _ = trained
    train, evaluation = rows(folder, "train.log"), rows(folder, "eval.log")
    assert [row["step"] for row in train] == [10, 20, 30]
    assert [row["episode"] for row in train] == [0, 1, 2]
    assert [row["step"] for row in evaluation] == [0, 15, 30, 36]
    assert all(row["env_step"] == 100 * row["step"] for row in train + evaluation)
    assert "critic_loss" not in train[0]  # before the first update
    logged = (
        "batch_reward critic_loss actor_loss alpha_loss alpha entropy cody_loss info_nce mi_bound "
        "contrastive_accuracy kl posterior_mu posterior_std prior_mu prior_std latent_norm latent_std "
        "kl_dim_min kl_dim_median kl_dim_max posterior_std_extreme latent_rank encoder_grad_ratio "
        "critic_grad_norm actor_grad_norm auxiliary_grad_norm"
    ).split()
    assert set(logged) <= set(train[1])
    for row in evaluation:
        assert len(row["returns"]) == 2 and row["episode_reward"] == pytest.approx(sum(row["returns"]) / 2)


def test_console_without_a_terminal_is_plain_lines(trained):
    _, stdout = trained
    assert "\r" not in stdout and "\x1b" not in stdout
    lines = stdout.splitlines()
    assert "new run of 36 steps, seed 3, on " in lines[0] and "frames drawn by " in lines[0]
    assert sum(line.startswith("| train") for line in lines) == 3
    assert sum(line.startswith("| eval") for line in lines) == 4
    last = [line for line in lines if line.startswith("| train")][-1]
    columns = [cell.split(":")[0].strip() for cell in last.split("|")[2:]]
    assert columns == ["E", "S", "R", "BR", "A_LOSS", "CR_LOSS", "CODY", "MI", "KL", "D", "D/S", "U/S", "T"]


def test_progress_bar_on_a_terminal(tmp_path):
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))  # 40 lines of 120 columns
    process = subprocess.Popen(command("train.py", SMALL, tmp_path), stdout=follower, stderr=follower)
    os.close(follower)
    output = b""
    while True:
        try:
            output += os.read(leader, 65536)
        except OSError:  # the terminal is closed
            break
    assert process.wait() == 0
    assert b"36/36" in output and b"step/s" in output
    assert b"\x1b[33m| train" in output and b"\x1b[32m| eval" in output  # yellow, green


def test_tensorboard(trained):
    folder, _ = trained
    events = EventAccumulator(str(folder / "tb"), size_guidance={"images": 0})
    events.Reload()
    tags = events.Tags()
    assert {"losses/critic_loss", "charts/kl", "charts/train_episode_reward"} <= set(tags["scalars"])
    assert [e.step for e in events.Scalars("charts/eval_episode_reward")] == [0, 1500, 3000, 3600]
    assert tags["images"] == [f"visual/augmented/{name}" for name in ("obs_prev", "obs", "next_obs")]
    assert "weights/encoder.convs.layers.0.weight" in tags["histograms"]


def test_video_plays(trained):
    folder, _ = trained
    videos = sorted((folder / "video").iterdir())
    assert [v.name for v in videos] == ["0.mp4", "15.mp4", "30.mp4", "36.mp4"]
    frames = iio.imread(videos[0], plugin="FFMPEG")
    assert frames.shape == (10, 256, 256, 3)
    assert frames.std() > 5  # a picture, and not the same one throughout
    assert (frames[0] != frames[-1]).any()


def test_the_data_of_a_kept_run(trained):
    folder, _ = trained
    replay = ReplayBuffer.load(folder)
    # 36 transitions in episodes of 10, less the first of each
    assert len(replay.legal_positions()) == 9 * 3 + 5
    batch = replay.sample(32)
    assert batch.obs.shape == (32, 9, 84, 84) and (batch.obs[:, 3:] != batch.next_obs[:, :-3]).sum() == 0
    returns = [0.0] * 4
    for position, _, _, _, reward, _ in journal.read(folder / "checkpoint"):
        returns[position // 11] += reward
    assert returns[:3] == pytest.approx([row["episode_reward"] for row in rows(folder, "train.log")])


def test_rows_say_how_fast_the_run_is(trained):
    folder, _ = trained
    train = rows(folder, "train.log")
    for before, row in zip([None, *train], train, strict=False):
        episode = row["step"] - (before["step"] if before else 0)
        assert row["decisions_per_s"] == pytest.approx(episode / row["duration"])
        # the evaluations come on top
        assert row["wall_seconds"] >= row["duration"] + (before["wall_seconds"] if before else 0) - 1e-6
    # 36 decisions, the first 12 without an update; the last row is at 30
    assert sum(row["updates_per_s"] * row["duration"] for row in train) == pytest.approx(30 - 12)


def test_evaluate_gives_the_logged_returns_again(trained, tmp_path, call):
    folder, _ = trained
    result = run(f"--run {folder} --num_eval_episodes 2 --video {tmp_path}/e.mp4", None, "evaluate.py")
    assert result.returncode == 0, result.stderr
    row = json.loads(result.stdout)
    assert row["step"] == 36 and row["returns"] == rows(folder, "eval.log")[-1]["returns"]
    assert iio.imread(tmp_path / "e.mp4", plugin="FFMPEG").shape == (10, 256, 256, 3)
    result = call("evaluate.py", f"--run {folder} --num_eval_episodes 2 --step 15")
    assert json.loads(result.stdout)["returns"] == rows(folder, "eval.log")[1]["returns"]


def test_an_exported_policy_plays_like_its_run(trained, tmp_path, call):
    folder, _ = trained
    result = call("evaluate.py", f"--run {folder} --step 15 --export {tmp_path}/a/policy")
    assert result.returncode == 0 and result.stdout.startswith(f"{tmp_path}/a/policy: the policy of step 15, ")
    policy, whole = (torch.load(path / "model/15.pt", weights_only=True) for path in (tmp_path / "a/policy", folder))
    assert {name.split(".")[0] for name in policy} == {"encoder", "actor"}
    assert not any(name.startswith("encoder.head") for name in policy) and all(
        torch.equal(policy[name], whole[name]) for name in policy
    )
    assert (tmp_path / "a/policy/model/15.pt").stat().st_size < (folder / "model/15.pt").stat().st_size / 2
    (logged,) = [row for row in rows(folder, "eval.log") if row["step"] == 15]
    row = json.loads(call("evaluate.py", f"--run {tmp_path}/a/policy --num_eval_episodes 2").stdout)
    assert row["returns"] == logged["returns"]
    for name in ("episode_reward", "episode_reward_std"):
        assert row[name] == row[f"logged_{name}"] == logged[name]

    (tmp_path / "a/policy/run.json").unlink()
    result = call("evaluate.py", f"--run {tmp_path}/a/policy --export {tmp_path}/b")
    assert result.returncode == 1 and result.stderr.count("\n") == 1 and not (tmp_path / "b").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without CUDA")
def test_a_policy_from_cuda_plays_on_the_cpu(trained, tmp_path, call):
    shutil.copytree(trained[0], tmp_path / "a")
    args = json.loads((tmp_path / "a/args.json").read_text())
    (tmp_path / "a/args.json").write_text(json.dumps({**args, "device": "cuda"}))
    result = call("evaluate.py", f"--run {tmp_path}/a --num_eval_episodes 1")
    assert result.returncode == 0, result.stderr


def test_a_run_from_before_a_flag(tmp_path):
    """A flag that args.json lacks has its default."""
    args = dataclasses.asdict(parse(STATE.split()))
    args.pop("cody_warmup_updates")
    (tmp_path / "args.json").write_text(json.dumps(args))
    assert load_config(tmp_path) == parse(STATE.split())


class Code:
    """A checkpoint that would run code where it is unpickled without care."""

    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def test_evaluate_refuses_in_one_line(trained, tmp_path, monkeypatch, call):
    """A copy of the run without its models, with files that are none; and folders that are no run."""
    model = trained[0] / "model"
    folder = tmp_path / "run"
    (folder / "model").mkdir(parents=True)
    args = json.loads((trained[0] / "args.json").read_text()) | {"env_worker": False}
    (folder / "args.json").write_text(json.dumps(args))
    monkeypatch.chdir(tmp_path)
    networks = torch.load(model / "36.pt", weights_only=True)
    first = next(name for name in networks if name.startswith("actor."))
    (folder / "model" / "1.pt").write_bytes(b"PK not a model")
    torch.save(Code(), folder / "model" / "2.pt")
    torch.save({"foreign": 1}, folder / "model" / "3.pt")
    torch.save({**networks, first: {}}, folder / "model" / "4.pt")
    (folder / "model" / "5.pt").write_bytes((model / "36.pt").read_bytes()[:5000])
    (folder / "model" / "6.pt").mkdir()
    foreign = {"broken": "{", "list": "[]"}
    for name, change in {
        "other": {"batch_size": 0}, "typed": {"batch_size": "a"}, "curl": {"agent": "curl_sac"},
    }.items():  # fmt: skip
        foreign[name] = json.dumps({**args, **change})
    for name, text in foreign.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "args.json").write_text(text)
    (tmp_path / "e.mp4").touch()
    no_run = "not the folder of a run (args.json: "
    for flags, line in (
        ("--run run --step 7", "--step 7: not in run/model, which has 1, 2, 3, 4, 5, 6"),
        *((f"--run run --step {step}", f"run/model/{step}.pt: no model of this run (") for step in range(1, 7)),
        ("--run .", f".: {no_run}No such file or directory)"),
        ("--run e.mp4", f"e.mp4: {no_run}Not a directory)"),
        ("--run broken", f"broken: {no_run}"),
        ("--run list", f"list: {no_run}"),
        ("--run other", f"other: {no_run}--batch_size 0: must be at least 1)"),
        ("--run typed", f"typed: {no_run}--batch_size a: must be a whole number)"),
        ("--run curl", f"curl: {no_run}--agent curl_sac: must be one of cody_sac"),
        ("--rum run", "unrecognized flag --rum; the nearest is --run"),
        (f"--run {'x' * 300}", "xxx"),
        ("--run run --num_eval_episodes 0", "--num_eval_episodes 0: must be at least 1"),
        ("--run run --video e.mp4", "--video e.mp4: exists and is not overwritten"),
        ("--run run --export a --video e.mp4", "--video e.mp4: has no effect with --export"),
        ("--run run --export run", "--export run: exists and is not overwritten"),
        ("--run run --export e.mp4/a", f"--export e.mp4/a: {tmp_path}/e.mp4 is not a folder"),
        ("--run run --video e.txt", "--video e.txt: must end in .mp4"),
        ("--run run --video a/e.mp4", f"--video a/e.mp4: {tmp_path}/a is not a folder"),
    ):
        result = call("evaluate.py", flags)
        assert (result.returncode, result.stdout) == (2, "") and result.stderr.count("\n") == 1
        assert result.stderr.startswith(f"evaluate.py: error: {line}") and len(result.stderr) <= 201, result.stderr
    assert not (tmp_path / "unpickled").exists()


def on_a_full_disk(function):
    """The function where no file may grow beyond 1,000 bytes."""

    def limited(*args):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            return function(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    return limited


@pytest.mark.parametrize("name", ["save_model", "save_video"])
def test_training_on_a_full_disk(tmp_path, monkeypatch, call, name):
    """One line on stderr, and no partial file."""
    monkeypatch.setattr(train, name, on_a_full_disk(getattr(train, name)))
    result = call("train.py", f"{SMALL} --save_model --save_video --work_dir {tmp_path}")
    folder = only_run(tmp_path)
    path = folder / {"save_model": "model/0.pt", "save_video": "video/0.mp4"}[name]
    assert result.returncode == 1 and result.stderr.startswith(f"{folder}: stopped: {path}: ")
    assert result.stderr.count("\n") == 1 and list(path.parent.iterdir()) == []
    assert len(rows(folder, "eval.log")) == 1


def test_an_error_of_cuda_is_not_a_lack_of_memory(monkeypatch):
    def broken(*args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("agent.SAC", broken)
    monkeypatch.setattr("replay_buffer.RawFrames", broken)
    for make in (
        lambda: make_agent(parse([]), (9, 84, 84), 1, torch.device("cpu")),
        lambda: make_replay(100, (3, 84, 84), 1),
    ):
        with pytest.raises(RuntimeError, match="illegal memory access"):
            make()


@pytest.mark.parametrize("when", ["making the networks", "an update on CUDA", "an update on the CPU"])
def test_memory_that_the_networks_lack(tmp_path, monkeypatch, call, when):
    if when.startswith("an update"):

        def update(*args, **kwargs):
            if when.endswith("CPU"):
                torch.empty(2**50)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total ...")

        monkeypatch.setattr(SAC, "update", update)
        result = call("train.py", f"{STATE} --run_dir {tmp_path}/a")
        reason = (
            f"can't allocate memory: you tried to allocate {2**52} bytes"
            if when.endswith("CPU")
            else "CUDA out of memory"
        )
        line = f"{tmp_path}/a: stopped: {reason}; reduce memory with a smaller --batch_size"
        assert (result.returncode, load_status(tmp_path / "a")["state"]) == (1, "stopped")
    else:
        monkeypatch.setattr("agent.SAC", lambda *args: torch.empty(2**50))
        result = call("train.py", f"{STATE} --run_dir {tmp_path}/a")
        line = "train.py: error: --hidden_dim 32 --num_filters 32: the networks do not fit in the memory of cpu\n"
        assert result.returncode == 2 and not list(tmp_path.iterdir())
    assert result.stderr.startswith(line) and result.stderr.count("\n") == 1


def test_memory_that_runs_out_before_a_run_begins(tmp_path, monkeypatch, call):
    def build(*args):
        raise MemoryError("Unable to allocate 2.00 GiB for an array")

    monkeypatch.setattr(train, "build", build)
    result = call("train.py", f"{STATE} --run_dir {tmp_path}/a")
    assert (result.returncode, result.stderr) == (1, "train.py: Unable to allocate 2.00 GiB for an array\n")


def test_the_last_rows_are_on_the_disk_before_the_checkpoint_goes(tmp_path, monkeypatch, call):
    """Otherwise a power cut could lose both the rows and the checkpoint that reproduces them."""
    synced = {}

    def fsync(descriptor, real=os.fsync):
        real(descriptor)
        synced[os.path.realpath(f"/proc/self/fd/{descriptor}")] = os.fstat(descriptor).st_size

    def free(self, real=Checkpoints.free):
        run = tmp_path / "a"
        for path in (run / "train.log", run / "eval.log", *(run / "tb").iterdir()):
            assert synced[str(path)] == path.stat().st_size
        real(self)
        (run / "looked").touch()

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Checkpoints, "free", free)
    monkeypatch.setattr(checkpoint, "CHECKPOINT_INTERVAL_RATIO", 1e9)  # no checkpoint after an evaluation
    assert call("train.py", f"{STATE} --save_tb --run_dir {tmp_path}/a").returncode == 0
    assert (tmp_path / "a" / "looked").exists()


def test_runs_of_two_seeds_are_evaluated_from_different_states():
    starts = [(eval_seed(Config(seed=seed)) + episode) % 2**32 for seed in range(100) for episode in range(50)]
    assert len(set(starts)) == len(starts)


def test_no_room_for_a_run(tmp_path, monkeypatch, call):
    monkeypatch.setattr(RunFolder, "begin", on_a_full_disk(RunFolder.begin))
    result = call("train.py", f"{SMALL} --work_dir {tmp_path}")
    assert result.returncode == 1 and result.stderr.startswith("train.py: ")
    assert result.stderr.endswith("/args.json: not written (File too large)\n") and result.stderr.count("\n") == 1
    assert list((tmp_path / "cartpole-swingup").iterdir()) == []


def test_evaluate_on_a_full_disk(trained, tmp_path, monkeypatch, call):
    """There is no video, not even a partial one, but the returns are printed."""
    folder, _ = trained
    monkeypatch.setattr(evaluate, "save_video", on_a_full_disk(save_video))
    result = call("evaluate.py", f"--run {folder} --num_eval_episodes 2 --video {tmp_path}/e.mp4")
    assert result.returncode == 1 and list(tmp_path.iterdir()) == []
    assert json.loads(result.stdout)["returns"] == rows(folder, "eval.log")[-1]["returns"]
    line = f"evaluate.py: {tmp_path}/e.mp4: no video written: ffmpeg failed; the disk has "
    assert result.stderr.startswith(line) and result.stderr.count("\n") == 1


def assert_same_logs(ours, theirs):
    """Byte-identical values, times aside."""
    for log in ("train.log", "eval.log"):
        values = [rows(folder, log) for folder in (ours, theirs)]
        for row in values[0] + values[1]:
            for name in ("duration", "decisions_per_s", "updates_per_s", "wall_seconds"):
                row.pop(name, None)
        assert json.dumps(values[0]) == json.dumps(values[1])


def test_same_seed_same_logs(trained, tmp_path, call):
    """What is saved beside them does not matter, nor do workers or how the replay stores its frames."""
    assert call("train.py", f"{SMALL} --replay_storage lz4 --work_dir {tmp_path}").returncode == 0
    assert_same_logs(only_run(tmp_path), trained[0])


def test_another_seed_is_another_run(trained, tmp_path, call):
    folder, _ = trained
    assert call("train.py", f"{SMALL} --seed -1 --work_dir {tmp_path}").returncode == 0
    again = only_run(tmp_path)
    assert again.name.endswith(f"-s{json.loads((again / 'args.json').read_text())['seed']}")
    assert rows(again, "eval.log")[0]["returns"] != rows(folder, "eval.log")[0]["returns"]


@pytest.mark.parametrize(
    "flags",
    [
        "--pre_transform_image_size 100 --frame_stack 2 --detach_encoder --updates_per_step 2",
        "--save_video --encoder_type identity --num_train_steps 60",
        "--agent sac --encoder_type protorl --image_size 64 --num_layers 2",
        "--agent sac_ae --save_tb --image_size 64",
        "--cody_objective published --save_tb",
    ],
)
def test_whole_runs_of_variants(tmp_path, call, flags):
    result = call("train.py", f"{STATE if 'identity' in flags else SMALL} {flags} --work_dir {tmp_path}")
    assert result.returncode == 0, result.stderr
    folder = only_run(tmp_path)
    assert rows(folder, "eval.log")[-1]["step"] == (60 if "60" in flags else 36)
    train = rows(folder, "train.log")
    last = train[-1]
    of_cody, of_sac = {"info_nce", "kl"} <= set(last), {"critic_loss", "actor_loss"} <= set(last)
    assert of_sac and of_cody == ("pre_transform" in flags)
    if "--updates_per_step 2" in flags:
        assert sum(row["updates_per_s"] * row["duration"] for row in train) == pytest.approx(2 * (30 - 12))
    if "identity" in flags:
        assert ", states, videos drawn by " in result.stdout
        assert len(list((folder / "video").iterdir())) == 5
    if "sac_ae" in flags:
        assert 0 < last["psnr"] < 60 and -1 < last["ssim"] <= 1
        events = EventAccumulator(str(folder / "tb"), size_guidance={"images": 0})
        events.Reload()
        assert "visual/reconstruction" in events.Tags()["images"]
    if "published" in flags:
        assert {"temporal_nce", "dynamics_loss", "latent_rank"} <= set(last)


def test_updates_per_step(monkeypatch):
    """Counted in a real loop: every decision from init_steps on makes that many updates, numbered in order."""
    from env_worker import SerialEnv

    config = parse(f"{STATE} --updates_per_step 3 --num_train_steps 20".split())

    class Agent:
        indices = []

        def act(self, obs, sample):
            return env.action_space.sample()

        def augment(self, batch):
            return batch

        def update(self, batch, index, detailed):
            self.indices.append(index)
            return {"critic_loss": torch.tensor(1.0)}

        def images(self, batch):
            return {}

        def named_parameters(self):
            return []

    env, eval_env = SerialEnv(config, 0), SerialEnv(config, 1)
    replay = make_replay(50, (5,), 1, frame_stack=1)
    logger = Logger(".", config)
    monkeypatch.setattr(logger, "_row", lambda *args: None)
    run_loop(config, env, eval_env, replay, Agent(), logger)
    assert Agent.indices == list(range(12 * 3, 20 * 3))


def test_divergence_is_warned_of_once_per_episode(tmp_path, capsys):
    logger = Logger(tmp_path, parse(["--divergence_factor", "5"]))

    def interval(step, kl):
        logger.record(step, {"kl": torch.tensor(kl), "critic_loss": torch.tensor(1.0)})
        logger.fetch()

    for step in range(10):
        interval(step, 20.0)
    interval(10, 99.0)  # not yet 5 times the median
    assert "warning" not in capsys.readouterr().out
    interval(11, 101.0)
    assert capsys.readouterr().out == (
        "warning: kl 101 at step 11 is more than 5 times its running median 20; see docs/troubleshooting.md\n"
    )
    interval(12, 1000.0)
    assert capsys.readouterr().out == ""
    logger.train_row(13, episode=0, episode_reward=0.0)
    capsys.readouterr()
    interval(14, 1000.0)
    assert capsys.readouterr().out.startswith("warning: kl 1000 at step 14")
    logger.close()


def test_collapsed_latents_are_warned_of_once(tmp_path, capsys):
    """Two readings in a row after 2,000 updates; a resumed run remembers the first."""
    config = parse(["--init_steps", "500", "--updates_per_step", "2"])
    logger = Logger(tmp_path, config)

    def interval(step, std, rank):
        metrics = {"latent_std": torch.tensor(std)} | ({} if rank is None else {"latent_rank": torch.tensor(rank)})
        logger.record(step, metrics)
        logger.fetch()
        return capsys.readouterr().out

    for step in (1300, 1400):  # 1,800 updates at most
        assert interval(step, 0.01, 1.0) == ""
    assert interval(1500, 0.01, 20.0) == ""
    assert interval(1600, 0.06, 3.1) == ""
    assert interval(1700, 0.06, math.nan) == ""  # undefined, which is no collapse
    assert interval(1800, 0.06, 2.9) == ""
    state = logger.state_dict()
    logger = Logger(tmp_path, config)
    logger.load_state_dict(state)
    assert interval(1850, 0.06, None) == ""  # before an evaluation: no reading of the rank
    line = (
        "warning: latent_std 0.049, latent_rank 2.9 at step 1900: latents have collapsed; see docs/troubleshooting.md\n"
    )
    assert interval(1900, 0.049, 2.9) == line
    assert interval(2000, 1.0, 20.0) == interval(2100, 0.01, 1.0) == interval(2200, 0.01, 1.0) == ""
    logger.close()


@pytest.mark.parametrize(
    "flags, line",
    [
        ("--domain_name cartpol", "--domain_name cartpol --task_name swingup: no such task; the nearest are cartpole"),
        ("--image_size 600", "--image_size or --pre_transform_image_size 600: the task renders at most"),
        ("--num_layers 30", "--image_size 84: must be at least 119 pixels for --num_layers 30"),
        ("--critic_lr -1", "--critic_lr -1.0: must be positive"),
        ("--init_steps 1", "--init_steps 1: must be at least 2"),
        ("--num_train_steps 900000000 --replay_buffer_capacity 900000000", "--replay_buffer_capacity 900000000: its"),
    ],
)
def test_bad_input_is_one_line_and_creates_nothing(tmp_path, monkeypatch, call, flags, line):
    monkeypatch.chdir(tmp_path)
    result = call("train.py", f"{WORKERS} {flags} --work_dir {tmp_path}/runs")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"train.py: error: {line}") and result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", ["--device cuda", "--replay_device cuda", "--compile"])
def test_what_is_asked_for_and_not_there(tmp_path, monkeypatch, call, flag):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CXX", "no-such-compiler")
    result = call("train.py", f"{SMALL} {flag} --work_dir {tmp_path}/runs")
    assert result.returncode == 2 and result.stderr.startswith(f"train.py: error: {flag}: ")
    assert result.stderr.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_unwritable_work_dir(tmp_path, call):
    (tmp_path / "file").write_text("")
    result = call("train.py", f"{SMALL} --work_dir {tmp_path}/file/runs")
    expected = f"train.py: error: --work_dir {tmp_path}/file/runs: {tmp_path}/file is not a folder\n"
    assert (result.returncode, result.stderr) == (2, expected)
    assert (tmp_path / "file").read_text() == ""
    result = call("train.py", f"{SMALL} --work_dir {tmp_path}/a/{'x' * 300}")
    assert result.returncode == 2 and "no name in it may be longer than 255 bytes" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    result = call("train.py", f"{SMALL} --work_dir /proc/runs")  # root may write there, and still cannot
    assert result.returncode == 2 and result.stderr.startswith("train.py: error: --work_dir /proc/runs: ")
    assert result.stderr.count("\n") == 1


def test_an_existing_run_is_not_written_over(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda _: "now")
    config = parse(["--work_dir", str(tmp_path)])
    names = [RunFolder(config, resumes=False).path.name for _ in range(3)]
    assert names == ["cody_sac-now-s1", "cody_sac-now-s1-2", "cody_sac-now-s1-3"]


def test_a_non_finite_loss_stops_the_run(tmp_path, call):
    result = call("train.py", f"{SMALL} --critic_lr 1e30 --work_dir {tmp_path}")
    assert result.returncode == 3 and "Traceback" not in result.stderr
    line = result.stderr.strip().splitlines()[-1]
    folder = only_run(tmp_path)
    assert line.startswith(f"{folder}: stopped: ") and "loss is " in line and " at step 1" in line
    assert "last metrics: " in line and "batch_reward" in line
    assert rows(folder, "train.log")[0]["step"] == 10 and rows(folder, "eval.log")[0]["step"] == 0


def test_a_policy_that_diverges_between_readings_stops_the_run(tmp_path, call):
    """Before its action reaches the physics, with a message that names the non-finite loss if there is one."""
    result = call("train.py", f"{SMALL} --log_interval 1000 --actor_lr 1e30 --work_dir {tmp_path}")
    assert result.returncode == 3 and "Traceback" not in result.stderr
    line = result.stderr.strip().splitlines()[-1]
    assert "stopped: " in line and "at step 1" in line and "last metrics: " in line


@pytest.mark.parametrize("console", ["a pipe without its reader", "a terminal that was closed"])
def test_a_console_that_goes_away(tmp_path, monkeypatch, console):
    """`| head -1` and a lost connection: the rows are still written, and an intact console still prints."""
    reader, writer = os.pipe() if "pipe" in console else pty.openpty()
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w"))
    logger = Logger(tmp_path, parse([]))
    logger.message("heard")
    assert os.read(reader, 100).split() == [b"heard"]
    os.close(reader)
    for step in range(3):
        logger.eval_row(step, episode=0, episode_reward=1.0, duration=1.0)
    logger.close()
    assert len(rows(tmp_path, "eval.log")) == 3


def test_a_console_that_shows_ascii_only(tmp_path, monkeypatch):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "ascii"))
    endings.prepare_console()
    Logger(tmp_path, parse([])).message("runs/ü")
    assert shown.getvalue() == b"runs/\\xfc\n"


def test_a_run_without_console(tmp_path):
    """stdout is lost after its first line; stderr is closed, and no file of the run may get its descriptor."""
    command_line = " ".join(command("train.py", SMALL, tmp_path))
    script = f"{command_line} 2>&- | head -1; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.count("\n") == 1 and "seed 3" in result.stdout
    assert [row["step"] for row in rows(only_run(tmp_path), "eval.log")] == [0, 15, 30, 36]


def test_readings_count_by_their_updates(tmp_path):
    """A reading of one update does not weigh as much as one of three; undefined diagnostics are null."""
    logger = Logger(tmp_path, parse([]))
    for losses in ([1.0, 2.0, 3.0], [10.0]):
        for loss in losses:
            dims = torch.tensor([loss, 1.0])
            metrics = {"kl": torch.tensor(loss), "kl_per_dim": dims, "latent_rank": torch.tensor(float("nan"))}
            logger.record(1, metrics)
        logger.fetch()
    logger.train_row(4, episode=0, episode_reward=0.0)
    (row,) = rows(tmp_path, "train.log")
    assert row["kl"] == 4.0 and row["kl_per_dim"] == [4.0, 1.0] and row["latent_rank"] is None
    logger.close()


STOPPED = "{folder}: stopped: {why}; --run_dir {folder} resumes at step "


@pytest.mark.parametrize(
    "sent, code, line",
    [
        ("Ctrl-C", 130, STOPPED.replace("{why}", "SIGINT")),
        ("SIGTERM to all", 75, STOPPED.replace("{why}", "SIGTERM")),
        ("SIGKILL", -9, ""),
        ("SIGKILL to a worker", 1, "{folder}: stopped: an environment worker has died with exit code -9"),
    ],
)
def test_an_interrupted_run_resumes(trained, tmp_path, call, sent, code, line):
    """It leaves no process and intact logs, and resumes to the results of an uninterrupted run."""
    folder = tmp_path / "run"
    process = subprocess.Popen(
        command("train.py", f"{WORKERS} --run_dir {folder}", None),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        # a test suite started in the background ignores Ctrl-C, and its children would
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not process.stdout.readline().startswith(b"| train"):
        pass
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2  # an environment to train in, and one or more to evaluate in
    time.sleep(random.random() / 10)  # at any moment of a decision
    if sent == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)
    elif sent == "SIGTERM to all":
        for each in (*children, process):
            each.terminate()
    elif sent == "SIGKILL":
        process.kill()
    else:
        children[0].kill()
    assert process.wait(timeout=30) == code
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive
    said = process.stderr.read().decode()
    assert said.startswith(line.format(folder=folder)) and said.count("\n") == (1 if line else 0)
    recorded = json.loads((folder / "run.json").read_text())
    assert recorded["state"] == ("stopped" if line else "running") and 0 < recorded["step"] < 36 or not line
    result = call("train.py", f"--run_dir {folder} --no_env_worker --save_tb")
    assert result.returncode == 0 and "resumes at step " in result.stdout, result.stderr
    assert_same_logs(folder, trained[0])
    assert json.loads((folder / "run.json").read_text())["state"] == "finished"
    # the files that it no longer needs are gone
    assert [p.name for p in (folder / "model").iterdir()] == ["36.pt"] and not (folder / "checkpoint").exists()
    args = json.loads((folder / "args.json").read_text())
    assert len(args["continued"]) == 1 and args["save_tb"] and not args["env_worker"]
