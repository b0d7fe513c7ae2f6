"""Asking models: what is kept, what goes on, several models, several ranks, wandb, and mistakes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import world
from asked import described, nlscale
from described import differences
from generate.models import saved

from nlscale.checkpoint.export.weights import export
from nlscale.checkpoint.store.store import Checkpoint
from nlscale.config import recipe
from nlscale.data.build import build
from nlscale.errors import UserError
from nlscale.evaluate.asking import ranks
from nlscale.evaluate.asking.kept import Kept, home_of, named
from nlscale.evaluate.fields import FAILED
from nlscale.evaluate.position import measure
from nlscale.generate import load as loading

ASK = ["--lengths", "8,32", "--contexts", "4"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for number in range(8):
        words = np.random.default_rng(number).choice(["some", "words", "of", "text\n"], 60)
        (folder / f"{number}.txt").write_text(" ".join(words))
    build([str(folder)], "bytes", folder / "data", held_out=0.5)
    return folder / "data"


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Checkpoint]:
    run = tmp_path_factory.mktemp("run")
    keys = [f"data.dir={data}", "model.mixer=gated-delta", "model.vocabulary=256"]
    checkpoint = saved(run, *keys)
    config = recipe.load(None, [*keys, f"run.dir={run}", "wandb.enabled=true"]).config
    recipe.write(config, run / "config.yaml")
    return run, checkpoint


@pytest.fixture
def run(trained: tuple[Path, Checkpoint], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was asked nothing yet."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    shutil.rmtree(trained[0] / "evals", ignore_errors=True)
    return trained[0]


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """Contexts are parts by themselves; tells those that were read, until it is interrupted."""
    read, most = list[int](), [10**9]
    monkeypatch.setattr(measure, "_ROWS", 1)
    reads = measure._read

    def counting(model: Any, text: Any, starts: Any, *rest: Any) -> Any:
        if len(read) >= most[0]:
            raise KeyboardInterrupt
        read.extend(starts)
        return reads(model, text, starts, *rest)

    monkeypatch.setattr(measure, "_read", counting)

    def until(count: int) -> list[int]:
        read.clear()
        most[0] = count
        return read

    return until


def test_what_was_cut_off_goes_on_and_is_what_it_would_have_been(
    run: Path,
    one_by_one: Callable[[int], list[int]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = ["eval", "loss", str(run), *ASK, "--json"]
    read = one_by_one(10**9)
    assert nlscale(*command) == 0
    whole = capsys.readouterr().out
    every = list(read)
    shutil.rmtree(run / "evals")

    one_by_one(2)
    assert nlscale(*command) == 130
    (parts,) = (run / "evals").iterdir()
    with open(parts, "ab") as file:
        file.write(b'{"kind": "part", "part": "torn')  # as a kill leaves it
    read = one_by_one(10**9)
    assert nlscale(*command) == 0
    assert sorted(every) == sorted(every[:2] + read) and len(read) == len(every) - 2
    assert capsys.readouterr().out == whole
    (result,) = (run / "evals").iterdir()
    assert result.name.startswith("loss-step6-") and result.suffix == ".json"

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("it is loaded to be asked again")

    monkeypatch.setattr(loading, "load", refuse)
    assert nlscale(*command) == 0, "asked again"
    assert capsys.readouterr().out == whole


def test_another_question_is_not_answered_by_what_is_kept(
    run: Path, one_by_one: Callable[[int], list[int]], tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    changes = [[], ["--contexts", "3"], ["--text", str(text)], ["--text", str(text)]]
    for number, asked in enumerate(changes):
        text.write_text(f"text {number // 3} " * 30)
        read = one_by_one(10**9)
        assert nlscale("eval", "loss", str(run), *ASK, *asked, "--json") == 0
        assert read, "it was not asked"
        read = one_by_one(10**9)
        assert nlscale("eval", "loss", str(run), *ASK, *asked, "--json") == 0
        assert not read, "it was asked twice"
    assert len(list((run / "evals").iterdir())) == 4


def test_models_stand_beside_each_other(
    run: Path,
    trained: tuple[Path, Checkpoint],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    exported = tmp_path / "exported"
    export(trained[1], exported)
    broken = tmp_path / "broken"
    shutil.copytree(exported, broken)
    (broken / "model.safetensors").write_bytes(b"cut off")
    models = [str(run), str(trained[1].path), str(exported)]
    out = tmp_path / "all.json"
    asked = ["eval", "loss", str(broken), *models, *ASK, "--json", str(out)]
    assert nlscale(*asked) == 1, "one could not be asked"
    printed, errors = capsys.readouterr()
    assert all(model in printed for model in models) and "8 - 32" in printed
    failed, *answers = json.loads(out.read_text())
    assert not differences(failed, FAILED) and failed["run"] == str(broken)
    assert errors.splitlines()[-1] == f"nlscale: {broken}: {failed['error']}"
    for answer in answers:
        described("loss", answer)
    assert [answer["run"] for answer in answers] == models
    assert len({json.dumps(answer["positions"]) for answer in answers}) == 1
    assert home_of(trained[1].path) == home_of(run) == run / "evals"
    assert len(list((run / "evals").iterdir())) == 1, "the run and its checkpoint are one model"
    assert len(list((exported / "evals").iterdir())) == 1
    assert named(exported).step == named(run).step == 6


def test_two_ranks_find_what_one_does(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", "loss", str(run), *ASK, "--json", "--cache"]
    assert nlscale(*command, str(tmp_path / "one")) == 0
    alone = capsys.readouterr().out
    ends = world.command(2, [*command, str(tmp_path / "two")], tmp_path / "out", before=small_parts)
    assert [end.code for end in ends] == [0, 0], [end.output for end in ends]
    printed = "\n".join(
        line for line in ends[0].output.splitlines() if not line.startswith("nlscale eval")
    )
    assert json.loads(printed) == json.loads(alone)
    assert ends[1].output == ""
    assert len(list((tmp_path / "two").iterdir())) == 1


def small_parts() -> None:
    os.environ["WANDB_MODE"] = "disabled"
    measure._ROWS = 1


def test_ranks_that_fail_end_together_and_one_says_why(run: Path, tmp_path: Path) -> None:
    command = ["eval", "loss", str(run), "--lengths", "1M"]
    ends = world.command(2, command, tmp_path)
    assert [end.code for end in ends] == [2, 2]
    said = [line for end in ends for line in end.output.splitlines()]
    assert len(said) == 1 and "a context of 1M needs 1,048,577" in said[0]


def failing_apart() -> list[Any]:
    """What ranks go on with when one of them has failed at something."""
    with ranks.together({}) as all_of_them:
        try:
            with all_of_them.trying("one") as those:
                if those.rank == 1:
                    raise UserError("its part is broken; mend it")
                those.gather("waits for the other")
        except UserError as error:
            said = str(error)
        with all_of_them.trying("two") as those:
            return [said, those.gather(those.rank)]


def test_what_one_rank_cannot_do_all_leave_and_go_on() -> None:
    assert world.run(2, failing_apart) == [["its part is broken; mend it", [0, 1]]] * 2


def soon() -> None:
    small_parts()
    ranks._SILENCE_SECONDS, ranks._MEET_SECONDS = 3.0, 5.0


def impatient() -> None:
    ranks._MEET_SECONDS = 0.5


def killed() -> None:
    """Rank KILLED dies at its first part; until then the other does not do any."""
    soon()
    dying, read = Path(os.environ["DYING"]), measure._read

    def dies(*_: Any) -> Any:
        dying.touch()
        os.kill(os.getpid(), signal.SIGKILL)

    def waits(*given: Any) -> Any:
        until = time.monotonic() + 60
        while not dying.exists() and time.monotonic() < until:
            time.sleep(0.01)
        return read(*given)

    measure._read = dies if os.environ["RANK"] == os.environ["KILLED"] else waits


@pytest.mark.parametrize(("lost", "said"), [
    (1, "nlscale: lost rank 1: nothing heard for 3 s"), (0, "rank 0 on"),
])  # fmt: skip
def test_a_rank_that_is_lost_ends_the_others(
    lost: int, said: str, run: Path, tmp_path: Path
) -> None:
    ends = world.command(
        2, ["eval", "loss", str(run), *ASK], tmp_path, before=killed,
        environment={"KILLED": str(lost), "DYING": str(tmp_path / "dying")},
    )  # fmt: skip
    assert ends[lost].code == -signal.SIGKILL and ends[1 - lost].code == 5
    last = ends[1 - lost].output.splitlines()[-1]
    assert said in last and "lost" in last
    assert last.endswith("the same command goes on with what was found")


def test_a_rank_that_never_comes_is_named(run: Path, tmp_path: Path) -> None:
    command = ["eval", "loss", str(run), *ASK]
    (end,) = world.command(2, command, tmp_path, before=impatient, started=1)
    assert end.code == 5 and "rank 1" in end.output and len(end.output.splitlines()) == 1


class FakeRun:
    """Takes what wandb would."""

    url = "https://example.invalid/run"

    def __init__(self) -> None:
        self.summary: dict[str, Any] = {}
        self.ended = False

    def define_metric(self, *_: Any, **__: Any) -> None: ...

    def finish(self, exit_code: int = 0) -> None:
        self.ended = exit_code == 0


def test_figures_are_in_the_summary_of_the_wandb_run(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    tracked, inits = FakeRun(), list[dict[str, Any]]()

    def init(**arguments: Any) -> FakeRun:
        inits.append(arguments)
        return tracked

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(wandb, "init", init)
    (run / "wandb_id").write_text("theirs\n")
    assert nlscale("eval", "loss", str(run), *ASK) == 0
    (one,) = inits
    assert one["mode"] == "offline" and one["id"] == "theirs" and one["dir"] == str(run)
    (result,) = (json.loads(path.read_text())["result"] for path in (run / "evals").iterdir())
    (key,) = (key for key in tracked.summary if key.endswith("/8-32/loss"))
    assert tracked.ended and tracked.summary[key] == result["figures"]["8-32/loss"]
    assert nlscale("eval", "loss", str(run), *ASK) == 0
    assert len(inits) == 1, "what is kept was tracked before"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["neddle", "RUN"], "no evaluation is called 'neddle'; did you mean 'needle'?"),
        (["loss", "gone"], "gone is no folder; give that of a run"),
        (["loss", "EMPTY"], "holds no finished checkpoint; give the folder of a run"),
        (["loss", "RUN", "--lengths", "1M"], "tokens, and a context of 1M needs 1,048,577"),
        (["loss", "RUN", "--lengths", "4k,1k"], "is not in ascending order"),
        (["loss", "RUN", "--text", "gone.txt"], "no file gone.txt"),
        (["loss", "RUN", "--data", "EMPTY"], "no data at"),
        (["loss", "RUN", "--cache", "FILE"], "where results are kept"),
        (["loss", "RUN", "--json", "FILE"], "file is no folder; name a file in a folder that"),
        (["loss", "RUN", "--json", "EMPTY"], "empty: it is a folder; name a file in it"),
        (["loss", "RUN", "--figure", "FILE.png"], "file is no folder; name a file in a folder"),
        (["recall", "RUN"], "holds text, and no task"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str],
    said: str,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    below = tmp_path / "file" / "below"
    places = {"RUN": run, "EMPTY": tmp_path / "empty", "FILE": below,
              "FILE.png": below.with_suffix(".png")}  # fmt: skip
    assert nlscale("eval", *(str(places.get(a, a)) for a in arguments)) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert said in error
    assert not list((run / "evals").glob("*")), "it was asked all the same"


def test_a_model_whose_tokenizer_is_gone_can_be_given_data(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path / "moved", "data.dir=moved/away", "model.mixer=gated-delta",
          "model.vocabulary=256")  # fmt: skip
    moved = str(tmp_path / "moved")
    assert nlscale("eval", "loss", moved, *ASK) == 2
    assert "or name text with --data or --text" in capsys.readouterr().err
    asked = ["eval", "loss", moved, *ASK, "--text", str(data.parent / "1.txt")]
    assert nlscale(*asked) == 2
    said = "moved/away/tokenizer.json; name the folder of one with --tokenizer"
    assert said in capsys.readouterr().err
    assert nlscale(*asked, "--tokenizer", str(data)) == 0
    assert nlscale(*asked, "--tokenizer", str(tmp_path)) == 2
    assert f"no tokenizer at {tmp_path}" in capsys.readouterr().err
    assert nlscale("eval", "loss", moved, *ASK, "--data", str(data)) == 0
    needle = ["eval", "needle", moved, "--kinds", "s1", "--lengths", "200", "--samples", "1"]
    assert nlscale(*needle) == 2
    assert said in capsys.readouterr().err
    assert nlscale(*needle, "--tokenizer", str(data / "tokenizer.json")) == 0


def test_a_result_that_is_kept_is_whole_or_not_there(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "evals", "loss-1")
    assert kept.result() is None and kept.parts() == {}
    kept.add("a", [1.0])
    kept.add("b", None)
    assert Kept(tmp_path / "evals", "loss-1").parts() == {"a": [1.0], "b": None}
    kept.finish({"step": 1})
    assert Kept(tmp_path / "evals", "loss-1").result() == {"step": 1}
    assert [path.name for path in (tmp_path / "evals").iterdir()] == ["loss-1.json"]
