"""The benchmark commands print what they claim to measure."""

import pytest


def test_throughput(call):
    result = call(
        "benchmarks.throughput", "--batch_sizes 2 --updates 2 --decisions 2 --rounds 2 --rows=--update_mode=joint"
    )
    assert result.returncode == 0, result.stderr
    assert "times as long in bf16 as in fp32" in result.stdout
    (row,) = [line.split() for line in result.stdout.splitlines() if line.startswith("--update_mode=joint")]
    batch, ms, ratio, ratios, sample, augment, decisions_per_s, gflop, of_peak, memory, kilobytes = row[1:]
    assert (
        (batch, ratio, ratios) == ("2", "1.00", "1.00-1.00")
        and 0 < float(sample[:-1]) + float(augment[:-1]) < 100
        and 0 < float(of_peak[:-1]) <= 100
    )
    assert 21.1 < float(kilobytes) < 21.6 and float(decisions_per_s) > 0 and float(ms) > 0 and float(memory) > 0
    # by hand: convolutions and heads of 4 passes forward and one backward, for a batch of 2
    of_convs = [2 * 9 * (9 if i == 0 else 32) * 32 * size**2 for i, size in enumerate((41, 39, 37, 35))]
    of_joint = 2 * (6 * sum(of_convs) - of_convs[0]) / 1e9
    assert of_joint < float(gflop) < 1.3 * of_joint


def test_no_row_is_above_its_peak():
    """Updates that are faster than the products that were timed become the peak themselves."""
    from benchmarks.throughput import highest_rates

    rows = [
        {"seconds": seconds, "flops": {"fp32": fp32, "bf16": bf16}, "peaks": {"fp32": 10.0, "bf16": 20.0}}
        for seconds, fp32, bf16 in ((1.0, 50.0, 0.0), (1.0, 10.0, 80.0), (1.0, 5.0, 10.0))
    ]
    best = highest_rates(rows)
    assert best == pytest.approx({"fp32": 50.0, "bf16": 100.0})
    shares = [sum(row["flops"][name] / best[name] for name in best) for row in rows]
    assert shares == pytest.approx([1.0, 1.0, 0.2])


def test_medians_over_rounds():
    """Of a row that was slow in one round, once in three, the other rounds count; ratios are taken within a round."""
    from benchmarks.throughput import over_rounds

    common = {"flops": {"fp32": 1.0, "bf16": 0.0}}
    rows = [
        {**common, "seconds": seconds, "ratio": ratio, "peaks": {"fp32": peak}}
        for seconds, ratio, peak in ((1.0, 0.5, 7.0), (9.0, 0.4, 2.0), (2.0, 3.0, 9.0))
    ]
    expected = {**common, "seconds": 2.0, "ratio": 0.5, "peaks": {"fp32": 9.0}, "ratios": [0.5, 0.4, 3.0]}
    assert over_rounds(rows) == expected


@pytest.mark.parametrize(
    "flags, line",
    [
        ("--rounds 0", "--rounds 0: must be at least 1"),
        ("--updates 1", "--updates 1: must be at least 2"),
        ("--batch_sizes many", "--batch_size many: must be a whole number"),
        ("--batch_sizes 3000", "--batch_size 3000: must not exceed what the replay can hold"),
        ("--rows=--update_mode=fast", "--update_mode fast: must be one of sequential, joint"),
        ("--batch_sizes=", "--batch_sizes: names none"),
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


def test_our_row_of_released():
    from benchmarks import released
    from config import parse

    config = parse("--update_mode joint --batch_size 2 --replay_buffer_capacity 2000".split())
    assert released.measure(config, 2, None, True) > 0


def test_random_policy(call):
    result = call("benchmarks.random_policy", "--tasks cartpole-swingup --num_episodes 2")
    header, row = [line.split(",") for line in result.stdout.splitlines()]
    assert header == "method env_steps task mean std seeds source".split()
    assert row[:3] == ["random policy", "0", "cartpole_swingup"] and 0 < float(row[3]) < 500 and row[5] == ""
    result = call("benchmarks.random_policy", "--num_episodes 1")
    assert (result.returncode, result.stdout) == (2, "") and "--num_episodes 1: must be at least 2" in result.stderr
