"""Figures: learning curves and diagnostics."""

import io
import math
import os
import textwrap
from collections import Counter
from itertools import cycle

os.environ["MPLBACKEND"] = "Agg"  # a notebook's or a desktop's backend fails here

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

from endings import Refused
from experiments.scores import MADE_BY, STATISTICS, by_seed, interval, random_returns, seeds_text, unfinished_seeds
from storage.run_folder import load_rows

DIAGNOSTICS = {
    "mi_bound": "MI bound (nats)",
    "kl": "KL (nats)",
    "latent_rank": "latent rank",
    "grad_ratio": "gradient ratio",
}

SMOOTHING = 10  # training episodes
STYLES = ["-", (0, (5, 1)), (0, (1, 1)), (0, (4, 1, 1, 1)), (0, (8, 2)), (0, (4, 1, 1, 1, 1, 1)), (0, (2, 1))]
MARKERS = "osD^vPX*<>"
FONT = 7  # points
THEME = {
    **dict.fromkeys(["axes.labelsize", "axes.titlesize", "xtick.labelsize", "ytick.labelsize"], FONT),
    **dict.fromkeys(["legend.fontsize", "legend.title_fontsize"], FONT - 0.5),
    **dict.fromkeys(["axes.linewidth", "grid.linewidth"], 0.5),
    **dict.fromkeys(["xtick.major.width", "ytick.major.width", "ytick.minor.width"], 0.5),
    **dict.fromkeys(["xtick.major.size", "ytick.major.size"], 3),
    **dict.fromkeys(["axes.spines.top", "axes.spines.right", "legend.frameon"], False),
    "axes.grid": True,
    "ytick.minor.size": 2,
    "legend.handlelength": 3,
    "pdf.fonttype": 42,  # TrueType, which journals require
    "savefig.dpi": 300,
}


def curve_styles(curves):
    """{curve: properties of its line}, distinguishable for colour-blind readers and in grayscale."""
    styles = zip(cycle(sns.color_palette("colorblind")), cycle(STYLES), cycle(MARKERS), strict=False)
    names = ("color", "linestyle", "marker")
    return {curve: dict(zip(names, style, strict=True)) for curve, style in zip(curves, styles, strict=False)}


def panels(rows, columns, height, **kwargs):
    """A figure of a paper's column or page width, and its axes; `height` is a row's, in inches."""
    matplotlib.rcdefaults()  # equal data give equal pictures, whatever a matplotlibrc says
    sns.set_theme(context="paper", style="ticks", rc=THEME)
    width = {1: 3.3, 2: 5.0}.get(columns, 6.9)
    return plt.subplots(rows, columns, figsize=(width, height * rows), squeeze=False, layout="constrained", **kwargs)


def draw_legend(figure, handles, title=None):
    """Draw a legend below the panels, with labels wrapped to the figure's width; the figure grows by its height."""
    width = int(figure.get_figwidth() * 19)  # characters
    longest = max(len(handle.get_label()) for handle in handles)
    columns = max(1, min(4, len(handles), width // (longest + 9)))  # 9: line sample and padding
    labels = [textwrap.fill(handle.get_label(), width // columns - 9) for handle in handles]
    title = title and textwrap.fill(title, width)
    lines = [label.count("\n") + 1.2 for label in labels]
    in_column = math.ceil(len(labels) / columns)
    height = max(sum(lines[i : i + in_column]) for i in range(0, len(lines), in_column))
    height += title.count("\n") + 1 if title else 0
    figure.set_figheight(figure.get_figheight() + (height + 1) * 1.2 * FONT / 72)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, title=title)


def legend_label(frame, curve, note=""):
    """The curve, its number of seeds, its unfinished seeds (counts if more than two tasks have some) and a note."""
    tasks = frame["task"].unique()
    parts = {task: frame[(frame["curve"] == curve) & (frame["task"] == task)] for task in tasks}
    counts = [len(by_seed(part).columns) for part in parts.values()]
    n = f"n\u00a0=\u00a0{min(counts)}" + f"\u00a0to\u00a0{max(counts)}" * (max(counts) > min(counts))  # no line break
    found = {task: unfinished_seeds(part) for task, part in parts.items()}
    words = [seeds_text(runs) + f" on {task}" * (len(tasks) > 1) for task, runs in found.items() if runs]
    if len(words) > 2:
        states = Counter(reason.split()[0] for runs in found.values() for reason in runs.values())
        words = [f"{count} run{'s' * (count > 1)} {state}" for state, count in states.items()]
    return f"{curve} ({'; '.join([n, *words, *[note] * bool(note)])})"


def draw_task(axis, frame, styles, statistic):
    """Draw one task's panel: thin lines are seeds, a thick line each curve's statistic with its interval."""
    for k, (curve, style) in enumerate(styles.items()):
        returns = by_seed(frame[frame["curve"] == curve])
        for seed in returns:
            axis.plot(returns[seed].dropna(), color=style["color"], linewidth=0.5, alpha=0.5)
        common = returns.dropna()  # the steps that all seeds share, so none beyond the shortest run
        if common.empty:
            continue
        of_seeds = STATISTICS[statistic]([common.to_numpy()])
        every = (min(k % 3, len(common) - 1), max(1, len(common) // 8))
        axis.plot(common.index, of_seeds, **style, linewidth=1.2, markersize=2.5, markevery=every)
        low, high = np.transpose([interval([row], statistic) for row in common.to_numpy()])
        axis.fill_between(common.index, low, high, color=style["color"], alpha=0.18, linewidth=0)  # not where NaN


def draw_curves(frame, names, statistic):
    """Figure of learning curves with one panel per task; `names` are the columns that define a curve."""
    tasks, styles = frame["task"].unique(), curve_styles(frame["curve"].unique())
    ours = frame["env_step"][frame["state"] != "published"]
    end = frame["env_step"].max() if ours.isna().all() else ours.max()  # public curves have millions of steps
    columns = min(3, len(tasks))
    figure, axes = panels(math.ceil(len(tasks) / columns), columns, 2.0, sharex=True, sharey=True)
    at_random = random_returns(frame)
    random_style = {"color": "0.45", "linestyle": (0, (3, 2)), "linewidth": 0.8}
    for axis in axes.flat[len(tasks) :]:
        axis.set_visible(False)
    for i, (axis, task) in enumerate(zip(axes.flat, tasks, strict=False)):
        axis.set(title=task, ylabel="evaluation return" if i % columns == 0 else None)
        if i + columns >= len(tasks):  # the lowest panel of its column
            axis.set_xlabel("environment steps")
            axis.tick_params(labelbottom=True)
        if task in at_random:
            axis.axhline(at_random[task], zorder=1, **random_style)
        draw_task(axis, frame[(frame["task"] == task) & (frame["env_step"] <= end)], styles, statistic)
    axes[0, 0].set(xlim=(0, max(1000, end) * 1.02), ylim=(-20, 1020), yticks=range(0, 1001, 250))
    axes[0, 0].xaxis.set_major_formatter(EngFormatter(sep=""))
    handles = [
        Line2D([], [], **style, markersize=3, label=legend_label(frame, curve)) for curve, style in styles.items()
    ]
    of_seeds = {"mean": "mean of the seeds", "iqm": "interquartile mean of the seeds"}[statistic]
    if any(band.get_paths() for axis in axes.flat for band in axis.collections):
        of_seeds += ", 95 % bootstrap interval"
    handles.append(Line2D([], [], color="0.3", linewidth=1.2, label=of_seeds))
    if set(tasks) & set(at_random.index):
        handles.append(Line2D([], [], label="uniformly random policy", **random_style))
    draw_legend(figure, handles, None if names in (["variant"], ["agent"]) else ", ".join(names))
    return figure


def training_log(run):
    """A run's train.log, smoothed: one row per episode, columns env_step, episode_reward and DIAGNOSTICS."""
    log = pd.DataFrame(load_rows(run, "train.log"))
    log = log.rename(columns=dict.fromkeys(["encoder_grad_ratio", "latent_grad_ratio"], "grad_ratio"))  # joint: latent
    log = log.reindex(columns=["env_step", "episode_reward", *DIAGNOSTICS]).astype(float)
    return log.assign(**log.drop(columns="env_step").rolling(SMOOTHING, min_periods=1).mean())


def draw_run(axis, x, y, seed, **style):
    """Draw a run's line, ending in its seed."""
    axis.plot(x, y, linewidth=0.9, **style)
    if len(x):
        end = (x.iloc[-1], y.iloc[-1])
        axis.annotate(seed, end, (2, 0), textcoords="offset points", fontsize=6, color=style["color"])


def draw_diagnostics(frame):
    """Figure with two rows per task, each diagnostic over environment steps and, below, over the training return.

    Also returns the titles of the diagnostics that no run logged; raises `Refused` if these are all.
    """
    ours = frame[frame["state"] != "published"]
    runs = ours[ours["state"] != "missing"].drop_duplicates("run")
    logs = {run: training_log(run) for run in runs["run"]}
    names = [name for name in DIAGNOSTICS if any(log[name].notna().any() for log in logs.values())]
    if not names:
        raise Refused("--diagnostics: no run logged any diagnostics; runs of --agent cody_sac do")
    silent = [(run.curve, run.seed) for run in runs.itertuples() if not logs[run.run][names].notna().any(axis=None)]
    styles = curve_styles(runs["curve"].unique())
    dashes = dict(zip(sorted(runs["seed"].unique()), cycle(STYLES), strict=False))
    figure, axes = panels(2 * runs["task"].nunique(), len(names), 1.4)
    rows = axes.reshape(-1, 2, len(names))
    for (top, bottom), (task, of_task) in zip(rows, runs.groupby("task", sort=False), strict=True):
        top[0].set_ylabel(task)
        for over_steps, over_return, name in zip(top, bottom, names, strict=True):
            over_return.sharey(over_steps)
            scale = "log" if name == "grad_ratio" else "linear"
            over_steps.set(title=DIAGNOSTICS[name], xlabel="environment steps", yscale=scale)
            over_return.set(xlabel="training return")
            over_steps.xaxis.set_major_formatter(EngFormatter(sep=""))
            for run in of_task.itertuples():
                log = logs[run.run].dropna(subset=name)
                style = {"color": styles[run.curve]["color"], "linestyle": dashes[run.seed]}
                draw_run(over_steps, log["env_step"], log[name], run.seed, **style)
                draw_run(over_return, log["episode_reward"], log[name], run.seed, **style)
    handles = []
    for curve, style in styles.items():
        words = seeds_text({seed: "not logged" for of, seed in silent if of == curve})
        handles.append(Line2D([], [], color=style["color"], label=legend_label(ours, curve, words)))
    handles += [Line2D([], [], color="0.3", linestyle=line, label=f"seed {seed}") for seed, line in dashes.items()]
    draw_legend(figure, handles)
    return figure, [title for name, title in DIAGNOSTICS.items() if name not in names]


def as_pictures(figure):
    """{suffix: bytes} of a figure, without timestamps, so that equal runs give identical files."""
    png, pdf = io.BytesIO(), io.BytesIO()
    figure.savefig(png, format="png", metadata={"Software": MADE_BY})
    figure.savefig(pdf, format="pdf", metadata={"Creator": MADE_BY, "CreationDate": None})
    plt.close(figure)
    return {".png": png.getvalue(), ".pdf": pdf.getvalue()}
