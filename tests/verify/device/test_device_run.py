"""`nlscale bench device` goes from part to part, whatever a part does."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import world
from verify.device.device_parts import is_named, part

from nlscale import cli
from nlscale.errors import Stopped, UserError
from nlscale.verify.device import run
from nlscale.verify.device.goals import verdicts
from nlscale.verify.device.page import write_page
from nlscale.verify.device.parts import PARTS, Part, named
from nlscale.verify.device.records import Record, State

NAMED = part("device", "is_named")


def accept(
    patch: pytest.MonkeyPatch, out: Path, *parts: Part, minutes: float = 1.0
) -> tuple[run.Report, list[str]]:
    """What is found, and the lines of progress."""
    known = {one.name: one for one in (NAMED, *parts)}
    patch.setattr(run, "named", lambda only, ranks: [known[name] for name in only or list(known)])
    said: list[str] = []
    report = run.accept(out, minutes, None, False, said.append)
    assert report is not None
    return report, said


def goes_on(pid: str) -> bool:
    """Whether the process is still there soon, and not only waiting for someone to hear of it."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return False
        except OSError:
            return False
        time.sleep(0.02)
    return True


def states(report: run.Report) -> dict[str, State]:
    return {name: record.state for name, record in report.records.items() if name != "device"}


def test_a_part_that_fails_does_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [part(name, name) for name in ("fails", "crashes", "fails_until_told", "works")]
    report, said = accept(monkeypatch, tmp_path, *parts)
    assert states(report) == {
        "fails": State.failed,
        "crashes": State.failed,
        "fails_until_told": State.failed,
        "works": State.done,
    }
    errors = {name: record.error for name, record in report.records.items()}
    assert errors["fails"] == "the kernel is wrong"
    assert errors["crashes"] == "killed by SIGABRT"
    assert errors["fails_until_told"] == "RuntimeError: out of memory, say"
    assert "before it failed" in (tmp_path / "parts" / "fails.log").read_text()
    assert any("failed" in line and "the kernel is wrong" in line for line in said)
    with pytest.raises(UserError, match=r"3 of 5 parts failed \(fails, crashes") as caught:
        report.check()
    assert caught.value.exit_code == 2 and not isinstance(caught.value, Stopped)
    page = (tmp_path / "page" / "index.md").read_text()
    assert "the kernel is wrong" in page and "call 1" in page


def test_the_next_call_does_what_is_left_and_then_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [part("fails_until_told", "fails_until_told"), part("works", "works")]
    accept(monkeypatch, tmp_path, *parts)
    (tmp_path / "parts" / "told").touch()
    report, said = accept(monkeypatch, tmp_path, *parts, part("another", "works"))
    assert set(states(report).values()) == {State.done}
    assert report.records["works"].result == {"calls": 1, "says": "call 1"}
    begun = re.findall(r"\d of \d, ([a-z_]+):", "\n".join(said))
    assert begun == ["device", "another", "fails_until_told"]
    assert "1 done before" in said[0]
    report.check()


def test_a_part_that_takes_too_long_is_ended_with_all_that_it_has_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, _ = accept(monkeypatch, tmp_path, part("sleeps", "sleeps", 1.5), part("b", "works"))
    assert states(report) == {"sleeps": State.too_long, "b": State.done}
    pid = (tmp_path / "parts" / "sleeps" / "pid").read_text()
    assert not goes_on(pid)
    with pytest.raises(UserError, match="1 of 3 parts failed"):
        report.check()


def test_when_the_minutes_are_over_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [part("sleeps", "sleeps"), part("works", "works")]
    report, said = accept(monkeypatch, tmp_path, *parts, minutes=3 / 60)
    assert states(report) == {"sleeps": State.cut}
    assert "works: not begun" in said[-1]
    with pytest.raises(Stopped, match=r"2 of 3 .*\(sleeps, works\); the same command goes on"):
        report.check()
    report, _ = accept(monkeypatch, tmp_path, parts[1])
    assert states(report)["works"] == State.done


def test_what_another_device_has_measured_is_not_mixed_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept(monkeypatch, tmp_path, part("works", "works"))
    monkeypatch.setattr(
        f"{__name__}.NAMED",
        part("device", "is_named", device="another GPU"),
    )
    with pytest.raises(UserError, match="holds measurements with device a GPU, and this is anoth"):
        accept(monkeypatch, tmp_path, part("works", "works"))


def test_a_record_that_is_damaged_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accept(monkeypatch, tmp_path)
    (tmp_path / "parts" / "device.json").write_text('{"part": "device"')
    with pytest.raises(UserError, match=r"device\.json is damaged .* remove it"):
        accept(monkeypatch, tmp_path)


def test_a_device_that_cannot_be_asked_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept(monkeypatch, tmp_path, part("works", "works"))
    before = (tmp_path / "parts" / "device.json").read_text()
    monkeypatch.setattr(f"{__name__}.NAMED", part("device", "fails"))
    report, _ = accept(monkeypatch, tmp_path, part("works", "works"), part("more", "works"))
    with pytest.raises(UserError, match=r"1 of 3 parts failed \(device\)") as caught:
        report.check()
    assert not isinstance(caught.value, Stopped)
    assert (tmp_path / "parts" / "device.json").read_text() == before, "what it is stays known"


def test_what_a_crashed_part_has_begun_ends_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept(monkeypatch, tmp_path, part("crashes", "leaves_a_process"))
    pid = (tmp_path / "parts" / "crashes" / "pid").read_text()
    assert not goes_on(pid)


def test_a_part_longer_than_the_call_is_begun_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = Part("long", "it works", "verify.device.device_parts:works", 3600, 3600)
    report, _ = accept(monkeypatch, tmp_path, long, replace(long, name="again"))
    assert states(report) == {"long": State.done}


def on_three_ranks(out: Path) -> dict[str, Any] | None:
    patch = pytest.MonkeyPatch()
    parts = [part("meets", "knows_its_place", by_all=True)]
    parts += [part("lost", "fails_on_the_second", by_all=True), part("first", "works")]
    known = {one.name: one for one in (part("device", "is_named", by_all=True), *parts)}
    patch.setattr(run, "named", lambda only, ranks: [known[name] for name in only or list(known)])
    report = run.accept(out, 1.0, None, False, lambda line: None)
    return None if report is None else report.records


def test_ranks_take_part_together_and_end_together(tmp_path: Path) -> None:
    records, *nothing = world.run(3, on_three_ranks, tmp_path)
    assert nothing == [None, None]
    assert records["meets"].result["ranks"] == [0, 1, 2]
    assert [other["ranks"] for other in records["meets"].others] == [[0, 1, 2]] * 2
    lost = records["lost"]
    assert lost.state == State.failed and lost.seconds < 60
    assert lost.error.startswith("rank 1 on ") and "fallen off the bus" in lost.error
    assert records["first"].state == State.done
    assert "| 1 | host1 | a GPU |" in (tmp_path / "page" / "index.md").read_text()


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[Any, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "device", *map(str, arguments)])
    return ended.value.code, *capsys.readouterr()


def test_the_command_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "device"
    code, printed, said = command(capsys, "--out", out, "--only", "scan.4k")
    assert code == 0 and "at tiny sizes" in said
    assert "no goal here" in printed and str(out / "page" / "index.md") in printed
    code, printed, _ = command(capsys, "--out", out, "--only", "scan", "--json")
    found = json.loads(printed)
    assert code == 0 and found["parts"].keys() == {"device", "scan.4k", "scan.16k", "scan.d128"}
    assert found == json.loads((out / "page" / "device.json").read_text())
    assert (out / "page" / "scans.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "page" / "index.md").read_text()
    assert page.startswith("# CPU\n") and "A rehearsal" in page and "](scans.png)" in page


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (["--only", "kernel"], "there is no such part; choose of device, ceilings, kernels.64.64"),
        (["--only", "links"], "several ranks"),
        (["--minutes", "0"], "--minutes"),
    ],
    ids=lambda given: str(given[-1]),
)
def test_what_is_asked_wrongly_is_said_in_one_line(
    wrong: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, said = command(capsys, "--out", tmp_path / "new", *wrong)
    assert code == 2 and said.count("\n") == 1 and says in said
    assert not (tmp_path / "new").exists()


def test_names_stand_for_all_below_them() -> None:
    names = [part.name for part in named(["step.4k", "costs"], 1)]
    assert names == [
        "step.4k.hope", "step.4k.attention", "step.4k.torch", "step.4k.gated-delta", "costs"
    ]  # fmt: skip
    assert {part.name for part in PARTS} - {part.name for part in named(None, 1)} == {
        "links",
        "overlap",
    }
    assert len(named(None, 2)) == len(PARTS)


def record(name: str, **result: Any) -> Record:
    return Record(name, "something", State.done, 1.0, "2026-01-01", "0.1.0", {"says": "", **result})


def test_verdicts_follow_from_what_was_measured() -> None:
    def on(sizes: str, speeds: dict[str, float]) -> dict[str, tuple[str, float | None]]:
        about = record("device", gpu={}, sizes=sizes)
        records = {"device": about} | {
            name: record(
                name, tokens_per_second=speed, peak_memory_bytes=12, planned_memory_bytes=10
            )
            for name, speed in speeds.items()
        }
        return {v.what: (v.judgement.value, v.value) for v in verdicts(records)}

    speeds = {"step.4k.hope": 110.0, "step.4k.attention": 100.0, "step.4k.torch": 120.0}
    found = on("full", {**speeds, "step.4k.gated-delta": 90.0})
    assert found["speed of Hope over the Transformer's, 340M, 8 x 4096"] == ("met", 1.1)
    what = "speed of the Transformer over plain torch, 340M, 8 x 4096"
    assert found[what] == ("missed", pytest.approx(100 / 120))
    assert found["peak memory over the plan's, 340M, 8 x 4096"] == ("missed", 1.2)
    assert found["speed of Hope over the Transformer's, 340M, 2 x 16384"][0] == "not measured"
    assert on("full", speeds)["peak memory over the plan's, 340M, 8 x 4096"][0] == "not measured"
    assert on("tiny", speeds)[what] == ("no goal here", None)


def test_a_wrong_kernel_is_missed_whatever_else_is_known() -> None:
    for sizes, gpu in (("full", {}), ("tiny", None)):
        about = record("device", gpu=gpu, sizes=sizes)
        for worst, said in ((0.5, "not measured"), (1.5, "missed")):
            records = {"device": about, "kernels.64.64": record("kernels.64.64", worst=worst)}
            first = verdicts(records)[0]
            assert first.judgement.value == said and "kernel" in first.what


def test_a_page_is_written_whatever_a_rank_has_not_found(tmp_path: Path) -> None:
    about = record("device", **is_named(tmp_path, False), cuda=None)
    about.others = [dict(about.result or {})]
    failed = replace(record("ceilings"), state=State.failed, result=None, error="no")
    records = {"device": about, "ceilings": failed}
    text = write_page(run.Folder(tmp_path), records, verdicts(records)).read_text()
    assert "| 1 | host0 | a GPU |  |  |" in text


def test_a_missed_goal_is_an_error_and_unknown_ones_are_none(tmp_path: Path) -> None:
    records = {
        "device": record("device", gpu={}, sizes="full"),
        "costs": record("costs", host_waits=3),
    }
    report = run.Report(run.Folder(tmp_path), [NAMED], records, verdicts(records))
    with pytest.raises(UserError, match="1 goals are missed: waits of the host in a step"):
        report.check()
    records["costs"] = record("costs", host_waits=1)
    run.Report(run.Folder(tmp_path), [NAMED], records, verdicts(records)).check()
