"""What the pages say can be typed: every command runs in a fresh clone, every flag and key exists.

A page's commands are one test, in their order; pages need nothing but the quickstart from each
other. What stands on two pages is run once. The quickstart and the README's torchrun start their
processes, as a reader does; all else is forked from one process (`docs.preloaded`). A command that
takes too long for a test says so in its comment, `# takes ten minutes`: it is then run with
--dry-run where it knows that, and else only its flags and keys are looked at.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from argparse import _SubParsersAction
from collections.abc import Iterator
from pathlib import Path

import pytest
import world
from docs.pages import PAGES, ROOT, Command, commands, shown, text_of
from docs.preloaded import client

pytestmark = pytest.mark.xdist_group("quickstart")  # of which one worker trains one

# The quickstart learns what is asked of it here in four windows of its slowest level, not in 25.
QUICKSTART = "bash launch/quickstart.sh train.steps=64"
SAVED = 50  # a step of it with a checkpoint, beside the last
# Other training commands run a few steps of what they say, of fewer sequences.
SHORT = "train.steps=4 train.global_batch=4 train.validation_sequences=4 optimizer.warmup_steps=2"
HERE = ("bash launch/quickstart.sh", "bash tests/run.sh")  # run by a fixture; running now
PATIENCE = 600.0  # seconds
WITH_COMMANDS = [page for page in PAGES if commands(page)]


class Clone:
    """The working tree as a fresh clone would have it, with the environment already installed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ran: set[str] = set()
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        ).stdout.splitlines()  # fmt: skip
        for name in listed:
            if (ROOT / name).is_file():
                (path / name).parent.mkdir(parents=True, exist_ok=True)
                (path / name).write_bytes((ROOT / name).read_bytes())
        (path / ".venv").symlink_to(ROOT / ".venv")

    def environment(self, *programs: Path) -> dict[str, str]:
        """Of its commands; with folders of programs that come first."""
        path = ":".join(map(str, [*programs, ROOT / ".venv/bin", os.environ["PATH"]]))
        # the editable install points at the repository; the clone's own sources come first
        environment = {**os.environ, "PATH": path, "PYTHONPATH": str(self.path)}
        environment.pop("PYTHONWARNINGS", None)
        return environment

    def run(self, text: str, *programs: Path, patience: float = PATIENCE) -> str:
        """Its output."""
        environment = self.environment(*programs)
        running = subprocess.Popen(
            ["bash", "-c", text], cwd=self.path, env=environment, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            output, errors = running.communicate(timeout=patience)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)  # the ranks that it has started, too
            running.communicate()
            pytest.fail(f"more than {patience:g} s; say '# takes N minutes' after it: {text}")
        assert running.returncode == 0, f"{text}\n{output[-3000:]}\n{errors[-3000:]}"
        return output

    def run_once(self, command: Command, *programs: Path) -> None:
        """As far as a test can wait for it, and not again where another page has it too."""
        todo = as_tested(command)
        if todo is not None and todo.same not in self._ran:
            self._ran.add(todo.same)
            self.run(todo.text, *programs)


def as_tested(command: Command) -> Command | None:
    """What is run of a command; None: nothing."""
    text = command.text
    if text in HERE or text.startswith(("git clone", "cd ")):
        return None
    if command.long:
        return Command(f"{text} --dry-run") if "--dry-run" in options_of(command.words) else None
    if re.search(r"\bnlscale train ", text):
        return Command(f"{text} {SHORT}")
    if " verify-resume " in text:
        small = "--at 3 --layout ranks=1 levels=[1,2] train.global_batch=4 data.sequence_length=64"
        return Command(re.sub(r"--at \d+", small, text))
    return Command(re.sub(r"/step-\d{8}\b", f"/step-{SAVED:08}", text))


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    path = tmp_path_factory.mktemp("clone") / "nlscale"
    return Clone(path)


@pytest.fixture(scope="module")
def forked(clone: Clone) -> Iterator[Path]:
    """A folder with an `nlscale` and a `torchrun` that are forked."""
    with client(clone.path.parent / "forked", clone.path, clone.environment()) as folder:
        yield folder


@pytest.fixture(scope="module")
def quickstart(clone: Clone) -> tuple[Path, str]:
    """The quickstart, all of it but for the number of steps: it is what a newcomer sees first."""
    output = clone.run(f"{QUICKSTART} 2>&1", patience=900)
    return clone.path / "runs" / "quickstart", output


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
    assert "Warning" not in output and "Traceback" not in output


def test_the_clone_leaves_the_environment_as_it_was(quickstart: tuple[Path, str]) -> None:
    """Installed again from the clone it would be gone when the clone is."""
    program = "import nlscale; print(nlscale.__file__)"
    where = subprocess.run(
        [ROOT / ".venv/bin/python", "-c", program],
        cwd="/", capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert Path(where.strip()) == ROOT / "nlscale" / "__init__.py"


def test_running_the_quickstart_again_is_quick_and_keeps_the_run(
    clone: Clone, quickstart: tuple[Path, str]
) -> None:
    before = (quickstart[0] / "metrics.jsonl").read_bytes()
    output = clone.run(QUICKSTART, patience=60)
    assert "has finished before" in output
    assert (quickstart[0] / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("page", WITH_COMMANDS)
def test_every_command_of_a_page_runs(
    page: str, clone: Clone, quickstart: tuple[Path, str], forked: Path
) -> None:
    for command in commands(page):
        started = page == "README.md" and "torchrun" in command.words
        clone.run_once(command, *([] if started else [forked]))


def test_a_forked_command_is_the_command(clone: Clone, forked: Path) -> None:
    for text in (
        "nlscale config quickstart; echo $?",
        "nlscale config nothing 2>&1; echo $?",
        "cd docs && printf 'N,D\\n1,2' | nlscale fit /dev/stdin 2>&1; echo $?",
    ):
        assert clone.run(text, forked) == clone.run(text), text


def test_commands_are_found_and_few_are_too_long_to_run() -> None:
    found = {command.same: command for page in PAGES for command in commands(page)}
    run = [command for command in found.values() if as_tested(command) is not None]
    assert len(run) > 40
    assert len(run) > 0.75 * len(found)


DOCUMENTS = [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md", *sorted(
    str(p.relative_to(ROOT)) for p in (ROOT / "launch").rglob("*") if p.suffix in (".sh", ".sbatch")
)]  # fmt: skip


def options_of(words: list[str]) -> set[str]:
    """The options of the command that these words name: `nlscale checkpoint list`."""
    from nlscale.cli.command import _parser

    parser, anywhere = _parser(), {"--import"}
    words = words[words.index("nlscale") + 1 :] if "nlscale" in words else []
    for word in [word for word in words if re.fullmatch(r"[a-z][a-z-]*", word)]:
        verbs = next((a for a in parser._actions if isinstance(a, _SubParsersAction)), None)
        if verbs is None:
            break
        if "--import" in words and verbs.choices.get(word) is None:  # what the module adds
            break
        assert word in verbs.choices, f"nlscale has no command {' '.join(words[:3])}"
        parser = verbs.choices[word]
    of_verb = {option for action in parser._actions for option in action.option_strings}
    return of_verb | anywhere


def with_flags(document: str) -> list[tuple[str, set[str]]]:
    """Commands of nlscale that a document names anywhere, in a sentence too, and their flags."""
    text = text_of(document).replace("\\\n", " ")
    found = re.findall(r"\bnlscale [a-z]+(?:-[a-z]+)?[^`\n#]*", text)
    flags = [
        {word.rstrip(",.;:)") for word in command.split() if word.startswith("--")}
        for command in found
    ]
    return [(command, given) for command, given in zip(found, flags, strict=True) if given]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_name_only_commands_and_flags_that_exist(document: str) -> None:
    for command, flags in with_flags(document):
        assert flags <= options_of(command.replace("|", " ").split()), f"{document}: {command}"


def test_flags_are_found() -> None:
    assert sum(len(with_flags(document)) for document in DOCUMENTS) > 40


def load_all(pages: list[tuple[list[str], str, list[str]]]) -> None:
    """On a rank, so that what is imported here adds its names there alone."""
    from nlscale.config.extensions import import_all
    from nlscale.config.recipe import load

    for modules, recipe, pairs in pages:
        import_all(modules)
        load(ROOT / "recipes" / recipe, pairs, trusted=True)


def test_the_pages_override_only_keys_that_exist() -> None:
    overrides = []
    for command in (c for page in PAGES for c in [*commands(page), *shown(page)]):
        typed = command.words
        after = zip(["", *typed], typed, strict=False)
        words = [word for before, word in after if before not in ("--layout", "--where")]
        if "--context" in words:  # takes keys of a level, any number of them
            words = words[: words.index("--context")]
        pairs = [word for word in words if re.fullmatch(r"[a-z_.0-9]+=.+", word)]
        if "nlscale" in words and pairs:
            named = [word for word in words if (ROOT / "recipes" / f"{word}.yaml").is_file()]
            recipe = f"{named[0] if named else 'quickstart'}.yaml"
            recipe = "bench-sync.yaml" if "bench sync" in command.text else recipe
            overrides.append((re.findall(r"--import (\S+)", command.text), recipe, pairs))
    assert len(overrides) > 10
    world.run(1, load_all, overrides)


@pytest.mark.parametrize("page", [page for page in PAGES if "```python" not in text_of(page)])
def test_keys_in_sentences_exist(page: str) -> None:
    """`data.document_mask=true` or `train.steps`; names of files are none."""
    from nlscale.config.recipe import all_keys, has_key, unknown_key

    sections = {key.partition(".")[0] for key in all_keys() if "." in key}
    for key, value in re.findall(r"`([a-z]+\.[a-z_0-9.]+)(=[^`]*)?`", text_of(page)):
        is_file = re.search(r"\.(?:py|yaml|md|sh|sbatch|jsonl?|log|png|txt)$", key) and not value
        if key.partition(".")[0] in sections and not is_file:
            assert has_key(key), f"{page}: {unknown_key(key)}"


def test_every_check_of_the_doctor_is_on_the_page_that_mends_it() -> None:
    sources = (ROOT / "nlscale" / "cluster" / "doctor").glob("*.py")
    named = re.compile(r"(?:Finding\(\s*|_CHECK = |_GLOO = |\bcheck\b[^=\n]*= )\"([A-Za-z ]+)\"")
    checks = {name for path in sources for name in named.findall(path.read_text())}
    page = text_of("docs/how-to/mend-doctor-findings.md")
    assert len(checks) > 20
    assert not [name for name in checks if f"`{name}" not in page]
