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

import numpy as np
import torch

import dmc2gym
from agent import make_agent
from checkpoint import save_model
from config import ConfigError, exit_with, parse
from env_worker import open_env, open_eval_envs
from evaluate import choose_device, eval_seed, evaluate, summary
from logger import Logger
from replay_buffer import ReplayBuffer
from utils import git_commit, keep_freed_memory, seed_everything


def train(config, env, eval_envs, replay, agent, logger, folder):
    """The training loop: config.num_train_steps decisions, one update each from init_steps on."""
    episode = 0
    obs = env.reset()
    replay.begin_episode(obs)
    episode_reward, episode_start = 0.0, time.time()

    for step in range(config.num_train_steps):
        # try to evaluate
        if step % config.eval_freq == 0:
            seconds = run_evaluation(config, eval_envs, replay, agent, logger, folder, step, episode)
            episode_start += seconds  # the training episode stood still meanwhile

        # choose an action
        if step < config.init_steps:
            action = env.action_space.sample()
        else:
            action = agent.act(obs, sample=True)

        # begin the env step
        env.start(action)

        # gradient updates beside it; they never see the transition being made
        if step >= config.init_steps:
            time_to_log = step % config.log_interval == 0
            for i in range(config.updates_per_step):
                batch = agent.augment(replay.sample(config.batch_size))
                logger.record(step, agent.update(batch, step * config.updates_per_step + i, detailed=time_to_log))
            if time_to_log:
                logger.read()
            if step % config.eval_freq == 0:
                logger.read()
                logger.media(step, agent.images(batch), agent.named_parameters())

        # end the env step
        obs, reward, terminated, truncated = env.finish()
        replay.add(action, reward, obs, terminated)
        episode_reward += reward
        logger.progress(step + 1)

        # end of episode
        if terminated or truncated:
            logger.train_row(
                step + 1, episode=episode, episode_reward=episode_reward, duration=time.time() - episode_start
            )
            episode += 1
            obs = env.reset()
            replay.begin_episode(obs)
            episode_reward, episode_start = 0.0, time.time()

    logger.read()
    run_evaluation(config, eval_envs, replay, agent, logger, folder, config.num_train_steps, episode)


def run_evaluation(config, eval_envs, replay, agent, logger, folder, step, episode):
    """Evaluate the policy after `step` decisions and save what the flags ask for; returns the seconds it took."""
    start = time.time()
    video = folder / "video" / f"{step}.mp4" if config.save_video else None
    returns = evaluate(eval_envs, agent, config.num_eval_episodes, eval_seed(config), video)
    seconds = time.time() - start
    logger.eval_row(step, episode=episode, **summary(returns), returns=returns, duration=seconds)
    if config.save_model:
        save_model(agent, folder / "model", step)
    if config.save_buffer:
        replay.save(folder / "buffer")
    return seconds


def check_work_dir(work_dir):
    """Raise `ConfigError` if a run folder cannot be made below `work_dir`; creates nothing."""
    path = pathlib.Path(work_dir).absolute()
    existing = next(p for p in [path, *path.parents] if os.path.lexists(p))
    if not existing.is_dir():
        raise ConfigError(f"--work_dir {work_dir}: {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"--work_dir {work_dir}: {existing} is not writable")


def make_run_folder(config):
    """A new folder <work_dir>/<domain>-<task>/<agent>-<time>-s<seed>/, numbered if that name is taken."""
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
    return folder


def provenance(config, device):
    """Everything that args.json holds: every flag, and what the run was made with."""
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


def run():
    """Set everything up, then train. Bad input: one line, exit code 2, nothing created."""
    keep_freed_memory()
    try:
        config = parse()
        device = choose_device(config.device)
        if config.replay_device == "cuda" and device.type != "cuda":
            raise ConfigError(f"--replay_device cuda: the networks run on {device}; use auto or cpu")
        variable, compiler = ("CC", "gcc") if device.type == "cuda" else ("CXX", "g++")
        if config.compile and not shutil.which(os.environ.get(variable, compiler)):
            raise ConfigError(f"--compile: needs a compiler and finds none; install {compiler}")
        check_work_dir(config.work_dir)
        seed_everything(config.seed)
        if config.save_video:
            dmc2gym.select_gl_backend()  # a run on states draws nothing else
        env, eval_envs = open_env(config, config.seed), open_eval_envs(config, config.num_eval_episodes)
        env.action_space.seed(config.seed)
        action_dim = env.action_space.shape[0]
        obs_space = env.observation_space
        replay = ReplayBuffer(
            capacity=min(config.replay_buffer_capacity, config.num_train_steps),
            frame_shape=(obs_space.shape[0] // config.frame_stack, *obs_space.shape[1:]),
            action_dim=action_dim,
            frame_stack=config.frame_stack,
            episode_steps=config.max_episode_steps,
            device=device,
            seed=config.seed,
            dtype=torch.uint8 if obs_space.dtype == np.uint8 else torch.float32,
            storage=config.replay_device,
        )
        agent = make_agent(config, obs_space.shape, action_dim, device)
        folder = make_run_folder(config)
    except (ConfigError, dmc2gym.EnvError, MemoryError, OSError) as error:
        exit_with(error)

    facts = provenance(config, device)
    (folder / "args.json").write_text(json.dumps(facts, indent=2) + "\n")
    logger = Logger(folder, config)
    sees = "states" if config.encoder_type == "identity" else f"frames drawn by {facts['mujoco_gl']}"
    logger.message(f"{folder}: seed {config.seed}, on {device}, {sees}, replay of {replay.nbytes / 1e9:.2f} GB")
    try:
        train(config, env, eval_envs, replay, agent, logger, folder)
    except FloatingPointError as error:
        sys.exit(f"{folder}: stopped: {logger.explain(error)}")
    except dmc2gym.EnvError as error:
        sys.exit(f"{folder}: stopped: {error}")
    finally:
        logger.close()


def main():
    """The command: `run`; Ctrl-C ends it with exit code 130."""
    try:
        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
