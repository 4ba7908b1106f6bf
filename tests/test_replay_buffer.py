"""The single-frame replay against a plain buffer that stores every stacked observation."""

import hashlib

import numpy as np
import pytest
import torch
from conftest import make_replay

from endings import Refused
from storage import journal
from storage.frames import flat, pack, unpack

FRAME = (3, 6, 5)


class Plain:
    """Every transition of the stream with its stacked observations, nothing shared, nothing overwritten."""

    def __init__(self):
        self.rows = []  # (position of o_t in the stream of frames, obs, action, reward, next_obs, not_done, episode)


def stream(replay, plain, lengths, k, seed=0):
    """Push episodes of these lengths, with random frames, through both buffers; True ends for every third."""
    rng = np.random.default_rng(seed)
    position = 0
    for episode, length in enumerate(lengths):
        frames = [rng.integers(0, 256, FRAME, np.uint8)] * k
        obs = np.concatenate(frames)
        replay.begin_episode(obs)
        for t in range(length):
            action = rng.standard_normal(2).astype(np.float32)
            reward = float(np.float32(rng.standard_normal()))
            frames = frames[1:] + [rng.integers(0, 256, FRAME, np.uint8)]
            next_obs = np.concatenate(frames)
            terminated = t == length - 1 and episode % 3 == 0
            replay.add(action, reward, next_obs, terminated)
            plain.rows.append((position, obs, action, reward, next_obs, not terminated, episode))
            obs = next_obs
            position += 1
        position += 1


def make(capacity=40, k=3, episode_steps=10, seed=0):
    return make_replay(capacity, FRAME, 2, k, episode_steps, seed=seed)


def expected_pairs(plain, replay, k):
    """Position of o_t -> (previous row, row), for pairs of one episode whose every frame is in the last `slots`."""
    frames_written = plain.rows[-1][0] + 2
    oldest = frames_written - replay.slots
    starts = {}
    pairs = {}
    for before, row in zip(plain.rows, plain.rows[1:], strict=False):
        starts.setdefault(before[-1], before[0])
        if before[-1] == row[-1] and max(starts[row[-1]], before[0] - (k - 1)) >= oldest:
            pairs[row[0]] = (before, row)
    return pairs


@pytest.mark.parametrize("k", [1, 3, 4])
@pytest.mark.parametrize("lengths", [[10] * 3, [10] * 13, [1, 2, 3, 9, 10, 1, 1, 10, 4, 7, 10, 10, 2], [95]])
def test_byte_equal_to_plain_buffer_at_every_legal_index(k, lengths):
    replay, plain = make(k=k), Plain()
    stream(replay, plain, lengths, k)
    pairs = expected_pairs(plain, replay, k)
    legal = replay.legal_positions()
    assert legal.tolist() == sorted(pairs)
    batch = replay.gather(legal)
    for i, position in enumerate(legal):
        before, (_, obs, action, reward, next_obs, not_done, _) = pairs[position]
        assert np.array_equal(batch.obs_prev[i], before[1])
        assert np.array_equal(batch.action_prev[i], before[2])
        assert np.array_equal(batch.obs[i], obs)
        assert np.array_equal(batch.action[i], action)
        assert batch.reward[i].item() == reward
        assert np.array_equal(batch.next_obs[i], next_obs)
        assert batch.not_done[i].item() == not_done


def test_every_prefix_of_a_wrapping_stream():
    """Legality holds at every moment, not just at the end of episodes."""
    for steps in range(2, 60):
        replay, plain = make(capacity=20, episode_steps=7), Plain()
        lengths = [7] * (steps // 7) + ([steps % 7] if steps % 7 else [])
        stream(replay, plain, lengths, 3)
        assert replay.legal_positions().tolist() == sorted(expected_pairs(plain, replay, 3))


def test_holds_capacity_transitions():
    replay, plain = make(capacity=40, episode_steps=10), Plain()
    stream(replay, plain, [10] * 20, 3)
    # at the end of an episode, the last 40 transitions: 4 episodes of 9 pairs each
    assert replay.legal_positions()[-36:].tolist() == [
        p for start in range(176, 220, 11) for p in range(start + 1, start + 10)
    ]


def test_batch_shapes_and_types():
    replay, plain = make(), Plain()
    stream(replay, plain, [10] * 3, 3)
    batch = replay.sample(16)
    for name in ("obs_prev", "obs", "next_obs"):
        assert getattr(batch, name).shape == (16, 9, 6, 5)
        assert getattr(batch, name).dtype == torch.uint8
    for name, width in (("action_prev", 2), ("action", 2), ("reward", 1), ("not_done", 1)):
        assert getattr(batch, name).shape == (16, width)
        assert getattr(batch, name).dtype == torch.float32


def test_sampling_is_uniform_over_legal_pairs(monkeypatch):
    replay, plain = make(), Plain()
    stream(replay, plain, [10] * 13, 3)
    monkeypatch.setattr(replay, "gather", lambda positions: positions)
    legal = replay.legal_positions()
    drawn = replay.sample(200_000)
    counts = np.array([(drawn == p).sum() for p in legal])
    assert counts.sum() == len(drawn)
    mean = len(drawn) / len(legal)
    assert (((counts - mean) ** 2 / mean).sum()) < len(legal) + 5 * np.sqrt(2 * len(legal))  # chi-square, 5 sigma


def test_sampling_finds_the_only_pair_and_says_when_there_is_none():
    replay = make(capacity=1000)
    with pytest.raises(ValueError, match="no pair"):
        replay.sample(1)
    plain = Plain()
    stream(replay, plain, [1] * 400, 3)
    with pytest.raises(ValueError, match="no pair"):
        replay.sample(8)
    obs = np.zeros((9, 6, 5), np.uint8)
    replay.begin_episode(obs)
    for reward in (1.0, 2.0):
        replay.add(np.zeros(2), reward, obs, False)
    assert replay.sample(8).reward.flatten().tolist() == [2.0] * 8


def test_same_seed_same_batches():
    batches = []
    for _ in range(2):
        replay = make(seed=3)
        stream(replay, Plain(), [10] * 3, 3)
        batches.append(replay.sample(16))
    assert all(torch.equal(a, b) for a, b in zip(batches[0][:7], batches[1][:7], strict=True))


def test_memory_per_transition_and_honest_allocation():
    replay = make_replay(1000, (3, 84, 84), 1, episode_steps=125)
    assert replay.nbytes / 1000 <= 21_600
    slots_at_100k = 100_000 + 100_000 // 125 + 2
    assert replay.nbytes / replay.slots * slots_at_100k <= 2.2e9
    with pytest.raises(Refused, match="--replay_buffer_capacity 1000000000: .* GB of memory are available"):
        make_replay(1_000_000_000, (3, 84, 84), 1)


def random_lengths(seed):
    """With many short episodes."""
    rng = np.random.default_rng(seed)
    return [int(n) for n in np.minimum(rng.geometric(0.15, rng.integers(5, 40)), 10)]


def assert_same_content(ours, theirs):
    legal = theirs.legal_positions()
    assert ours.legal_positions().tolist() == legal.tolist() and len(legal)
    for a, b in zip(ours.gather(legal)[:7], theirs.gather(legal)[:7], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("seed", range(12))
def test_packed_frames_are_the_raw_ones(seed):
    """Noise, which does not compress, and a scene that does; lengths, ends and wrap-around as they come."""
    raw, packed = (make_replay(40, FRAME, 2, seed=seed, replay_storage=kind) for kind in ("raw", "lz4"))
    obs = np.full((9, *FRAME[1:]), 200, np.uint8)
    for replay in (raw, packed):
        stream(replay, Plain(), random_lengths(seed), 3, seed)
        replay.begin_episode(obs)
    assert_same_content(packed, raw)
    for i in range(9):
        obs = obs.copy()
        obs[:, i % 6, i % 5] += 100  # past 255
        for replay in (raw, packed):
            replay.add(np.zeros(2), 0.0, obs, False)
        assert_same_content(packed, raw)
    assert all(torch.equal(a, b) for a, b in zip(raw.sample(64)[:7], packed.sample(64)[:7], strict=True))


def test_packed_states_are_the_raw_ones():
    raw, packed = (make_replay(40, (5,), 2, replay_storage=kind) for kind in ("raw", "lz4"))
    rng = np.random.default_rng(0)
    for i in range(90):
        obs = rng.standard_normal(15).astype(np.float32)
        for replay in (raw, packed):
            replay.add(np.zeros(2), 0.0, obs, False) if i % 10 else replay.begin_episode(obs)
    assert_same_content(packed, raw)


def test_noise_takes_no_more_than_its_own_bytes():
    frame, first = np.random.default_rng(0).integers(0, 256, (2, 3, 84, 84), np.uint8)
    assert len(pack(frame, flat(first))) == frame.nbytes and len(pack(first, flat(first))) < 200
    out = np.empty_like(frame)
    unpack(pack(frame, flat(first)), flat(first), out)
    assert np.array_equal(out, frame)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", ["raw", "lz4"])
def test_what_is_read_from_the_journal(tmp_path, monkeypatch, seed, kind):
    """At any moment, with short segments whose oldest are deleted: the same pairs and the same draws."""
    monkeypatch.setattr(journal, "SEGMENT_BYTES", 500)
    replay, plain = make_replay(40, FRAME, 2, seed=seed, replay_storage=kind), Plain()
    replay.open_journal(tmp_path)
    for lengths in (random_lengths(seed), [4, 3], random_lengths(seed + 100)):
        stream(replay, plain, lengths, 3, seed)
        files = replay.commit()
        for name, (size, expected) in files.items():
            data = (tmp_path / name).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (size, expected)
        for path in tmp_path.iterdir():
            if path.name not in files:
                path.unlink()
        other = make_replay(40, FRAME, 2, seed=seed)
        other.read(tmp_path, files)
        other.load_state_dict(replay.state_dict())
        assert_same_content(other, replay)
        assert torch.equal(other.sample(64).obs, replay.sample(64).obs)
    assert 2 <= len(files) <= 8
    larger = make_replay(1000, FRAME, 2)
    larger.read(tmp_path, files)
    assert larger.legal_positions()[0] > int(min(files).split(".")[0]) > 0  # earlier segments are gone from the journal
    larger.gather(larger.legal_positions())


def test_the_journal_resumes_after_a_checkpoint(tmp_path, monkeypatch):
    """Later data is removed: the end of its last segment, and whole segments."""
    monkeypatch.setattr(journal, "SEGMENT_BYTES", 1500)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
        replay = make(capacity=1000)
        replay.open_journal(folder)
        stream(replay, Plain(), [10, 10, 3], 3, seed=1)
        files = replay.commit()
        if folder is broken:
            stream(replay, Plain(), [7] * 5, 3, seed=2)  # lost
            replay.commit()
            replay = make(capacity=1000)
            replay.open_journal(folder)
            replay.read(folder, files)
        stream(replay, Plain(), [10] * 4, 3, seed=3)
        files = replay.commit()
    assert {p.name: p.read_bytes() for p in whole.iterdir()} == {p.name: p.read_bytes() for p in broken.iterdir()}
    assert files.keys() == {p.name for p in whole.iterdir()} and len(files) == 4


def test_a_journal_that_ends_in_the_middle_of_a_record(tmp_path):
    replay = make(capacity=1000)
    replay.open_journal(tmp_path)
    stream(replay, Plain(), [10], 3)
    replay.commit()
    (path,) = tmp_path.iterdir()
    data = path.read_bytes()
    for missing in (1, 50, 100, 120):
        path.write_bytes(data[:-missing])
        other = make(capacity=1000)
        other.read(tmp_path)
        assert len(other.legal_positions()) == 8 - (missing >= 119)
