"""Train SAC from pixels on a DeepMind Control task, its encoder shared with the CoDy auxiliary task.

    python train.py                                              # cartpole swingup, settings of the task table
    python train.py --domain_name walker --task_name walk        # another task; its action repeat is looked up
    python train.py --omega_cody_loss 0.01 --seed 3 --save_tb    # weight of the KL term, seed, TensorBoard
    python train.py --run_dir runs/a                             # begin there, or go on with what was begun there

`python train.py --help` lists every flag. A run writes <work_dir>/<domain>-<task>/<agent>-<time>-s<seed>/:
args.json, run.json, train.log, eval.log, checkpoint/ and, as asked for, tb/, video/, model/.
"""

import signals

if __name__ == "__main__":
    signals.listen()  # before the seconds that the other imports take

import contextlib
import dataclasses
import os
import time

import torch

import dmc2gym
import rendering
from agent import make_agent
from config import ConfigError, exit_with, leave
from env_worker import WorkerDeath, open_env, open_eval_envs
from episodes import eval_seed, evaluate, summary
from logger import Logger, prepare_console
from machine import bf16_time_ratio, check_machine, choose_device, keep_freed_memory, limit_threads
from replay_buffer import ReplayBuffer
from storage.checkpoint import Checkpoints, save_model
from storage.run_folder import CHECKPOINT, DIVERGED, TOO_EARLY, Over, RunFolder, parse_run, provenance
from utils import GlobalRandomness, seed_everything
from video import save_video


@dataclasses.dataclass
class Progress:
    """Where the loop stands between two decisions."""

    step: int = 0
    episode: int = 0
    episode_reward: float = 0.0
    evaluated: int = -1  # step of the last evaluation

    def state_dict(self):
        return dataclasses.asdict(self)

    def load_state_dict(self, state):
        vars(self).update(state)


def train(config, folder, env, eval_envs, replay, agent, logger, progress, checkpoints):
    """The training loop: config.num_train_steps decisions, one update each from init_steps on."""
    obs = env.obs

    for step in range(progress.step, config.num_train_steps):
        # try to evaluate
        if step % config.eval_freq == 0:
            run_evaluation(config, folder, eval_envs, agent, logger, progress, checkpoints)

        # stop the run where it can be saved, or just save it
        check(env, eval_envs, replay)
        checkpoints.save_if_due()

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
            logger.physics_error(step + 1, progress.episode)
        else:
            replay.add(action, reward, obs, terminated)
            progress.episode_reward += float(reward)

        # end of episode
        if terminated or truncated:
            logger.train_row(step + 1, episode=progress.episode, episode_reward=progress.episode_reward)
            progress.episode += 1
            progress.episode_reward = 0.0
            obs = env.reset()
            replay.begin_episode(obs)

        progress.step = step + 1
        logger.progress(progress.step)
        folder.tick(progress.step)

    run_evaluation(config, folder, eval_envs, agent, logger, progress, checkpoints)


def run_evaluation(config, folder, eval_envs, agent, logger, progress, checkpoints):
    """Evaluate the policy, unless that was done before the run was ended here, and save what the flags ask for."""
    step = progress.step
    if progress.evaluated == step:
        return
    start = time.monotonic()
    seed, film = eval_seed(config), config.save_video
    episodes = config.num_eval_episodes
    returns, frames = evaluate(eval_envs, agent, episodes, seed, film, logger.message, check=signals.check)
    duration = time.monotonic() - start
    logger.eval_row(step, episode=progress.episode, **summary(returns), returns=returns, duration=duration)
    if frames:
        save_video(folder.path / "video" / f"{step}.mp4", frames, eval_envs[0].metadata["render_fps"])
    if config.save_model:
        save_model(agent, folder.path / "model", step)
    progress.evaluated = step
    checkpoints.save_if_due(evaluated=True)


def check(env, eval_envs, replay):
    """Raise `signals.Stopped` if the run has to stop between these two decisions."""
    signals.check()
    for each in (env, *eval_envs):
        each.check()
    replay.check_memory()


def build(config, device):
    """Environment to train in, those to evaluate in, replay and agent: everything random seeded by `config.seed`.

    Raises:
        EnvError, MemoryError: one of them cannot be made; one line.
    """
    seed_everything(config.seed)
    if config.save_video:
        rendering.select_gl_backend()  # a run on states draws nothing else
    env, eval_envs = open_env(config, config.seed), open_eval_envs(config, config.num_eval_episodes)
    env.action_space.seed(config.seed)
    signals.check()  # what came so far has taken seconds, and what follows does
    action_dim = env.action_space.shape[0]
    replay = ReplayBuffer(config, env.observation_space, action_dim, device)
    try:
        agent = make_agent(config, env.observation_space.shape, action_dim, device)
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        sizes = " ".join(f"--{flag} {getattr(config, flag)}" for flag in ("hidden_dim", "num_filters"))
        raise MemoryError(f"{sizes}: the networks do not fit in the memory of {device}") from None
    return env, eval_envs, replay, agent


def describe(config, device, replay):
    """What a run says of itself first: seed, threads, device, precision, what draws, memory of the replay."""
    backend = os.environ.get("MUJOCO_GL")
    drawn = f"drawn by {backend}, {rendering.renderer(backend)}"
    sees = f"frames {drawn}"
    if config.encoder_type == "identity":
        sees = f"states, videos {drawn}" if config.save_video else "states"
    threads = torch.get_num_threads()
    return (
        f"seed {config.seed}, on {device} with {threads} thread{'s' if threads > 1 else ''} in {config.precision}, "
        f"{sees}, {replay.description}"
    )


def finish(config, folder, agent, logger, progress, checkpoints):
    """The run is over: keep its networks, and the rest only if --keep_checkpoint asks for that."""
    logger.flush()
    save_model(agent, folder.path / "model", progress.step)
    if config.keep_checkpoint:
        checkpoints.save()
    folder.report(state="finished", step=progress.step)
    if not config.keep_checkpoint:
        checkpoints.free()


def prepare():
    """Check, build and restore everything that `train` needs. Bad input: one line, exit code 2, nothing created."""
    signals.check()
    config, continues = parse_run()
    device = choose_device(config.device)
    check_machine(config, device)
    env, eval_envs, replay, agent = build(config, device)
    signals.check()
    folder = RunFolder(config, continues)
    logger, progress = Logger(folder.path, config), Progress()
    parts = {"progress": progress, "agent": agent, **agent.optimizers, "replay": replay, "env": env, "logger": logger}
    parts["randomness"] = GlobalRandomness()
    made_with = provenance(device)
    if not continues:
        folder.begin(0, made_with)
    checkpoints = Checkpoints(folder.path, parts, config.checkpoint_minutes, made_with, logger.message)
    replay.open_journal(folder.path / CHECKPOINT)
    if not checkpoints.load():
        logger.cut_logs({})  # of a run that was ended before its first checkpoint
        replay.begin_episode(env.reset())
    if continues:
        folder.begin(progress.step, made_with)
    try:
        logger.open()
    except OSError as error:
        folder.take_back(error)
        raise
    on = f"goes on at step {progress.step}, " if continues else ""
    logger.message(f"{folder}: {on}{describe(config, device, replay)}")
    if config.precision == "bf16" and device.type == "cpu" and (ratio := bf16_time_ratio()) >= 1:
        logger.message(
            f"warning: --precision bf16: a convolution takes {ratio:.2f} times as long in it as in fp32 here"
        )
    return config, folder, env, eval_envs, replay, agent, logger, progress, checkpoints


def main():
    """The command: exit code 0 finished, 1 failed, 2 refused, 3 diverged, 75 and 130 stopped by a signal."""
    prepare_console()
    keep_freed_memory()
    limit_threads()
    try:
        run = prepare()
    except Over as over:
        leave(str(over), over.code)
    except signals.Stopped as stop:
        leave(f"train.py: stopped by {stop} {TOO_EARLY}", stop.code)
    except (WorkerDeath, OSError) as error:  # a full disk; no fault of the flags
        leave(f"train.py: stopped before it began: {error}", 1)
    except (ConfigError, dmc2gym.EnvError, MemoryError) as error:
        exit_with(error)

    config, folder, _, _, _, agent, logger, progress, checkpoints = run
    with contextlib.closing(logger):  # the last, since an upload may take its time
        try:
            try:
                train(*run)
            except signals.Stopped:
                checkpoints.save()
                raise
            finish(config, folder, agent, logger, progress, checkpoints)
            return
        except signals.Stopped as stop:
            state, code, why = "stopped", stop.code, f"{stop}; --run_dir {folder} goes on at step {progress.step}"
        except FloatingPointError as error:
            state, code, why = "diverged", DIVERGED, logger.explain(error)
        except (dmc2gym.EnvError, MemoryError, OSError) as error:  # a full disk too
            state, code, why = "stopped", 1, error
        except torch.OutOfMemoryError as error:  # of CUDA; its message is a paragraph
            less = "--replay_device cpu, fewer runs at once or a smaller --batch_size take less"
            state, code, why = "stopped", 1, f"{str(error).split('. ')[0]}; {less}"
        with contextlib.suppress(OSError):
            folder.report(state=state, step=progress.step, message=f"{folder}: stopped: {why}")
    leave(f"{folder}: stopped: {why}", code)


if __name__ == "__main__":
    main()
