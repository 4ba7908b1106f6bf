"""Files of a checkpoint that are damaged, disks that are full: small parts in place of a whole run."""

import json
import pathlib
import random
import shutil

import pytest
import torch
from conftest import make_replay
from test_replay_buffer import FRAME, Plain, assert_same_content, stream
from test_train import on_a_full_disk

from endings import Ending, Refused
from storage.checkpoint import Checkpoints


class Part:
    """Something with a state."""

    def __init__(self):
        self.value = torch.zeros(50)

    def state_dict(self):
        return {"value": self.value, "big": 2**100, "text": "ü", "nested": [1.5, None, (True, {"a": [2]})]}

    def load_state_dict(self, state):
        assert state["big"] == 2**100 and state["nested"] == [1.5, None, (True, {"a": [2]})]
        self.value = state["value"]


def open_run(folder, said=None, **made_with):
    """(checkpoints, part, replay) on a folder."""
    (folder / "checkpoint").mkdir(parents=True, exist_ok=True)
    part, replay = Part(), make_replay(1000, FRAME, 2)
    replay.open_journal(folder / "checkpoint")
    parts = {"part": part, "replay": replay}
    message = print if said is None else said.append
    return (
        Checkpoints(folder, parts, 10, {"torch": "1", "versions": {"numpy": "2"}, **made_with}, message),
        part,
        replay,
    )


def advance(part, replay, seed):
    part.value = torch.full((50,), float(seed))
    stream(replay, Plain(), [10, 7], 3, seed)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with two checkpoints, and the replays that they hold."""
    folder = tmp_path_factory.mktemp("saved")
    checkpoints, part, replay = open_run(folder)
    replays = []
    for seed in range(1, 4):
        advance(part, replay, seed)
        checkpoints.save()
        other = make_replay(1000, FRAME, 2)
        other.read(folder / "checkpoint", replay.commit())
        replays.append(other)
    return folder, replays


def test_a_kill_while_they_are_removed_leaves_none_that_is_not_whole(saved, tmp_path, monkeypatch):
    shutil.copytree(saved[0], tmp_path / "run")
    checkpoints, _, _ = open_run(tmp_path / "run")
    remove = pathlib.Path.unlink

    def look(path):
        remove(path)
        there = {path.name for path in (tmp_path / "run" / "checkpoint").iterdir()}
        for name in there:
            if name.endswith(".json"):
                assert json.loads((tmp_path / "run" / "checkpoint" / name).read_text())["files"].keys() <= there

    monkeypatch.setattr(pathlib.Path, "unlink", look)
    checkpoints.free()
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_the_last_and_the_one_before_are_kept(saved, tmp_path):
    folder, replays = saved
    names = [path.name for path in (folder / "checkpoint").iterdir()]
    assert sorted(names) == ["000000000000.replay", "000002.json", "000002.pt", "000003.json", "000003.pt"]
    shutil.copytree(folder, tmp_path / "moved")
    said = []
    checkpoints, part, replay = open_run(tmp_path / "moved", said)
    assert checkpoints.load() and not said
    assert part.value.eq(3).all()
    assert_same_content(replay, replays[2])
    assert not open_run(tmp_path / "empty")[0].load()


def truncated(data):
    return data[: random.Random(0).randrange(1, len(data))]


def flipped(data):
    place = random.Random(0).randrange(len(data))
    return data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :]


@pytest.mark.parametrize("damage", [truncated, flipped, lambda data: b"", None, "folder"])
@pytest.mark.parametrize("name", ["000003.json", "000003.pt"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(saved, tmp_path, name, damage):
    folder = tmp_path / "run"
    shutil.copytree(saved[0], folder)
    path = folder / "checkpoint" / name
    data = path.read_bytes()
    path.unlink()
    if damage == "folder":  # as good as unreadable, which nothing is for root
        path.mkdir()
    elif damage:
        path.write_bytes(damage(data))
    said = []
    checkpoints, part, replay = open_run(folder, said)
    assert checkpoints.load() and part.value.eq(2).all()
    assert_same_content(replay, saved[1][1])
    missing = name == "000003.json" and damage is None
    assert [line.startswith(f"warning: {path}: damaged (") for line in said] == [True] * (not missing)
    advance(part, replay, 9)
    (folder / "checkpoint" / "notes.txt").touch()  # is not ours to remove
    checkpoints.save()
    assert (folder / "checkpoint" / "notes.txt").exists()
    again, part, other = open_run(folder, said)
    assert again.load() and part.value.eq(9).all()
    assert_same_content(other, replay)


def test_a_changed_manifest(saved, tmp_path):
    """Although it is JSON of the right form."""
    shutil.copytree(saved[0], tmp_path / "run")
    path = tmp_path / "run" / "checkpoint" / "000003.json"
    text = path.read_text()
    path.write_text(text.replace('"numpy": "2"', '"numpy": "3"'))
    said = []
    assert text != path.read_text() and open_run(tmp_path / "run", said)[0].load()
    assert said == [f"warning: {path}: damaged (checksum mismatch): resuming from the checkpoint before it"]


@pytest.mark.parametrize("damage", [truncated, flipped, lambda data: b"", None])
def test_nothing_can_be_used(saved, tmp_path, damage):
    """The beginning of the replay is in both."""
    folder = tmp_path / "run"
    shutil.copytree(saved[0], folder)
    path = folder / "checkpoint" / "000000000000.replay"
    data = path.read_bytes()[:1000]
    path.write_bytes(damage(data)) if damage else path.unlink()
    before = sorted(path.name for path in folder.rglob("*"))
    with pytest.raises(Refused, match="replay: damaged .* no intact checkpoint; start a new run in another folder"):
        open_run(folder)[0].load()
    assert sorted(path.name for path in folder.rglob("*")) == before


def test_the_newest_frames_are_damaged(saved, tmp_path):
    """Files that the previous checkpoint does not have."""
    folder = tmp_path / "run"
    shutil.copytree(saved[0], folder)
    path = folder / "checkpoint" / "000000000000.replay"
    path.write_bytes(path.read_bytes()[:-10])
    said = []
    checkpoints, part, replay = open_run(folder, said)
    assert checkpoints.load() and part.value.eq(2).all() and len(said) == 1
    assert_same_content(replay, saved[1][1])


def test_memory_that_a_resumed_run_lacks(saved, tmp_path):
    """As on a GPU that another job fills: unlike another version's checkpoint, one that a sweep tries again."""
    shutil.copytree(saved[0], tmp_path / "run")
    checkpoints, part, _ = open_run(tmp_path / "run")

    def load_state_dict(state):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total ...")

    part.load_state_dict = load_state_dict
    with pytest.raises(Ending, match="^CUDA out of memory; reduce memory with ") as error:
        checkpoints.load()
    assert error.value.code == 1


def test_a_full_disk(tmp_path):
    """The last checkpoint is unchanged, whichever file did not fit, and no partial file remains."""
    checkpoints, part, replay = open_run(tmp_path)
    advance(part, replay, 1)
    checkpoints.save()
    part.value = torch.arange(1000.0)
    with pytest.raises(OSError):
        on_a_full_disk(checkpoints.save)()
    assert not list((tmp_path / "checkpoint").glob("*.tmp"))
    _, part, other = after = open_run(tmp_path)
    assert after[0].load() and part.value.eq(1).all()
    assert_same_content(other, replay)


def test_what_bit_equality_depends_on(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "run")
    said = []
    assert open_run(tmp_path / "run", said, torch="3", versions={"numpy": "4"})[0].load()
    (line,) = said
    assert line == "warning: results may no longer be bit-identical: torch was 1, is 3, numpy was 2, is 4"


def test_how_often(tmp_path, monkeypatch):
    """Every 10 minutes, and after an evaluation unless it would cost more than 2 %."""
    now = [0.0]
    monkeypatch.setattr("storage.checkpoint.time.monotonic", lambda: now[0])
    checkpoints, part, replay = open_run(tmp_path)
    saves = []
    monkeypatch.setattr(checkpoints, "save", lambda: saves.append(now[0]))
    checkpoints.save_if_due()
    checkpoints._duration = 2.0
    for now[0] in (99, 101, 599, 601):
        checkpoints.save_if_due()
    now[0] = 99
    checkpoints.save_if_due(evaluated=True)
    now[0] = 101
    checkpoints.save_if_due(evaluated=True)
    assert saves == [601, 101]


def test_old_segments_go(tmp_path, monkeypatch):
    """Files that no kept checkpoint needs."""
    monkeypatch.setattr("storage.journal.SEGMENT_BYTES", 1000)
    checkpoints, part, _ = open_run(tmp_path)
    replay = checkpoints._parts["replay"] = make_replay(40, FRAME, 2)
    replay.open_journal(tmp_path / "checkpoint")
    for seed in range(12):
        advance(part, replay, seed)
        checkpoints.save()
    first = min(path.name for path in (tmp_path / "checkpoint").glob("*.replay"))
    assert 12 * 19 - 40 - 60 < int(first.split(".")[0]) < 12 * 19 - 40
    manifests = sorted((tmp_path / "checkpoint").glob("*.json"))
    for path in manifests:
        assert all((tmp_path / "checkpoint" / name).exists() for name in json.loads(path.read_text())["files"])
    assert len(manifests) == 2 and replay.sample(8).reward.isfinite().all()
