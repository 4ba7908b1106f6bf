"""Train SAC from pixels on a DeepMind Control task, its encoder shared with the CoDy auxiliary task.

    python train.py                                              cartpole swingup with the published settings
    python train.py --domain_name walker --task_name walk        another task; its action repeat is looked up
    python train.py --omega_cody_loss 0.01 --seed 3 --save_tb    weight of the KL term, seed, TensorBoard

`python train.py --help` lists every flag. A run writes <work_dir>/<domain>-<task>/<agent>-<time>-s<seed>/:
args.json, train.log, eval.log and, as asked for, tb/, video/, model/, buffer/.
"""

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import shutil
import sys
import time

import torch

import dmc2gym
from agent import make_agent
from checkpoint import save_model
from config import ConfigError, exit_with, parse
from env_worker import open_env, open_eval_envs
from evaluate import choose_device, eval_seed, evaluate, summary
from logger import Logger, prepare_console
from machine import bf16_time_ratio, keep_freed_memory, limit_threads
from replay_buffer import ReplayBuffer
from utils import git_commit, seed_everything
from video import save_video


def train(config, env, eval_envs, replay, agent, logger, folder):
    """The training loop: config.num_train_steps decisions, one update each from init_steps on."""
    episode = 0
    obs = env.reset()
    replay.begin_episode(obs)
    episode_reward = 0.0

    for step in range(config.num_train_steps):
        # try to evaluate
        if step % config.eval_freq == 0:
            run_evaluation(config, eval_envs, replay, agent, logger, folder, step, episode)

        # choose an action
        if step < config.init_steps:
            action = env.action_space.sample()
        else:
            action = agent.act(obs, sample=True)

        # begin the env step
        env.start(action)

        # gradient updates beside it; they never see the transition being made
        if step >= config.init_steps:
            reading = step % config.log_interval == 0
            for index in range(step * config.updates_per_step, (step + 1) * config.updates_per_step):
                batch = agent.augment(replay.sample(config.batch_size))
                logger.record(step, agent.update(batch, index, detailed=reading))
            if reading:
                logger.read()
            if step % config.eval_freq == 0:
                logger.media(step, agent.images(batch), agent.named_parameters())

        # end the env step
        obs, reward, terminated, truncated = env.finish()
        if obs is None:  # the physics has diverged: the episode ends without this transition
            logger.physics_error(step + 1, episode)
        else:
            replay.add(action, reward, obs, terminated)
            episode_reward += reward
        logger.progress(step + 1)

        # end of episode
        if terminated or truncated:
            logger.train_row(step + 1, episode=episode, episode_reward=episode_reward)
            episode += 1
            obs = env.reset()
            replay.begin_episode(obs)
            episode_reward = 0.0

    run_evaluation(config, eval_envs, replay, agent, logger, folder, config.num_train_steps, episode)


def run_evaluation(config, eval_envs, replay, agent, logger, folder, step, episode):
    """Evaluate the policy after `step` decisions and save what the flags ask for."""
    start = time.time()
    seed, film = eval_seed(config), config.save_video
    returns, frames = evaluate(eval_envs, agent, config.num_eval_episodes, seed, film, logger.message)
    logger.eval_row(step, episode=episode, **summary(returns), returns=returns, duration=time.time() - start)
    if frames:
        save_video(folder / "video" / f"{step}.mp4", frames, eval_envs[0].metadata["render_fps"])
    if config.save_model:
        save_model(agent, folder / "model", step)
    if config.save_buffer:
        replay.save(folder / "buffer")


def check_work_dir(work_dir):
    """Raise `ConfigError` if a run folder cannot be made below `work_dir`; creates nothing."""
    path = pathlib.Path(work_dir).absolute()
    existing = next(p for p in [path, *path.parents] if os.path.lexists(p))
    if not existing.is_dir():
        raise ConfigError(f"--work_dir {work_dir}: {existing} is not a folder")
    longest = os.pathconf(existing, "PC_NAME_MAX")
    if any(len(os.fsencode(part)) > longest for part in path.parts):
        raise ConfigError(f"--work_dir {work_dir[:60]}...: no name in it may be longer than {longest} bytes")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"--work_dir {work_dir}: {existing} is not writable")


def make_run_folder(config, device):
    """A new folder <work_dir>/<domain>-<task>/<agent>-<time>-s<seed>/ with its args.json, numbered if it is there."""
    parent = pathlib.Path(config.work_dir) / f"{config.domain_name}-{config.task_name}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # what check_work_dir cannot see, such as a file system that takes no folders
        raise ConfigError(f"--work_dir {config.work_dir}: {error}") from None
    name = f"{config.agent}-{time.strftime('%Y%m%d-%H%M%S')}-s{config.seed}"
    number = 1
    while True:
        folder = parent / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()
            break
        except FileExistsError:  # another run of the same sweep, in the same second
            number += 1
    for part, wanted in {"video": config.save_video, "model": config.save_model, "buffer": config.save_buffer}.items():
        if wanted:
            (folder / part).mkdir()
    try:
        (folder / "args.json").write_text(json.dumps(provenance(config, device), indent=2) + "\n")
    except OSError:
        shutil.rmtree(folder)
        raise
    return folder


def provenance(config, device):
    """What args.json holds: every flag, and what the run was made with."""
    packages = ("torch", "mujoco", "dm_control", "gymnasium", "numpy")
    return {
        **dataclasses.asdict(config),
        "command": sys.argv,
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "python": sys.version.split()[0],
        "device_used": str(device),
        "mujoco_gl": os.environ.get("MUJOCO_GL"),
        "git_commit": git_commit(),
    }


def check_machine(config, device):
    """Raise `ConfigError` if this machine lacks what a flag needs."""
    if config.replay_device == "cuda" and device.type != "cuda":
        raise ConfigError(f"--replay_device cuda: the networks run on {device}; use auto or cpu")
    variable, compiler = ("CC", "gcc") if device.type == "cuda" else ("CXX", "g++")
    if config.compile and not shutil.which(os.environ.get(variable, compiler)):
        raise ConfigError(f"--compile: needs a compiler and finds none; install {compiler}")
    check_work_dir(config.work_dir)


def build(config, device):
    """Environment to train in, those to evaluate in, replay and agent: everything random seeded by `config.seed`."""
    seed_everything(config.seed)
    if config.save_video:
        dmc2gym.select_gl_backend()  # a run on states draws nothing else
    env, eval_envs = open_env(config, config.seed), open_eval_envs(config, config.num_eval_episodes)
    env.action_space.seed(config.seed)
    action_dim = env.action_space.shape[0]
    replay = ReplayBuffer(config, env.observation_space, action_dim, device)
    agent = make_agent(config, env.observation_space.shape, action_dim, device)
    return env, eval_envs, replay, agent


def describe(config, device, replay):
    """What a run says of itself first: seed, threads, device, precision, what draws, memory of the replay."""
    backend = os.environ.get("MUJOCO_GL")
    drawn = f"drawn by {backend}, {dmc2gym.renderer(backend)}"
    sees = f"frames {drawn}"
    if config.encoder_type == "identity":
        sees = f"states, videos {drawn}" if config.save_video else "states"
    threads = torch.get_num_threads()
    return (
        f"seed {config.seed}, on {device} with {threads} thread{'s' if threads > 1 else ''} in {config.precision}, "
        f"{sees}, replay of {replay.nbytes / 1e9:.2f} GB"
    )


def run():
    """Check, build, train. Bad input: one line, exit code 2, nothing created."""
    keep_freed_memory()
    limit_threads()
    try:
        config = parse()
        device = choose_device(config.device)
        check_machine(config, device)
        env, eval_envs, replay, agent = build(config, device)
        folder = make_run_folder(config, device)
        logger = Logger(folder, config)
    except (ConfigError, dmc2gym.EnvError, MemoryError, OSError) as error:
        exit_with(error)

    logger.message(f"{folder}: {describe(config, device, replay)}")
    if config.precision == "bf16" and device.type == "cpu" and (ratio := bf16_time_ratio()) >= 1:
        logger.message(
            f"warning: --precision bf16: a convolution takes {ratio:.2f} times as long in it as in fp32 here"
        )
    try:
        train(config, env, eval_envs, replay, agent, logger, folder)
    except FloatingPointError as error:
        sys.exit(f"{folder}: stopped: {logger.explain(error)}")
    except (dmc2gym.EnvError, OSError) as error:  # a full disk too
        sys.exit(f"{folder}: stopped: {error}")
    finally:
        logger.close()


def main():
    """The command: `run`; Ctrl-C ends it with exit code 130."""
    prepare_console()
    try:
        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
