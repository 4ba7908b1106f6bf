"""Train SAC from pixels on a DeepMind Control task, its encoder shared with the CoDy auxiliary task.

    python train.py                                              # cartpole swingup, settings from the task table
    python train.py --domain_name walker --task_name walk        # another task; its action repeat is looked up
    python train.py --omega_cody_loss 0.01 --seed 3 --save_tb    # weight of the KL term, seed, TensorBoard
    python train.py --run_dir runs/a                             # start a run in this folder, or resume it

`python train.py --help` lists every flag. A run writes <work_dir>/<domain>-<task>/<agent>-<time>-s<seed>/:
args.json, run.json, train.log, eval.log, checkpoint/ (until it finishes), model/ and, if requested, tb/ and video/.
"""

import endings

if __name__ == "__main__":
    endings.listen()  # before the other imports, which take seconds

import contextlib
import dataclasses
import time

from agent import make_agent
from endings import Ending, RunEnded, Stopped, check_signals, out_of_memory
from env_worker import open_env, open_eval_envs
from episodes import eval_seed, evaluate, summary
from logger import Logger
from machine import check_machine, choose_device, keep_freed_memory, limit_threads
from replay_buffer import ReplayBuffer
from storage.checkpoint import Checkpoints, save_model
from storage.run_folder import CHECKPOINT, RunFolder, parse_run, provenance
from utils import GlobalRandomness, seed_everything
from video import check_ffmpeg, save_video


@dataclasses.dataclass
class Progress:
    """Counters of the training loop, between two decisions."""

    step: int = 0
    episode: int = 0
    episode_reward: float = 0.0
    evaluated: int = -1  # step of the last evaluation

    def state_dict(self):
        return dataclasses.asdict(self)

    def load_state_dict(self, state):
        vars(self).update(state)


@dataclasses.dataclass
class Run:
    """One training run: the loop and the parts it works on."""

    config: object
    folder: RunFolder
    env: object
    eval_envs: list
    replay: ReplayBuffer
    agent: object
    logger: Logger
    progress: Progress
    checkpoints: Checkpoints

    def train(self):
        """Take config.num_train_steps decisions, each with updates_per_step updates from init_steps on."""
        config, env, replay, agent = self.config, self.env, self.replay, self.agent
        logger, progress = self.logger, self.progress
        obs = env.obs

        for step in range(progress.step, config.num_train_steps):
            # evaluate
            if step % config.eval_freq == 0:
                self.evaluate()

            # stop here, where a checkpoint can be saved, or save one if due
            check_signals()
            replay.check_memory()
            self.checkpoints.save_if_due()

            # choose an action
            if step < config.init_steps:
                action = env.action_space.sample()
            else:
                action = agent.act(obs, sample=True)

            # start the env step
            env.start(action)

            # gradient updates meanwhile; they never see this step's transition
            if step >= config.init_steps:
                should_log = step % config.log_interval == 0
                for index in range(step * config.updates_per_step, (step + 1) * config.updates_per_step):
                    batch = agent.augment(replay.sample(config.batch_size))
                    logger.record(step, agent.update(batch, index, detailed=should_log))
                if should_log:
                    logger.fetch()
                if step % config.eval_freq == 0:
                    logger.media(step, agent.images(batch), agent.named_parameters())

            # finish the env step
            obs, reward, terminated, truncated = env.finish()
            if obs is None:  # the physics diverged: the episode ends without this transition
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
            self.folder.tick(progress.step)

        self.evaluate()

    def evaluate(self):
        """Evaluate the policy and save what the flags ask for; no-op if the checkpoint already has this evaluation."""
        config, step = self.config, self.progress.step
        if self.progress.evaluated == step:
            return
        start = time.monotonic()
        episodes, seed, video = config.num_eval_episodes, eval_seed(config), config.save_video
        returns, frames = evaluate(
            self.eval_envs, self.agent, episodes, seed, video, self.logger.message, check=check_signals
        )
        values = {"episode": self.progress.episode, **summary(returns), "returns": returns}
        self.logger.eval_row(step, **values, duration=time.monotonic() - start)
        if frames:
            fps = self.eval_envs[0].metadata["render_fps"]
            save_video(self.folder.path / "video" / f"{step}.mp4", frames, fps)
        if config.save_model:
            save_model(self.agent.state_dict(), self.folder.path / "model", step)
        self.progress.evaluated = step
        self.checkpoints.save_if_due(evaluated=True)

    def finish(self):
        """Save the networks of the finished run; delete its checkpoint unless --keep_checkpoint."""
        self.logger.flush()
        save_model(self.agent.state_dict(), self.folder.path / "model", self.progress.step)
        if self.config.keep_checkpoint:
            self.checkpoints.save()
        self.folder.report(state="finished", step=self.progress.step)
        if not self.config.keep_checkpoint:
            self.checkpoints.free()

    def complete(self):
        """Train and finish, or record in run.json why the run stopped and raise `RunEnded`."""
        try:
            try:
                self.train()
            except Stopped:
                self.checkpoints.save()
                raise
            return self.finish()
        except Stopped as stop:
            ending = Ending(f"{stop}; --run_dir {self.folder.path} resumes at step {self.progress.step}", stop.code)
        except FloatingPointError as error:
            ending = self.logger.explain(error)
        except RuntimeError as error:
            if not (ending := out_of_memory(error)):
                raise
        except (Ending, OSError, MemoryError) as error:  # a dead worker, a full disk
            ending = error if isinstance(error, Ending) else Ending(error)
        with contextlib.suppress(OSError):
            self.folder.report(state=ending.state, step=self.progress.step, reason=str(ending))
        raise RunEnded(f"{self.folder.path}: stopped: {ending}", ending.code)


def build(config, device):
    """Training environment, evaluation environments, replay and agent, all seeded with `config.seed`."""
    seed_everything(config.seed)
    env, eval_envs = open_env(config, config.seed), open_eval_envs(config, config.num_eval_episodes)
    env.action_space.seed(config.seed)
    check_signals()  # environments and networks take seconds each
    action_dim = env.action_space.shape[0]
    replay = ReplayBuffer(config, env.observation_space, action_dim, device)
    return env, eval_envs, replay, make_agent(config, env.observation_space.shape, action_dim, device)


def prepare():
    """Check the flags, build a `Run` and restore its checkpoint. Bad input leaves no files behind."""
    check_signals()
    config, resumes = parse_run()
    device = choose_device(config.device)
    check_machine(config, device)
    if config.save_video:
        check_ffmpeg("save_video")
    env, eval_envs, replay, agent = build(config, device)
    check_signals()
    folder = RunFolder(config, resumes)
    logger, progress = Logger(folder.path, config), Progress()
    parts = {"progress": progress, "agent": agent, **agent.optimizers, "replay": replay, "env": env, "logger": logger}
    parts["randomness"] = GlobalRandomness()
    made_with = provenance(device, env.background, eval_envs[0].background)
    try:
        if not resumes:
            folder.begin(0, made_with)
        checkpoints = Checkpoints(folder.path, parts, config.checkpoint_minutes, made_with, logger.message)
        replay.open_journal(folder.path / CHECKPOINT)
        if not checkpoints.load():
            logger.drop_newer({})  # rows from before the first checkpoint
            replay.begin_episode(env.reset())
        if resumes:
            folder.begin(progress.step, made_with)
        logger.open()
    except OSError as error:
        folder.undo(error)
        raise
    logger.announce(device, replay, progress.step if resumes else None)
    return Run(config, folder, env, eval_envs, replay, agent, logger, progress, checkpoints)


@endings.command()
def main():
    """Train one run; endings.py lists the exit codes."""
    keep_freed_memory()
    limit_threads()
    run = prepare()
    with contextlib.closing(run.logger):  # closed last: an upload may take a while
        run.complete()


if __name__ == "__main__":
    main()
