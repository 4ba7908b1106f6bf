"""Tables of returns: every curve per task and over all tasks, pairwise differences, and published numbers.

Each number has two measures: the last evaluation, and the outcome, the mean of the evaluations in the second half of a
run, which varies less between seeds. docs/plotting.md explains the intervals and differences.
"""

import itertools

import numpy as np
import pandas as pd

from endings import Refused
from experiments.scores import (
    MADE_BY,
    MIN_SEEDS,
    STATISTICS,
    begun,
    difference,
    interval,
    measured,
    normalised,
    pooled_difference,
    published_scores,
    seeds_text,
    unfinished_seeds,
)

TABLE = "task env_step method measure statistic value low high std n note source protocol".split()  # columns of the CSV
MEASURES = ("last", "outcome")
ALL = "all tasks"


def last_common_step(frame):
    """The last environment step at which every run with evaluations has one; raises `Refused` if there is none."""
    common = set.intersection(*(set(steps) for _, steps in begun(frame).groupby("run")["env_step"]))
    if not common:
        raise Refused("--table: no environment step at which all runs were evaluated; name one, as --table 100000")
    return max(common)


def returns_of(part, step, measure):
    """One number per seed of one curve on one task, and a note about the other seeds.

    Returns:
        Series indexed by seed, empty if a started seed has no evaluation at `step`, since the mean of the others would
        be biased upwards; and a note, which then lists the others.
    """
    scores = measured(part, step, measure)
    lacking = [(seed, state) for seed, state in unfinished_seeds(part) if seed not in scores.index]
    ended = sorted(begun(part).query("state in ('finished', 'published')")["seed"].unique())
    lacking += [(seed, f"not evaluated at {step:,}") for seed in ended if seed not in scores.index]
    if scores.empty or any(state != "missing" for _, state in lacking):
        others = [f"seed {seed}: {score:.0f}" for seed, score in scores.items()]
        return scores.iloc[:0], "; ".join([*others, seeds_text(lacking) or "no run"])
    return scores, seeds_text(lacking)


def cell(part, step, measure):
    """A dict with one curve's mean over seeds on one task and its interval."""
    scores, note = returns_of(part, step, measure)
    if scores.empty:
        return {"note": note}
    low, high = interval([scores.to_numpy()], "mean")
    return {"value": scores.mean(), "low": low, "high": high, "std": scores.std(), "n": len(scores), "note": note}


def pooled_returns(part, tasks, step, measure):
    """Normalised returns of one curve, a list of (seeds,) arrays per task, and ""; or None and the reason."""
    found = []
    for task in tasks:
        scores, note = returns_of(part[part["task"] == task], step, measure)
        if scores.empty:
            return None, f"{task}: {note}"
        try:
            found.append(normalised(scores.to_numpy(), task))
        except KeyError:
            return None, f"{task}: no random policy is known"
    return found, ""


def pooled_cell(part, tasks, step, measure, statistic):
    """The statistic of normalised returns over all tasks; `n` is the smallest number of seeds on any task."""
    pooled, note = pooled_returns(part, tasks, step, measure)
    if pooled is None:
        return {"note": note}
    low, high = interval(pooled, statistic)
    n = min(len(scores) for scores in pooled)
    return {"value": STATISTICS[statistic](pooled), "low": low, "high": high, "n": n}


def table_cells(frame, steps):
    """Frame with columns TABLE and one row per cell: task by task, then over all tasks; our curves before published."""
    tasks = list(frame["task"].unique())
    published = published_scores().rename(columns={"env_steps": "env_step", "mean": "value", "seeds": "n"})
    at_random = published["method"] == "random policy"  # belongs to every step
    published = pd.concat([published[at_random].assign(env_step=step) for step in steps] + [published[~at_random]])
    published = published.assign(measure="last", statistic="mean")
    cells = []
    for task, step, measure in itertools.product(tasks, steps, MEASURES):
        for curve, part in frame.groupby("curve", sort=False):
            row = {"task": task, "env_step": step, "method": curve, "measure": measure, "statistic": "mean"}
            cells.append({**row, "source": "runs", **cell(part[part["task"] == task], step, measure)})
        if measure == "last":
            cells += published.query("task == @task and env_step == @step").to_dict("records")
    if len(tasks) > 1:
        for step, measure, statistic in itertools.product(steps, MEASURES, STATISTICS):
            for curve, part in frame.groupby("curve", sort=False):
                row = {"task": ALL, "env_step": step, "method": curve, "measure": measure, "statistic": statistic}
                cells.append({**row, "source": "runs", **pooled_cell(part, tasks, step, measure, statistic)})
    return pd.DataFrame(cells, columns=TABLE).astype({"n": "Int64"})


def in_cell(cell):
    """The Markdown text of one row of `table_cells`."""
    if pd.isna(cell.value):
        return f"– ({cell.note})"
    n = [] if pd.isna(cell.n) else [str(cell.n)]
    if cell.source != "runs":
        return f"{cell.value:.0f} ± {cell.std:.0f}" + f" ({''.join(n)})" * len(n)
    digits = 3 if cell.task == ALL else 0
    spread = "" if pd.isna(cell.low) else f" [{cell.low:.{digits}f}, {cell.high:.{digits}f}]"
    notes = n + [cell.note] * isinstance(cell.note, str) * bool(cell.note)
    return f"{cell.value:.{digits}f}{spread} ({'; '.join(notes)})"


def differences(frame, cells):
    """Yield rows of a Markdown table: each pair of curves per task, then over all tasks, in both measures."""
    ours = cells[(cells["source"] == "runs") & cells["value"].notna()]
    tasks = list(frame["task"].unique())
    for (task, step, measure, statistic), row in ours.groupby(["task", "env_step", "measure", "statistic"], sort=False):
        for a, b in itertools.combinations(row.itertuples(), 2):
            if task == ALL:
                parts = [frame[frame["curve"] == curve] for curve in (a.method, b.method)]
                pooled = [pooled_returns(part, tasks, step, measure)[0] for part in parts]
                found, digits, where = pooled_difference(*pooled, statistic), 3, f"{ALL}, {statistic}"
            else:
                found, digits, where = difference((a.value, a.std, a.n), (b.value, b.std, b.n)), 0, task
            value, low, high = (f"{round(number, digits) + 0:+.{digits}f}" for number in found)  # + 0: no "-0"
            no_interval = "too few seeds" if min(a.n, b.n) < MIN_SEEDS else "no spread"
            between = no_interval if np.isnan(found[1]) else f"[{low}, {high}]"
            columns = (where, f"{step:,}", measure, f"{a.method} − {b.method}", value, between, f"{a.n}, {b.n}")
            yield f"| {' | '.join(columns)} |"


def beside_published(cells):
    """Yield a line per curve and step: is it above, below or indistinguishable from each published mean?"""
    last = cells[(cells["measure"] == "last") & (cells["task"] != ALL) & cells["value"].notna()]
    published = last[(last["source"] != "runs") & (last["n"] >= MIN_SEEDS) & last["std"].notna()]
    for ours in last[last["source"] == "runs"].itertuples():
        if ours.n < MIN_SEEDS:
            yield f"- {ours.task}, {ours.env_step:,}, {ours.method}: too few seeds"
            continue
        found = {"above": [], "below": [], "indistinguishable from": []}
        for other in published.query("task == @ours.task and env_step == @ours.env_step").itertuples():
            _, low, high = difference((ours.value, ours.std, ours.n), (other.value, other.std, other.n))
            found["above" if low > 0 else "below" if high < 0 else "indistinguishable from"].append(other.column)
        words = "; ".join(f"{word} {', '.join(names)}" for word, names in found.items() if names)
        if words:
            yield f"- {ours.task}, {ours.env_step:,}, {ours.method}: {words}"


def markdown(frame, cells):
    """The Markdown page: table, differences between curves, comparison with published means, and their sources."""
    ours = cells["source"] == "runs"
    published = cells[~ours].drop_duplicates("method").fillna({"protocol": "protocol not stated"})
    numbered = {method: f"{method} [{i}]" for i, method in enumerate(published["method"], 1)}
    cells = cells.assign(column=cells["method"].where(ours, cells["method"].map(numbered)))
    columns = list(cells["column"][ours].unique()) + list(numbered.values())
    lines = [f"<!-- {MADE_BY} -->", f"| task | env steps | measure | {' | '.join(columns)} |"]
    lines.append("|---" * (len(columns) + 3) + "|")
    for (task, step, measure, statistic), row in cells.groupby(
        ["task", "env_step", "measure", "statistic"], sort=False
    ):
        texts = {cell.column: in_cell(cell) for cell in row.itertuples()}
        where = f"{task}, {statistic}" if task == ALL else task
        lines.append(f"| {where} | {step:,} | {measure} | {' | '.join(texts.get(column, '–') for column in columns)} |")
    lines += [
        "",
        "last: the evaluation at exactly that environment step. outcome: mean of a run's evaluations from half that "
        "step up to it. Runs: mean over seeds [95 % bootstrap interval] (seeds). Published: mean ± standard "
        "deviation (seeds). All tasks: (return − random policy) / (1000 − random policy).",
    ]
    if pairs := list(differences(frame, cells)):
        lines += [
            "",
            "| task | env steps | measure | curves | difference | 95 % interval | seeds |",
            "|---" * 7 + "|",
            *pairs,
        ]
        lines += [
            "",
            "Intervals of differences are Welch's t, over all tasks a bootstrap stratified by task; none is corrected "
            "for the number of comparisons.",
        ]
    if beside := list(beside_published(cells)):
        lines += [
            "",
            "Last evaluations beside published means with a known number of seeds, by the same interval:",
            "",
            *beside,
        ]
    lines.append("")
    for row in published.itertuples():
        seeds = "no number of seeds" if pd.isna(row.n) else f"{row.n} seeds"
        lines.append(f"- {numbered[row.method]}: {seeds}; {row.source}; {row.protocol}")
    return "\n".join(lines).rstrip() + "\n"
