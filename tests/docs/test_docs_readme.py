"""Every command of the README, run in a fresh clone, in the order in which it stands there."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from argparse import _SubParsersAction
from pathlib import Path

import pytest
import world

ROOT = Path(__file__).parents[2]
# Training commands other than the quickstart run a few steps of what they say.
SHORT = "train.steps=6 train.validation_sequences=4 optimizer.warmup_steps=2"


PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))]


def commands() -> list[str]:
    """The lines of the pages' bash blocks, continuation lines joined, comments dropped."""
    text = "\n".join((ROOT / page).read_text() for page in PAGES)
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [" ".join(shlex.split(line, comments=True)) for line in lines if line.strip()]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working tree as a fresh clone would have it, with the environment already installed."""
    path = tmp_path_factory.mktemp("clone") / "nlscale"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    for name in listed:
        if (ROOT / name).is_file():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes((ROOT / name).read_bytes())
    (path / ".venv").symlink_to(ROOT / ".venv")
    return path


def run(clone: Path, command: str, timeout: float) -> str:
    environment = {**os.environ, "PATH": f"{ROOT}/.venv/bin:{os.environ['PATH']}"}
    environment.pop("PYTHONWARNINGS", None)
    # the editable install points at the repository; the clone's own sources come first
    environment["PYTHONPATH"] = str(clone)
    done = subprocess.run(
        ["bash", "-c", command], cwd=clone, env=environment,
        capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def quickstart(clone: Path) -> tuple[Path, str]:
    """The quickstart, whole: it is what a newcomer sees first."""
    output = run(clone, "bash launch/quickstart.sh", timeout=900)
    return clone / "runs" / "quickstart", output


@pytest.mark.slow
def test_the_quickstart_learns_and_shows_it(quickstart: tuple[Path, str]) -> None:
    run_dir, output = quickstart
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["val_bits_per_byte"] <= summary["unigram_bits_per_byte"] - 1.0
    assert summary["dropped_steps"] == 0
    assert abs(summary["initial_loss"] - 5.545) < 0.2, "ln 256 is 5.545"
    for level in summary["levels"]:
        assert level["updates"] == level["reductions"]
        assert abs(level["updates"] - summary["steps"] / level["period_steps"]) <= 1
    assert (run_dir / "loss.png").stat().st_size > 10_000
    assert "runs/quickstart/loss.png" in output


@pytest.mark.slow
def test_the_clone_leaves_the_environment_as_it_was(quickstart: tuple[Path, str]) -> None:
    """Installed again from the clone it would be gone when the clone is."""
    program = "import nlscale; print(nlscale.__file__)"
    where = subprocess.run(
        [ROOT / ".venv/bin/python", "-c", program],
        cwd="/", capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert Path(where.strip()) == ROOT / "nlscale" / "__init__.py"


@pytest.mark.slow
def test_running_the_quickstart_again_is_quick_and_keeps_the_run(
    clone: Path, quickstart: tuple[Path, str]
) -> None:
    before = (quickstart[0] / "metrics.jsonl").read_bytes()
    output = run(clone, "bash launch/quickstart.sh", timeout=60)
    assert "has finished before" in output
    assert (quickstart[0] / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_every_command_of_the_pages_runs(clone: Path, quickstart: tuple[Path, str]) -> None:
    ran = 0
    for command in commands():
        if command.startswith("git clone") or command.startswith("cd "):
            continue
        if command in ("bash launch/quickstart.sh", "bash tests/run.sh"):
            continue  # the first has run above, the second is running now
        if command.startswith("nlscale bench"):
            continue  # run by tests/cluster and tests/bench, on smaller sizes
        if "recipes/sweeps/quickstart" in command or "runs/sweeps/quickstart" in command:
            continue  # run by tests/scaling, on smaller sizes
        if " train " in command:
            command = f"{command} {SHORT}"
        if " verify-resume " in command:
            command = re.sub(r"--at \d+", "--at 3 --layout ranks=1 levels=[1,2]", command)
        run(clone, command, timeout=600)
        ran += 1
    assert ran >= 6, "the commands were not found"


DOCUMENTS = [*PAGES, "CONTRIBUTING.md", *sorted(
    str(p.relative_to(ROOT)) for p in (ROOT / "launch").rglob("*") if p.suffix in (".sh", ".sbatch")
)]  # fmt: skip


def options_of(words: list[str]) -> set[str]:
    """The options of the command that the first of these words name: `checkpoint list`."""
    from nlscale.cli.command import _parser

    parser, anywhere = _parser(), {"--import"}
    for word in words:
        verbs = next((a for a in parser._actions if isinstance(a, _SubParsersAction)), None)
        if verbs is None:
            break
        assert word in verbs.choices, f"nlscale has no command {' '.join(words[:3])}"
        parser = verbs.choices[word]
    of_verb = {option for action in parser._actions for option in action.option_strings}
    return of_verb | anywhere


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_name_only_commands_and_flags_that_exist(document: str) -> None:
    text = (ROOT / document).read_text().replace("\\\n", " ")
    found = re.findall(r"\bnlscale ((?:[a-z]+(?:-[a-z]+)?)(?:[^`\n#]*))", text)
    checked = 0
    for command in found:
        words = command.replace("|", " ").split()
        flags = [word.rstrip(",.;:)") for word in words if word.startswith("--")]
        if flags:
            known = options_of([word for word in words if re.fullmatch(r"[a-z][a-z-]*", word)])
            assert set(flags) <= known, f"{document}: nlscale {command}"
            checked += 1
    assert document != "README.md" or checked >= 8


def load_all(pages: list[tuple[list[str], list[str]]]) -> None:
    """On a rank, so that what is imported here adds its names there alone."""
    from nlscale.config.extensions import import_all
    from nlscale.config.recipe import load

    for modules, pairs in pages:
        import_all(modules)
        load(ROOT / "recipes" / "quickstart.yaml", pairs, trusted=True)


def test_the_pages_name_only_keys_that_exist() -> None:
    pages = []
    for command in commands():
        pairs = [word for word in command.split() if re.fullmatch(r"[a-z_.0-9]+=\S+", word)]
        if "nlscale" in command and pairs:
            pages.append((re.findall(r"--import (\S+)", command), pairs))
    assert len(pages) > 10
    world.run(1, load_all, pages)
