"""What a launcher says to a rank is believed whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
from places import stand, variables

from nlscale import cli
from nlscale.cluster.life.place import Place, alone, place
from nlscale.errors import UserError

WHOLE = variables(rank=5, ranks=8, per_node=4)


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_without_a_launcher_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    stand(monkeypatch)
    monkeypatch.setenv("SLURM_NTASKS", "8")  # which the script of a job has too
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("MASTER_PORT", "nonsense")  # nobody is to be met there
    assert place() == Place() and not place().meets
    alone("nlscale sweep")


def test_a_whole_place(monkeypatch: pytest.MonkeyPatch) -> None:
    stand(monkeypatch, **WHOLE)
    here = place()
    assert (here.rank, here.world, here.local_rank, here.local_world) == (5, 8, 1, 4)
    assert here.meeting_point == "127.0.0.1:29500" and here.meets and not here.opens_store
    stand(monkeypatch, **WHOLE | {"RANK": 0, "LOCAL_RANK": 0})
    assert place().opens_store
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert not place().opens_store
    with pytest.raises(UserError, match=r"nlscale sweep is for one process.*rank 0 of 8"):
        alone("nlscale sweep")


def test_the_place_that_deepspeed_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {name: value for name, value in WHOLE.items() if name != "LOCAL_WORLD_SIZE"}
    stand(monkeypatch, **given | {"CROSS_RANK": 1, "CROSS_SIZE": 2})
    monkeypatch.setenv("LOCAL_SIZE", "4")
    assert place().local_world == 4


def test_a_single_rank_needs_no_meeting_point(monkeypatch: pytest.MonkeyPatch) -> None:
    stand(monkeypatch, RANK=0, WORLD_SIZE=1)
    assert place() == Place()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"RANK": None}, "RANK is not: which rank is this"),
        ({"RANK": None, "LOCAL_RANK": None}, "header of an sbatch script"),
        ({"WORLD_SIZE": None}, "WORLD_SIZE is not"),
        ({"LOCAL_RANK": None}, "LOCAL_RANK is not"),
        ({"LOCAL_WORLD_SIZE": None}, "LOCAL_WORLD_SIZE is not"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not"),
        ({"MASTER_PORT": None}, "MASTER_PORT is not"),
        ({"RANK": "", "WORLD_SIZE": ""}, "RANK='' is not a whole number"),
        ({"RANK": "x"}, "RANK='x' is not a whole number"),
        ({"RANK": "-1"}, "RANK='-1' is not"),
        ({"RANK": "1.0"}, "RANK='1.0' is not"),
        ({"RANK": " 1"}, "RANK=' 1' is not"),
        ({"RANK": "\u0661"}, "is not a whole number"),
        ({"WORLD_SIZE": "9" * 5000}, "is not a whole number"),
        ({"WORLD_SIZE": "0"}, "RANK=5 is not one of WORLD_SIZE=0"),
        ({"RANK": "8"}, "RANK=8 is not one of WORLD_SIZE=8"),
        ({"LOCAL_RANK": "4"}, "LOCAL_RANK=4 is not one of LOCAL_WORLD_SIZE=4"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_RANK=1 is not one of LOCAL_WORLD_SIZE=0"),
        ({"LOCAL_WORLD_SIZE": "16"}, "LOCAL_WORLD_SIZE=16 ranks of one node are more than"),
        ({"LOCAL_SIZE": "8"}, "LOCAL_WORLD_SIZE=4 and LOCAL_SIZE=8 disagree"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT='99999' is not a port, 1 to 65535"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT='0' is not a port"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT='http' is not a port"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR='' is not the name"),
        ({"MASTER_ADDR": "node a"}, "MASTER_ADDR='node a' is not the name"),
    ],
)
def test_what_is_half_said_or_cannot_be_is_refused_before_anything_is_written(
    changes: dict[str, str | None],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = {name: value for name, value in (WHOLE | changes).items() if value is not None}
    stand(monkeypatch, **said)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(UserError) as refused:
        place()
    assert says in str(refused.value) and "\n" not in str(refused.value)
    monkeypatch.setenv("LOCAL_RANK", said.get("LOCAL_RANK", "0").replace("1", "0"))
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "quickstart"])
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("nlscale: ") and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_world_size_of_an_sbatch_header_is_no_run_of_one_rank(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stand(monkeypatch, WORLD_SIZE=2)
    with pytest.raises(UserError, match=r"WORLD_SIZE=2 is set \(often exported in the header"):
        place()


def test_a_rank_that_lacks_the_rest_says_so_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand(monkeypatch, LOCAL_RANK=3)
    with pytest.raises(SystemExit):
        cli.main(["train", "quickstart"])
    assert "LOCAL_RANK=3 is set and RANK is not" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("launcher", "said"),
    [
        ("srun", {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"}),
        ("mpirun", {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2"}),
        ("mpirun", {"PMI_SIZE": "4", "PMI_RANK": "2"}),
    ],
)
def test_one_of_several_processes_that_are_told_nothing_is_refused(
    launcher: str, said: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stand(monkeypatch)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"process 2 of 4 that {launcher} started"):
        place()
    monkeypatch.setenv(next(iter(said)), "1")  # an interactive step
    assert place() == Place()
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    for name, value in WHOLE.items():
        monkeypatch.setenv(name, value)
    assert place().world == 8


@pytest.mark.parametrize(
    "verb", [["sweep", "quickstart"], ["verify-resume", "quickstart", "--at=2"]]
)
def test_verbs_that_start_ranks_of_their_own_are_not_started_as_one(
    verb: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand(monkeypatch, **variables(0, 2))
    with pytest.raises(SystemExit) as ended:
        cli.main(verb)
    assert ended.value.code == 2
    assert f"nlscale {verb[0]} is for one process" in capsys.readouterr().err
