"""Plot learning curves, a table with published numbers, or diagnostics, from run folders and public curves.

python plot.py runs/omega --hue omega_cody_loss
python plot.py runs/dmc6 --table 100000 500000
python plot.py runs/omega dmc_planet_bench.csv --out figures/omega
python plot.py runs/omega --diagnostics

docs/plotting.md describes the files and how intervals and differences are computed.
"""

import dataclasses
import os
import pathlib
import sys
from typing import Literal

import tyro

from command_line import parse_flags
from endings import Refused, command
from experiments.figures import as_pictures, draw_curves, draw_diagnostics
from experiments.scores import EVALUATION, MADE_BY, evaluations, read_scores, varied, warnings_about, with_curves
from experiments.tables import TABLE, last_common_step, markdown, table_cells
from storage.run_folder import check_writable, write_whole


@dataclasses.dataclass(frozen=True)
class Args:
    """Plot learning curves or diagnostics, or write a table."""

    paths: tyro.conf.Positional[tuple[str, ...]]
    """Folders of runs (at any depth), public curves (drq's .csv, dreamerv3's .json.gz) or this command's curves.csv."""
    hue: str | None = None
    """Grouping of runs into curves: comma-separated flag names, agent, or variant (the folder above
    <task>/s<seed>). None: variant if every run has such a folder, else the flags that differ, else agent."""
    statistic: Literal["mean", "iqm"] = "mean"
    """Statistic over seeds of the thick line: mean, as in published numbers, or interquartile mean."""
    table: tuple[int, ...] | None = None
    """Write a table at these environment steps, given after the folders; if none, at the last that all runs reached."""
    diagnostics: bool = False
    """Plot MI bound, KL, latent rank and gradient ratio per seed, over environment steps and training return."""
    out: str | None = None
    """Path of the output files without extension. None: curves, table or diagnostics in the first folder."""


def check_replaceable(path, inputs):
    """Raise `Refused` if `path` exists and is an input or was not written by this command."""
    if not path.exists():
        return
    if path.resolve() in [pathlib.Path(p).resolve() for p in inputs]:
        raise Refused(f"--out: {path} is an input and would be overwritten; name another")
    content = path.read_bytes() if path.is_file() else b""
    header = content.partition(b"\n")[0].decode(errors="replace")
    ours = header.endswith(",".join(EVALUATION)) or header.startswith(",".join(TABLE[:3]))
    if MADE_BY.encode() not in content and not ours:
        raise Refused(f"--out: {path} exists and was not made by plot.py; name another")


def parse_command(argv):
    """Command line -> Args; raises `Refused` for invalid ones."""
    if "--table" in argv:
        for word in argv[argv.index("--table") + 1 :]:
            if word.startswith("--"):
                break
            if not word.isdecimal():
                raise Refused(f"--table {word}: must be environment steps; folders come before --table")
    args = parse_flags(Args, argv)
    if "" in args.paths:
        raise Refused("an empty path; must be a folder of runs or a file of curves")
    if not args.paths:
        raise Refused("nothing to plot; give run folders or curve files, such as runs/omega")
    if args.table is not None and args.diagnostics:
        raise Refused("--diagnostics: not together with --table, which is a command of its own")
    if args.statistic != "mean" and (args.table is not None or args.diagnostics):
        raise Refused(f"--statistic {args.statistic}: has no effect with --table or --diagnostics")
    suffix = os.path.splitext(args.out or "")[1]
    if args.out is not None and (not os.path.basename(args.out) or suffix in (".png", ".pdf", ".csv", ".md")):
        raise Refused(f"--out {args.out}: must end in a name, to which .png and so on are added")
    return args


@command()
def main():
    """Read, compute, and only then write; print warnings and the files' paths."""
    args = parse_command(sys.argv[1:])
    kind = "diagnostics" if args.diagnostics else "curves" if args.table is None else "table"
    first = pathlib.Path(args.paths[0])
    frame, names = with_curves(read_scores(args.paths), args.hue)
    stem = args.out or str((first if first.is_dir() else first.parent) / kind)
    suffixes = {"curves": (".png", ".pdf", ".csv"), "diagnostics": (".png", ".pdf"), "table": (".md", ".csv")}[kind]
    paths = {suffix: pathlib.Path(stem + suffix) for suffix in suffixes}
    check_writable("out", os.path.dirname(stem) or ".")
    for path in paths.values():
        check_replaceable(path, args.paths)
    if evaluations(frame).empty:
        raise Refused(f"{first}: no run has been evaluated yet")
    lines = list(warnings_about(frame, names))
    if kind == "curves":
        files = as_pictures(draw_curves(frame, names, args.statistic))
        files[".csv"] = frame[varied(frame) + EVALUATION].to_csv(index=False).encode()
    elif kind == "diagnostics":
        figure, absent = draw_diagnostics(frame)
        files = as_pictures(figure)
        lines += [f"no run has logged: {', '.join(absent)}"] * bool(absent)
    else:
        cells = table_cells(frame, list(dict.fromkeys(args.table or [last_common_step(frame)])))
        files = {".md": markdown(cells).encode(), ".csv": cells[TABLE].to_csv(index=False).encode()}
    for suffix, path in paths.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda file, content=files[suffix]: file.write(content))
    print("\n".join([*lines, *map(str, paths.values())]), flush=True)


if __name__ == "__main__":
    main()
