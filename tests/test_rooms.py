"""The floor plan: who may import whom, what answers without torch, and what no file may become."""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from nlscale.config.vocabulary import MIXERS, RULES

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "nlscale"
ORDER = (
    "errors",
    "config",
    "levels.spectrum",
    "ops",
    "data",
    "telemetry",
    "model",
    "cluster.spread",
    "cluster.machines",
    "cluster.life",
    "parallel",
    "optim",
    "levels",
    "plan",
    "cluster.launch",
    "cluster.doctor",
    "step",
    "checkpoint",
    "generate",
    "evaluate",
    "train",
    "bench",
    "verify",
    "scaling",
    "continual",
    "cli",
)
"""The rooms from the ground up. A module belongs to the longest name that it begins with, and may
import what stands before its own room, or in it."""


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def imports_of(name: str) -> Iterator[str]:
    """Modules of the package that a module imports, wherever in it."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES)
        elif isinstance(node, ast.ImportFrom) and node.module in FILES:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in FILES else node.module


def named_by(name: str) -> Iterator[str]:
    """Modules of the package that a module names to import later, as `package.module:name`."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            module, colon, _ = node.value.partition(":")
            if colon and module in FILES:
                yield module


IMPORTS = {name: set(imports_of(name)) - {name} for name in FILES}


def room(name: str) -> str:
    inside = name.removeprefix("nlscale.")
    fitting = [r for r in ORDER if inside == r or inside.startswith(f"{r}.")]
    return max(fitting, key=len, default="")


def test_every_module_is_in_a_room() -> None:
    outside = {name for name in FILES if not room(name)}
    faces = {"nlscale", "nlscale.__main__", "nlscale.cluster"}
    assert outside == faces


def test_imports_run_downward() -> None:
    floor = {r: i for i, r in enumerate(ORDER)}
    upward = {
        f"{name} -> {other}"
        for name, others in IMPORTS.items()
        for other in {*others, *named_by(name)}
        if room(name) and room(other) and floor[room(other)] > floor[room(name)]
    }
    assert not upward


def test_no_modules_import_each_other() -> None:
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        raise AssertionError(f"a circle of imports: {' -> '.join(error.args[1])}") from None


def test_operations_know_nothing_of_configuration_or_processes() -> None:
    known = {room(other) for name in FILES if room(name) == "ops" for other in IMPORTS[name]}
    assert known <= {"ops", "errors"}


NAMES = {*MIXERS, *RULES}
TABLES = {"nlscale.model.mixers.table", "nlscale.optim.table", "nlscale.config.vocabulary"}


def test_no_branch_on_a_mixers_or_an_optimizers_name() -> None:
    """What differs between them is a fact in their table."""
    compared = {
        f"{name}:{node.lineno}"
        for name in FILES.keys() - TABLES
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Compare | ast.MatchValue)
        for inner in ast.walk(node)
        if isinstance(inner, ast.Constant) and inner.value in NAMES
    }
    assert not compared


def test_one_name_one_file() -> None:
    """`memory.py` twice is what a newcomer trips over."""
    stems = [path.stem for path in FILES.values()]
    for stem in ("memory", "levels", "schedule", "report", "trainer", "engine", "recipe"):
        assert stems.count(stem) <= (2 if stem == "recipe" else 1), stem
    arguments = {
        f"{name}: {node.arg}"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.arg) and node.arg in ("mc", "cfg")
    }
    assert not arguments


def test_rooms_and_files_stay_small() -> None:
    folders = {name.split(".")[1] for name in FILES if name.count(".") > 0}
    assert len(folders) <= 24
    lines = [len(path.read_text().splitlines()) for path in FILES.values()]
    assert max(lines) <= 450
    assert statistics.median(n for n in lines if n) <= 150


def test_functions_are_typed() -> None:
    """All but the kernels, whose arguments Triton types."""
    functions = [
        node
        for name, tree in TREES.items()
        if ".kernels." not in name and name != "nlscale.ops.loss.kernel"
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert all(f.returns is not None for f in functions)


def test_tests_mirror_the_rooms() -> None:
    beside = {"docs", "golden", "examples", "wheel", "__pycache__"}
    for folder in (path for path in (ROOT / "tests").rglob("*") if path.is_dir()):
        inside = folder.relative_to(ROOT / "tests")
        if beside.isdisjoint(inside.parts):
            assert (PACKAGE / inside).is_dir(), f"tests/{inside} mirrors no room"


HEAVY = (
    "torch", "deepspeed", "einops", "fsspec", "matplotlib", "megatron", "pyarrow", "safetensors",
    "scipy", "tokenizers", "wandb", "webdataset",
)  # fmt: skip
LIGHTLY = f"""
import sys
sys.modules.update(dict.fromkeys({HEAVY}))  # importing one is an error now
from nlscale.cli import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    "command",
    [
        "--help",
        "config recipes/hope-7b.yaml",
        "config --keys",
        "recipe list",
        "plan recipes/hope-7b.yaml --cluster recipes/clusters/eight-nodes-64-gpus.yaml",
        "launch slurm recipes/hope-7b.yaml --cluster recipes/clusters/eight-nodes-64-gpus.yaml "
        "--dry-run",
        "launch torchrun recipes/quickstart.yaml --cluster recipes/clusters/test.yaml --dry-run "
        "--node-rank 1 model.vocabulary=256",
        "sweep recipes/sweeps/hope-ladder.yaml --dry-run",
        "continual recipes/streams/languages.yaml --dry-run",
        "checkpoint --help",
        "doctor --help",
        "bench --help",
        "eval --help",
        "generate --help",
    ],
    ids=lambda command: " ".join(command.split()[:2]),
)
def test_what_plans_and_lists_imports_little(command: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", LIGHTLY, *command.split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
