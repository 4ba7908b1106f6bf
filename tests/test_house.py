"""The structure: imports go downwards, one list of packages, no package unused or unlisted."""

import ast
import pathlib
import sys

import yaml

ROOT = pathlib.Path(__file__).parent.parent
FILES = {path.stem: path for path in ROOT.glob("*.py")}
# a file imports only from floors below its own
FLOORS = [
    {"augment", "config", "frames", "machine", "signals"},
    {"dmc2gym", "journal", "run_folder", "slurm", "video"},
    {"dashboard", "env_worker", "scores", "standing", "utils"},
    {"encoder", "logger", "processes", "tables"},
    {"checkpoint", "replay_buffer"},
    {"sac", "cody", "decoder"},
    {"agent"},
    {"evaluate"},
    {"plot", "train"},
    {"sweep"},
]


def imports(path):
    """Top-level names of all modules that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


def test_imports_go_down():
    floor = {name: level for level, names in enumerate(FLOORS) for name in names}
    assert set(floor) == set(FILES)
    for name, path in FILES.items():
        for imported in imports(path) & set(FILES):
            assert floor[imported] < floor[name], f"{name}.py imports {imported}.py"


def requirements(file):
    lines = [line.split("#")[0].strip() for line in (ROOT / file).read_text().splitlines()]
    return [line for line in lines if line]


def test_packages_are_pinned_and_used():
    lines = requirements("requirements.txt")
    assert all("==" in line for line in lines)
    listed = {line.split("==")[0] for line in lines}
    used = set().union(*(imports(path) for path in FILES.values())) - set(FILES) - set(sys.stdlib_module_names)
    modules = {"skimage": "scikit-image", "imageio_ffmpeg": "imageio-ffmpeg"}
    needed_by_others = {"mujoco"}  # pinned for dm_control
    optional = {"wandb"}
    assert {modules.get(name, name) for name in used - optional} == listed - needed_by_others


def test_environment_yml_installs_the_same_list():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    assert pip == {"pip": ["-r requirements.txt"]}
    assert [line.split("=")[0] for line in conda] == ["python", "pip"]
    python = tuple(map(int, conda[0].split("=")[1].split(".")))
    assert (3, 10) <= python < (3, 13)
