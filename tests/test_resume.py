"""A killed and resumed run equals an uninterrupted one, byte for byte. Real dm_control throughout."""

import json
import os
import pathlib
import random
import statistics
import subprocess
import sys
import time

import psutil
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import env_worker
import logger
import replay_buffer
import sac
import train
from storage import checkpoint, journal, run_folder

# 10 decisions an episode
FLAGS = (
    "--action_repeat 100 --batch_size 4 --init_steps 8 --num_train_steps 26 --eval_freq 13 --num_eval_episodes 1 "
    "--log_interval 3 --hidden_dim 16 --num_filters 4 --encoder_feature_dim 8 --image_size 32 --num_layers 2 --seed 3 "
    "--no_env_worker --keep_checkpoint --checkpoint_minutes 1e-9"
)
STATES = FLAGS.replace("--num_filters 4 --encoder_feature_dim 8 --image_size 32 --num_layers 2", "").replace(
    "--num_eval", "--agent sac --encoder_type identity --num_eval"
)
TIMES = ("duration", "decisions_per_s", "updates_per_s", "wall_seconds")


class Kill(BaseException):
    """Simulates SIGKILL for a run in this process."""


class Moments:
    """Counts a run's operations in order and kills the run at a given one."""

    DOINGS = [
        (env_worker.SerialEnv, "reset"), (env_worker.SerialEnv, "finish"), (sac.SAC, "update"), (logger.Logger, "_row"),
        (replay_buffer.ReplayBuffer, "begin_episode"), (replay_buffer.ReplayBuffer, "add"), (journal.Journal, "commit"),
        (checkpoint, "_save"), (checkpoint, "write_json"), (checkpoint.Checkpoints, "_remove"),
        (run_folder, "write_json"), (os, "replace"),
    ]  # fmt: skip

    def __init__(self, monkeypatch):
        self.count, self.due, self.names = 0, None, []
        for owner, name in self.DOINGS:
            monkeypatch.setattr(owner, name, self._counted(getattr(owner, name), name))

    def _counted(self, function, name):
        def counted(*args, **kwargs):
            self.count += 1
            self.names.append(name)
            if self.count == self.due:
                raise Kill(name)
            return function(*args, **kwargs)

        return counted


@pytest.fixture
def moments(monkeypatch):
    return Moments(monkeypatch)


def rows(path):
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in path.read_text().splitlines()]


def numbers(value):
    """Everything in a nested state as comparable numbers; without times and values that depend on their digits."""
    if isinstance(value, dict):
        return {k: numbers(v) for k, v in value.items() if k not in ("seconds", "row_seconds", "lengths")}
    if isinstance(value, (list, tuple)):
        return [numbers(v) for v in value]
    return (value.dtype, value.shape, value.numpy().tobytes()) if isinstance(value, torch.Tensor) else value


def curves(folder):
    """{tag: [(environment step, value)]} that TensorBoard shows, without times."""
    if not folder.exists():
        return {}
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("speed/")]
    shown = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}
    shown |= {tag: [event.step for event in events.Images(tag)] for tag in events.Tags()["images"]}
    return shown | {tag: len(events.Tensors(tag)) for tag in events.Tags()["tensors"]}  # the flags and the layout


def result(folder):
    """All results of a finished run with --keep_checkpoint."""
    folder = pathlib.Path(folder)
    last = max((folder / "checkpoint").glob("*.pt"))
    return {
        "train.log": rows(folder / "train.log"),
        "eval.log": rows(folder / "eval.log"),
        "state": numbers(torch.load(last, weights_only=True)),
        "replay": {path.name: path.read_bytes() for path in (folder / "checkpoint").glob("*.replay")},
        "tb": curves(folder / "tb"),
        "model": {p.name: numbers(torch.load(p, weights_only=True)) for p in (folder / "model").iterdir()},
    }


def assert_same(ours, theirs):
    for part in theirs:
        keys = theirs[part] if isinstance(theirs[part], dict) else ()
        different = [key for key in keys if ours[part].get(key) != theirs[part][key]]
        assert not different and ours[part] == theirs[part], (part, different)


VARIANTS = {
    "cody": FLAGS,
    "joint": FLAGS
    + " --update_mode joint --replay_storage lz4 --save_tb --cody_warmup_updates 14 --cody_max_grad_norm 1"
    + " --cody_grad_ratio 1 --target_augmentations 2 --critic_augmentations 2",
    "published": FLAGS + " --cody_objective published --replay_buffer_capacity 15",
    "sac_ae": FLAGS + " --agent sac_ae --domain_name point_mass --task_name hard",
    "moving": FLAGS + " --agent sac --background moving",
    "states": STATES + " --domain_name finger --task_name turn_hard --action_repeat 100",
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_anywhere(tmp_path, call, moments, variant):
    flags = VARIANTS[variant]
    assert call("train.py", f"{flags} --run_dir {tmp_path}/whole").returncode == 0
    whole = result(tmp_path / "whole")
    total = moments.count
    dice = random.Random(variant)
    killed = []
    while True:
        moments.count, moments.due = 0, dice.randrange(1, total // 2)
        try:
            outcome = call("train.py", f"{flags} --run_dir {tmp_path}/killed")
            assert outcome.returncode == 0, outcome.stderr
            break
        except Kill as kill:
            killed.append(f"{kill} ({moments.due})")
    print(f"{variant} killed in {', '.join(killed)}")
    assert_same(result(tmp_path / "killed"), whole)


@pytest.mark.parametrize("moment", ["before args.json", "the first decision", "the first update", "the end"])
def test_killed_at(tmp_path, call, moments, moment):
    """Moments that random sampling seldom hits, on states."""
    flags = f"{STATES} --run_dir {tmp_path}"
    assert call("train.py", f"{flags}/whole").returncode == 0
    names = moments.names
    due = {
        "before args.json": names.index("write_json"),
        "the first decision": [i for i, name in enumerate(names) if name == "finish"][10],  # after 10 of evaluation
        "the first update": names.index("update"),
        "the end": len(names) - 1,
    }[moment]
    moments.count, moments.due = 0, due + 1
    with pytest.raises(Kill, match=names[due]):
        call("train.py", f"{flags}/killed")
    moments.due = None
    assert call("train.py", f"{flags}/killed").returncode == 0
    assert_same(result(tmp_path / "killed"), result(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_twenty_kills(tmp_path, seed):
    """SIGKILL to real processes with workers, at random moments."""
    dice = random.Random(seed)
    flags = FLAGS.replace("--no_env_worker", "--save_tb --save_video").replace("1e-9", "0.02").replace("26", "400")
    flags += [" --background moving", " --update_mode joint --replay_storage lz4"][seed]

    def start(name):
        command = [sys.executable, train.__file__, *flags.split(), "--run_dir", str(tmp_path / name)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    process = start("whole")
    begun = time.monotonic()
    process.stdout.readline()
    seconds = time.monotonic()
    assert process.wait() == 0, process.stdout.read()
    start_up, seconds = seconds - begun, time.monotonic() - seconds
    kills = []
    while len(kills) < 20:
        process = start("killed")
        wait = start_up * dice.random() if dice.random() < 0.1 else start_up + dice.random() * seconds / 8
        try:
            assert process.wait(wait) == 0
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills.append(f"{wait:.2f} s, step {run_folder.load_status(tmp_path / 'killed').get('step')}")
    process = start("killed")
    assert process.wait() == 0, process.stdout.read()
    assert len(kills) > 5
    print(f"seed {seed}: {len(kills)} kills after {'; '.join(kills)}")
    assert_same(result(tmp_path / "killed"), result(tmp_path / "whole"))


@pytest.mark.slow
def test_memory_stays(tmp_path):
    """20,000 decisions with a checkpoint every 5 seconds: the second half takes no more than 1 % over the first."""
    flags = STATES.replace("1e-9", "0.083").replace("--num_train_steps 26 --eval_freq 13", "--num_train_steps 20000")
    command = [sys.executable, train.__file__, *flags.split(), "--run_dir", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    seen = []  # (step, bytes)
    while process.poll() is None:
        step = run_folder.load_status(tmp_path / "run").get("step", 0)
        seen.append((step, psutil.Process(process.pid).memory_info().rss))
        time.sleep(1)
    assert process.returncode == 0
    checkpoints = int(max((tmp_path / "run" / "checkpoint").glob("*.json")).stem)
    first, second = ([rss for step, rss in seen if low < step <= low + 8000] for low in (4000, 12000))
    print(f"{checkpoints} checkpoints, {statistics.median(first):,} and {statistics.median(second):,} bytes")
    assert checkpoints > 10 and statistics.median(second) < 1.01 * statistics.median(first)
