"""The wheel, installed into an environment of its own and used from an empty folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = ("data.sequence_length=64", "train.global_batch=2", "train.micro_batch=2")
SUPPORTED = ("3.10", "3.11", "3.12")
# What verbs that plan and list import; installed anew for a Python that is not the tests' own.
LIGHT = ("omegaconf", "pyyaml", "packaging", "rich", "numpy")
SHORT = ("train.steps=3", "optimizer.warmup_steps=1", "train.validation_sequences=4", *SMALL)


def run(*command: str | Path, cwd: Path, code: int = 0) -> str:
    environment = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
    environment |= {"PATH": f"{Path(command[0]).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == code, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout + done.stderr


def other_pythons() -> list[str]:
    """Those that nlscale supports and this machine has, but for the one that runs the tests."""
    found = []
    for version in SUPPORTED:
        if version == f"{sys.version_info[0]}.{sys.version_info[1]}":
            continue
        on_path = shutil.which(f"python{version}")
        installed = Path.home().glob(f".pyenv/versions/{version}.*/bin/python{version}")
        for python in [*([on_path] if on_path else []), *map(str, installed)]:
            # a shim of pyenv is on the PATH also where there is no such Python behind it
            if subprocess.run([python, "-c", ""], capture_output=True).returncode == 0:
                found.append(python)
                break
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing is left in the clone."""
    clone, out = tmp_path_factory.mktemp("source") / "nlscale", tmp_path_factory.mktemp("wheel")
    listed = ["git", "ls-files", "-co", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in names.splitlines():
        if (ROOT / name).is_file() and not name.startswith(("tests/", "docs/")):
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, clone / name)
    run(
        Path(sys.executable), "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", out, ".",
        cwd=clone,
    )  # fmt: skip
    (found,) = out.glob("nlscale-*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`nlscale` of an environment that holds the wheel; what it needs comes from the tests' own.

    A path in a .pth file is searched, but the .pth files in there are not read: the clone that is
    installed in place is not seen.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = folder / "bin/python"
    run(
        Path(sys.executable), "-m", "pip", "--python", python, "install", "--quiet", "--no-deps",
        wheel, cwd=folder,
    )  # fmt: skip
    return folder / "bin/nlscale"


def test_the_wheel_holds_recipes_scripts_and_types(wheel: Path) -> None:
    names = {n.removeprefix("nlscale/") for n in zipfile.ZipFile(wheel).namelist()}
    for folder, pattern in (("recipes", "*.yaml"), ("launch/slurm", "*"), ("launch/torchrun", "*")):
        there = [str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob(pattern)]
        assert there and {f"share/{name}" for name in there} <= names
    assert "py.typed" in names
    metadata = zipfile.ZipFile(wheel).read(f"nlscale-{version()}.dist-info/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata


def version() -> str:
    from nlscale import __version__

    return __version__


def test_it_trains_and_sweeps_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    def nlscale(*arguments: str) -> str:
        return run(installed, *arguments, cwd=tmp_path)

    for i in range(40):
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / f"text/{i}.txt").write_text(f"the text of number {i} " * 60)
    nlscale("data", "build", "--source", "text", "--tokenizer", "bytes", "--held-out", "0.2",
            "--out", "data/stdlib")  # fmt: skip
    assert "runs/quickstart/loss.png" in nlscale("train", "quickstart", *SHORT)
    summary = json.loads((tmp_path / "runs/quickstart/summary.json").read_text())
    assert summary["steps"] == 3
    nlscale("recipe", "copy", "sweeps/quickstart", "mine.yaml")
    mine = tmp_path / "mine.yaml"
    text = mine.read_text().replace("tokens: [750k, 1.5M, 3M]", "tokens: [4k]")
    text = text.replace("warmup_steps: 50", "warmup_steps: 1")
    text = text.replace("validation_sequences: 512", "validation_sequences: 4")
    text = text.replace("[hope, attention]", "[gated-delta]").replace("length: 128", "length: 32")
    mine.write_text("".join(line for line in text.splitlines(True) if "0k: {" not in line
                            or "40k" in line))  # fmt: skip
    assert "All have finished" in nlscale("sweep", "mine.yaml")


def test_it_plans_and_launches_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    where = run(installed.parent / "python", "-c", "import nlscale; print(nlscale.__file__)",
                cwd=tmp_path)  # fmt: skip
    assert Path(where.strip()).is_relative_to(installed.parents[1]), "not the clone's"
    plans_and_launches(installed, tmp_path)


@pytest.mark.parametrize("python", other_pythons(), ids=lambda path: Path(path).name)
def test_other_pythons_plan_and_launch(wheel: Path, tmp_path: Path, python: str) -> None:
    folder = tmp_path / "environment"
    run(Path(python), "-m", "venv", "--without-pip", folder, cwd=tmp_path)
    pip = [Path(sys.executable), "-m", "pip", "--python", folder / "bin/python", "install"]
    pip += ["--quiet", "--no-compile"]  # it imports little of what it installs
    run(*pip, "--no-deps", wheel, cwd=tmp_path)
    run(*pip, *LIGHT, cwd=tmp_path)
    (tmp_path / "empty").mkdir()
    plans_and_launches(folder / "bin/nlscale", tmp_path / "empty")
    run(folder / "bin/python", "-m", "compileall", "-q",
        *folder.glob("lib/python*/site-packages/nlscale"), cwd=tmp_path)  # fmt: skip


def plans_and_launches(nlscale: Path, folder: Path) -> None:
    assert "quickstart" in run(nlscale, "recipe", "list", cwd=folder)
    run(nlscale, "config", "quickstart", cwd=folder)
    plan = ("hope-7b", "--cluster", "eight-nodes-64-gpus")
    assert "8 nodes of 8 GPUs" in run(nlscale, "plan", *plan, cwd=folder)
    assert "srun" in run(nlscale, "launch", "slurm", *plan, "--dry-run", cwd=folder)
    node = run(nlscale, "launch", "torchrun", "quickstart", "--cluster", "test", "--dry-run",
               "--node-rank", "1", "model.vocabulary=256", cwd=folder)  # fmt: skip
    (script,) = (word for word in node.split() if word.endswith("many-nodes.sh"))
    assert Path(script).is_file() and f"cd {folder}" in node
    assert "runs" in run(nlscale, "sweep", "hope-ladder", "--dry-run", cwd=folder)
    assert not any(folder.iterdir()), "planning leaves nothing behind"
