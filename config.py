"""Every flag of `train.py`: its type, default and meaning. Importable without torch.

`parse` turns a command line into a complete, checked and frozen `Config`. For an invalid value it raises `Refused`
with a one-line message: the flag, its value, and the accepted values.
"""

import dataclasses
import math
import os
import re
from typing import Literal

from command_line import parse_flags, shorten
from endings import Refused

# (domain, task) -> action repeat, decisions, decisions between evaluations; about 500K environment steps.
# Action repeats: PlaNet (arXiv 1811.04551), table 1, as used by SAC+AE, CURL and DrQ.
TASK_TABLE = {
    ("cartpole", "swingup"): (8, 63_000, 1_250),
    ("ball_in_cup", "catch"): (4, 125_500, 2_500),
    ("reacher", "easy"): (4, 125_500, 2_500),
    ("cheetah", "run"): (4, 125_500, 2_500),
    ("finger", "spin"): (2, 250_100, 5_000),
    ("walker", "walk"): (2, 250_100, 5_000),
}
ENV_STEPS = 500_000  # training budget of a task outside the table
EVAL_ENV_STEPS = 10_000  # environment steps between evaluations of a task outside the table
EPISODE_LENGTH = 1_000  # environment steps in a DeepMind Control episode


@dataclasses.dataclass(frozen=True)
class TaskFlags:
    """The task and its observations."""

    domain_name: str = "cartpole"
    """DeepMind Control domain."""
    task_name: str = "swingup"
    """Task of that domain."""
    action_repeat: int | None = None
    """Environment steps per decision. None: the task table's value, else 1."""
    frame_stack: int | None = None
    """Frames in one observation. None: 3, or 1 with --encoder_type identity."""
    image_size: int = 84
    """Height and width in pixels of the encoder's input."""
    pre_transform_image_size: int | None = None
    """Rendered height and width in pixels. If larger than image_size: random crops for training, centre crop for
    acting. None: image_size, with random shifts."""
    camera_id: int | None = None
    """Camera for frames and videos. None: the task's usual one, 2 for quadruped and dog fetch, else 0."""
    background: str = "none"
    """none: the task's own floor and sky; moving: discs over a drifting texture; or a folder of videos or pictures, see
    docs/backgrounds.md."""
    eval_background: str | None = None
    """Background of evaluations: train or test (a split of --background), none, moving or another folder. If not given:
    test."""
    background_frames: int = 1_000
    """Maximum number of frames to decode from a folder, per split."""
    background_gray: bool = False
    """Show a folder's frames in shades of gray."""


@dataclasses.dataclass(frozen=True)
class TrainingFlags:
    """The agent, its budget and its evaluations."""

    agent: Literal["cody_sac", "sac", "sac_ae"] = "cody_sac"
    """SAC with the CoDy auxiliary task, without one, or with SAC+AE's reconstruction loss (and no augmentation)."""
    seed: int = 1
    """Random seed; -1 draws one and records it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the networks; auto is cuda if available."""
    num_train_steps: int | None = None
    """Decisions in the run. None: the task table's value, else 500,000 environment steps."""
    init_steps: int = 1_000
    """Decisions with uniformly random actions before the first update."""
    updates_per_step: int = 1
    """Gradient updates per decision."""
    batch_size: int = 256
    """Pairs of consecutive transitions per update. The released code has 256 in its README, 512 in train.sh, 32 as its
    default."""
    replay_buffer_capacity: int = 100_000
    """Capacity of the replay buffer in transitions."""
    eval_freq: int | None = None
    """Decisions between evaluations. None: the task table's value, else 10,000 environment steps."""
    num_eval_episodes: int = 10
    """Episodes per evaluation; with software rendering, 10 take up to a tenth of the run."""


@dataclasses.dataclass(frozen=True)
class SpeedFlags:
    """Speed and memory; only update_mode and precision change results beyond float32 rounding."""

    update_mode: Literal["sequential", "joint"] = "sequential"
    """sequential, as released: the critic's and CoDy's optimizers step the encoder in turn. joint: one forward of
    o_t and one backward through the encoder for both losses, one Adam at encoder_lr; the actor reuses the features. For
    more updates per minute: joint with cody_grad_ratio 1, num_strided_layers 2 and conv_init orthogonal."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """Precision of the encoder's convolutions; tf32 (on CUDA) of all convolutions and matrix products. Parameters and
    losses are float32."""
    deterministic: bool = False
    """Use deterministic, slower kernels on CUDA, so that a repeated run is bit-identical. CPU runs always are."""
    compile: bool = False
    """Use torch.compile for the networks, with CUDA graphs on CUDA; the first updates are slow."""
    replay_device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device that stores the replay's frames; auto is the networks' device if the raw frames fit in half of its free
    memory, else the CPU."""
    replay_storage: Literal["auto", "raw", "lz4"] = "auto"
    """Storage of the replay's frames: raw, or LZ4-compressed to between 1/20 and 1/2 of the size, depending on the
    task, at a small cost per update. auto: raw if they fit in half of the free memory or have a background, which
    LZ4 hardly compresses."""
    env_worker: bool = True
    """Run the environment in its own process beside the updates, and evaluations in up to four; same results."""


@dataclasses.dataclass(frozen=True)
class SACFlags:
    """Soft actor-critic: critic, actor, temperature."""

    hidden_dim: int = 1024
    """Width of the hidden layers of actor, critic and CoDy."""
    discount: float = 0.99
    """Discount factor gamma per decision."""
    critic_lr: float = 1e-3
    """Adam learning rate of the Q networks and, unless --update_mode joint, of the encoder in the critic's step."""
    critic_beta: float = 0.9
    """Adam beta1 of the critic and its encoder."""
    critic_tau: float = 0.01
    """EMA rate of the target Q networks."""
    critic_target_update_freq: int = 2
    """Updates between EMA steps of all targets."""
    target_augmentations: int = 1
    """K: augmentations of the next observation over which the critic's target is averaged."""
    critic_augmentations: int = 1
    """M: augmentations of the observation over which the critic's loss is averaged."""
    detach_encoder: bool = False
    """Stop the critic's gradient at the convolutions' output."""
    actor_lr: float = 1e-3
    """Adam learning rate of the actor."""
    actor_beta: float = 0.9
    """Adam beta1 of the actor."""
    actor_log_std_min: float = -10.0
    """Lower bound of the policy's log standard deviation."""
    actor_log_std_max: float = 2.0
    """Upper bound of the policy's log standard deviation."""
    actor_update_freq: int = 2
    """Updates between steps of the actor and the temperature."""
    init_temperature: float = 0.1
    """Initial entropy temperature alpha."""
    alpha_lr: float = 1e-4
    """Adam learning rate of the temperature."""
    alpha_beta: float = 0.5
    """Adam beta1 of the temperature."""


@dataclasses.dataclass(frozen=True)
class EncoderFlags:
    """The encoder, shared by SAC and the auxiliary task."""

    encoder_type: Literal["pixel", "protorl", "identity"] = "pixel"
    """pixel: convs, linear, LayerNorm. protorl: pixels / 255 - 1/2, a linear latent, LayerNorm and tanh in actor and
    critic. identity: train from the task's state instead of pixels."""
    encoder_feature_dim: int = 50
    """Dimension d of the latent."""
    encoder_lr: float = 1e-3
    """Adam learning rate of the encoder: in the auxiliary task's step (for CoDy plus cody_lr), or in the joint step."""
    encoder_tau: float = 0.05
    """EMA rate of the target encoder and CoDy's target predictor."""
    num_layers: int = 4
    """Number of convolution layers."""
    num_strided_layers: int = 1
    """Number of leading convolutions with stride 2; 2 halves the cost of an update."""
    conv_init: Literal["delta_orthogonal", "orthogonal"] = "delta_orthogonal"
    """Initialisation of the encoder's convolutions: orthogonal at the kernel's centre, or over the whole kernel."""
    num_filters: int = 32
    """Filters per convolution."""


@dataclasses.dataclass(frozen=True)
class CoDyFlags:
    """The CoDy auxiliary task."""

    cody_lr: float = 1e-4
    """Adam learning rate of CoDy's own networks."""
    cody_beta2: float = 0.999
    """Adam beta2 of CoDy's optimizer; 0.99 or 0.95 forgets old gradients sooner."""
    cody_warmup_updates: int = 0
    """Updates of linear warm-up of CoDy's step size."""
    cody_max_grad_norm: float | None = None
    """Maximum norm of the gradient of CoDy's loss. None: no clipping."""
    cody_grad_ratio: float | None = None
    """Joint mode: rescale CoDy's gradient at the latent, in each batch, to this multiple of the norm of the critic's.
    None: no rescaling; CoDy's is then about 0.01 of the critic's late in a run."""
    omega_cody_loss: float = 1e-3
    """Weight omega of the KL term (in the published objective, of its second term); 0 still computes and logs it. The
    released code has 0.001 in its README and as its default, 0.01 in train.sh."""
    cody_objective: Literal["dynamics_kl", "published"] = "dynamics_kl"
    """InfoNCE with the KL term, or the three-term loss of the 2022 paper."""
    beta_cody_loss: float = 1.0
    """Weight beta of the regression term of the published objective."""
    kl_prior: Literal["learned", "shared", "unit_gaussian", "none"] = "learned"
    """Prior of the KL term: its own network, the posterior's network, N(0, 1), or no KL term."""
    kl_encoder: Literal["target", "online"] = "target"
    """Encoder for the prior's input o_{t-1}; no gradient either way."""
    key_encoder: Literal["target", "online"] = "target"
    """Encoder for the keys' o_{t+1}; no gradient either way."""
    dynamics_layer_norm: bool = True
    """LayerNorm over the outputs of posterior and prior."""
    reward_prediction: Literal["contrastive", "regression", "none"] = "contrastive"
    """contrastive: the reward is part of the key. regression: a head predicts it (squared error). none: not at all."""
    reward_norm: Literal["per_step", "symmetric", "none"] = "per_step"
    """Scale of the reward that CoDy predicts: mean per environment step, the same mapped from [0, 1] to [-1, 1], or the
    sum over the decision."""
    action_encoder: bool = False
    """Encode actions (|A| to 512 to 16, LayerNorm) before posterior and prior."""
    projection: Literal["mlp", "linear", "none"] = "mlp"
    """Projection between the posterior's sample and the predictor."""
    predictor_layers: int = 2
    """Number of linear layers in the predictor."""


@dataclasses.dataclass(frozen=True)
class DecoderFlags:
    """The reconstruction loss of --agent sac_ae."""

    decoder_lr: float = 1e-3
    """Adam learning rate of the decoder; the encoder's, in the same step, is encoder_lr."""
    decoder_update_freq: int = 1
    """Updates between steps on the reconstruction loss."""
    decoder_latent_lambda: float = 1e-6
    """Weight of the penalty on the squared norm of the latent."""
    decoder_weight_lambda: float = 1e-7
    """Weight decay of the decoder."""


@dataclasses.dataclass(frozen=True)
class OutputFlags:
    """Folders, checkpoints and logs."""

    work_dir: str = "runs"
    """Folder for all runs; this run writes <work_dir>/<domain>-<task>/<agent>-<time>-s<seed>/."""
    run_dir: str | None = None
    """Folder for this run; if it already holds a run, resume it with its flags. None: a new one in work_dir."""
    checkpoint_minutes: float = 10.0
    """Minutes between checkpoints, from which an interrupted run resumes. If saving is cheap, each evaluation is
    followed by one too."""
    keep_checkpoint: bool = False
    """Keep optimizers and replay after the run, to continue it with a larger num_train_steps or to read the data."""
    log_interval: int = 100
    """Decisions between reads of the training metrics from the device."""
    divergence_factor: float = 10.0
    """Warn when KL or the critic loss exceeds this multiple of its running median."""
    save_tb: bool = False
    """Write TensorBoard events to tb/."""
    tb_media: bool = True
    """Include images and histograms, which take up most of the loading time of a page with many runs."""
    wandb: str | None = None
    """Weights & Biases project to send the events to as well; WANDB_MODE=offline keeps them in wandb/. None: off."""
    save_video: bool = False
    """Write an mp4 of the first episode of each evaluation to video/."""
    save_model: bool = False
    """Write the networks to model/ at each evaluation, not only at the end; evaluate.py reads them."""


# --help shows each base class as a group; the last comes first, in Python's order of inheritance
@dataclasses.dataclass(frozen=True)
class Config(OutputFlags, DecoderFlags, CoDyFlags, EncoderFlags, SACFlags, SpeedFlags, TrainingFlags, TaskFlags):
    """Train SAC from pixels on a DeepMind Control task, its encoder shared with the CoDy auxiliary task."""

    @property
    def max_episode_steps(self) -> int:
        """Decisions in a full episode."""
        return math.ceil(EPISODE_LENGTH / self.action_repeat)


def complete(config: Config) -> Config:
    """Replace each None whose default depends on other flags, and draw the seed if it is -1."""
    repeat, steps, eval_freq = TASK_TABLE.get((config.domain_name, config.task_name), (1, None, None))
    if config.action_repeat not in (None, repeat):  # same budget in environment steps, different number of decisions
        repeat, steps, eval_freq = config.action_repeat, None, None
    per_decision = max(1, repeat)  # `check` reports an invalid repeat
    defaults = {
        "action_repeat": repeat,
        "num_train_steps": steps or math.ceil(ENV_STEPS / per_decision),
        "eval_freq": eval_freq or math.ceil(EVAL_ENV_STEPS / per_decision),
        "pre_transform_image_size": config.image_size,
        "frame_stack": 1 if config.encoder_type == "identity" else 3,
    }
    values = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    if config.seed == -1:
        values["seed"] = int.from_bytes(os.urandom(3), "little")
    return dataclasses.replace(config, **values)


# may change when a run resumes: they affect no result, or only rounding
NO_EFFECT_ON_RESULTS = (
    "device compile replay_device replay_storage env_worker work_dir run_dir log_interval divergence_factor save_tb "
    "tb_media wandb save_video save_model checkpoint_minutes keep_checkpoint"
).split()

AT_LEAST_1 = (
    "action_repeat frame_stack image_size num_train_steps batch_size hidden_dim eval_freq num_eval_episodes "
    "critic_target_update_freq actor_update_freq encoder_feature_dim num_layers num_filters log_interval "
    "updates_per_step predictor_layers decoder_update_freq target_augmentations critic_augmentations background_frames"
).split()
POSITIVE = (
    "checkpoint_minutes critic_lr actor_lr alpha_lr encoder_lr cody_lr decoder_lr init_temperature cody_max_grad_norm "
    "cody_grad_ratio"
).split()
FRACTIONS = "critic_tau encoder_tau".split()
BETAS = "critic_beta actor_beta alpha_beta cody_beta2".split()
NOT_NEGATIVE = (
    "omega_cody_loss beta_cody_loss decoder_latent_lambda decoder_weight_lambda cody_warmup_updates"
).split()

DYNAMICS_KL = (
    "kl_prior kl_encoder key_encoder dynamics_layer_norm reward_prediction reward_norm action_encoder projection "
    "predictor_layers"
).split()
NOT_SAC_AE = "num_strided_layers target_augmentations critic_augmentations".split()
PIXELS = (
    "image_size background eval_background precision update_mode target_augmentations critic_augmentations "
    "detach_encoder"
).split()
PIXELS += [field.name for field in dataclasses.fields(EncoderFlags) if field.name != "encoder_type"]
CODY = [field.name for field in dataclasses.fields(CoDyFlags)]
DECODER = [field.name for field in dataclasses.fields(DecoderFlags)]


def check(config: Config) -> None:
    """Raise `Refused` for the first invalid value of a complete config."""
    for refusals in (_ranges, _relations, _combinations):
        for ok, flag, right in refusals(config):
            if not ok:
                raise Refused(f"--{flag} {shorten(getattr(config, flag))}: {right}")


def _ranges(c: Config):
    """(ok, flag, the accepted values) for each value on its own."""
    floats = [f.name for f in dataclasses.fields(c) if isinstance(getattr(c, f.name), float)]
    yield from ((math.isfinite(getattr(c, flag)), flag, "must be finite") for flag in floats)
    yield from ((getattr(c, flag) >= 1, flag, "must be at least 1") for flag in AT_LEAST_1)
    yield from ((getattr(c, flag) is None or getattr(c, flag) > 0, flag, "must be positive") for flag in POSITIVE)
    yield from ((0 < getattr(c, flag) <= 1, flag, "must be in (0, 1]") for flag in FRACTIONS)
    yield from ((0 <= getattr(c, flag) < 1, flag, "must be in [0, 1)") for flag in BETAS)
    yield 0 <= c.discount <= 1, "discount", "must be in [0, 1]"
    yield from ((getattr(c, flag) >= 0, flag, "must not be negative") for flag in NOT_NEGATIVE)
    yield c.divergence_factor > 1, "divergence_factor", "must be above 1"
    yield 0 <= c.seed < 2**32, "seed", "must be -1 (drawn for you) or in [0, 2^32)"
    below = f"must be below the {EPISODE_LENGTH} steps of an episode, so that it has two decisions or more"
    yield c.action_repeat < EPISODE_LENGTH, "action_repeat", below
    project = c.wandb is None or re.fullmatch(r"[^/\\#?%:]{1,128}", c.wandb)
    yield project, "wandb", "must be 1 to 128 characters, none of them / \\ # ? % or :"
    yield c.init_steps >= 2, "init_steps", "must be at least 2, to leave a pair of transitions to sample"


def _relations(c: Config):
    """The same for values that depend on each other."""
    std_max, layers, strided = c.actor_log_std_max, c.num_layers, c.num_strided_layers
    yield c.actor_log_std_min < std_max, "actor_log_std_min", f"must be below --actor_log_std_max {std_max}"
    yield 0 <= strided <= layers, "num_strided_layers", f"must be from 0 to --num_layers {layers}"
    # at least one output pixel must remain: a 3x3 convolution with stride 1 takes 2 pixels, with stride 2 half of them
    smallest = 2**strided * 2 * (layers - strided + 1) - 1
    right = f"must be at least {smallest} pixels for --num_layers {layers} and --num_strided_layers {strided}"
    yield c.image_size >= smallest, "image_size", right
    right = f"must be at least --image_size {c.image_size}"
    yield c.pre_transform_image_size >= c.image_size, "pre_transform_image_size", right
    steps, capacity = c.num_train_steps, c.replay_buffer_capacity
    right = f"must be below --num_train_steps {steps}, or nothing is trained"
    yield c.init_steps < steps, "init_steps", right
    for limit, most in (("replay_buffer_capacity", capacity), ("num_train_steps", steps)):
        yield c.batch_size <= most, "batch_size", f"must not exceed what the replay can hold, --{limit} {most}"
    right = f"must be at least {c.frame_stack + 5}, to hold a pair of transitions with --frame_stack {c.frame_stack}"
    yield capacity >= c.frame_stack + 5, "replay_buffer_capacity", right


def _combinations(c: Config):
    """The same for flags that another flag makes meaningless: refused rather than ignored."""
    steps_encoder = c.agent != "sac" or c.update_mode == "joint"
    pixels = c.encoder_type != "identity"
    known = (None, "none", "moving")
    folders = c.background not in known or c.eval_background not in (*known, "train", "test")
    yield pixels or c.agent != "cody_sac", "encoder_type", "--agent cody_sac has no encoder to train; needs --agent sac"
    needs = [
        (CODY, "--agent cody_sac", c.agent == "cody_sac"),
        (PIXELS, "--encoder_type pixel or protorl", pixels),
        (["background_frames", "background_gray"], "a folder as --background or --eval_background", folders),
        (["camera_id"], "--encoder_type pixel or protorl, or --save_video", pixels or c.save_video),
        (["cody_grad_ratio"], "--update_mode joint", c.update_mode == "joint"),
        (["encoder_lr"], "--agent cody_sac, --agent sac_ae or --update_mode joint", steps_encoder),
        (DYNAMICS_KL, "--cody_objective dynamics_kl", c.cody_objective == "dynamics_kl"),
        (["beta_cody_loss"], "--cody_objective published", c.cody_objective == "published"),
        (["omega_cody_loss"], "a --kl_prior", c.kl_prior != "none"),
        (["kl_encoder"], "--kl_prior learned or shared", c.kl_prior in ("learned", "shared")),
        (["reward_norm"], "--reward_prediction contrastive or regression", c.reward_prediction != "none"),
        (DECODER, "--agent sac_ae", c.agent == "sac_ae"),
        (NOT_SAC_AE, "--agent cody_sac or sac", c.agent != "sac_ae"),
        (["tb_media", "wandb"], "--save_tb", c.save_tb),
    ]
    defaults = {field.name: field.default for field in dataclasses.fields(c)}
    for flags, need, met in needs:
        for flag in flags:
            yield met or getattr(c, flag) == defaults[flag], flag, f"has no effect without {need}"
    right = "is a split of --background, which is none"
    yield c.background != "none" or c.eval_background not in ("train", "test"), "eval_background", right
    same_size = c.pre_transform_image_size == c.image_size
    right = "has no effect without --encoder_type pixel or protorl"
    yield pixels or same_size, "pre_transform_image_size", right
    right = "is kept in this process's memory; use --replay_device auto or cpu"
    yield c.replay_storage != "lz4" or c.replay_device != "cuda", "replay_storage", right
    right = "has no effect with --run_dir, which names the folder exactly"
    yield c.run_dir is None or c.work_dir == defaults["work_dir"], "work_dir", right
    if c.agent == "sac_ae":
        yield c.encoder_type == "pixel", "agent", f"reconstructs pixels, not with --encoder_type {c.encoder_type}"
        right = f"--agent sac_ae has no augmentation, so it must be --image_size {c.image_size}"
        yield same_size, "pre_transform_image_size", right
        yield c.image_size >= 7, "image_size", "must be at least 7 for the SSIM of --agent sac_ae"


def parse(args=None) -> Config:
    """Command line -> complete, checked config; raises as `parse_flags` does."""
    config = complete(parse_flags(Config, args))
    check(config)
    return config
