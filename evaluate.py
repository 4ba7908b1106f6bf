"""Evaluate the deterministic policy of a run that has saved its networks, or export it.

python evaluate.py --run runs/cartpole-swingup/cody_sac-20260101-120000-s1
python evaluate.py --run ... --step 10000 --num_eval_episodes 50 --video episode.mp4
python evaluate.py --run ... --export policy     # the policy alone; evaluate.py --run policy plays it
"""

import dataclasses
import functools
import json
import os
import pathlib
import sys
from typing import Literal

from agent import make_agent
from command_line import parse_flags
from config import check
from endings import Ending, Refused, RunEnded, command
from env_worker import open_eval_envs
from episodes import eval_seed, evaluate, summary
from machine import choose_device, limit_threads
from storage.checkpoint import load_policy, save_model
from storage.run_folder import check_writable, load_args, load_config, load_rows
from video import check_ffmpeg, save_video


@dataclasses.dataclass(frozen=True)
class Args:
    """Evaluate a finished run, or one trained with --save_model, or export its policy."""

    run: str
    """The run's folder."""
    step: int | None = None
    """Step of the saved model. None: the last one."""
    num_eval_episodes: int = 10
    """Number of episodes."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the networks; auto is cuda if available."""
    video: str | None = None
    """Path for an mp4 of the first episode; must not exist yet."""
    eval_background: str | None = None
    """Background, as in train.py: train, test, none, moving or a folder. None: the run's."""
    export: str | None = None
    """New folder for the run's flags, policy and logged evaluation; plays no episodes."""


def check_video_path(video):
    """Raise `Refused` unless `video` is a new .mp4 in an existing, writable folder."""
    path = pathlib.Path(video)
    if path.suffix != ".mp4":
        raise Refused(f"--video {video}: must end in .mp4")
    if path.exists():
        raise Refused(f"--video {video}: exists and is not overwritten")
    if not os.access(path.absolute().parent, os.W_OK | os.X_OK):
        raise Refused(f"--video {video}: {path.absolute().parent} is not a folder that can be written to")


def rows_at(run, step):
    """The rows of the run's eval.log at this step: one, or none."""
    return [row for row in load_rows(run, "eval.log") if row["step"] == step]


def check_export(args):
    """Raise `Refused` unless the folder is new and no flag asks for episodes."""
    for flag in ("num_eval_episodes", "video", "eval_background"):
        if getattr(args, flag) != getattr(Args, flag):
            raise Refused(f"--{flag} {getattr(args, flag)}: has no effect with --export, which plays no episodes")
    if os.path.lexists(args.export):
        raise Refused(f"--export {args.export}: exists and is not overwritten")
    check_writable("export", args.export)


def export(run, step, policy, folder):
    """Write the run's args.json and run.json, its evaluation at `step` and model/<step>.pt with the policy alone."""
    folder = pathlib.Path(folder)
    copies = {name: (pathlib.Path(run) / name).read_bytes() for name in ("args.json", "run.json")}
    folder.mkdir(parents=True)
    for name, content in copies.items():
        (folder / name).write_bytes(content)
    (folder / "eval.log").write_text("".join(json.dumps(row) + "\n" for row in rows_at(run, step)))
    save_model(policy, folder / "model", step)
    size = (folder / "model" / f"{step}.pt").stat().st_size / 1e6
    print(f"{folder}: the policy of step {step}, {size:.1f} MB")


@command()
def main():
    """Evaluate and print one JSON line: mean, standard deviation and all returns, beside what was logged; or export."""
    limit_threads()
    args = parse_flags(Args)
    if args.num_eval_episodes < 1:
        raise Refused(f"--num_eval_episodes {args.num_eval_episodes}: must be at least 1")
    if args.export is not None:
        check_export(args)
    if args.video:
        check_video_path(args.video)
        check_ffmpeg("video")
    # compiling takes longer than the episodes
    own = {"device": args.device, "compile": False, "save_video": bool(args.video)}
    config = dataclasses.replace(load_config(args.run), **own)
    if args.export is not None:
        config = dataclasses.replace(config, eval_background="none")  # its files are not needed
    if args.eval_background is not None:
        config = dataclasses.replace(config, eval_background=args.eval_background)
        check(dataclasses.replace(config, background_frames=1000, background_gray=False))  # they need a folder
    device = choose_device(args.device)
    envs = open_eval_envs(config, args.num_eval_episodes)
    agent = make_agent(config, envs[0].observation_space.shape, envs[0].action_space.shape[0], device)
    step, policy = load_policy(agent, pathlib.Path(args.run) / "model", args.step)
    if args.export is not None:
        export(args.run, step, policy, args.export)
        return

    message = functools.partial(print, file=sys.stderr)
    shown = envs[0].background and envs[0].background.sha256
    if args.eval_background is None and shown != load_args(args.run).get("eval_background_sha256"):
        message("warning: the background's files have changed since the run")
    try:
        returns, frames = evaluate(envs, agent, args.num_eval_episodes, eval_seed(config), config.save_video, message)
    except (FloatingPointError, Ending) as error:
        raise RunEnded(f"{args.run}: stopped: {error}", 1) from None
    row = {"step": step, "env_step": step * config.action_repeat, **summary(returns)}
    for logged in rows_at(args.run, step):
        row |= {f"logged_{name}": logged[name] for name in summary(returns)}
        row["logged_episodes"] = config.num_eval_episodes
    print(json.dumps(row | {"returns": returns}), flush=True)  # before the video, which a full disk may refuse
    if frames:
        save_video(args.video, frames, envs[0].metadata["render_fps"])


if __name__ == "__main__":
    main()
