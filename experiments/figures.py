"""Figures: learning curves and diagnostics."""

import io
import math
import textwrap

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

from endings import Refused
from experiments.scores import (
    MADE_BY,
    STATISTICS,
    aligned,
    begun,
    by_seed,
    interval,
    published_scores,
    seeds_text,
    unfinished_seeds,
)
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
    **dict.fromkeys(["axes.linewidth", "grid.linewidth", "xtick.major.width", "ytick.major.width"], 0.5),
    **dict.fromkeys(["xtick.minor.width", "ytick.minor.width"], 0.5),
    **dict.fromkeys(["xtick.major.size", "ytick.major.size"], 3),
    **dict.fromkeys(["xtick.minor.size", "ytick.minor.size"], 2),
    **dict.fromkeys(["axes.spines.top", "axes.spines.right", "legend.frameon"], False),
    "axes.grid": True,
    "legend.handlelength": 3,
    "pdf.fonttype": 42,  # TrueType, which journals require
    "savefig.dpi": 300,
}


def curve_styles(curves):
    """{curve: (colour, line style, marker)}, distinguishable for colour-blind readers and in grayscale."""
    colours = sns.color_palette("colorblind", 10)
    return {
        curve: (colours[i % len(colours)], STYLES[i % len(STYLES)], MARKERS[i % len(MARKERS)])
        for i, curve in enumerate(curves)
    }


def panels(rows, columns, height, **kwargs):
    """A figure of a paper's column or page width, and its axes; `height` is a row's, in inches."""
    sns.set_theme(context="paper", style="ticks", rc=THEME)
    width = {1: 3.3, 2: 5.0}.get(columns, 6.9)
    return plt.subplots(rows, columns, figsize=(width, height * rows), squeeze=False, layout="constrained", **kwargs)


def draw_legend(figure, handles, title=None):
    """Draw a legend below the panels, with labels wrapped to the figure's width; the figure grows by its height."""
    width = int(figure.get_figwidth() * 19)  # characters
    longest = max(len(handle.get_label()) for handle in handles)
    columns = max(1, min(4, len(handles), width // (longest + 9)))  # 9: line sample and padding
    labels = [textwrap.fill(handle.get_label(), width // columns - 9) for handle in handles]
    lines = [label.count("\n") + 1.2 for label in labels]
    in_column = math.ceil(len(labels) / columns)
    height = max(sum(lines[i : i + in_column]) for i in range(0, len(lines), in_column)) + (title is not None)
    figure.set_figheight(figure.get_figheight() + (height + 1) * 1.2 * FONT / 72)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, title=title)


def legend_label(frame, curve, also=""):
    """The curve with its number of seeds, its unfinished seeds (only counts if more than two tasks have some), and the
    note `also`."""
    tasks = frame["task"].unique()
    parts = {task: frame[(frame["curve"] == curve) & (frame["task"] == task)] for task in tasks}
    counts = [begun(part)["seed"].nunique() for part in parts.values()]
    n = f"n\u00a0=\u00a0{min(counts)}" + f"\u00a0to\u00a0{max(counts)}" * (max(counts) > min(counts))  # no line break
    found = {task: unfinished_seeds(part) for task, part in parts.items()}
    words = [f"{seeds_text(runs)}" + f" on {task}" * (len(tasks) > 1) for task, runs in found.items() if runs]
    if len(words) > 2:
        states = pd.Series([what.split()[0] for runs in found.values() for _, what in runs]).value_counts(sort=False)
        words = [f"{count} run{'s' * (count > 1)} {state}" for state, count in states.items()]
    return f"{curve} ({'; '.join([n, *words, *[also] * bool(also)])})"


def draw_curves(frame, names, statistic):
    """Figure with one panel per task: thin lines are seeds, a thick line each curve's statistic with its interval."""
    tasks, styles = frame["task"].unique(), curve_styles(frame["curve"].unique())
    ours = begun(frame[frame["state"] != "published"])
    end = (ours if len(ours) else frame)["env_step"].max()  # public curves have millions of steps
    columns = min(3, len(tasks))
    figure, axes = panels(math.ceil(len(tasks) / columns), columns, 2.0, sharex=True, sharey=True)
    at_random = published_scores().query("method == 'random policy'").set_index("task")["mean"]
    random_style = {"color": "0.45", "linestyle": (0, (3, 2)), "linewidth": 0.8}
    for i, axis in enumerate(axes.flat):
        if i >= len(tasks):
            axis.set_visible(False)
            continue
        axis.set_title(tasks[i])
        axis.set_ylabel("evaluation return" if i % columns == 0 else None)
        if i + columns >= len(tasks):  # the lowest panel of its column
            axis.set_xlabel("environment steps")
            axis.tick_params(labelbottom=True)
        if tasks[i] in at_random:
            axis.axhline(at_random[tasks[i]], zorder=1, **random_style)
        for k, (curve, (colour, line, marker)) in enumerate(styles.items()):
            scores = by_seed(frame[(frame["curve"] == curve) & (frame["task"] == tasks[i])]).loc[:end]
            for seed in scores:
                axis.plot(scores[seed].dropna(), color=colour, linewidth=0.5, alpha=0.5)
            common = aligned(scores)
            if len(common):
                of_seeds = STATISTICS[statistic]([common.to_numpy()])
                every = (k % 3, max(1, len(common) // 8))
                style = {"color": colour, "linestyle": line, "linewidth": 1.2, "marker": marker, "markersize": 2.5}
                axis.plot(common.index, of_seeds, markevery=every, **style)
                low, high = np.transpose([interval([row], statistic) for row in common.to_numpy()])
                axis.fill_between(common.index, low, high, color=colour, alpha=0.18, linewidth=0)
    axes[0, 0].set(xlim=(0, max(1, end) * 1.02), ylim=(-20, 1020), yticks=range(0, 1001, 250))
    axes[0, 0].xaxis.set_major_formatter(EngFormatter(sep=""))
    handles = [
        Line2D([], [], color=colour, linestyle=line, marker=marker, markersize=3, label=legend_label(frame, curve))
        for curve, (colour, line, marker) in styles.items()
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


def draw_diagnostics(frame):
    """Two rows per task: each diagnostic over environment steps and, below, over the training return.

    Returns:
        The figure, and the titles of the diagnostics that it omits because no run logged them.

    Raises:
        Refused: no run logged any diagnostic.
    """
    ours = frame[frame["state"] != "published"]
    runs = ours[ours["state"] != "missing"].drop_duplicates("run")
    logs = {run: training_log(run) for run in runs["run"]}
    names = [name for name in DIAGNOSTICS if any(log[name].notna().any() for log in logs.values())]
    if not names:
        raise Refused("--diagnostics: no train.log here has any of them; runs of --agent cody_sac log them")
    silent = [(run.curve, run.seed) for run in runs.itertuples() if not logs[run.run][names].notna().any(axis=None)]
    tasks, seeds = runs["task"].unique(), sorted(runs["seed"].unique())
    styles = curve_styles(runs["curve"].unique())
    dashes = {seed: STYLES[i % len(STYLES)] for i, seed in enumerate(seeds)}
    figure, axes = panels(2 * len(tasks), len(names), 1.4)
    for (top, bottom), task in zip(axes.reshape(-1, 2, len(names)), tasks, strict=True):
        top[0].set_ylabel(task)
        for over_steps, over_return, name in zip(top, bottom, names, strict=True):
            over_return.sharey(over_steps)
            over_steps.set(title=DIAGNOSTICS[name], xlabel="environment steps")
            over_return.set(xlabel="training return")
            over_steps.xaxis.set_major_formatter(EngFormatter(sep=""))
            if name == "grad_ratio":
                over_steps.set_yscale("log")
            for run in runs[runs["task"] == task].itertuples():
                colour, log = styles[run.curve][0], logs[run.run].dropna(subset=name)
                for axis, x in ((over_steps, "env_step"), (over_return, "episode_reward")):
                    axis.plot(log[x], log[name], color=colour, linestyle=dashes[run.seed], linewidth=0.9)
                    for end in zip(log[x].tail(1), log[name].tail(1), strict=True):
                        axis.annotate(run.seed, end, (2, 0), textcoords="offset points", fontsize=6, color=colour)
    handles = []
    for curve, (colour, _, _) in styles.items():
        words = seeds_text([(seed, "without them") for of, seed in silent if of == curve])
        handles.append(Line2D([], [], color=colour, label=legend_label(ours, curve, words)))
    handles += [Line2D([], [], color="0.3", linestyle=line, label=f"seed {seed}") for seed, line in dashes.items()]
    draw_legend(figure, handles)
    return figure, [title for name, title in DIAGNOSTICS.items() if name not in names]


def as_pictures(figure):
    """{suffix: bytes} of a figure, without timestamps, so that equal runs give identical files."""
    files = {}
    for ending, metadata in ((".png", {"Software": MADE_BY}), (".pdf", {"Creator": MADE_BY, "CreationDate": None})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=ending[1:], metadata=metadata)
        files[ending] = buffer.getvalue()
    plt.close(figure)
    return files
