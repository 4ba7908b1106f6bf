"""Flags: published names and defaults, the task table, and one clear line for each value that cannot work."""

import dataclasses
import os
import pathlib
import re
import subprocess
import sys

import pytest

from config import TASK_TABLE, Config, parse
from endings import Refused

PUBLISHED_FLAGS = """domain_name task_name action_repeat num_train_steps work_dir cody_lr omega_cody_loss
    pre_transform_image_size image_size frame_stack replay_buffer_capacity agent init_steps batch_size hidden_dim
    eval_freq num_eval_episodes critic_lr critic_beta critic_tau critic_target_update_freq actor_lr actor_beta
    actor_log_std_min actor_log_std_max actor_update_freq encoder_type encoder_feature_dim encoder_lr encoder_tau
    num_layers num_filters discount init_temperature alpha_lr alpha_beta seed save_tb save_video
    save_model detach_encoder log_interval""".split()


def test_published_names_are_flags():
    assert set(PUBLISHED_FLAGS) <= {field.name for field in dataclasses.fields(Config)}


def test_published_command():
    command = (
        "--domain_name cartpole --task_name swingup --action_repeat 8 --save_tb --frame_stack 3 --seed -1 "
        "--eval_freq 10000 --batch_size 256 --num_train_steps 1000000"
    )
    config = parse(command.split())
    assert (config.eval_freq, config.num_train_steps, config.save_tb) == (10_000, 1_000_000, True)
    assert config.seed >= 0 and parse(command.split()).seed != config.seed


def test_no_flag_is_the_table_for_cartpole_swingup():
    config = parse([])
    assert (config.domain_name, config.task_name) == ("cartpole", "swingup")
    assert (config.action_repeat, config.num_train_steps, config.eval_freq) == (8, 63_000, 1_250)
    assert (config.batch_size, config.hidden_dim, config.replay_buffer_capacity) == (256, 1024, 100_000)
    assert (config.init_steps, config.discount, config.init_temperature) == (1000, 0.99, 0.1)
    assert (config.num_eval_episodes, config.log_interval, config.omega_cody_loss) == (10, 100, 0.001)


def test_task_table():
    for (domain, task), row in TASK_TABLE.items():
        c = parse(["--domain_name", domain, "--task_name", task])
        assert (c.action_repeat, c.num_train_steps, c.eval_freq) == row
        assert 500_000 <= c.num_train_steps * c.action_repeat <= 504_000


def test_tasks_outside_the_table_and_other_repeats():
    c = parse("--domain_name hopper --task_name hop".split())
    assert (c.action_repeat, c.num_train_steps, c.eval_freq) == (1, 500_000, 10_000)
    c = parse("--action_repeat 4".split())
    assert (c.action_repeat, c.num_train_steps, c.eval_freq) == (4, 125_000, 2_500)
    assert parse("--image_size 64".split()).pre_transform_image_size == 64


@pytest.mark.parametrize(
    "flags, line",
    [
        ("--batch_size 0", "--batch_size 0: must be at least 1"),
        ("--batch_size many", "--batch_size many: must be a whole number"),
        ("--camera_id 1.5", "--camera_id 1.5: must be a whole number"),
        ("--omega_cody_loss x", "--omega_cody_loss x: must be a number"),
        ("--cody_max_grad_norm it's", "--cody_max_grad_norm it's: must be a number"),
        ("--bach_size 3", "unrecognized flag --bach_size; the nearest is --batch_size"),
        ("--device tpu", "--device tpu: must be one of auto, cpu, cuda"),
        ("--omega_cody_los 1", "unrecognized flag --omega_cody_los; the nearest is --omega_cody_loss"),
        ("--learning_rate 1", "unrecognized flag --learning_rate; --help lists them"),
        ("--critic_lr -0.001", "--critic_lr -0.001: must be positive"),
        ("--cody_lr nan", "--cody_lr nan: must be finite"),
        ("--omega_cody_loss -1", "--omega_cody_loss -1.0: must not be negative"),
        ("--encoder_tau 1.5", "--encoder_tau 1.5: must be in (0, 1]"),
        ("--actor_beta 1", "--actor_beta 1.0: must be in [0, 1)"),
        ("--discount 1.1", "--discount 1.1: must be in [0, 1]"),
        ("--seed -2", "--seed -2: must be -1 (drawn for you) or in [0, 2^32)"),
        ("--num_strided_layers 5", "--num_strided_layers 5: must be from 0 to --num_layers 4"),
        ("--target_augmentations 0", "--target_augmentations 0: must be at least 1"),
        ("--cody_max_grad_norm 0", "--cody_max_grad_norm 0.0: must be positive"),
        ("--cody_grad_ratio 1", "--cody_grad_ratio 1.0: has no effect without --update_mode joint"),
        ("--update_mode joint --cody_grad_ratio 0", "--cody_grad_ratio 0.0: must be positive"),
        ("--update_mode joint --cody_grad_ratio nan", "--cody_grad_ratio nan: must be finite"),
        (
            "--update_mode joint --agent sac_ae --cody_grad_ratio 1",
            "--cody_grad_ratio 1.0: has no effect without --agent cody_sac",
        ),
        ("--cody_beta2 1", "--cody_beta2 1.0: must be in [0, 1)"),
        ("--cody_warmup_updates -1", "--cody_warmup_updates -1: must not be negative"),
        (
            "--agent sac_ae --num_strided_layers 2",
            "--num_strided_layers 2: has no effect without --agent cody_sac or sac",
        ),
        ("--agent sac --cody_warmup_updates 5", "--cody_warmup_updates 5: has no effect without --agent cody_sac"),
        (
            "--num_layers 22",
            "--image_size 84: must be at least 87 pixels for --num_layers 22 and --num_strided_layers 1",
        ),
        ("--image_size 10", "--image_size 10: must be at least 15 pixels for --num_layers 4"),
        ("--pre_transform_image_size 80", "--pre_transform_image_size 80: must be at least --image_size 84"),
        ("--init_steps 1", "--init_steps 1: must be at least 2, to leave a pair of transitions to sample"),
        (
            "--batch_size 200 --replay_buffer_capacity 100",
            "--batch_size 200: must not exceed what the replay can hold, --replay_buffer_capacity 100",
        ),
        (
            "--batch_size 2 --replay_buffer_capacity 5",
            "--replay_buffer_capacity 5: must be at least 8, to hold a pair of transitions with --frame_stack 3",
        ),
        (
            "--action_repeat 1000",
            "--action_repeat 1000: must be below the 1000 steps of an episode, so that it has two decisions or more",
        ),
        ("--actor_log_std_min 3", "--actor_log_std_min 3.0: must be below --actor_log_std_max 2.0"),
        ("--num_train_steps 1100 --batch_size 1200", "--batch_size 1200: must not exceed what the replay can hold"),
        ("--num_train_steps 500", "--init_steps 1000: must be below --num_train_steps 500, or nothing is trained"),
        ("--num_train_steps 0", "--num_train_steps 0: must be at least 1"),
        ("--run_dir=", "--run_dir: must not be empty"),
        ("--seed=", "--seed: must not be empty"),
        ("--save_tb true", "--save_tb true: takes no value; --save_tb switches it on, --no_save_tb off"),
        ("--env_worker=False", "--env_worker False: takes no value; --env_worker switches it on, --no_env_worker off"),
    ],
)
def test_bad_values(flags, line):
    with pytest.raises(Refused) as error:
        parse(flags.split())
    assert str(error.value).startswith(line) and "\n" not in str(error.value) and len(str(error.value)) <= 200


def test_train_is_a_split_of_the_evaluation_and_may_be_a_folder():
    parse("--background train --background_frames 500".split())
    with pytest.raises(Refused):
        parse("--background moving --eval_background train --background_frames 500".split())


@pytest.mark.parametrize(
    "flags",
    [
        f"--batch_size {'9' * 300}",
        f"--{'x' * 300} 1",
        "--batch_size",
        f"--device {'z' * 300}",
        "x" * 400,
        "-x",
        f"--domain_name {'z' * 400}",
        "--domain_name zzz --task_name q",
        "--no_seed",
        "--batch-size x",
        "--agent sac --encoder_type identity --camera_id 1",
    ],
)
def test_every_refusal_is_one_short_line(tmp_path, call, flags):
    result = call("train.py", f"{flags} --work_dir {tmp_path}/runs")
    line = result.stderr.removesuffix("\n")
    assert result.returncode == 2 and result.stdout == "" and not (tmp_path / "runs").exists()
    assert line.startswith("train.py: error: ") and "\n" not in line and len(line) <= 200


def test_smallest_images_that_pass_give_one_output_pixel():
    from encoder import ConvNet

    for layers in range(1, 7):
        for strided in range(layers + 1):
            size = 2**strided * 2 * (layers - strided + 1) - 1
            flags = f"--num_layers {layers} --num_strided_layers {strided} --image_size"
            parse(f"{flags} {size}".split())
            with pytest.raises(Refused):
                parse(f"{flags} {size - 1}".split())
            assert ConvNet((9, size, size), layers, 2, strided).feature_dim == 2


def test_help_explains_every_flag():
    run = subprocess.run([sys.executable, "train.py", "--help"], capture_output=True, text=True)
    assert run.returncode == 0
    words = " ".join(run.stdout.replace("│", " ").split())
    for field in dataclasses.fields(Config):
        # the flag, perhaps its --no_ form and its values, then words before the default
        assert re.search(rf"--{field.name}\b[^()]* [a-zA-Z][^()]* [a-z]", words), field.name
    documented = re.findall(r'\n    \w+: .* = .*\n    """[a-zA-Z0-9-]', pathlib.Path("config.py").read_text())
    assert len(documented) >= len(dataclasses.fields(Config))


def test_config_imports_without_torch():
    code = "import config, sys; assert not {'torch', 'dm_control'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_refusals_without_unicode():
    """On an ASCII terminal tyro draws another frame around its messages; it is removed too."""
    for flags, line in (
        ("--update_mode fast", "--update_mode fast: must be one of sequential, joint\n"),
        ("--bach 3", "unrecognized flag --bach; the nearest is --batch_size\n"),
    ):
        code = f"import config, sys\ntry: config.parse({flags.split()})\nexcept config.Refused as e: print(e)"
        environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
        result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert result.stdout.startswith(line), result.stdout
