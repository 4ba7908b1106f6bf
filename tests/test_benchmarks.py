"""The benchmark commands print what they claim to measure."""

import types

import pytest
from conftest import SMALL

from benchmarks import checkpoint_cost
from config import parse
from storage import journal
from storage.run_folder import CHECKPOINT


def test_throughput(call):
    result = call(
        "benchmarks.throughput", "--batch_sizes 2 --updates 2 --decisions 2 --rounds 2 --rows=--update_mode=joint"
    )
    assert result.returncode == 0, result.stderr
    assert "times as long in bf16 as in fp32" in result.stdout
    (row,) = [line.split() for line in result.stdout.splitlines() if line.startswith("--update_mode=joint")]
    batch, ms, ratio, sample, augment, decisions_per_s, gflop, memory, kilobytes, lowest, highest = row[1:]
    assert batch == "2" and ratio == lowest == highest == "1.00" and 0 < float(sample) + float(augment) < 100
    assert 21.1 < float(kilobytes) < 21.6 and float(decisions_per_s) > 0 and float(ms) > 0 and float(memory) > 0
    # by hand: convolutions and heads of 4 passes forward and one backward, for a batch of 2
    of_convs = [2 * 9 * (9 if i == 0 else 32) * 32 * size**2 for i, size in enumerate((41, 39, 37, 35))]
    of_joint = 2 * (6 * sum(of_convs) - of_convs[0]) / 1e9
    assert of_joint < float(gflop) < 1.3 * of_joint


def test_medians_over_rounds():
    """Medians are over all rounds, ratios within each round."""
    from benchmarks.throughput import table

    rounds = [
        [
            {"batch": 128, "ms": baseline, "GB": 1.0},
            {"batch": 128, "ms": ms, "GB": 3.0},
            {"batch": 256, "ms": 7.0, "GB": 2.0},
        ]
        for baseline, ms in ((2.0, 1.0), (22.5, 9.0), (4.0, 12.0))
    ]
    result = table(["a", "b", "a"], rounds)
    assert [*result.index] == ["a", "b", "a"] and [*result["batch"]] == [128, 128, 256]
    assert [*result["ms"]] == [4.0, 9.0, 7.0] and [*result["ratio"]] == [1.0, 0.5, 1.0] and [*result["GB"]] == [1, 3, 2]
    assert [*result["lowest ratio"]] == [1.0, 0.4, 1.0] and [*result["highest ratio"]] == [1.0, 3.0, 1.0]
    assert "lowest ratio" not in table(["a", "b", "a"], rounds[:1])


@pytest.mark.parametrize(
    "flags, line",
    [
        ("--rounds 0", "--rounds 0: must be at least 1"),
        ("--updates 1", "--updates 1: must be at least 2"),
        ("--batch_sizes many", "--batch_size many: must be a whole number"),
        ("--batch_sizes 3000", "--batch_size 3000: must not exceed what the replay can hold"),
        ("--rows=--update_mode=fast", "--update_mode fast: must be one of sequential, joint"),
        ("--batch_sizes=", "--batch_sizes: must not be empty"),
    ],
)
def test_what_cannot_be_timed(call, flags, line):
    result = call("benchmarks.throughput", flags)
    assert (result.returncode, result.stdout) == (2, "") and result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"benchmarks.throughput: error: {line}") and len(result.stderr) <= 201


@pytest.mark.parametrize("directory", ["", "tests", "/no/such/folder"])
def test_released_says_what_it_needs(call, directory):
    result = call("benchmarks.released", directory)
    assert result.returncode == 2 and result.stdout == "" and result.stderr.count("\n") == 1
    assert "needs git clone https://github.com/BangYou01/DY2P and git -C DY2P checkout 0ce9f0f" in result.stderr
    assert len(result.stderr) <= 201


def test_released_beside_ours(call, monkeypatch):
    """One measurement of the released code for all rows of a batch size; the ratio is above 1 if ours is faster."""
    from benchmarks import released, throughput

    calls = []

    def measured(function, config, *args):
        calls.append(function.__name__)
        return {"ms": 5.0 * len(calls)} if function is throughput.measure else 40.0

    monkeypatch.setattr(throughput, "in_own_process", measured)
    git = types.SimpleNamespace(run=lambda *args, **kwargs: types.SimpleNamespace(stdout="0ce9f0f\n"))
    monkeypatch.setattr(released, "subprocess", git)
    result = call("benchmarks.released", "DY2P --batch_sizes 8")
    assert result.returncode == 0 and calls == ["measure_released", "measure", "measure"]
    assert [line.split()[2:] for line in result.stdout.splitlines()[-2:]] == [
        ["8", "40.0", "10.0", "4.00"],
        ["8", "40.0", "15.0", "2.67"],
    ]


def test_checkpoint_cost_counts_the_transitions_on_disk(tmp_path, capsys):
    flags = f"{SMALL} --action_repeat 100 --replay_buffer_capacity 30 --num_train_steps 1030 --batch_size 4"
    checkpoint_cost.measure(
        checkpoint_cost.Args(transitions=30, saves=3), parse(f"{flags} --no_env_worker".split()), tmp_path
    )
    ages = [age for _, _, age, *_ in journal.read(tmp_path / CHECKPOINT)]
    size = sum(path.stat().st_size for path in (tmp_path / CHECKPOINT).glob("*.replay"))
    per_transition = size / sum(age > 0 for age in ages) / 1e3
    assert f"replay on disk {per_transition:.2f} KB a transition" in capsys.readouterr().out


def test_random_policy(call):
    result = call("benchmarks.random_policy", "--tasks cartpole-swingup --num_episodes 2")
    header, row = [line.split(",") for line in result.stdout.splitlines()]
    assert header == "method env_steps task mean std seeds source".split()
    assert row[:3] == ["random policy", "0", "cartpole_swingup"] and 0 < float(row[3]) < 500 and row[5] == ""
    result = call("benchmarks.random_policy", "--num_episodes 1")
    assert (result.returncode, result.stdout) == (2, "") and "--num_episodes 1: must be at least 2" in result.stderr
