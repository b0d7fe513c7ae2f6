"""metrics.jsonl, train.log and summary.json as a reader finds them."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nlscale.errors import UserError
from nlscale.telemetry.figures import read_records
from nlscale.telemetry.files import LineFile, read_object, to_json
from nlscale.telemetry.run import Telemetry, WandbOptions


def train(step: int, loss: float = 2.5, **changes: Any) -> dict[str, Any]:
    levels = {
        name: {
            "period": period,
            "learning_rate": 3e-3,
            "grad_norm": 0.8 if step % period == 0 else None,
            "updates": step // period,
            "reductions": step // period,
            "updated": step % period == 0,
            "window_fill": (step % period) / period,
            "update_ratio": None,
        }
        for name, period in {"base": 1, "slow": 4}.items()
    }
    record = {
        "kind": "train",
        "step": step,
        "tokens": step * 1024,
        "loss": loss,
        "tokens_per_second": 21000.0,
        "step_seconds": 0.4,
        "dropped_steps": 0,
        "bytes_saved": 10 * step,
        "levels": levels,
    }
    return record | changes


def validation(step: int, loss: float = 2.4) -> dict[str, Any]:
    bits = loss / math.log(2)
    return {
        "kind": "validation",
        "step": step,
        "tokens": step * 1024,
        "loss": loss,
        "bits_per_byte": bits,
    }


def telemetry(run_dir: Path, total_steps: int = 20) -> Telemetry:
    return Telemetry(run_dir, total_steps, WandbOptions(), {}, 1024)


def test_records_come_back_as_given_and_are_there_at_once(tmp_path: Path) -> None:
    records = [train(1), train(2), validation(2)]
    with telemetry(tmp_path) as open_telemetry:
        for record in records:
            report = open_telemetry.train_step
            (report if record["kind"] == "train" else open_telemetry.validation)(record)
        assert read_records(tmp_path) == records  # before any close


def test_a_loss_that_is_not_finite_leaves_valid_json(tmp_path: Path) -> None:
    bad = train(1, loss=math.nan)
    bad["levels"]["slow"]["grad_norm"] = math.inf
    with telemetry(tmp_path) as open_telemetry:
        open_telemetry.train_step(bad)
    line = (tmp_path / "metrics.jsonl").read_text()
    record = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert record["loss"] is None
    assert record["levels"]["slow"]["grad_norm"] is None
    assert record["not_finite"] == ["loss", "levels.slow.grad_norm"]
    assert math.isnan(bad["loss"]), "the caller's record is not touched"


def test_finite_records_are_not_marked() -> None:
    assert "not_finite" not in json.loads(to_json(train(1)))


def test_numpy_scalars_and_paths_become_plain() -> None:
    plain = json.loads(to_json({"a": np.float32(0.5), "b": np.int64(3), "c": Path("x")}))
    assert plain == {"a": 0.5, "b": 3, "c": "x"}


def test_truncate_after_drops_later_steps_and_goes_on(tmp_path: Path) -> None:
    with telemetry(tmp_path) as first:
        for step in range(1, 9):
            first.train_step(train(step))
            if step % 4 == 0:
                first.validation(validation(step))
    with telemetry(tmp_path) as resumed:
        assert len(resumed.truncate_after(5)) == 4  # steps 6, 7, 8 and the validation at 8
        resumed.train_step(train(6, loss=1.0))
    steps = [(r["kind"][0], r["step"]) for r in read_records(tmp_path)]
    expected = [("t", 1), ("t", 2), ("t", 3), ("t", 4), ("v", 4), ("t", 5), ("t", 6)]
    assert steps == expected
    assert read_records(tmp_path)[-1]["loss"] == 1.0


def test_a_line_torn_by_a_kill_is_dropped_on_resume(tmp_path: Path) -> None:
    with telemetry(tmp_path) as first:
        first.train_step(train(1))
        first.train_step(train(2))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    assert [r["step"] for r in read_records(tmp_path)] == [1]
    with telemetry(tmp_path) as resumed:
        resumed.train_step(train(2))
    assert [r["step"] for r in read_records(tmp_path)] == [1, 2]


def test_a_bad_line_in_the_middle_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnot json\n{"step": 2}\n')
    with pytest.raises(UserError, match="line 2"):
        read_records(tmp_path)


def test_a_full_disk_is_a_clear_error() -> None:
    file = LineFile(Path("/dev/full"))
    with pytest.raises(UserError, match="cannot append to /dev/full: No space left"):
        file.append("line")
    file.close()


def test_a_directory_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot create"):
        telemetry(tmp_path / "file" / "run")


def test_train_log_has_what_the_terminal_had(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with telemetry(tmp_path) as open_telemetry:
        open_telemetry.note("loading shards")
        open_telemetry.warn("one shard is short")
        open_telemetry.train_step(train(1))
    printed = capsys.readouterr().out.splitlines()
    logged = (tmp_path / "train.log").read_text().splitlines()
    assert [line.split("  ", 1)[1] for line in logged] == printed
    assert "loading shards" in printed
    assert "warning: one shard is short" in printed


def test_close_twice_and_silent_do_no_harm(tmp_path: Path) -> None:
    open_telemetry = telemetry(tmp_path)
    open_telemetry.close()
    open_telemetry.close()
    with Telemetry.silent() as silent:
        silent.note("x")
        silent.warn("x")
        silent.train_step(train(1))
        silent.validation(validation(1))
        assert silent.truncate_after(0) == []
        silent.finish({})


def test_an_exception_closes_and_passes_through(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), telemetry(tmp_path) as open_telemetry:
        open_telemetry.train_step(train(1))
        _ = 1 / 0
    assert len(read_records(tmp_path)) == 1
    with pytest.raises(ValueError, match="closed"):
        open_telemetry.train_step(train(2))


def test_importing_it_loads_neither_wandb_nor_matplotlib() -> None:
    code = "import sys, nlscale.telemetry.run; print({'wandb', 'matplotlib'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_what_goes_is_set_aside_and_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with telemetry(tmp_path) as first:
        for step in (1, 2, 3):
            first.train_step(train(step))
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    with telemetry(tmp_path) as resumed:
        assert [r["step"] for r in resumed.truncate_after(1)] == [2, 3]
        assert resumed.truncate_after(1) == []
    with telemetry(tmp_path) as anew:
        assert [r["step"] for r in anew.truncate_after(-1)] == [1]
    aside = (tmp_path / "set-aside.jsonl").read_bytes().splitlines(keepends=True)
    assert aside == [lines[1], lines[2], lines[0]]
    said = capsys.readouterr().out
    assert said.count("records of steps 2 to 3 (2 of them) are set aside in") == 1
    assert said.count("records of steps 1 to 1 (1 of them) are set aside in") == 1


@pytest.mark.parametrize(
    "bad",
    [
        b"not json", b"", b"7", b"[]", b"\xff\x00", b"[" * 100_000, b'{"kind": "train"}',
        b'{"kind": "train", "step": "one"}', b'{"kind": "train", "step": 1, "loss": "high"}',
        b'{"kind": "train", "step": 1, "levels": {"a": null}}',
    ],
    ids=range(10),
)  # fmt: skip
def test_a_line_that_is_no_record_is_set_aside_and_the_others_stay(
    tmp_path: Path, bad: bytes
) -> None:
    good = (to_json(train(1)) + "\n").encode(), (to_json(validation(1)) + "\n").encode()
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(good[0] + bad + b"\n" + good[1])
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: "):
        read_records(tmp_path)
    with telemetry(tmp_path) as resumed:
        assert len(resumed.records()) == 2
        resumed.truncate_after(9)
    assert path.read_bytes() == b"".join(good)
    (aside,) = (tmp_path / "set-aside.jsonl").read_text().splitlines()
    assert json.loads(aside) == {
        "kind": "unreadable", "line": bad.decode("utf-8", "backslashreplace")
    }  # fmt: skip
    log = (tmp_path / "train.log").read_text()
    assert "metrics.jsonl: 1 line is no record; set aside in" in log


def test_where_nothing_can_be_set_aside_no_line_is_lost(tmp_path: Path) -> None:
    with telemetry(tmp_path) as first:
        first.train_step(train(1))
        before = (tmp_path / "metrics.jsonl").read_bytes()
        (tmp_path / "set-aside.jsonl").symlink_to("/dev/full")
        with pytest.raises(UserError, match=r"cannot append to .*set-aside\.jsonl: No space left"):
            first.truncate_after(0)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe\x00", b'{"a": 1', b"7"])
def test_an_object_that_is_none_is_named_by_its_path(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "summary.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_object(path)
    assert str(error.value).startswith(f"{path} is damaged: ") and "\n" not in str(error.value)


def test_a_file_without_lines_is_set_aside_whole(tmp_path: Path) -> None:
    content = b"\x00\x01" * (1 << 20)
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with telemetry(tmp_path) as resumed:
        resumed.truncate_after(9)
        resumed.train_step(train(1))
    assert [r["step"] for r in read_records(tmp_path)] == [1]
    (aside,) = (tmp_path / "set-aside.jsonl").read_text().splitlines()
    assert json.loads(aside)["line"].encode() == content
