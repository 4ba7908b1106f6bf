"""The benchmark commands print what they claim to measure."""

import json
import pathlib
import subprocess
import sys

import pytest

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"


def run(script, *flags):
    return subprocess.run([sys.executable, str(BENCHMARKS / script), *flags], capture_output=True, text=True)


def test_throughput(tmp_path):
    table = tmp_path / "t.json"
    flags = "--batch_sizes 2 --precisions fp32 --updates 2 --decisions 2 --replay_sizes 1000"
    result = run("throughput.py", *flags.split(), "--json", str(table))
    assert result.returncode == 0, result.stderr
    assert "times as long in bf16 as in fp32" in result.stdout
    sequential, joint = json.loads(table.read_text())
    assert joint["bytes_per_transition"] < 21_600
    # by hand: convolutions and heads of 4 passes forward and one backward, for a batch of 2
    of_convs = [2 * 9 * (9 if i == 0 else 32) * 32 * size**2 for i, size in enumerate((41, 39, 37, 35))]
    of_joint = 2 * (6 * sum(of_convs) - of_convs[0])
    assert of_joint < joint["flops"]["fp32"] < 1.3 * of_joint and joint["flops"]["bf16"] == 0
    assert sequential["flops"]["fp32"] > 1.3 * joint["flops"]["fp32"]
    assert joint["decisions_per_s_worker"] > 0 < joint["decisions_per_s"]
    assert 0 < joint["sampling_ms"] < joint["ms"]


@pytest.mark.parametrize("directory", ["", "tests", "/no/such/folder"])
def test_released_says_what_it_needs(directory):
    result = run("released.py", *([directory] if directory else []))
    assert result.returncode == 2 and result.stdout == "" and result.stderr.count("\n") == 1
    assert "needs git clone https://github.com/BangYou01/DY2P and git -C DY2P checkout 0ce9f0f" in result.stderr
    assert len(result.stderr) <= 200


def test_our_row_of_released():
    row = {"update_mode": "joint", "precision": "fp32", "batch_size": 2, "updates": 2, "raised": True}
    result = run("released.py", "--row", json.dumps(row))
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["ms"] > 0
