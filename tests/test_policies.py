"""The policies in the repository reach their logged returns."""

import json
import pathlib

import pytest

POLICIES = pathlib.Path(__file__).parent.parent / "results" / "policies"
TOLERANCE = 20  # episodes differ by up to 2.3 between AVX2 and AVX-512, and by up to 3.8 on an H200


@pytest.mark.parametrize("name", [path.parent.name for path in sorted(POLICIES.glob("*/args.json"))])
def test_reaches_its_logged_return(name, call):
    result = call("evaluate.py", f"--run {POLICIES / name} --num_eval_episodes 2")
    assert result.returncode == 0, result.stderr
    (logged,) = [json.loads(line) for line in (POLICIES / name / "eval.log").read_text().splitlines()]
    row = json.loads(result.stdout)
    assert row["logged_episodes"] == len(logged["returns"]) == 10 and len(row["returns"]) == 2
    for ours, theirs in zip(row["returns"], logged["returns"], strict=False):
        assert abs(ours - theirs) < TOLERANCE
    assert sum(path.stat().st_size for path in (POLICIES / name).rglob("*")) < 7_000_000
