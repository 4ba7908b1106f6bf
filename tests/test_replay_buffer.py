"""The single-frame replay against a plain buffer that stores every stacked observation."""

import numpy as np
import pytest
import torch
from conftest import make_replay

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
    with pytest.raises(MemoryError, match="--replay_buffer_capacity 1000000000: .* GB of memory are available"):
        make_replay(1_000_000_000, (3, 84, 84), 1)


@pytest.mark.parametrize("capacity", [1000, 40])
def test_saved_chunks_load_back(tmp_path, capacity):
    replay, plain = make(capacity=capacity), Plain()
    stream(replay, plain, [10, 4], 3)
    replay.save(tmp_path)
    obs = np.full((9, 6, 5), 7, np.uint8)
    replay.begin_episode(obs)
    for i in range(20):
        replay.add(np.full(2, i), i, obs + i, False)
    replay.save(tmp_path)
    replay.save(tmp_path)  # nothing new
    assert len(list(tmp_path.iterdir())) == 2
    other = make(capacity=capacity)
    other.load(tmp_path)
    legal = other.legal_positions()
    # all but the last transition, whose next frame is still to be saved
    assert legal.tolist() == replay.legal_positions()[:-1].tolist()
    for a, b in zip(replay.gather(legal)[:7], other.gather(legal)[:7], strict=True):
        assert torch.equal(a, b)


def test_a_gap_between_saved_chunks_is_not_bridged(tmp_path):
    """More frames than slots between two saves: what was overwritten unsaved is not sampled as if it were there."""
    for gap in range(1, 60):
        folder = tmp_path / str(gap)
        folder.mkdir()
        replay, everything = make(capacity=12), make(capacity=1000)
        for buffer in (replay, everything):
            stream(buffer, Plain(), [5], 3)
            if buffer is replay:
                buffer.save(folder)
            obs = np.zeros((9, 6, 5), np.uint8)
            buffer.begin_episode(obs)
            for i in range(gap):
                buffer.add(np.full(2, i), i, obs + i + 1, False)
        replay.save(folder)
        other = make(capacity=12)
        other.load(folder)
        legal = other.legal_positions()
        assert len(legal) >= min(gap - 2, 12 - 3)
        for a, b in zip(everything.gather(legal)[:7], other.gather(legal)[:7], strict=True):
            assert torch.equal(a, b)
