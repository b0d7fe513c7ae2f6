"""The command line: help, and how a mistake ends."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from places import stand_at

from nlscale import cli
from nlscale.cli.command import _parser
from nlscale.data.build import build

Ended = tuple[int, str, str]
Nlscale = Callable[..., Ended]


@pytest.fixture
def nlscale(capsys: pytest.CaptureFixture[str]) -> Nlscale:
    """Run a command in this process; its exit code, stdout and stderr."""

    def run(*arguments: str) -> Ended:
        with pytest.raises(SystemExit) as ended:
            cli.main(list(arguments))
        assert isinstance(ended.value.code, int)
        return ended.value.code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = tmp_path_factory.mktemp("texts")
    for i in range(20):
        (texts / f"{i}.txt").write_text(f"text number {i}, " * 20)
    out = tmp_path_factory.mktemp("built") / "shards"
    build([str(texts)], "bytes", out, held_out=0.2)
    return out


@pytest.fixture
def recipe_file(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny recipe over a copy of the data, in an empty folder that is the current one."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(built, tmp_path / "shards")
    path = tmp_path / "some.yaml"
    path.write_text(
        "data: {dir: shards, sequence_length: 16}\n"
        "model: {layers: 1, d_model: 32, heads: 2}\n"
        "train: {steps: 2, global_batch: 8, micro_batch: 4, dtype: fp32}\n"
    )
    return path


def commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from commands(command)


@pytest.mark.parametrize("command", list(commands(_parser())), ids=lambda c: c.prog)
def test_help_explains_every_argument(command: argparse.ArgumentParser) -> None:
    text = command.format_help()
    assert command.description and command.description in " ".join(text.split())
    for action in command._actions:
        if isinstance(action, argparse._SubParsersAction):
            helped = {choice.dest: choice.help for choice in action._choices_actions}
            assert set(helped) == set(action.choices) and all(helped.values())
            continue
        assert action.help and len(action.help) > 8, action.dest
        for name in action.option_strings or [str(action.metavar)]:
            assert name in text


def test_help_of_the_module_itself() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "nlscale", "--help"], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 0 and ended.stderr == ""
    for command in ("train", "config", "data", "figure"):
        assert f"    {command} " in ended.stdout


def refused(ended: Ended) -> str:
    """The one line with which a command ended that was wrongly asked."""
    code, out, err = ended
    assert code == 2 and out == ""
    assert err.startswith("nlscale: ") and err.endswith("\n") and err.count("\n") == 1
    assert "Traceback" not in err
    return err


def test_train_refuses_a_wrong_key(nlscale: Nlscale, recipe_file: Path) -> None:
    line = refused(nlscale("train", str(recipe_file), "train.stepz=3"))
    assert "train.stepz" in line and "train.steps" in line


def test_the_table_of_rules_refuses_what_training_would(
    nlscale: Nlscale, recipe_file: Path
) -> None:
    asked = ["config", str(recipe_file), "--optimizer"]
    assert "model.d_model 32" in refused(nlscale(*asked, "model.heads=3"))
    assert "model.vocabulary=N" in refused(nlscale(*asked, "data.dir=nowhere"))
    assert "not allowed with" in refused(nlscale(*asked, "--keys"))


def test_train_refuses_a_recipe_that_is_not_there(nlscale: Nlscale, recipe_file: Path) -> None:
    assert "nope.yaml" in refused(nlscale("train", "nope.yaml"))


def test_train_refuses_a_batch_that_does_not_divide(nlscale: Nlscale, recipe_file: Path) -> None:
    line = refused(nlscale("train", str(recipe_file), "train.global_batch=10"))
    assert "train.global_batch 10" in line and "train.micro_batch 4" in line
    assert "use 8 or 12" in line
    line = refused(nlscale("train", str(recipe_file), "train.global_batch=3"))
    assert line.endswith("use 4\n")


def test_train_counts_the_ranks_of_the_run(
    nlscale: Nlscale, recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_at(monkeypatch, 0, 5)
    line = refused(nlscale("train", str(recipe_file), "train.global_batch=8"))
    assert "5 data-parallel ranks" in line and "use 20" in line
    line = refused(nlscale("train", str(recipe_file), "parallel.tensor=2"))
    assert "5 ranks" in line and "multiple of 2" in line


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ("parallel.tensor=4 model.heads=2", "model.heads 2 is not divisible by"),
        ("parallel.tensor=2 model.heads=2 model.vocabulary=257", "use 256 or 258"),
        (
            "parallel.tensor=4 parallel.sequence=true model.heads=4 model.d_model=32 "
            "data.sequence_length=30",
            "28 or 32",
        ),
        ("parallel.pipeline=4 model.layers=2", "use at least 4 layers or fewer stages"),
        (
            "parallel.pipeline=2 parallel.virtual_stages=2 model.layers=4 "
            "train.global_batch=12 train.micro_batch=2",
            "makes 3 micro batches a rank.*multiple of parallel.pipeline 2; "
            "use train.global_batch=8 or 16",
        ),
    ],
)
def test_train_refuses_what_does_not_fit_four_ranks(
    nlscale: Nlscale,
    recipe_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    overrides: str,
    says: str,
) -> None:
    stand_at(monkeypatch, 0, 4)
    line = refused(nlscale("train", str(recipe_file), "train.global_batch=8", *overrides.split()))
    assert re.search(says, line), line


def test_train_refuses_missing_data(nlscale: Nlscale, recipe_file: Path) -> None:
    line = refused(nlscale("train", str(recipe_file), "data.dir=elsewhere"))
    assert "elsewhere" in line and "nlscale data build" in line


@pytest.mark.parametrize("split", ["train", "validation"])
def test_train_refuses_a_missing_shard(nlscale: Nlscale, recipe_file: Path, split: str) -> None:
    (recipe_file.parent / "shards" / f"{split}-000000.tar").unlink()
    line = refused(nlscale("train", str(recipe_file)))
    assert f"{split}-000000.tar is missing" in line


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.steps=0", "train.steps is 0; it must be above 0"),
        ("train.micro_batch=-4", "train.micro_batch"),
        ("optimizer.learning_rate=.nan", "optimizer.learning_rate is nan"),
        ("optimizer.learning_rate=.inf", "optimizer.learning_rate is inf"),
        ("optimizer.beta2=1.0", "optimizer.beta2"),
        ("optimizer.min_learning_rate=2", "optimizer.min_learning_rate is 2.0"),
        ("optimizer.warmup_steps=-1", "optimizer.warmup_steps"),
        ("model.memory.chunk=0", "model.memory.chunk is 0"),
        ("model.vocabulary=0", "model.vocabulary is 0"),
        ("model.vocabulary=9", "leave it null"),
        ("model.d_model=33", "use 32 or 34"),
        ("model.hidden=4", "model.hidden"),
        ("levels=[{hidden: -8}]", "levels.spectrum.0.hidden is -8"),
        ("levels=[]", "levels=[1]"),
        ("levels=[4,1]", "list the fastest level first"),
        ("levels=[{name: a}, {name: a}]", "levels.spectrum.1.name"),
        ("parallel.pipeline=2", "model.layers 1 are fewer than the 2 stages"),
        ("parallel.sequence=true", "use parallel.tensor=2 or more"),
        ("parallel.virtual_stages=2", "use parallel.pipeline=2 or more"),
        ("train.recompute=mixer", "a list such as [mixer]"),
        ("train.recompute=[mixr]", "'mixr' is not one of mixer, cms"),
        ("parallel.stages=[1,9]", "must be 1 numbers"),
    ],
)
def test_train_refuses_impossible_sizes(
    nlscale: Nlscale,
    recipe_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    override: str,
    says: str,
) -> None:
    stand_at(monkeypatch, 0, 2 if "pipeline" in override else 1)
    assert says in refused(nlscale("train", str(recipe_file), override))
    assert not (recipe_file.parent / "runs").exists()


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["model.heads=1"], "model.heads 1"),
        (["levels=[{hidden: 9}]"], "levels.spectrum.0.hidden 9"),
        (["model.vocabulary=259"], "model.vocabulary 259"),
    ],
)
def test_train_refuses_what_tensor_parallel_cannot_split(
    nlscale: Nlscale,
    recipe_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    overrides: list[str],
    says: str,
) -> None:
    stand_at(monkeypatch, 0, 2)
    line = refused(nlscale("train", str(recipe_file), "parallel.tensor=2", *overrides))
    assert says in line and "parallel.tensor 2" in line


def test_the_first_rank_of_a_node_complains_first(
    nlscale: Nlscale, recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    refused(nlscale("train", str(recipe_file), "train.stepz=3"))
    assert not waited
    stand_at(monkeypatch, 1, 2)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "some")
    refused(nlscale("train", str(recipe_file), "train.stepz=3"))
    # torchrun ends the others when the first has failed: they speak only if it has nothing to say
    assert waited and waited[0] > 1
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    # nobody ends them under srun
    assert nlscale("train", str(recipe_file), "train.stepz=3") == (2, "", "")


def test_config_prints_a_recipe_that_gives_the_same(nlscale: Nlscale, recipe_file: Path) -> None:
    code, printed, _ = nlscale("config", str(recipe_file), "train.steps=7", "levels=[1,4]")
    assert code == 0 and "steps: 7" in printed
    recipe_file.write_text(printed)
    assert nlscale("config", str(recipe_file)) == (0, printed, "")


def test_config_explains_a_key_wherever_the_overrides_stand(
    nlscale: Nlscale, recipe_file: Path
) -> None:
    explain, override = ["--explain", "train.steps"], "train.steps=7"
    for arguments in (
        [*explain, str(recipe_file), override],
        [str(recipe_file), *explain, override],
    ):
        code, printed, _ = nlscale("config", *arguments)
        assert code == 0 and printed.startswith("train.steps = 7\n  from: the command line\n")
    assert "train.steps" in refused(nlscale("config", str(recipe_file), "--explain", "train.stes"))


def test_config_lists_keys_and_asks_for_a_recipe(nlscale: Nlscale) -> None:
    code, printed, _ = nlscale("config", "--keys")
    assert code == 0 and "\ntrain.steps (1000; above 0): " in printed
    assert "recipe" in refused(nlscale("config"))


INTERRUPTED = """
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "nlscale.cli":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Finder())
from nlscale.__main__ import program
program()
"""


def test_ctrl_c_while_a_command_starts_is_one_line() -> None:
    ended = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (130, "nlscale: interrupted\n")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("generate run --temprature 0.5", "there is no --temprature; the nearest is --temperature"),
        ("checkpoint export run --too=safetensors", "the nearest is --to; `nlscale checkpoint ex"),
        ("eval loss run --figrue a.png", "there is no --figrue; the nearest is --figure; `nlscale"),
        ("train --imprt x some.yaml", "there is no --imprt; the nearest is --import"),
        ("train some.yaml --xyzzy", "there is no --xyzzy; `nlscale train --help` says more"),
    ],
)
def test_a_misspelt_option_is_told_the_nearest(nlscale: Nlscale, arguments: str, says: str) -> None:
    assert says in refused(nlscale(*arguments.split()))


@pytest.mark.parametrize(
    "arguments", [["config", "some.yaml", "--foo"], ["figure", "a", "--foo"], []]
)
def test_an_unknown_option_or_no_command_is_refused(nlscale: Nlscale, arguments: list[str]) -> None:
    code, _, err = nlscale(*arguments)
    assert code == 2 and ("--foo" if arguments else "COMMAND") in err
