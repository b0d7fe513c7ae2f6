"""Dry runs on a machine without the data: the script is printed, and what was not checked is
said."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from cluster.launch.stubs import Stubs
from scaling.sweeps import write_sweep

from nlscale import cli
from nlscale.cluster.launch.script import print_script
from nlscale.cluster.launch.torchrun import node_script
from nlscale.cluster.machines import Cluster, Launch
from nlscale.errors import UserError

SHOWS = {"slurm": "#SBATCH --nodes=2", "torchrun": "export NODES=2"}


def ends(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command."""
    with pytest.raises(SystemExit) as ended:
        cli.main(list(words))
    out, err = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, out, err


def launch(launcher: str, folder: Path, *more: str) -> list[str]:
    return [
        "launch", launcher, "quickstart", "--cluster", "test", "data.dir=nowhere",
        f"run.dir={folder / 'run'}", *more,
    ]  # fmt: skip


@pytest.mark.parametrize("launcher", SHOWS)
@pytest.mark.parametrize("vocabulary", ["null", "256"])
def test_a_dry_run_without_data_prints_the_script_and_warns(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, launcher: str, vocabulary: str
) -> None:
    words = launch(launcher, tmp_path, f"model.vocabulary={vocabulary}")
    code, out, err = ends(capsys, *words, "--dry-run")
    assert code == 0 and SHOWS[launcher] in out
    assert out.startswith("#!/usr/bin/env bash\n"), "the script and nothing else"
    assert "warning: no data at nowhere" in err and "Not checked: the data" in err
    assert ("and the memory and divisibility of the vocabulary" in err) == (vocabulary == "null")
    assert not (tmp_path / "run").exists()
    code, out, err = ends(capsys, *words)
    assert code == 2 and not out and "no data at nowhere; build it with" in err


@pytest.mark.parametrize("index", ["", "{}", "[]", "{"])
def test_damaged_data_are_data_that_are_not_there(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, index: str
) -> None:
    (tmp_path / "index.json").write_text(index)
    words = launch("slurm", tmp_path, f"data.dir={tmp_path}")
    code, out, err = ends(capsys, *words, "--dry-run")
    assert code == 0 and SHOWS["slurm"] in out and "index.json" in err
    assert ends(capsys, *words)[0] == 2


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("parallel.tensor=8", "parallel.tensor"),
        ("train.global_batch=7", "train.global_batch 7 is not divisible"),
        ("model.hidden=4000000", "does not fit test"),
        ("evaluate=[los]", "did you mean"),
        ("train.steps=none", "train.steps"),
    ],
)
def test_a_dry_run_without_data_checks_the_rest(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, override: str, says: str
) -> None:
    for launcher in SHOWS:
        code, out, err = ends(capsys, *launch(launcher, tmp_path, override, "--dry-run"))
        assert code == 2 and not out and says in err


def test_the_folder_of_the_log_is_asked_for(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = launch("slurm", tmp_path / "it's #1", "--dry-run")
    assert f"mkdir -p '{tmp_path}/it'\"'\"'s #1/run' before" in ends(capsys, *words)[2]
    (tmp_path / "it's #1" / "run").mkdir(parents=True)
    assert "mkdir" not in ends(capsys, *words)[2]


def test_a_sweep_without_data_prints_the_script_of_its_array(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = write_sweep(tmp_path, Path("nowhere"), {"run.seed": [1, 2, 3]})
    words = ["sweep", str(path), "--executor", "slurm", "--cluster", "test", "--dry-run"]
    code, out, err = ends(capsys, *words)
    assert code == 0 and out.startswith("#!/usr/bin/env bash\n")
    assert "#SBATCH --array=1-3%8\n" in out
    assert "Not checked: the data; sizes are those of 256 token ids" in err
    assert "seed2" in err, "the list of runs"
    assert not (tmp_path / "runs").exists()
    assert ends(capsys, *words[:-1])[0] == 2


def machines(**launch: object) -> Cluster:
    return Cluster("big", 1, 8, 100.0, 80.0, 989.0, Launch(**launch))  # type: ignore[arg-type]


@pytest.mark.parametrize("setup", ["false", "exit 0", "exit 75", "no-such-command-here"])
def test_a_setup_that_fails_starts_no_ranks(tmp_path: Path, setup: str) -> None:
    stubs = Stubs(tmp_path)
    done = stubs.run(node_script("r.yaml", [], machines(setup=setup), None))
    assert done.returncode == 2 and "launch.setup failed on " in done.stderr


def test_a_node_is_given_what_was_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "it's #1 $(touch X)"
    folder.mkdir()
    monkeypatch.chdir(folder)
    stubs = Stubs(tmp_path / "stubs")
    (stubs.bin / "python").rename(stubs.bin / "torchrun")
    setup = f"{stubs.setup}; x=$undefined; false; pwd > '{stubs.notes}/where'"
    script = node_script(
        "r.yaml", ["run.dir=a\nb 'c'"], machines(setup=setup, environment={"A": "$(x)\n"}), None
    )
    done = stubs.run(script)
    assert done.returncode == 0, done.stderr
    assert stubs.words("arguments")[-2:] == ["r.yaml", "run.dir=a\nb 'c'"]
    assert stubs.environment()["A"] == "$(x)\n"
    assert (stubs.notes / "where").read_text() == f"{folder}\n"


@pytest.mark.parametrize("host", ["", "a b", "-x", "a;b", "a\n", "user@a", "a/b", "$(x)", "a,b"])
def test_a_host_is_a_host(host: str) -> None:
    with pytest.raises(UserError, match=r"launch\.hosts"):
        node_script("r", [], machines(hosts=[host]), None)


@pytest.mark.parametrize("host", ["node-a", "10.0.0.1", "fe80::1", "::1", "a.b_c", "[::1]"])
def test_a_host_may_be_a_name_or_an_address(host: str) -> None:
    node_script("r", [], machines(hosts=[host]), None)


def test_a_script_is_printed_in_utf8_whatever_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="ascii"))
    print_script("# é\n")
    sys.stdout.flush()
    assert printed.getvalue() == "# é\n".encode()
