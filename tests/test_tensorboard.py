"""The pages that a user sees in TensorBoard, and the upload to Weights & Biases."""

import importlib.util
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import types

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorboard.summary.writer import event_file_writer
from test_train import STATE

import dashboard
from config import Config, parse
from endings import Refused
from logger import Logger
from storage.run_folder import RunFolder, load_status, run_id

ROOT = pathlib.Path(__file__).parent.parent
LOSSES = {"critic_loss": 3.0, "actor_loss": -9.0, "cody_loss": 2.0, "info_nce": 1.0, "mi_bound": 4.0, "kl": 20.0}


def begin(folder, flags=""):
    config = parse(f"--save_tb --run_dir {folder} {flags}".split())
    RunFolder(config, resumes=False).begin(0, {})
    return Logger(folder, config)


def write(logger, returns, first=0):
    """An evaluation with each of the returns, every 1250 decisions, and training between them."""
    logger.open()
    for step, value in enumerate(returns, first):
        logger.eval_row(1250 * step, episode=step, episode_reward=value, episode_reward_std=1.0, duration=0.0)
        logger.record(1250 * step, {name: torch.tensor(value) for name, value in LOSSES.items()})
        logger.fetch()
        logger.train_row(1250 * step + 125, episode=step, episode_reward=value / 2)
        logger.progress(1250 * step + 125)


def events(folder):
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


def test_groups_are_sorted_as_a_person_reads():
    tags = [dashboard.tag(name) for name in ("eval_episode_reward", "critic_loss", "temporal_nce", "q", "duration")]
    assert tags == sorted(tags) and tags[-1] < "visual/" < "weights/"
    assert [tag.split("/")[0] for tag in tags] == ["charts", "losses", "losses", "metrics", "speed"]


def test_flags_and_layout_come_once_and_the_best_return_is_kept(tmp_path):
    logger = begin(tmp_path / "run", "--seed 5 --no_dynamics_layer_norm")
    write(logger, [100.0, 700.0, 300.0])
    state = logger.state_dict()
    logger.close()
    again = Logger(tmp_path / "run", parse(f"--save_tb --run_dir {tmp_path}/run".split()))
    again.load_state_dict(state)
    write(again, [500.0, 900.0], first=3)
    again.close()
    shown = events(tmp_path / "run" / "tb")
    best = [(event.step, event.value) for event in shown.Scalars("metrics/eval_episode_reward_best")]
    assert best == [(0, 100.0), (10_000, 700.0), (20_000, 700.0), (30_000, 700.0), (40_000, 900.0)]
    assert set(shown.Tags()["tensors"]) == {"custom_scalars__config__", "_hparams_/session_start_info"}
    assert all(len(shown.Tensors(tag)) == 1 for tag in shown.Tags()["tensors"])
    content = shown.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    flags = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert flags["seed"].number_value == 5 and flags["omega_cody_loss"].number_value == 1e-3
    assert flags["agent"].string_value == "cody_sac" and flags["cody_max_grad_norm"].string_value == "None"
    assert flags["dynamics_layer_norm"].WhichOneof("kind") == "bool_value" and "run_dir" not in flags


def test_media_can_be_left_out(tmp_path):
    for name, flags in (("with", ""), ("without", "--no_tb_media")):
        logger = begin(tmp_path / name, flags)
        logger.open()
        logger.media(0, {"augmented/obs": torch.rand(4, 3, 8, 8)}, [("W", torch.rand(4, 4))])
        logger.record(0, {"kl": torch.tensor(1.0), "kl_per_dim": torch.ones(3)})
        logger.fetch()
        logger.close()
    tags = {name: events(tmp_path / name / "tb").Tags() for name in ("with", "without")}
    assert tags["with"]["images"] == ["visual/augmented/obs"]
    assert tags["with"]["histograms"] == ["weights/W", "weights/kl_per_dim"]
    assert not tags["without"]["images"] and not tags["without"]["histograms"]
    assert tags["without"]["scalars"] == tags["with"]["scalars"] == ["charts/kl"]


def test_the_config_of_a_sweep_is_replaced_if_it_changes(tmp_path):
    dashboard.write_hparams_config(tmp_path, ["seed"])
    (path,) = tmp_path.iterdir()
    before = path.stat()
    dashboard.write_hparams_config(tmp_path, ["seed"])
    assert path.stat() == before
    dashboard.write_hparams_config(tmp_path, ["seed", "agent"])
    assert list(tmp_path.iterdir()) == [path]
    content = events(tmp_path).SummaryMetadata("_hparams_/experiment").plugin_data.content
    experiment = plugin_data_pb2.HParamsPluginData.FromString(content).experiment
    assert [info.name for info in experiment.hparam_infos] == ["seed", "agent"]
    assert [info.name.tag for info in experiment.metric_infos] == list(dashboard.METRICS)


def test_dashboard_imports_without_torch():
    code = "import dashboard, sys; assert not {'torch', 'tensorflow', 'dm_control'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.fixture
def page(tmp_path):
    """A page in headless Chromium on a TensorBoard of two times two runs in a sweep's folder."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        pytest.skip("needs chromium (apt install chromium)")
    sync_api = pytest.importorskip("playwright.sync_api")
    for omega in ("0.1", "0.01"):
        for seed in (0, 1):
            logger = begin(tmp_path / f"omega_{omega}" / f"s{seed}", f"--omega_cody_loss {omega} --seed {seed}")
            write(logger, [100.0, 700.0 + seed, 600.0 + 100 * float(omega)])
            logger.close()
    dashboard.write_hparams_config(tmp_path, ["omega_cody_loss", "seed"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(tmp_path), "--host", "127.0.0.1", "--port"]
    tensorboard = subprocess.Popen([*command, address.split(":")[1]], stderr=subprocess.PIPE, text=True)
    try:
        for line in tensorboard.stderr:
            if "Press CTRL+C" in line:
                break
        flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        flags += "--disable-component-update --disable-sync"
        with sync_api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=flags.split())
            page = browser.new_page(viewport={"width": 1400, "height": 1600}, base_url=f"http://{address}")
            page.set_default_timeout(30_000)
            yield page
            browser.close()
    finally:
        tensorboard.terminate()
        tensorboard.wait()


@pytest.mark.slow
def test_pages(page, tmp_path):
    """In a browser: the return comes first, the custom scalars are plots, HPARAMS has a row for each run."""
    page.goto("/")
    page.locator("scalar-card", has_text="20,000").first.wait_for()
    groups = page.locator("metrics-card-group-toolbar").all_inner_texts()
    assert [re.match("[a-z]+", group)[0] for group in groups] == ["charts", "losses", "metrics", "speed"]
    cards = [text.split("\n")[:2] for text in page.locator("scalar-card").all_inner_texts()]
    assert cards[0] == ["charts", "/eval_episode_reward"]
    assert {name for _, name in cards} >= {"/train_episode_reward", "/mi_bound", "/kl", "/critic_loss"}
    page.screenshot(path=tmp_path / "time_series.png")

    page.goto("/#custom_scalars")
    page.get_by_text("Matches (4)").nth(6).wait_for()  # of each chart: a curve of each run
    assert page.locator("tf-custom-scalar-multi-line-chart-card").count() == len(dashboard.LAYOUT["CoDy"])
    page.screenshot(path=tmp_path / "custom_scalars.png")

    page.goto("/#hparams")
    page.get_by_text(f"{tmp_path}/omega_0.1/s1 ").first.wait_for()
    cells = [text.strip() for text in page.locator("vaadin-grid-cell-content").all_inner_texts()]
    cells = [text for text in cells if text]
    headings = ["Trial ID", "Show Metrics", "omega_cody_loss", "seed", *dashboard.METRICS.values()]
    assert cells[:6] == headings
    rows = [cells[i : i + 5] for i in range(6, len(cells), 5)]
    assert rows == [
        [f"{tmp_path}/omega_{omega}/s{seed} {run_id(tmp_path / f'omega_{omega}' / f's{seed}')}", *values]
        for omega, seed, values in (
            ("0.01", 0, ["0.010000", "0.0000", "601.00", "700.00"]),
            ("0.01", 1, ["0.010000", "1.0000", "601.00", "701.00"]),
            ("0.1", 0, ["0.10000", "0.0000", "610.00", "700.00"]),
            ("0.1", 1, ["0.10000", "1.0000", "610.00", "701.00"]),
        )
    ]
    page.screenshot(path=tmp_path / "hparams.png")


def test_sessions_of_the_same_host_and_process_lose_nothing(tmp_path, monkeypatch):
    """As in a restarted container: only the number distinguishes the names of their event files."""
    monkeypatch.setattr(event_file_writer, "_global_uid", types.SimpleNamespace(get=lambda: 0))
    logger = begin(tmp_path / "run")
    write(logger, [100.0, 200.0, 300.0])
    for session in (1, 2):
        state = logger.state_dict()
        logger.close()
        logger = Logger(tmp_path / "run", parse(f"--save_tb --run_dir {tmp_path}/run".split()))
        logger.load_state_dict(state)
        write(logger, [100.0 * (session + 3)], first=session + 2)
    logger.close()
    returns = [event.value for event in events(tmp_path / "run" / "tb").Scalars("charts/eval_episode_reward")]
    assert returns == [100.0, 200.0, 300.0, 400.0, 500.0] and len(list((tmp_path / "run" / "tb").iterdir())) == 3


@pytest.mark.parametrize("named", [False, True])
def test_wandb_that_refuses(tmp_path, monkeypatch, call, named):
    """A folder below --work_dir is deleted; one named by --run_dir records the reason in run.json."""

    def refuse(*args):
        raise OSError("--wandb p: no API key")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: types.SimpleNamespace(origin="wandb/__init__.py"))
    monkeypatch.setattr(dashboard, "_open_wandb", refuse)
    place = f"--run_dir {tmp_path}/a" if named else f"--work_dir {tmp_path}"
    result = call("train.py", f"{STATE} --save_tb --wandb p {place}")
    assert (result.returncode, result.stderr) == (1, "train.py: --wandb p: no API key\n")
    if named:
        status = load_status(tmp_path / "a")
        assert (status["state"], status["reason"]) == ("stopped", "before it began: --wandb p: no API key")
    else:
        assert list((tmp_path / "cartpole-swingup").iterdir()) == []


def test_wandb_that_is_not_there(tmp_path, monkeypatch, call):
    """A leftover folder named wandb does not count as the package."""
    line = "train.py: error: --wandb p: the package is not installed; pip install wandb\n"
    for found in (None, importlib.machinery.ModuleSpec("wandb", None)):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, found=found: found)
        result = call("train.py", f"{STATE} --save_tb --wandb p --work_dir {tmp_path}/runs")
        assert (result.returncode, result.stdout, result.stderr) == (2, "", line) and not list(tmp_path.iterdir())


def test_wandb_flags():
    with pytest.raises(Refused, match="^--wandb p: has no effect without --save_tb$"):
        parse(["--wandb", "p"])
    with pytest.raises(Refused, match="^--tb_media False: has no effect without --save_tb$"):
        parse(["--no_tb_media"])
    with pytest.raises(Refused, match="^--wandb: must not be empty$"):
        parse(["--save_tb", "--wandb", ""])
    for project in ("a/b", "x" * 129):
        with pytest.raises(Refused, match="^--wandb .*: must be 1 to 128 characters, none of them / "):
            parse(["--save_tb", "--wandb", project])
    assert Config().wandb is None


def test_wandb(tmp_path):
    """Offline: a resumed run keeps its id, all files are in its folder, and TERM stops it as without wandb."""
    pytest.importorskip("wandb")
    environment = {**os.environ, "WANDB_MODE": "offline", "HOME": str(tmp_path / "home")}
    (tmp_path / "home").mkdir()
    run = tmp_path / "run"
    command = [sys.executable, "train.py", *STATE.split(), "--save_tb", "--wandb", "p", "--run_dir", str(run)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not process.stdout.readline().startswith("| train"):
        pass
    process.send_signal(signal.SIGTERM)
    stderr = process.communicate()[1]
    assert process.returncode == 75 and stderr.splitlines()[-1].startswith(f"{run}: stopped: SIGTERM"), stderr
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folders = sorted((run / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and {folder.name.split("-")[-1] for folder in folders} == {run_id(run)}
    for folder in folders:
        records = (folder / f"run-{run_id(run)}.wandb").read_bytes()
        assert b"charts/eval_episode_reward" in records and b"tb/charts" not in records
    assert list((tmp_path / "home").iterdir()) == []
