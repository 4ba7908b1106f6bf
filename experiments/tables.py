"""Tables of returns: every curve per task and over all tasks, pairwise differences, and published numbers."""

import itertools

import numpy as np
import pandas as pd

from endings import Refused
from experiments import scores

TABLE = "task env_step method measure statistic value low high std n note source protocol".split()  # columns of the CSV
MEASURES = ("last", "outcome")  # see `returns_of`
ALL = "all tasks"
ROW = ["task", "env_step", "measure", "statistic"]  # columns that identify a row of the Markdown table


def last_common_step(frame):
    """The last environment step at which every run with evaluations has one; raises `Refused` if there is none."""
    common = set.intersection(*scores.evaluations(frame).groupby("run")["env_step"].agg(set))
    if not common:
        raise Refused("--table: no environment step at which all runs were evaluated; name one, as --table 100000")
    return max(common)


def returns_of(part, step, measure):
    """One number per seed of one curve on one task, a list with a (seeds,) array, and a note about the other seeds.

    It is the return at exactly `step` ("last") or the mean from `step` / 2 to `step` at the evaluations that all these
    seeds share ("outcome"). If a started seed has no evaluation at `step`, the mean of the others would be biased
    upwards: the list is then empty and the note has their numbers.
    """
    returns, reasons = scores.by_seed(part), scores.unfinished_seeds(part)
    reasons |= {seed: f"not evaluated at {step:,}" for seed in returns if seed not in reasons}
    seeds = returns.columns[returns.reindex([step]).notna().all()]
    lacking = {seed: reason for seed, reason in reasons.items() if seed not in seeds}
    returns = returns.loc[step if measure == "last" else step / 2 : step, seeds].dropna().mean()
    if returns.empty or set(lacking.values()) - {"missing"}:
        others = [f"seed {seed}: {value:.0f}" for seed, value in returns.items()]
        return [], "; ".join([*others, scores.seeds_text(lacking) or "no run"])
    return [returns.to_numpy()], scores.seeds_text(lacking)


def pooled_returns(part, tasks, step, measure):
    """`returns_of` one curve on all tasks, a list of (seeds,) arrays, empty if a task has none, and a note.

    They are normalised: 0 is the random policy and 1 the maximum return.
    """
    at_random, pooled = scores.random_returns(part), []
    for task in tasks:
        returns, note = returns_of(part[part["task"] == task], step, measure)
        if not returns:
            return [], f"{task}: {note}"
        if task not in at_random:
            return [], f"{task}: no random policy is known at this action repeat"
        pooled.append((returns[0] - at_random[task]) / (1000 - at_random[task]))
    return pooled, ""


def table_cells(frame, steps):
    """Frame with columns TABLE and our `returns`, one row per cell: task by task, ours first, then over all tasks."""
    tasks, published = list(frame["task"].unique()), scores.published_scores()
    rows = list(itertools.product(tasks, steps, MEASURES, ["mean"]))
    if len(tasks) > 1:
        rows += itertools.product([ALL], steps, MEASURES, scores.STATISTICS)
    cells = []
    for task, step, measure, statistic in rows:
        row = {"task": task, "env_step": step, "measure": measure, "statistic": statistic}
        for curve, part in frame.groupby("curve", sort=False):
            if task == ALL:
                returns, note = pooled_returns(part, tasks, step, measure)
            else:
                returns, note = returns_of(part[part["task"] == task], step, measure)
            cells.append({**row, "method": curve, "note": note, "source": "runs", "returns": returns})
            if returns:
                low, high = scores.interval(returns, statistic)
                n = min(len(of_task) for of_task in returns)  # the smallest number of seeds on any task
                cells[-1] |= {"value": scores.STATISTICS[statistic](returns), "low": low, "high": high, "n": n}
            if returns and task != ALL:
                cells[-1]["std"] = pd.Series(returns[0]).std()
        if measure == "last":
            steps_known = [step] + [0] * (task in scores.random_returns(frame))  # 0: the random policy
            known = published[(published["task"] == task) & published["env_step"].isin(steps_known)]
            cells += known.assign(**row).to_dict("records")
    return pd.DataFrame(cells, columns=[*TABLE, "returns"]).astype({"n": "Int64"})


def in_cell(cell):
    """The Markdown text of one row of `table_cells`."""
    if pd.isna(cell.value):
        return f"– ({cell.note})"
    if cell.source != "runs":
        return f"{cell.value:.0f} ± {cell.std:.0f}" + ("" if pd.isna(cell.n) else f" ({cell.n})")
    digits = 3 if cell.task == ALL else 0
    spread = "" if pd.isna(cell.low) else f" [{cell.low:.{digits}f}, {cell.high:.{digits}f}]"
    seeds = f"{cell.n}; {cell.note}" if cell.note else f"{cell.n}"
    return f"{cell.value:.{digits}f}{spread} ({seeds})"


def markdown_table(header, rows):
    """A Markdown table of rows of texts."""
    lines = [f"| {' | '.join(row)} |" for row in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def returns_table(cells):
    """The Markdown table of all cells, with a column per method."""
    columns, rows = cells["column"].unique(), []
    for (task, step, measure, statistic), row in cells.groupby(ROW, sort=False):
        texts = {cell.column: in_cell(cell) for cell in row.itertuples()}
        where = f"{task}, {statistic}" if task == ALL else task
        rows.append([where, f"{step:,}", measure, *(texts.get(column, "–") for column in columns)])
    return markdown_table(["task", "env steps", "measure", *columns], rows)


def differences(cells):
    """Yield the rows of a Markdown table: each pair of curves per task, then over all tasks, in both measures."""
    ours = cells[(cells["source"] == "runs") & cells["value"].notna()]
    for (task, step, measure, statistic), row in ours.groupby(ROW, sort=False):
        for a, b in itertools.combinations(row.itertuples(), 2):
            if task == ALL:
                where, digits = f"{ALL}, {statistic}", 3
                found = scores.pooled_difference(a.returns, b.returns, statistic)
            else:
                where, digits = task, 0
                found = scores.difference((a.value, a.std, a.n), (b.value, b.std, b.n))
            value, low, high = (f"{round(number, digits) + 0:+.{digits}f}" for number in found)  # + 0: no "-0"
            no_interval = "too few seeds" if min(a.n, b.n) < scores.MIN_SEEDS else "no spread"
            between = no_interval if np.isnan(found[1]) else f"[{low}, {high}]"
            yield where, f"{step:,}", measure, f"{a.method} − {b.method}", value, between, f"{a.n}, {b.n}"


def beside_published(cells):
    """Yield a line per curve and step: is it above, below or indistinguishable from each published mean?"""
    last = cells[(cells["measure"] == "last") & (cells["task"] != ALL) & cells["value"].notna()]
    published = last[(last["source"] != "runs") & (last["n"] >= scores.MIN_SEEDS) & last["std"].notna()]
    for ours in last[last["source"] == "runs"].itertuples():
        if ours.n < scores.MIN_SEEDS:
            yield f"- {ours.task}, {ours.env_step:,}, {ours.method}: too few seeds"
            continue
        found = {"above": [], "below": [], "indistinguishable from": []}
        for other in published.query("task == @ours.task and env_step == @ours.env_step").itertuples():
            _, low, high = scores.difference((ours.value, ours.std, ours.n), (other.value, other.std, other.n))
            found["above" if low > 0 else "below" if high < 0 else "indistinguishable from"].append(other.column)
        words = "; ".join(f"{word} {', '.join(names)}" for word, names in found.items() if names)
        if words:
            yield f"- {ours.task}, {ours.env_step:,}, {ours.method}: {words}"


def markdown(cells):
    """The Markdown page: table, differences between curves, comparison with published means, and their sources."""
    ours = cells["source"] == "runs"
    numbered = {method: f"{method} [{i}]" for i, method in enumerate(cells["method"][~ours].unique(), 1)}
    cells = cells.assign(column=cells["method"].where(ours, cells["method"].map(numbered)))
    blocks = [
        f"<!-- {scores.MADE_BY} -->\n{returns_table(cells)}",
        "last: the evaluation at exactly that environment step. outcome: mean of a run's evaluations from half that "
        "step up to it. Runs: mean over seeds [95 % bootstrap interval; with three seeds, their range] (seeds). "
        "Published: mean ± standard deviation (seeds). All tasks: (return − random policy) / (1000 − random policy).",
    ]
    if pairs := list(differences(cells)):
        header = ["task", "env steps", "measure", "curves", "difference", "95 % interval", "seeds"]
        blocks += [
            markdown_table(header, pairs),
            "Intervals of differences are Welch's t, over all tasks a bootstrap stratified by task; none is corrected "
            "for the number of comparisons.",
        ]
    if beside := list(beside_published(cells)):
        blocks.append("Last evaluations beside published means with a known number of seeds, by the same interval:")
        blocks.append("\n".join(beside))
    sources = []
    for row in cells[~ours].drop_duplicates("column").fillna({"protocol": "protocol not stated"}).itertuples():
        seeds = "no number of seeds" if pd.isna(row.n) else f"{row.n} seeds"
        sources.append(f"- {row.column}: {seeds}; {row.source}; {row.protocol}")
    if sources:
        blocks.append("\n".join(sources))
    return "\n\n".join(blocks) + "\n"
