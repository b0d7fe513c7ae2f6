"""`nlscale generate`: what it prints, keeps and refuses."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from generate.models import VOCABULARY, saved

from nlscale.checkpoint.export.weights import export
from nlscale.checkpoint.store.store import Store
from nlscale.cli import generate_output, main
from nlscale.cli.command import _parser
from nlscale.data.tokenizer import SymbolTokenizer
from nlscale.generate import state_file, text
from nlscale.generate.sampling import Sampling

SYMBOLS = SymbolTokenizer("letters", [f"s{i}" for i in range(VOCABULARY)])
PROMPT = ("--prompt", "s1 s2 s3")
SHORT = (*PROMPT, "--tokens", "6")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, and the data that its configuration names."""
    folder = tmp_path_factory.mktemp("generate")
    (folder / "data").mkdir()
    SYMBOLS.save(folder / "data")
    saved(folder / "run", f"data.dir={folder / 'data'}")
    return folder / "run"


class Shell:
    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.errors = ""

    def __call__(self, *arguments: str | Path, code: int = 0) -> str:
        """Standard output; of a command that is refused its one line."""
        with pytest.raises(SystemExit) as ended:
            main(["generate", *map(str, arguments)])
        output, self.errors = self._capsys.readouterr()
        assert ended.value.code == code, self.errors
        if code == 2:
            assert not output and self.errors.count("\n") == 1
        return self.errors if code == 2 else output

    def json(self, *arguments: str | Path) -> dict[str, Any]:
        output = self(*arguments, "--json")
        assert output.count("\n") == 1 and not self.errors
        return json.loads(output)


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any) -> Shell:
    monkeypatch.chdir(tmp_path)
    return Shell(capsys)


def test_a_prompt_and_what_follows_it(run: Path, shell: Shell) -> None:
    output = shell(run, *SHORT)
    found = shell.json(run, *SHORT)
    (one,) = found.pop("samples")
    assert output == f"s1 s2 s3{one['text']}\n"
    assert one["text"] == "".join(f" s{i}" for i in one["ids"]) and len(one["ids"]) == 6
    assert one["ended"] == "tokens" and len(one["log_probabilities"]) == 6
    assert found.pop("tokens_per_second") == pytest.approx(6 / found.pop("seconds"))
    assert found.pop("reading_seconds") > 0
    assert found.pop("sampling") == vars(Sampling())
    assert found == {
        "model": str(run), "step": 6, "prompt": "s1 s2 s3", "prompt_tokens": 3, "tokens_before": 0,
        "seed": 0, "stop": [], "state": None,
    }  # fmt: skip
    shell(run, *SHORT)
    assert "6 tokens in " in shell.errors and "read 3 tokens in" in shell.errors
    assert "ended: tokens" in shell.errors and shell.errors.count("\n") == 1


def test_samples_and_seeds(run: Path, shell: Shell) -> None:
    many = shell.json(run, *SHORT, "--samples", "3", "--seed", "5")["samples"]
    assert [one["sample"] for one in many] == [0, 1, 2]
    assert shell.json(run, *SHORT, "--seed", "5")["samples"] == [
        {**many[0], "log_probabilities": pytest.approx(many[0]["log_probabilities"], abs=1e-4)}
    ]
    assert len({one["text"] for one in many}) == 3
    assert shell.json(run, *SHORT, "--seed", "6")["samples"][0]["ids"] != many[0]["ids"]
    output = shell(run, *SHORT, "--samples", "3", "--seed", "5")
    assert output == "".join(f"--- sample {one['sample']}\ns1 s2 s3{one['text']}\n" for one in many)
    assert "18 tokens of 3 samples" in shell.errors


def test_a_file_is_read_and_not_repeated(
    run: Path, shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text").write_text("s1 s2 s3")
    typed, of_file = (
        shell.json(run, *prompt, "--tokens", "6") for prompt in (PROMPT, ("--file", "text"))
    )
    assert of_file["samples"][0]["ids"] == typed["samples"][0]["ids"]
    assert of_file["file"] == "text" and "prompt" not in of_file
    assert shell(run, "--file", "text", "--tokens", "6") == f"{typed['samples'][0]['text']}\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"s1 s2 s3")))
    piped = shell.json(run, "--file", "-", "--tokens", "6")
    assert piped["samples"][0]["ids"] == typed["samples"][0]["ids"]
    assert "s" in shell(run, "--tokens", "2"), "without a prompt a document begins"


def test_a_long_text_is_read_with_progress(
    run: Path, shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "PIECE", 4)
    monkeypatch.setattr(generate_output, "_LINE_SECONDS", 0.0)
    monkeypatch.setattr(generate_output, "_LINES_OF_A_TIME", float("inf"))
    (tmp_path / "book").write_text("s1 s2 s3 s4 s5 s6 s7 s8 s9 " * 4)
    shell(run, "--file", "book", "--tokens", "0", "--state", "book.st")
    lines = shell.errors.splitlines()
    assert [line.partition(", ")[0] for line in lines[:-1]] == [
        f"reading: {done} of 35 tokens" for done in [*range(4, 35, 4), 35]
    ]
    assert lines[-1].endswith("book.st holds 36 tokens")


def test_the_options_reach_the_sampling(run: Path, shell: Shell) -> None:
    greedy = shell.json(run, *SHORT, "--temperature", "0")["samples"][0]
    assert shell.json(run, *SHORT, "--top-k", "1")["samples"][0]["ids"] == greedy["ids"]
    assert shell.json(run, *SHORT, "--top-p", "1e-9")["samples"][0]["ids"] == greedy["ids"]
    assert shell.json(run, *SHORT, "--min-p", "1")["samples"][0]["ids"] == greedy["ids"]
    rare = shell.json(run, *SHORT, "--temperature", "0", "--repetition-penalty", "1e9")
    ids = rare["samples"][0]["ids"]
    assert len({1, 2, 3, *ids}) == 3 + len(ids), "no token twice"
    third = f"s{greedy['ids'][2]}"
    stopped = shell.json(run, *SHORT, "--temperature", "0", "--stop", "none", "--stop", third)
    (one,) = stopped["samples"]
    assert one["ended"] == "stop" and greedy["text"].startswith(one["text"])
    assert third not in one["text"] and stopped["stop"] == ["none", third]


def test_defaults_are_those_of_python() -> None:
    args = _parser().parse_args(["generate", "run"])
    assert Sampling() == Sampling(
        args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty
    )
    assert args.tokens == text.TOKENS


def test_in_a_terminal_it_streams_and_controls_nothing(
    run: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = shell.json(run, *SHORT)["samples"][0]["text"]
    monkeypatch.setattr(generate_output, "is_terminal", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    flushed: list[str] = []
    monkeypatch.setattr(sys.stdout, "flush", lambda: flushed.append(""))
    assert shell(run, *SHORT) == f"\x1b[2ms1 s2 s3\x1b[22m{plain}\n"
    assert len(flushed) >= 7, "each token comes when it is there"
    monkeypatch.setenv("NO_COLOR", "1")
    assert shell(run, *SHORT) == f"s1 s2 s3{plain}\n"
    # Symbols that would clear the screen, as a model of bytes may write them.
    monkeypatch.setattr(
        SymbolTokenizer, "decode", lambda self, ids: "\x1b[2J\x9b2J\tx\r\n" * len(ids)
    )
    output = shell(run, *SHORT)
    assert "\x1b" not in output and "\x9b" not in output and "\r" not in output
    assert "␛[2J" in output and "\tx␍\n" in output


def test_a_state_goes_on_and_can_be_left_alone(run: Path, shell: Shell, tmp_path: Path) -> None:
    at_once = shell.json(run, *PROMPT, "--tokens", "9", "--seed", "2")["samples"][0]
    kept = ("--state", "talk.st", "--seed", "2")
    first = shell.json(run, "--prompt", "s1 s2", "--tokens", "0", *kept)
    assert first["state"] == {"file": "talk.st", "tokens": 2} and first["samples"][0]["ids"] == []
    assert first["tokens_per_second"] is None
    before = (tmp_path / "talk.st").read_bytes()
    asked = ("--prompt", "s3", "--tokens", "4", *kept)
    twice = [shell.json(run, *asked, "--state-read-only") for _ in range(2)]
    assert twice[0]["samples"] == twice[1]["samples"] and twice[0]["state"] is None
    several = shell.json(run, *asked, "--state-read-only", "--samples", "2")["samples"]
    assert several[0]["ids"] == twice[0]["samples"][0]["ids"] != several[1]["ids"]
    assert (tmp_path / "talk.st").read_bytes() == before
    second = shell.json(run, *asked)
    assert second["tokens_before"] == 2 and second["state"]["tokens"] == 7
    output = shell(run, "--tokens", "5", *kept)
    assert second["samples"][0]["text"] + output.rstrip("\n") == at_once["text"]
    assert "talk.st holds 12 tokens" in shell.errors
    assert [path.name for path in tmp_path.iterdir()] == ["talk.st"]


def test_ctrl_c_keeps_what_is_there(
    run: Path, shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = shell.json(run, *SHORT)["samples"][0]["text"]
    number, calls = text.number, []

    def interrupted(*key: int) -> float:
        calls.append(key)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return number(*key)

    monkeypatch.setattr(text, "number", interrupted)
    output = shell(run, *SHORT, "--state", "talk.st", code=130)
    assert output.count(" ") == 2 + 3 and f"s1 s2 s3{whole}".startswith(output.rstrip("\n"))
    assert "3 tokens in" in shell.errors and "ended: interrupted" in shell.errors
    assert state_file.facts_of(tmp_path / "talk.st").tokens == 6
    rest = shell(run, "--tokens", "3", "--state", "talk.st")
    assert output.rstrip("\n") + rest == f"s1 s2 s3{whole}\n"


def test_ctrl_c_while_reading_leaves_the_state_as_it_was(
    run: Path, shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell(run, *SHORT, "--state", "talk.st")
    before = (tmp_path / "talk.st").read_bytes()
    reading = text.Generation.reading

    def interrupted(self: text.Generation) -> Any:
        for count in reading(self):
            os.kill(os.getpid(), signal.SIGINT)
            yield count

    monkeypatch.setattr(text.Generation, "reading", interrupted)
    assert shell(run, *SHORT, "--state", "talk.st", code=130) == ""
    assert shell.errors == "nlscale: interrupted\n"
    assert (tmp_path / "talk.st").read_bytes() == before


def test_an_export_answers_as_its_run_and_its_state_is_the_same(
    run: Path, shell: Shell, tmp_path: Path
) -> None:
    export(Store(run / "checkpoints").checkpoints()[-1], tmp_path / "exported")
    SYMBOLS.save(tmp_path)
    of_run = shell.json(run, *SHORT, "--state", "talk.st")
    assert shell.json(tmp_path / "exported", *SHORT)["samples"] == of_run["samples"]
    on = ("--tokens", "3", "--state", "talk.st", "--state-read-only")
    expected = shell.json(run, *on)["samples"]
    for tokenizer in (tmp_path, tmp_path / "tokenizer.json"):
        assert (
            shell.json(tmp_path / "exported", *on, "--tokenizer", tokenizer)["samples"] == expected
        )
    SymbolTokenizer("own", [f"t{i}" for i in range(VOCABULARY)]).save(tmp_path / "exported")
    own = shell.json(tmp_path / "exported", "--prompt", "t1", "--tokens", "3")
    assert own["samples"][0]["text"].startswith(" t")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--temperature=-1", "-1 must be 0 or above"),
        ("--temperature=nan", "temperature"),
        ("--top-k=-1", "-1 must be 0 or above"),
        ("--top-k=2.5", "is not a whole number"),
        ("--top-p=0", "0 must be above 0 and at most 1"),
        ("--min-p=1.1", "1.1 must be from 0 to 1"),
        ("--repetition-penalty=0", "0 must be above 0"),
        ("--tokens=-3", "-3 must be 0 or above"),
        ("--samples=0", "0 must be 1 or above"),
        ("--seed=-1", "-1 must be 0 or above"),
        ("--stop=", "an empty text would end everything"),
        ("--prompt=x --file=y", "not allowed with"),
        ("--prompt=\udcff", "not UTF-8"),
        ("--file=missing", "cannot read missing: No such file or directory; name a text file"),
        ("--file=.", "cannot read .: Is a directory"),
        ("--file=binary", "binary is not UTF-8 (byte 2)"),
        ("--file=empty", "empty is empty; leave out --file"),
        ("--tokens=0", "nothing to read and nothing to generate; give --prompt or --file"),
        ("--stream --json", "--stream prints one text as it comes; leave out it or --json"),
        ("--stream --samples=2", "leave out it or --samples 2"),
        ("--state=new --state-read-only", "no state new to read"),
        ("--state-read-only", "name its file, too"),
        (
            "--state=new --samples=2",
            "--samples 2 would leave as many states; add --state-read-only",
        ),
        ("--state=no/where", "no is not a folder; make it first"),
        ("--state=binary", "binary is no state that --state has saved"),
        ("--state=.", "is not a file"),
        ("--tokenizer=nowhere", "no tokenizer at nowhere"),
    ],
)
def test_what_cannot_be_is_refused_before_the_model_is_loaded(
    arguments: str, says: str, shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "binary").write_bytes(b"ab\xff")
    (tmp_path / "empty").touch()
    (tmp_path / "run").mkdir()
    monkeypatch.setattr("nlscale.load", lambda path: pytest.fail("it is loaded"))
    assert says in shell("run", *arguments.split(), code=2)


def test_without_the_data_another_tokenizer_is_asked_for(shell: Shell, tmp_path: Path) -> None:
    saved(tmp_path / "run", "data.dir=gone")
    line = shell("run", *SHORT, code=2)
    assert "no tokenizer at gone" in line and line.endswith(
        "; name the folder of one with --tokenizer\n"
    )
    SYMBOLS.save(tmp_path)
    assert shell("run", *SHORT, "--tokenizer", ".").startswith("s1 s2 s3 s")
    assert "nowhere is no folder; give that of a run" in shell("nowhere", *SHORT, code=2)
    assert "'x' is no symbol of letters" in shell(
        "run", "--prompt", "x", "--tokenizer", ".", code=2
    )
