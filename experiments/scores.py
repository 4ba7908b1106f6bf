"""Evaluations of runs and public curves in one frame, with their statistics; imports no torch and no matplotlib.

A row is an evaluation. A run without evaluations has one row without step and return, so that tables and legends list
its seed as missing. docs/plotting.md explains the intervals and differences.
"""

import dataclasses
import difflib
import pathlib
import re
import sys
import zlib

import numpy as np
import pandas as pd
from scipy import stats

from command_line import parse_flags, shorten
from config import NO_EFFECT_ON_RESULTS, TASK_TABLE, Config, complete
from endings import Refused
from storage.run_folder import find_runs, load_args, load_rows, load_state

MADE_BY = "plot.py of CoDy"  # marks the pictures and tables that plot.py may overwrite
PUBLISHED = pathlib.Path(__file__).resolve().parent.parent / "results" / "published_scores.csv"
EVALUATION = ["variant", "task", "agent", "seed", "step", "env_step", "episode_reward", "state"]  # columns of every CSV
OWN_COLUMNS = {"domain_name", "task_name", "seed", "agent"}  # flags that EVALUATION covers
METHOD = {f.name: f.default for f in dataclasses.fields(Config) if f.name not in {*NO_EFFECT_ON_RESULTS, *OWN_COLUMNS}}
BUDGET = {"num_train_steps", "eval_freq", "num_eval_episodes"}  # training and evaluation budget, not the method
MADE_WITH = ["git_commit", "python", "device_used", "processor", "renderer"]  # args.json keys besides `versions`
RESAMPLES = 20_000  # bootstrap draws: they fix an interval's ends to a fiftieth of the standard error
MIN_SEEDS = 3  # minimum for an interval
STATISTICS = {  # list of (..., seeds) arrays, one per task -> (...)
    "mean": lambda tasks: np.mean([scores.mean(-1) for scores in tasks], axis=0),
    "iqm": lambda tasks: stats.trim_mean(np.concatenate(tasks, axis=-1), 0.25, axis=-1),
}


def read_scores(paths):
    """Frame of all evaluations in `paths`, columns EVALUATION, flags of METHOD, `made_with ...`, `run` and others.

    `env_step` counts environment steps; `episode_reward` is the mean return of one evaluation. Raises `Refused` if a
    path is missing, holds no run, or has an unknown format.
    """
    frames = []
    for path in map(pathlib.Path, paths):
        if not path.exists():
            raise Refused(f"{path}: no such folder or file")
        frames.append(_read_folder(path) if path.is_dir() else _read_file(path))
    frame = pd.concat([f.dropna(axis="columns", how="all") for f in frames], ignore_index=True)
    frame = frame.reindex(columns=list(dict.fromkeys([*EVALUATION, "run", *frame])))
    if any(ours := frame["state"] != "published"):  # public files have tasks without a run of ours
        frame = frame[frame["task"].isin(frame["task"][ours])]
    return _typed(frame)


def _typed(frame):
    """The frame with seeds and steps as nullable integers and returns as floats."""
    types = {**dict.fromkeys(["seed", "step", "env_step"], "Int64"), "episode_reward": float}
    return frame.astype({name: kind for name, kind in types.items() if name in frame})


def _read_folder(folder):
    runs = find_runs(folder)
    if not runs:
        raise Refused(f"{folder}: holds no run (no args.json at any depth)")
    rows, unreadable = [], []
    for run, planned in runs.items():
        try:
            rows += _read_run(run, planned)
        except (Refused, OSError) as error:
            unreadable.append(str(error))
    if not rows:
        raise Refused(unreadable[0])
    for reason in unreadable:
        print(f"warning: left out: {reason}", file=sys.stderr)
    return pd.DataFrame(rows)


def _read_run(run, planned):
    """Rows of one run, a list of dicts; `planned` are its flags in sweep.json."""
    if planned is None or (run / "args.json").exists():
        args = load_args(run)
    else:
        args = dataclasses.asdict(complete(parse_flags(Config, planned)))
    flags = {name: args.get(name, default) for name, default in METHOD.items()}
    task, place = f"{args['domain_name']}-{args['task_name']}", run.resolve()
    in_layout = place.name == f"s{args['seed']}" and place.parent.name == task
    known = {
        "run": str(run),
        "variant": place.parent.parent.name if in_layout else None,
        "task": task,
        "agent": args["agent"],
        "seed": args["seed"],
        "state": load_state(run),
        **{name: "none" if value is None else value for name, value in flags.items()},
        **_made_with(args),
    }
    return [{**row, **known} for row in load_rows(run, "eval.log")] or [known]


def _made_with(args):
    """{"made_with <name>": tuple of values}, several values if a run resumed with another version or machine."""
    made_with = {}
    for part in [args, *args.get("continued", [])]:
        for name, value in {**part.get("versions", {}), **{n: part.get(n) for n in MADE_WITH}}.items():
            if value is not None:
                made_with.setdefault(f"made_with {name}", set()).add(value)
    return {name: tuple(sorted(values)) for name, values in made_with.items()}


def _read_file(path):
    """Frame from drq's CSV, dreamerv3's JSON, or a CSV written by plot.py."""
    try:
        if path.suffix == ".csv":
            frame = pd.read_csv(path, keep_default_na=False, na_values=[""], float_precision="round_trip")
        else:
            frame = pd.read_json(path, precise_float=True).explode(["xs", "ys"], ignore_index=True)
        if "state" not in frame:  # a public file, whose steps are environment steps
            names = {"env": "task", "step": "env_step", "method": "agent", "xs": "env_step", "ys": "episode_reward"}
            frame = frame.rename(columns=names).assign(state="published")
        if frame.empty or not {"env_step", "episode_reward", "agent"} <= set(frame) or frame["seed"].isna().any():
            raise KeyError  # as a missing seed does
        of_run = sorted(set(frame) - {"step", "env_step", "episode", "episode_reward"})
        run = f"{path}, " + frame[of_run].astype(str).agg(", ".join, axis=1)
        frame = frame.assign(run=run, task=frame["task"].map(task_folder))
        return _typed(frame[[name for name in frame if name in {*EVALUATION, *METHOD, "run"}]])
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, AttributeError):
        raise Refused(
            f"{path}: neither drq's curves (.csv: step, episode_reward, env, seed, agent) nor dreamerv3's (.json.gz: "
            "task, method, seed, xs, ys) nor a CSV of plot.py"
        ) from None


def task_folder(name):
    """A task's public name -> our <domain>-<task>: dmc_ball_in_cup_catch -> ball_in_cup-catch."""
    return re.sub(r"^(?:dmc_)?(ball_in_cup|point_mass|humanoid_CMU|[^_-]+)[_-]", r"\1-", name)


def published_scores():
    """results/published_scores.csv with the columns of our tables; the random policy, with env_step 0, comes first."""
    columns = {"env_steps": "env_step", "mean": "value", "seeds": "n"}
    scores = pd.read_csv(PUBLISHED).rename(columns=columns).sort_values("env_step", kind="stable")
    return scores.assign(task=scores["task"].map(task_folder))


def random_returns(frame):
    """The uniformly random policy's mean return, a Series indexed by task; not all tasks have one.

    It was measured at the task table's action repeats and depends on them, so tasks with a run at another have none.
    """
    returns = published_scores().query("method == 'random policy'").set_index("task")["value"]
    repeats = {f"{domain}-{task}": row[0] for (domain, task), row in TASK_TABLE.items()}
    if "action_repeat" in frame:
        ours = frame.dropna(subset="action_repeat")
        others = ours["task"][ours["action_repeat"] != ours["task"].map(repeats)]
        returns = returns.drop(others.unique(), errors="ignore")
    return returns


def varied(frame):
    """Flags that differ between runs of one task; differences between tasks do not count."""
    return [name for name in METHOD if name in frame and frame.groupby("task")[name].nunique().max() > 1]


def with_curves(frame, hue):
    """The frame of `read_scores` with a column `curve`, and the names of the columns that define it.

    `hue` is their comma-separated names, or None to choose them; public curves lack these and use their agent. Raises
    `Refused` if a flag does not exist, the runs are not in variant folders, or two runs of a curve share a seed.
    """
    ours = frame[frame["state"] != "published"]
    if hue is None:
        in_layout = len(ours) and ours["variant"].notna().all()
        differing = ["agent"] * (ours["agent"].nunique() > 1) + [name for name in varied(frame) if name not in BUDGET]
        names = ["variant"] if in_layout else differing or ["agent"]
    else:
        names = hue.split(",")
    for name in names:
        possible = ["variant", "agent", *METHOD]
        if name not in possible:
            near = difflib.get_close_matches(name, possible, n=1, cutoff=0.5)
            nearest = f"; the nearest is {near[0]}" if near else ""
            raise Refused(f"--hue {name}: must be variant, agent or a flag that defines the method{nearest}")
        if name not in frame or ours[name].isna().any():
            right = "not all runs are in <variant>/<task>/s<seed>" if name == "variant" else "not known of all runs"
            raise Refused(f"--hue {name}: {right}")
    values = frame[names]
    label = values.map(lambda v: f"{v:g}" if isinstance(v, float) else str(v)).agg(", ".join, axis=1)
    frame = frame.assign(curve=label.where(values.notna().all(axis=1), frame["agent"]))
    if all(pd.api.types.is_numeric_dtype(values[name]) for name in names):
        frame = frame.loc[values.sort_values(names, kind="stable").index]
    for (_, task, seed), part in frame.groupby(["curve", "task", "seed"], sort=False):
        if part["run"].nunique() > 1 or part["env_step"].duplicated().any():
            two = " and ".join(part["run"].unique()[:2])
            right = "add a flag to --hue or leave out a path"
            raise Refused(f"--hue {shorten(','.join(names))}: a curve has seed {seed} on {task} twice; {right}: {two}")
    return frame, names


def evaluations(frame):
    """The rows that are evaluations, so none for a run without any."""
    return frame[frame["env_step"].notna()]


def by_seed(part):
    """Returns of one curve on one task, (evaluation steps, seeds); NaN where a seed has no evaluation."""
    return evaluations(part).pivot(index="env_step", columns="seed", values="episode_reward")


def unfinished_seeds(part):
    """{seed: "missing" or "diverged at 40,000"} for the unfinished runs of one curve on one task."""
    last = part[~part["state"].isin(["finished", "published"])].groupby(["seed", "state"])["env_step"].max()
    return {seed: state if pd.isna(step) else f"{state} at {step:,}" for (seed, state), step in last.items()}


def seeds_text(reasons):
    """Dict as from `unfinished_seeds` -> "seeds 2, 3 missing; seed 4 diverged at 40,000"."""
    words = {}
    for seed, reason in reasons.items():
        words.setdefault(reason, []).append(str(seed))
    return "; ".join(f"seed{'s' * (len(seeds) > 1)} {', '.join(seeds)} {reason}" for reason, seeds in words.items())


def warnings_about(frame, names):
    """Yield warnings: missing runs, an aggregate that ends early, and differences within or between curves."""
    made_with = [name for name in frame if name.startswith("made_with ")]
    compared = [name for name in [*METHOD, *made_with] if name in frame and name not in names]
    for (curve, task), part in frame.groupby(["curve", "task"], sort=False):
        where = f"{curve} on {task}"
        if found := unfinished_seeds(part):
            yield f"{where}: {seeds_text(found)}"
        scores = by_seed(part)
        steps, common = scores.index, scores.dropna().index
        if len(steps) and not len(common):
            yield f"{where}: no aggregate, since no evaluation step is common to all its seeds"
        elif len(steps) and common[-1] < steps[-1]:
            yield f"{where}: aggregate to {common[-1]:,}, the last evaluation that all its seeds have"
        if uneven := [f"{step:,}" for step in steps.difference(common) if len(common) and step < common[-1]]:
            more = f" and {len(uneven) - 5} more" * (len(uneven) > 5)
            yield f"{where}: not evaluated by all seeds, so not in the aggregate: {', '.join(uneven[:5])}{more}"
        for name in compared:
            values = set(part[name].dropna().explode())
            if len(values) > 1:
                shown = ", ".join(str(value)[:12] for value in sorted(values, key=str))
                yield f"{where}: its runs differ in {name.removeprefix('made_with ')}: {shown}"
    for name in made_with:
        known = frame.dropna(subset=name).groupby("curve", sort=False)[name]
        values = known.agg(lambda made: tuple(sorted(set().union(*made))))
        if values.nunique() > 1:
            shown = (f"{curve} {', '.join(str(value)[:12] for value in made)}" for curve, made in values.items())
            yield f"curves differ in {name.removeprefix('made_with ')}: {'; '.join(shown)}"
    for name in [name for name in ("eval_freq", "num_eval_episodes") if name in compared]:
        for task, part in frame.groupby("task", sort=False):
            values = part.dropna(subset=name).groupby("curve", sort=False)[name].unique()
            if values.explode().nunique() > 1:
                shown = (f"{curve} {', '.join(map(str, of_curve))}" for curve, of_curve in values.items())
                yield f"outcomes on {task} do not compare: curves differ in {name}: {'; '.join(shown)}"
    flags = [name for name in ("task", "agent", *METHOD) if name in frame and name not in BUDGET]
    for _, part in frame[frame["state"] != "published"].groupby(flags, sort=False, dropna=False):
        if len(twins := part["curve"].unique()) > 1:
            yield f"{' and '.join(twins)} have the same flags on {part['task'].iloc[0]}; --hue with flags joins them"


def resampled(tasks, statistic, rng):
    """The statistic of RESAMPLES bootstrap draws, stratified by task; `tasks` is a list of (seeds,) arrays."""
    draws = [scores[rng.integers(len(scores), size=(RESAMPLES, len(scores)))] for scores in tasks]
    return STATISTICS[statistic](draws)


def interval(tasks, statistic, minus=()):
    """95 % percentile bootstrap interval, (2,), of a statistic of `tasks` or of its difference to that of `minus`.

    NaN if a task has fewer than MIN_SEEDS seeds. The bootstrap's seed is fixed, so equal scores give equal intervals.
    """
    if min(len(scores) for scores in [*tasks, *minus]) < MIN_SEEDS:
        return np.full(2, np.nan)
    rng = np.random.default_rng(0)
    samples = resampled(tasks, statistic, rng)
    if minus:
        samples = samples - resampled(minus, statistic, rng)
    return np.percentile(samples, [2.5, 97.5])


def pooled_difference(a, b, statistic):
    """Difference a - b of two curves' statistics over the same tasks: (value, low, high), see `interval`."""
    return STATISTICS[statistic](a) - STATISTICS[statistic](b), *interval(a, statistic, minus=b)


def difference(a, b):
    """Difference of two means, a - b, and its 95 % Welch t interval: (value, low, high).

    `a` and `b` are (mean, sample standard deviation, number of seeds). The interval is NaN if either has fewer than
    MIN_SEEDS seeds, or if both variances are 0.
    """
    (mean_a, std_a, n_a), (mean_b, std_b, n_b) = a, b
    value, variance_a, variance_b = mean_a - mean_b, std_a**2 / n_a, std_b**2 / n_b  # variances of the means
    variance = variance_a + variance_b
    if min(n_a, n_b) < MIN_SEEDS or not variance > 0:
        return value, np.nan, np.nan
    freedom = variance**2 / (variance_a**2 / (n_a - 1) + variance_b**2 / (n_b - 1))
    margin = stats.t.ppf(0.975, freedom) * variance**0.5
    return value, value - margin, value + margin
