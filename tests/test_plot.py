"""plot.py: figures and files equal plain loops over the logs, and no run is lost on the way.

IQM and intervals are held to rliable 1.2.0 (with arch 7.2.0, pandas 2.3.3), whose numbers are stored here.
"""

import csv
import dataclasses
import gzip
import json
import pathlib
import random
import statistics
import subprocess
import sys

import numpy as np
import pytest
from scipy.stats import ttest_ind

import plot
from config import Config, complete, parse
from endings import Refused
from experiments import figures, scores
from experiments.tables import table_cells

ROOT = pathlib.Path(__file__).parent.parent
MADE_WITH = {"versions": {"torch": "2.13.0", "numpy": "2.2.6"}, "device_used": "cpu", "git_commit": "a" * 40}


def make_run(folder, flags="", returns=(), state="finished", **made_with):
    """A run's folder as train.py leaves it, evaluated each 10,000 environment steps."""
    config = parse(f"--num_train_steps 12500 {flags}".split())
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps({**dataclasses.asdict(config), **MADE_WITH, **made_with}))
    steps = [i * config.eval_freq for i in range(len(returns))]
    rows = [
        {"step": step, "env_step": step * config.action_repeat, "episode_reward": value}
        for step, value in zip(steps, returns, strict=True)
    ]
    (folder / "eval.log").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recorded = {"state": "running" if state == "died" else state, "step": 1, "num_train_steps": 12500}
    (folder / "run.json").write_text(json.dumps({**recorded, "host": "elsewhere", "pid": 1}))


def noisy(seed, top=800.0, n=11):
    return [float(top * i / 10 + v) for i, v in enumerate(np.random.default_rng(seed).normal(0, 30, n))]


@pytest.fixture
def sweep(tmp_path):
    """Three seeds each of CoDy and SAC: all there; one diverged, one missing. With the sweep.json that names them."""
    runs = []
    for variant, flags in (("cody", ""), ("sac", "--agent sac")):
        for seed in (1, 2, 3):
            given = f"{flags} --seed {seed} --num_train_steps 12500"
            folder = f"{variant}/cartpole-swingup/s{seed}"
            runs.append({"folder": folder, "flags": given.split()})
            if (variant, seed) == ("sac", 2):
                make_run(tmp_path / "sweep" / folder, given, noisy(5, 600)[:5], "diverged")
            elif (variant, seed) != ("sac", 3):
                make_run(tmp_path / "sweep" / folder, given, noisy(seed, 800 if variant == "cody" else 600))
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps({"runs": runs}))
    return tmp_path / "sweep"


def frame_of(*paths, hue=None):
    return scores.with_curves(scores.read_scores(paths), hue)


def lines_of(axis):
    """[(x, y)] of the thick lines of a panel."""
    return [line.get_xydata() for line in axis.lines if line.get_marker() != "None"]


def labels_of(figure):
    return [text.get_text().replace("\xa0", " ").replace("\n", " ") for text in figure.legends[0].get_texts()]


def test_a_curve_of_one_evaluation_is_seen(tmp_path):
    """As a sweep begins: one marker per curve, on an axis in whole steps."""
    for agent in ("cody_sac", "sac", "sac_ae"):
        make_run(tmp_path / agent, f"--agent {agent}", [10.0])
    axis = figures.draw_curves(*frame_of(tmp_path), "mean").axes[0]
    assert [line.get_markevery()[0] for line in axis.lines if line.get_marker() != "None"] == [0, 0, 0]
    assert axis.get_xlim()[1] >= 1000


def test_outcomes_of_other_evaluations_do_not_compare(tmp_path):
    make_run(tmp_path / "a", "--agent sac", noisy(1))
    make_run(tmp_path / "b", "--eval_freq 6250 --num_eval_episodes 1", [0.0, 400.0, 800.0])
    frame, names = frame_of(tmp_path)
    said = [line for line in scores.warnings_about(frame, names) if line.startswith("outcomes on cartpole-swingup")]
    assert [line.split("differ in ")[1] for line in said] == [
        "eval_freq: sac 1250; cody_sac 6250",
        "num_eval_episodes: sac 10; cody_sac 1",
    ]


def test_the_random_policy_has_the_task_tables_action_repeat(tmp_path):
    """At another it has another return (cartpole swingup 131 at 8, about 40 at 2), so none is shown or used."""
    for repeat, known in ((8, True), (4, False)):
        make_run(tmp_path / f"{repeat}", f"--action_repeat {repeat}", [1.0, 2.0])
        frame, names = frame_of(tmp_path / f"{repeat}")
        labels = labels_of(figures.draw_curves(frame, names, "mean"))
        assert (len(scores.random_returns(frame)), "uniformly random policy" in labels) == (6 if known else 5, known)
        methods = table_cells(frame, [10_000])["method"]
        assert ("random policy" in set(methods)) == known


def test_curves_of_a_sweep(sweep, call):
    result = call("plot.py", f"{sweep}")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "sac on cartpole-swingup: seed 2 diverged at 40,000; seed 3 missing",
        "sac on cartpole-swingup: aggregate to 40,000, the last evaluation that all its seeds have",
        *(f"{sweep}/curves.{ending}" for ending in ("png", "pdf", "csv")),
    ]
    rows = list(csv.DictReader(open(sweep / "curves.csv")))
    assert list(rows[0]) == scores.EVALUATION  # agent is one of them, and nothing else differs
    # a plain loop over the folders
    expected = []
    for variant in ("cody", "sac"):
        for seed in (1, 2, 3):
            folder = sweep / variant / "cartpole-swingup" / f"s{seed}"
            known = [variant, "cartpole-swingup", "sac" if variant == "sac" else "cody_sac", str(seed)]
            if not folder.exists():
                expected.append([*known, "", "", "", "missing"])
                continue
            for line in (folder / "eval.log").read_text().splitlines():
                row = json.loads(line)
                state = "diverged" if (variant, seed) == ("sac", 2) else "finished"
                expected.append([*known, *(str(row[k]) for k in ("step", "env_step", "episode_reward")), state])
    assert [list(row.values()) for row in rows] == expected


def test_the_thick_line_is_the_mean_and_ends_with_its_shortest_run(sweep):
    frame, names = frame_of(sweep)
    figure = plot.draw_curves(frame, names, "mean")
    cody, sac = lines_of(figure.axes[0])
    of_seeds = [noisy(seed, 800) for seed in (1, 2, 3)]
    assert cody[:, 0].tolist() == [10_000 * i for i in range(11)]
    assert cody[:, 1] == pytest.approx([statistics.mean(values) for values in zip(*of_seeds, strict=True)])
    assert sac[:, 0].tolist() == [10_000 * i for i in range(5)]
    assert sac[:, 1] == pytest.approx([(a + b) / 2 for a, b in zip(noisy(1, 600)[:5], noisy(5, 600)[:5], strict=True)])
    thin = [line.get_xydata()[:, 1].tolist() for line in figure.axes[0].lines if line.get_linewidth() == 0.5]
    assert thin == [*of_seeds, noisy(1, 600), noisy(5, 600)[:5]]
    assert labels_of(figure) == [
        "cody (n = 3)",
        "sac (n = 2; seed 2 diverged at 40,000; seed 3 missing)",
        "mean of the seeds, 95 % bootstrap interval",
        "uniformly random policy",
    ]
    band, of_two_seeds = (collection.get_paths() for collection in figure.axes[0].collections)
    assert of_two_seeds == []
    band = band[0].vertices
    last = np.array([values[-1] for values in of_seeds])
    ends = band[band[:, 0] == 100_000, 1]
    assert {ends.min(), ends.max()} == {*scores.interval([last], "mean")}


def test_the_legend_promises_an_interval_only_if_one_is_drawn(tmp_path):
    for seed in (1, 2, 3):
        make_run(tmp_path / f"v/cartpole-swingup/s{seed}", f"--seed {seed}", noisy(seed))
        for statistic, line in (("mean", "mean of the seeds"), ("iqm", "interquartile mean of the seeds")):
            shown = labels_of(plot.draw_curves(*frame_of(tmp_path), statistic))
            assert shown[1] == (line if seed < 3 else f"{line}, 95 % bootstrap interval")


@pytest.mark.parametrize("state", ["stopped", "died"])
def test_a_run_that_has_not_finished_is_named(tmp_path, call, state):
    make_run(tmp_path / "runs/v/cartpole-swingup/s1", "--seed 1", noisy(1))
    make_run(tmp_path / "runs/v/cartpole-swingup/s2", "--seed 2", noisy(2)[:4], state)
    make_run(tmp_path / "runs/v/cartpole-swingup/s3", "--seed 3", [], state)
    out = call("plot.py", f"{tmp_path}/runs").stdout
    assert out.startswith(f"v on cartpole-swingup: seed 2 {state} at 30,000; seed 3 {state}\n")
    frame, names = frame_of(tmp_path / "runs")
    assert (
        labels_of(plot.draw_curves(frame, names, "mean"))[0] == f"v (n = 2; seed 2 {state} at 30,000; seed 3 {state})"
    )


def test_many_tasks_have_panels_and_short_labels(tmp_path):
    tasks = [("cartpole", "swingup"), ("walker", "walk"), ("finger", "spin"), ("cheetah", "run"), ("hopper", "hop")]
    for domain, task in tasks:
        for seed in (1, 2):
            flags = f"--domain_name {domain} --task_name {task} --seed {seed} --num_train_steps 300000"
            state = "diverged" if seed == 2 and domain != "hopper" else "finished"
            make_run(
                tmp_path / f"v/{domain}-{task}/s{seed}", flags, noisy(seed)[: 4 if state == "diverged" else 11], state
            )
    frame, names = frame_of(tmp_path)
    assert names == ["variant"] and scores.varied(frame) == []  # what the task alone decides does not differ
    figure = plot.draw_curves(frame, names, "iqm")
    shown = [axis for axis in figure.axes if axis.get_visible()]
    assert sorted(axis.get_title() for axis in shown) == sorted(f"{d}-{t}" for d, t in tasks)
    assert labels_of(figure)[0] == "v (n = 2; 4 runs diverged)"
    dashed = {axis.get_title(): sum(line.get_linestyle() == "--" for line in axis.lines) for axis in shown}
    assert dashed["walker-walk"] == 1 and dashed["hopper-hop"] == 0  # not measured


def test_kills_change_no_byte_of_the_csv(tmp_path, call):
    whole, cut = tmp_path / "whole/v/cartpole-swingup/s1", tmp_path / "cut/v/cartpole-swingup/s1"
    make_run(whole, "", noisy(1))
    make_run(cut, "", noisy(1)[:6], "died")
    call("plot.py", f"{tmp_path}/cut")
    before = (tmp_path / "cut/curves.csv").read_bytes()
    with open(cut / "eval.log", "w") as log:  # as a resumed run would
        log.write((whole / "eval.log").read_text())
    (cut / "run.json").write_text((whole / "run.json").read_text())
    args = json.loads((cut / "args.json").read_text())
    (cut / "args.json").write_text(json.dumps({**args, "continued": [{"step": 6000, "time": 1.0, **MADE_WITH}]}))
    assert call("plot.py", f"{tmp_path}/cut").returncode == call("plot.py", f"{tmp_path}/whole").returncode == 0
    after = (tmp_path / "cut/curves.csv").read_bytes()
    assert before != after == (tmp_path / "whole/curves.csv").read_bytes()


def test_the_csv_is_read_back(sweep, tmp_path, call):
    call("plot.py", f"{sweep} --hue agent")
    again = call("plot.py", f"{sweep}/curves.csv --hue agent --out {tmp_path}/again")
    assert again.stdout.splitlines()[:2] == [
        "sac on cartpole-swingup: seed 2 diverged at 40,000; seed 3 missing",
        "sac on cartpole-swingup: aggregate to 40,000, the last evaluation that all its seeds have",
    ]
    assert (tmp_path / "again.csv").read_bytes() == (sweep / "curves.csv").read_bytes()
    assert (tmp_path / "again.png").read_bytes() == (sweep / "curves.png").read_bytes()
    call("plot.py", f"{sweep} --table --out {tmp_path}/a")
    call("plot.py", f"{sweep}/curves.csv --table --out {tmp_path}/b")
    assert (tmp_path / "a.md").read_bytes() == (tmp_path / "b.md").read_bytes()
    assert "| cartpole-swingup | 40,000 |" in (tmp_path / "a.md").read_text()  # the last that all have reached


# from rliable: for shape ...: scores = np.random.default_rng(7).beta(2, 3, shape); library.get_interval_estimates(
# {"a": scores}, lambda x: np.array([metrics.aggregate_mean(x)]), reps=50_000), and with aggregate_iqm
RLIABLE = {
    ((3, 1), "mean"): (0.31913, 0.23800, 0.42646),
    ((3, 1), "iqm"): (0.31913, 0.23800, 0.42646),
    ((5, 1), "mean"): (0.35655, 0.28482, 0.41910),
    ((5, 1), "iqm"): (0.37276, 0.25631, 0.42337),
    ((10, 6), "mean"): (0.38847, 0.34313, 0.43513),
    ((10, 6), "iqm"): (0.37955, 0.32418, 0.43396),
}


@pytest.mark.parametrize("shape, statistic", RLIABLE)
def test_intervals_are_those_of_rliable(shape, statistic):
    tasks = list(np.random.default_rng(7).beta(2, 3, shape).T)
    point, low, high = RLIABLE[shape, statistic]
    assert scores.STATISTICS[statistic](tasks) == pytest.approx(point, abs=1e-5)
    assert scores.interval(tasks, statistic) == pytest.approx([low, high], abs=0.002)


def test_two_seeds_have_no_interval():
    assert np.isnan(scores.interval([np.array([500.0, 700.0, 600.0]), np.array([5.0, 7.0])], "mean")).all()
    assert np.isnan(scores.difference((9, 2, 2), (1, 2, 8))[1:]).all()
    a, b = [np.array([1.0, 2.0])], [np.array([1.0, 2.0, 6.0])]
    assert scores.pooled_difference(a, b, "mean")[0] == -1.5
    assert np.isnan(scores.pooled_difference(a, b, "mean")[1:]).all()


def test_differences_are_scipys_welch():
    dice = np.random.default_rng(3)
    a, b = dice.normal(700, 90, 3), dice.normal(500, 20, 5)
    theirs = ttest_ind(a, b, equal_var=False).confidence_interval()
    ours = scores.difference(*((x.mean(), x.std(ddof=1), len(x)) for x in (a, b)))
    assert ours == pytest.approx((a.mean() - b.mean(), *theirs))
    assert np.isnan(scores.difference((9, 0, 3), (1, 0, 3))[1:]).all()  # no spread to judge by


def test_pooled_differences_are_those_of_a_plain_bootstrap():
    """Tasks with unequal numbers of seeds count the same, and seeds are drawn within each task."""
    dice = np.random.default_rng(4)
    a = [dice.normal(0.8, 0.1, 5), dice.normal(0.3, 0.2, 3)]
    b = [dice.normal(0.6, 0.1, 4), dice.normal(0.3, 0.2, 3)]
    draws = random.Random(0)

    def resample(curve):
        return statistics.fmean(statistics.fmean(draws.choices(task.tolist(), k=len(task))) for task in curve)

    plain = sorted(resample(a) - resample(b) for _ in range(20_000))
    value, low, high = scores.pooled_difference(a, b, "mean")
    assert value == pytest.approx((a[0].mean() + a[1].mean() - b[0].mean() - b[1].mean()) / 2)
    assert (low, high) == pytest.approx((plain[500], plain[19_500]), abs=0.005)


def table_of(path, number=0):
    """{column: text} of each row of one of the tables in a Markdown file."""
    blocks = [block for block in path.read_text().split("\n\n") if "\n|---" in block]
    lines = [line.strip("| ").split(" | ") for line in blocks[number].splitlines() if line.startswith("| ")]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]


def outcome(returns, steps):
    """Mean of the evaluations, each 10,000 environment steps, from half of `steps` to `steps`, by a plain loop."""
    return statistics.fmean(value for i, value in enumerate(returns) if steps / 2 <= 10_000 * i <= steps)


@pytest.fixture
def two_tasks(tmp_path):
    """Three seeds each of two variants on two tasks, and one run of a third variant on the first task."""
    for domain, task in (("cartpole", "swingup"), ("walker", "walk")):
        flags = f"--domain_name {domain} --task_name {task} --num_train_steps 50000"
        for seed in (1, 2, 3):
            make_run(tmp_path / f"runs/bad/{domain}-{task}/s{seed}", f"{flags} --seed {seed}", noisy(seed, 100))
            make_run(tmp_path / f"runs/good/{domain}-{task}/s{seed}", f"{flags} --seed {seed}", noisy(seed, 700))
    make_run(tmp_path / "runs/lone/cartpole-swingup/s1", "", noisy(1))
    return tmp_path / "runs"


def test_table(two_tasks, call):
    result = call("plot.py", f"{two_tasks} --table 50000 100000")
    assert result.returncode == 0, result.stderr
    rows = {(row["task"], row["env steps"], row["measure"]): row for row in table_of(two_tasks / "table.md")}
    tasks = ("cartpole-swingup", "walker-walk", "all tasks, mean", "all tasks, iqm")
    steps, measures = ("50,000", "100,000"), ("last", "outcome")
    assert set(rows) == {(task, step, measure) for task in tasks for step in steps for measure in measures}
    numbers = {"last": [noisy(seed, 700)[10] for seed in (1, 2, 3)]}
    numbers["outcome"] = [outcome(noisy(seed, 700), 100_000) for seed in (1, 2, 3)]
    for measure, of_seeds in numbers.items():
        # of 3 seeds, all three draws the same has a chance of 1/27
        expected = f"{statistics.mean(of_seeds):.0f} [{min(of_seeds):.0f}, {max(of_seeds):.0f}] (3)"
        for task in tasks[:2]:
            assert rows[task, "100,000", measure]["good"] == expected
        scaled = [(x - r) / (1000 - r) for x in of_seeds for r in (random_return("cartpole"), random_return("walker"))]
        pooled = rows["all tasks, mean", "100,000", measure]["good"]
        assert pooled.startswith(f"{statistics.mean(scaled):.3f} [") and pooled.endswith("] (3)")
        assert rows["all tasks, mean", "100,000", measure]["lone"] == "– (walker-walk: no run)"
    row = rows["cartpole-swingup", "100,000", "last"]
    assert row["lone"] == f"{noisy(1)[10]:.0f} (1)"
    assert rows["walker-walk", "100,000", "last"]["lone"] == "– (no run)"
    assert row["CURL [2]"] == "582 ± 146 (10)"
    assert {rows[key]["CURL [2]"] for key in rows if key[1] == "50,000" or key[2] == "outcome"} == {"–"}
    assert row["random policy [1]"] == rows["cartpole-swingup", "50,000", "last"]["random policy [1]"] == "131 ± 69"
    assert (
        "- CURL [2]: 10 seeds; CURL paper Table 1, arXiv 2004.04136; evaluation return, action repeats of PlaNet"
        in (two_tasks / "table.md").read_text()
    )
    cells = {
        (r["task"], r["env_step"], r["method"], r["measure"]): r for r in csv.DictReader(open(two_tasks / "table.csv"))
    }
    for measure, of_seeds in numbers.items():
        ours = cells["cartpole-swingup", "100000", "good", measure]
        assert float(ours["value"]) == pytest.approx(statistics.mean(of_seeds))
        assert float(ours["std"]) == pytest.approx(statistics.stdev(of_seeds)) and ours["n"] == "3"
    assert cells["walker-walk", "100000", "DrQ", "last"]["source"] == "DrQ paper Table 1, arXiv 2004.13649"


def random_return(domain):
    rows = csv.DictReader(open(scores.PUBLISHED))
    return next(float(r["mean"]) for r in rows if r["method"] == "random policy" and r["task"].startswith(domain))


def test_differences_in_the_table(two_tasks, call):
    assert call("plot.py", f"{two_tasks} --table 100000").returncode == 0
    rows = {(row["task"], row["measure"], row["curves"]): row for row in table_of(two_tasks / "table.md", 1)}
    for measure in ("last", "outcome"):
        good, bad = (
            [noisy(seed, top)[10] if measure == "last" else outcome(noisy(seed, top), 100_000) for seed in (1, 2, 3)]
            for top in (700, 100)
        )
        welch = ttest_ind(bad, good, equal_var=False).confidence_interval()
        value = statistics.mean(bad) - statistics.mean(good)
        row = rows["cartpole-swingup", measure, "bad − good"]
        assert row == rows["walker-walk", measure, "bad − good"] | {"task": "cartpole-swingup"}
        assert (row["difference"], row["seeds"]) == (f"{value:+.0f}", "3, 3")
        assert row["95 % interval"] == f"[{welch.low:+.0f}, {welch.high:+.0f}]"
        row = rows["cartpole-swingup", measure, "good − lone"]
        assert (row["95 % interval"], row["seeds"]) == ("too few seeds", "3, 1")
        pooled = rows["all tasks, mean", measure, "bad − good"]
        scaled = statistics.mean(value / (1000 - random_return(domain)) for domain in ("cartpole", "walker"))
        assert pooled["difference"] == f"{scaled:+.3f}" and pooled["seeds"] == "3, 3"
        low, high = (float(end) for end in pooled["95 % interval"].strip("[]").split(", "))
        assert low < scaled < high < 0
    text = (two_tasks / "table.md").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("- cartpole-swingup, 100,000, good: ")]
    above, below, alike = line.removeprefix("- cartpole-swingup, 100,000, good: ").split("; ")
    assert above.startswith("above ") and below.startswith("below ") and alike.startswith("indistinguishable from ")
    assert "State SAC" not in line and "- cartpole-swingup, 100,000, lone: too few seeds" in text
    # Welch's interval by hand for SPR, 799 +- 42 of 10 seeds
    last = [noisy(seed, 700)[10] for seed in (1, 2, 3)]
    t = (statistics.mean(last) - 799) / (statistics.variance(last) / 3 + 42**2 / 10) ** 0.5
    assert t < -3 and "SPR" in below


def test_the_outcome_is_of_evaluations_that_all_seeds_have(tmp_path, call):
    for seed in (1, 2, 3):
        folder = tmp_path / f"v/cartpole-swingup/s{seed}"
        make_run(folder, f"--seed {seed}", noisy(seed))
        if seed == 2:  # torn rows, from 60,000 to 90,000
            rows = (folder / "eval.log").read_text().splitlines(keepends=True)
            (folder / "eval.log").write_text("".join(rows[:6] + rows[10:]))
    assert "not in the aggregate: 60,000, 70,000" in call("plot.py", f"{tmp_path} --table 100000 100000").stdout
    rows = table_of(tmp_path / "table.md")
    expected = statistics.mean((noisy(seed)[5] + noisy(seed)[10]) / 2 for seed in (1, 2, 3))
    assert [row["measure"] for row in rows] == ["last", "outcome"] and rows[1]["v"].startswith(f"{expected:.0f} [")


def test_a_cell_says_what_it_lacks(sweep, call):
    call("plot.py", f"{sweep} --table 40000 100000 55555")
    at_40, outcome_at_40, at_100, outcome_at_100, at_55, _ = table_of(sweep / "table.md")
    pair = [noisy(1, 600)[4], noisy(5, 600)[4]]
    assert at_40["sac"] == f"{sum(pair) / 2:.0f} (2; seed 3 missing)"
    pair = [outcome(noisy(seed, 600), 40_000) for seed in (1, 5)]
    assert outcome_at_40["sac"] == f"{sum(pair) / 2:.0f} (2; seed 3 missing)"
    # the seed that is left is shown, and no mean that would flatter
    assert at_100["sac"] == f"– (seed 1: {noisy(1, 600)[10]:.0f}; seed 2 diverged at 40,000; seed 3 missing)"
    assert outcome_at_100["sac"].endswith("; seed 2 diverged at 40,000; seed 3 missing)")
    assert at_55["cody"] == "– (seeds 1, 2, 3 not evaluated at 55,555)"
    pairs = table_of(sweep / "table.md", 1)
    assert {row["env steps"] for row in pairs} == {"40,000"} and pairs[0]["95 % interval"] == "too few seeds"


# the first rows of denisyarats/drq data/dmc_planet_bench.csv (MIT licence) and, as in danijar/dreamerv3
# scores/dmc_vision-curl.json.gz (MIT licence), its first values
DRQ = """step,episode,episode_reward,env,seed,agent
0,0,15.638273082339,cartpole_swingup,8,DrQ
16000,16,248.144474896702,cartpole_swingup,8,DrQ
0,0,17.5,cartpole_swingup,9,DrQ
16000,16,200.0,cartpole_swingup,9,DrQ
0,0,33.0,ball_in_cup_catch,9,DrQ
"""
CURL = [{"task": "dmc_cartpole_swingup", "method": "curl", "seed": 0, "xs": [0, 20000], "ys": [10.0, 210.5]}]
DAMAGED = {
    "torn.json.gz": gzip.compress(json.dumps(CURL).encode())[:-9],
    "flipped.json.gz": gzip.compress(json.dumps(CURL).encode())[:14] + b"\xff" * 40,
    "no_seed.csv": DRQ.replace(",seed,", ",number,").encode(),
    "empty_seed.csv": DRQ.replace(",8,", ",,").encode(),
    "text_in_seed.csv": DRQ.replace(",8,", ",eight,").encode(),
    "text_in_step.csv": DRQ.replace("16000,", "16k,").encode(),
    "half_a_step.csv": DRQ.replace("16000,", "16000.5,").encode(),
    "text_in_return.csv": DRQ.replace("200.0", "high").encode(),
}


def test_public_curves_beside_a_run(tmp_path, call):
    make_run(tmp_path / "runs/cartpole-swingup/cody_sac-20260101-120000-s1", "", noisy(1))
    (tmp_path / "drq.csv").write_text(DRQ)
    (tmp_path / "curl.json.gz").write_bytes(gzip.compress(json.dumps(CURL).encode()))
    paths = f"{tmp_path}/runs {tmp_path}/drq.csv {tmp_path}/curl.json.gz"
    result = call("plot.py", f"{paths} --out {tmp_path}/new/figure")
    assert result.returncode == 0, result.stderr
    rows = [row for row in csv.DictReader(open(tmp_path / "new/figure.csv")) if row["state"] == "published"]
    assert [(r["task"], r["agent"], r["seed"], r["env_step"], r["episode_reward"]) for r in rows] == [
        ("cartpole-swingup", "DrQ", "8", "0", "15.638273082339"),
        ("cartpole-swingup", "DrQ", "8", "16000", "248.144474896702"),
        ("cartpole-swingup", "DrQ", "9", "0", "17.5"),
        ("cartpole-swingup", "DrQ", "9", "16000", "200.0"),
        ("cartpole-swingup", "curl", "0", "0", "10.0"),
        ("cartpole-swingup", "curl", "0", "20000", "210.5"),
    ]  # ball_in_cup-catch is no task of ours
    frame, names = frame_of(*paths.split())
    assert names == ["agent"] and list(frame["curve"].unique()) == ["cody_sac", "DrQ", "curl"]
    alone = scores.read_scores([tmp_path / "drq.csv"])
    assert list(alone["task"].unique()) == ["cartpole-swingup", "ball_in_cup-catch"]


@pytest.mark.parametrize(
    "public, folder",
    [
        ("dmc_ball_in_cup_catch", "ball_in_cup-catch"),
        ("finger_turn_easy", "finger-turn_easy"),
        ("dmc_point_mass_easy", "point_mass-easy"),
        ("ball_in_cup-catch", "ball_in_cup-catch"),
        ("quadruped-walk", "quadruped-walk"),
    ],
)
def test_names_of_tasks(public, folder):
    assert scores.task_folder(public) == folder


def test_hue(tmp_path):
    for omega in ("0.1", "1e-05", "0.001"):
        for size in (64, 128):
            folder = tmp_path / f"cartpole-swingup/cody_sac-{omega}-{size}"
            make_run(folder, f"--omega_cody_loss {omega} --batch_size {size}", noisy(1))
    frame, names = frame_of(tmp_path)
    assert names == ["batch_size", "omega_cody_loss"] == scores.varied(frame)
    assert list(frame["curve"].unique()) == [
        "64, 1e-05",
        "64, 0.001",
        "64, 0.1",
        "128, 1e-05",
        "128, 0.001",
        "128, 0.1",
    ]
    figure = plot.draw_curves(frame, names, "mean")
    assert figure.legends[0].get_title().get_text() == "batch_size, omega_cody_loss"
    with pytest.raises(Refused, match="--hue batch_size: a curve has seed 1 on cartpole-swingup twice; add a flag"):
        frame_of(tmp_path, hue="batch_size")


def test_what_differs_inside_a_curve_is_said(tmp_path, call):
    runs = tmp_path / "v/cartpole-swingup"
    make_run(runs / "s1", "--seed 1", noisy(1))
    versions = {"torch": "2.12.0", "numpy": "2.2.6"}
    make_run(runs / "s2", "--seed 2 --action_repeat 4 --num_train_steps 25000", noisy(2), versions=versions)
    make_run(runs / "s3", "--seed 3", noisy(3), continued=[{"step": 5, **MADE_WITH, "git_commit": "b" * 40}])
    lines = call("plot.py", f"{tmp_path}").stdout.splitlines()
    for line in (
        "its runs differ in action_repeat: 4, 8",
        "its runs differ in torch: 2.12.0, 2.13.0",
        "its runs differ in git_commit: aaaaaaaaaaaa, bbbbbbbbbbbb",
    ):
        assert lines.count(f"v on cartpole-swingup: {line}") == 1
    assert not any("numpy" in line for line in lines)
    make_run(tmp_path / "w/cartpole-swingup/s1", "--seed 1", noisy(1))
    said = call("plot.py", f"{tmp_path}").stdout
    assert "curves differ in torch: v 2.12.0, 2.13.0; w 2.13.0\n" in said and "curves differ in numpy" not in said


def test_uneven_evaluations_are_named(tmp_path):
    make_run(tmp_path / "v/cartpole-swingup/s1", "--seed 1", noisy(1)[:5])
    make_run(tmp_path / "v/cartpole-swingup/s2", "--seed 2 --eval_freq 2500", noisy(2)[:3])
    frame, names = frame_of(tmp_path)
    assert "v on cartpole-swingup: not evaluated by all seeds, so not in the aggregate: 10,000, 30,000" in list(
        scores.warnings_about(frame, names)
    )
    (thick,) = lines_of(plot.draw_curves(frame, names, "mean").axes[0])
    assert thick[:, 0].tolist() == [0, 20_000, 40_000]
    make_run(tmp_path / "v/cartpole-swingup/s3", "--seed 3 --eval_freq 1111", [])
    (tmp_path / "v/cartpole-swingup/s3/eval.log").write_text('{"step": 9, "env_step": 72, "episode_reward": 1.0}\n')
    frame, names = frame_of(tmp_path)
    assert any(
        "no aggregate, since no evaluation step is common" in line for line in scores.warnings_about(frame, names)
    )
    assert lines_of(plot.draw_curves(frame, names, "mean").axes[0]) == []


def test_diagnostics(tmp_path, call):
    for variant, flags, ratio in (("joint", "--update_mode joint", "latent"), ("cody", "", "encoder")):
        for seed in (1, 2):
            make_run(tmp_path / f"{variant}/cartpole-swingup/s{seed}", f"{flags} --seed {seed}", noisy(seed))
            rows = [{"step": 125, "env_step": 1000, "episode_reward": 100.0}]  # before the first update
            for i in range(2, 30):
                metrics = {"mi_bound": i / 10, "kl": 20.0 + seed, "latent_rank": None, f"{ratio}_grad_ratio": 0.1 * i}
                rows.append({"step": 125 * i, "env_step": 1000 * i, "episode_reward": 100.0 * seed, **metrics})
            log = "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / f"{variant}/cartpole-swingup/s{seed}/train.log").write_text(log + '{"step": 99')
    make_run(tmp_path / "sac/cartpole-swingup/s1", "--agent sac", noisy(1))
    planned = [{"folder": f"cody/cartpole-swingup/s{seed}", "flags": ["--seed", str(seed)]} for seed in (1, 2, 3)]
    (tmp_path / "sweep.json").write_text(json.dumps({"runs": planned}))
    result = call("plot.py", f"{tmp_path} --diagnostics")
    assert result.returncode == 0 and (tmp_path / "diagnostics.pdf").exists(), result.stderr
    frame, _ = frame_of(tmp_path)
    assert "no run has logged: latent rank\n" in result.stdout
    figure, absent = plot.draw_diagnostics(frame)
    assert absent == ["latent rank"]
    top, bottom = figure.axes[:3], figure.axes[3:]
    assert [axis.get_title() for axis in top] == ["MI bound (nats)", "KL (nats)", "gradient ratio"]  # no rank anywhere
    assert [len(axis.lines) for axis in figure.axes] == [5] * 6 and bottom[0].get_xlabel() == "training return"
    steps, bound = top[0].lines[0].get_xdata(), top[0].lines[0].get_ydata()
    assert steps[0] == 2000 and steps[-1] == 29_000
    assert bound[-1] == pytest.approx(statistics.mean(i / 10 for i in range(20, 30)))
    assert set(labels_of(figure)) == {
        *("joint (n = 2)", "cody (n = 2; seed 3 missing)", "sac (n = 1; seed 1 not logged)"),
        *("seed 1", "seed 2"),
    }


def test_the_runs_of_this_repository(tmp_path, call):
    result = call("plot.py", f"{ROOT}/results/100k --table --out {tmp_path}/t")
    assert result.returncode == 0, result.stderr
    rows = {(row["task"], row["measure"]): row for row in table_of(tmp_path / "t.md")}
    last, half = (rows["cartpole-swingup", measure] for measure in ("last", "outcome"))
    logs = [log.read_text() for log in (ROOT / "results/100k/strided/cartpole-swingup").glob("s*/eval.log")]
    returns = [[json.loads(line)["episode_reward"] for line in log.splitlines()] for log in logs]
    assert last["env steps"] == "100,000" and last["strided"].split()[-1] == f"({len(logs)})"
    assert last["strided"].split()[0] == f"{statistics.mean(values[-1] for values in returns):.0f}"
    assert half["strided"].split()[0] == f"{statistics.mean(outcome(values, 100_000) for values in returns):.0f}"


def test_published_scores_have_sources():
    rows = list(csv.DictReader(open(scores.PUBLISHED)))
    assert all(row["source"] and row["mean"] and row["method"] for row in rows)
    measured = {row["task"]: float(row["mean"]) for row in rows if row["method"] == "random policy"}
    # 20 episodes each gave these
    about = dict(
        cartpole_swingup=138, ball_in_cup_catch=33, reacher_easy=59, cheetah_run=15, finger_spin=0, walker_walk=39
    )
    assert measured == pytest.approx(about, abs=20)


def test_pictures_are_the_same_twice_and_have_their_fonts(sweep, call):
    call("plot.py", f"{sweep}")
    first = {ending: (sweep / f"curves.{ending}").read_bytes() for ending in ("png", "pdf", "csv")}
    assert call("plot.py", f"{sweep}").returncode == 0  # plot.py may overwrite its own files
    assert first == {ending: (sweep / f"curves.{ending}").read_bytes() for ending in first}
    assert b"/FontFile2" in first["pdf"] and b"/Type3" not in first["pdf"]


def test_imports_without_torch():
    code = "import plot, sys; assert not {'torch', 'dm_control'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    "flags, line",
    [
        ("", "nothing to plot; give run folders or curve files, such as runs/omega"),
        ("{tmp}/none", "{tmp}/none: no such folder or file"),
        ("{tmp}", "{tmp}: holds no run (no args.json at any depth)"),
        ("{tmp}/other.txt", "{tmp}/other.txt: neither drq's curves"),
        ("{tmp}/other.csv", "{tmp}/other.csv: neither drq's curves"),
        *((f"{{tmp}}/{name}", f"{{tmp}}/{name}: neither drq's curves") for name in DAMAGED),
        ("{tmp}/torn", "{tmp}/torn/s1: not the folder of a run (args.json: "),
        (
            "{sweep} --hue omega",
            "--hue omega: must be variant, agent or a flag that defines the method; the nearest is omega_cody_loss",
        ),
        ("{sweep} --hue seed", "--hue seed: must be variant, agent or a flag that defines the method"),
        ("{plain} --hue variant", "--hue variant: not all runs are in <variant>/<task>/s<seed>"),
        (
            "{sweep} --hue kl_prior",
            "--hue kl_prior: a curve has seed 1 on cartpole-swingup twice; add a flag to --hue or leave out a path: ",
        ),
        (
            "{sweep} {sweep}/cody",
            "--hue variant: a curve has seed 1 on cartpole-swingup twice; add a flag to --hue or leave out a path: ",
        ),
        (
            "{sweep} --statistic median",
            "--statistic median: must be one of mean, iqm",
        ),
        ("{sweep} --statistic iqm --table", "--statistic iqm: has no effect with --table or --diagnostics"),
        ("{sweep} --diagnostics --table", "--diagnostics: not together with --table"),
        ("{sweep} --table -5", "--table -5: must be environment steps"),
        ("{sweep} --out {tmp}/figures/", "--out {tmp}/figures/: must end in a name, to which .png and so on are added"),
        ("{sweep} --table 1e5", "--table 1e5: must be environment steps; folders come before --table"),
        ("--table 100000 runs/a", "--table runs/a: must be environment steps; folders come before --table"),
        (
            "{sweep} --diagnostics",
            "--diagnostics: no run logged any diagnostics; runs of --agent cody_sac do",
        ),
        ("{sweep} --out {sweep}/sweep.json/x", "--out {sweep}/sweep.json: {here}/{sweep}/sweep.json is not a folder"),
        ("{sweep} --out {tmp}/other", "--out: {tmp}/other.csv exists and was not made by plot.py; name another"),
        ("{tmp}/drq.csv --out {tmp}/drq", "--out: {tmp}/drq.csv is an input and would be overwritten; name another"),
        ("{begun}", "{begun}: no run has been evaluated yet"),
        ("{plain} {uneven} --table", "--table: no environment step at which all runs were evaluated; name one"),
    ],
)
def test_refusals(sweep, tmp_path, monkeypatch, call, flags, line):
    monkeypatch.chdir(tmp_path)  # a long path would truncate the line
    places = {name: pathlib.Path("places", name) for name in ("plain", "begun", "uneven")}
    places["sweep"] = sweep.relative_to(tmp_path)
    tmp = pathlib.Path("nothing")
    tmp.mkdir()
    (tmp / "other.txt").write_text("hello")
    (tmp / "other.csv").write_text("a,b\n1,2\n")
    (tmp / "drq.csv").write_text(DRQ)
    for name, content in DAMAGED.items():
        (tmp / name).write_bytes(content)
    (tmp / "torn").mkdir()
    if "torn" in flags:
        (tmp / "torn/s1").mkdir()
        (tmp / "torn/s1/args.json").write_text("{")
    make_run(places["plain"] / "cartpole-swingup/cody_sac-20260101-120000-s1", "", noisy(1))
    make_run(places["begun"] / "cartpole-swingup/s1", "", [], "stopped")
    make_run(places["uneven"] / "x", "--seed 2", [])
    (places["uneven"] / "x/eval.log").write_text('{"step": 9, "env_step": 72, "episode_reward": 1.0}\n')
    before = sorted(tmp_path.rglob("*"))
    result = call("plot.py", flags.format(tmp=tmp, **places))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"plot.py: error: {line.format(tmp=tmp, here=tmp_path, **places)}"[:200])
    assert result.stderr.count("\n") == 1 and len(result.stderr) <= 201
    assert sorted(tmp_path.rglob("*")) == before


def test_config_of_a_missing_run_is_that_of_its_flags(tmp_path):
    flags = "--omega_cody_loss 0.1 --domain_name walker --task_name walk --seed 4".split()
    make_run(tmp_path / "a/cartpole-swingup/s1", "", noisy(1))
    (tmp_path / "sweep.json").write_text(json.dumps({"runs": [{"folder": "b/walker-walk/s4", "flags": flags}]}))
    row = scores.read_scores([tmp_path]).query("state == 'missing'").iloc[0]
    assert (row["variant"], row["task"], row["seed"], row["omega_cody_loss"]) == ("b", "walker-walk", 4, 0.1)
    assert row["eval_freq"] == complete(Config(domain_name="walker", task_name="walk")).eval_freq


def test_variants_with_the_same_flags_are_named(tmp_path, call):
    """As in a sweep that has grown: the folders of its first runs name fewer flags."""
    for variant, seed in (("cody_sac", 0), ("omega_cody_loss=0.001", 1), ("omega_cody_loss=0.01", 1)):
        flags = "--omega_cody_loss 0.01" if variant.endswith("0.01") else ""
        make_run(tmp_path / variant / "cartpole-swingup" / f"s{seed}", f"--seed {seed} {flags}", noisy(seed))
    said = call("plot.py", f"{tmp_path}").stdout
    assert "cody_sac and omega_cody_loss=0.001 have the same flags on cartpole-swingup" in said
    assert "same flags" not in call("plot.py", f"{tmp_path} --hue omega_cody_loss").stdout
