"""The structure: six rules about imports, one list of packages, no package unused or unlisted."""

import ast
import pathlib
import sys

import pytest
import yaml

ROOT = pathlib.Path(__file__).parent.parent
FOLDERS = ("storage", "experiments")
FILES = {  # module: path
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))]
}
COMMANDS = {"train", "evaluate", "sweep", "plot"}
NETWORKS = {"sac", "cody", "decoder", "encoder", "augment", "utils", "agent", "auxiliary"}
STORAGE = {name for name in FILES if name.startswith("storage.")}
EXPERIMENTS = {name for name in FILES if name.startswith("experiments.")}
ENVIRONMENTS = {"background", "dmc2gym", "env_worker", "rendering"}


def imports(path, inside=True):
    """All modules that a file imports; with `inside` in its functions too."""
    names = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if inside else tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def reached(name, inside=True, seen=None):
    """The modules of this project, and the packages, that importing `name` brings in."""
    seen = set() if seen is None else seen
    for imported in imports(FILES[name], inside) - seen:
        seen.add(imported)
        if imported in FILES:
            reached(imported, inside, seen)
    return seen


@pytest.mark.parametrize(
    "who, whom",
    [
        (NETWORKS, STORAGE | ENVIRONMENTS),
        (STORAGE, EXPERIMENTS),
        ({"train"}, EXPERIMENTS),
        (set(FILES), COMMANDS),
    ],
    ids=["networks", "storage", "train", "commands"],
)
def test_nothing_reaches_what_it_must_not(who, whom):
    for name in who:
        assert not reached(name) & whom, f"{name} imports {reached(name) & whom}"


def test_workers_do_without_torch():
    assert "torch" not in reached("env_worker", inside=False)


def test_there_are_no_circles():
    for name in FILES:
        assert name not in reached(name)


def requirements(file):
    lines = [line.split("#")[0].strip() for line in (ROOT / file).read_text().splitlines()]
    return [line for line in lines if line]


def test_packages_are_pinned_and_used():
    lines = requirements("requirements.txt")
    assert all("==" in line for line in lines)
    listed = {line.split("==")[0] for line in lines}
    used = {name.split(".")[0] for path in FILES.values() for name in imports(path)}
    used -= {name.split(".")[0] for name in FILES} | set(sys.stdlib_module_names)
    modules = {"skimage": "scikit-image", "imageio_ffmpeg": "imageio-ffmpeg"}
    needed_by_others = {"mujoco", "PyOpenGL"}  # pinned for dm_control; OpenGL is imported in rendering.py's processes
    optional = {"wandb"}
    assert {modules.get(name, name) for name in used - optional} == listed - needed_by_others


def test_environment_yml_installs_the_same_list():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    assert pip == {"pip": ["-r requirements.txt"]}
    assert [line.split("=")[0] for line in conda] == ["python", "pip"]
    python = tuple(map(int, conda[0].split("=")[1].split(".")))
    assert (3, 10) <= python < (3, 13)
