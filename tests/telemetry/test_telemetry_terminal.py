"""What a person watching a run reads."""

from __future__ import annotations

import os
import re
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from nlscale.telemetry import terminal
from nlscale.telemetry.run import Telemetry, WandbOptions
from nlscale.telemetry.terminal import Pace, duration, step_line, summary_lines, validation_line


def train(step: int, loss: float | None = 2.3142, dropped: int = 0) -> dict[str, Any]:
    periods = {"base": 1, "medium": 4, "slow": 16}
    return {
        "kind": "train",
        "step": step,
        "tokens": step,
        "loss": loss,
        "tokens_per_second": 21345.0,
        "step_seconds": 0.4,
        "dropped_steps": dropped,
        "bytes_saved": 0,
        "levels": {
            name: {"period": p, "updates": step // p, "updated": step % p == 0}
            for name, p in periods.items()
        },
    }


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(terminal, "monotonic", clock)
    monkeypatch.setattr("nlscale.telemetry.run.monotonic", clock)
    return clock


def test_the_step_line_says_everything_in_order() -> None:
    assert step_line(train(120), 400, 2.4009, 130) == (
        "step 120/400   30%  loss 2.314  val 2.401  21.3k tok/s  eta 2m10s  "
        "updates base 120 medium 30 slow 7"
    )


def test_where_nothing_counts_there_is_no_loss() -> None:
    """Which is not the same as one that is not finite."""
    line = step_line({**train(7, loss=None), "dropped_because": None}, 400, None, 1)
    assert "no loss" in line and "NOT FINITE" not in line
    record = {"step": 7, "loss": 2.5, "bits_per_byte": None}
    assert validation_line(record, 400) == "step   7/400  validation loss 2.500"
    assert validation_line({**record, "loss": None}, 400) == "step   7/400  no validation loss"


def test_the_step_line_names_dropped_steps_and_bad_losses() -> None:
    line = step_line(train(7, loss=float("nan"), dropped=3), 400, None, 1)
    assert "loss NOT FINITE" in line
    assert "dropped 3" in line
    assert "val" not in line
    assert "loss NOT FINITE" in step_line(train(7, loss=None), 400, None, 1)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0s"), (9.4, "9s"), (59.6, "1m00s"), (130, "2m10s"), (11100, "3h05m"), (187200, "2d04h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize("total", [1, 3, 40, 41, 400, 12345])
def test_a_fast_run_prints_about_forty_lines(total: int, clock: Clock) -> None:
    pace = Pace(total)
    due = [step for step in range(1, total + 1) if pace.due(step)]
    assert due[0] == 1
    assert due[-1] == total
    assert min(total, 20) <= len(due) <= 42


def test_a_slow_run_is_never_silent_for_long_nor_floods_the_log(clock: Clock) -> None:
    pace = Pace(100_000)
    times = []
    for step in range(1, 10_001):  # ten hours of 3.6 s steps, a tenth of the run
        clock.now += 3.6
        if pace.due(step):
            times.append(clock.now)
    gaps = [b - a for a, b in pairwise(times)]
    assert gaps[0] <= 5 + 3.6
    assert max(gaps) <= 600 + 3.6
    assert len(times) < 150


def test_plain_output_of_a_run(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Telemetry(tmp_path / "tiny", 400, WandbOptions(), {}, 32768) as telemetry:
        for step in range(1, 401):
            clock.now += 0.01
            telemetry.train_step(train(step, loss=float("nan") if 203 <= step <= 205 else 2.0))
            if step == 200:
                telemetry.validation(
                    {"kind": "validation", "step": 200, "loss": 2.5, "bits_per_byte": 3.6}
                )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "run tiny: 400 steps of 32.8k tokens, 13.1M tokens in all"
    assert "step 200/400  validation loss 2.500  3.600 bits per byte" in lines
    bad = [line for line in lines if "NOT FINITE" in line]
    assert len(bad) == 1, "a bad stretch is reported once, where it begins"
    assert bad[0].startswith("step 203/400")
    assert len(lines) <= 45
    # 200 steps of 10 ms are left, at the pace of the clock and not the 0.4 s of the records.
    assert any(line.startswith("step 200/400   50%") and "eta 2s" in line for line in lines)


def test_what_is_left_of_a_run_in_stages_is_counted_in_tokens(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    def tokens_until(step: int) -> int:
        return 100 * min(step, 200) + 400 * max(0, step - 200)

    with Telemetry(tmp_path, 400, WandbOptions(), {}, None, tokens_until) as telemetry:
        for step in range(1, 301):
            clock.now += 1.0 if step <= 200 else 4.0
            telemetry.train_step(train(step))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"run {tmp_path.name}: 400 steps, 100k tokens in all"
    for step in (100, 200, 300):
        left = (tokens_until(400) - tokens_until(step)) // 100
        (line,) = (line for line in lines if line.startswith(f"step {step}/400"))
        assert f"eta {duration(left)} " in line


def test_the_summary_is_aligned_and_readable() -> None:
    summary = {
        "tokens": 13107200,
        "final_loss": 1.34567,
        "tokens_per_second": 21034.7,
        "unigram": None,
        "data": {"bytes": 25},
        "losses": [1, 2],
        "levels": [
            {"name": "slow", "period_steps": 16, "parameters": 92_500, "updates": 25,
             "reductions": 1},
        ],
    }  # fmt: skip
    assert summary_lines(summary) == [
        "summary",
        "  tokens             13,107,200",
        "  final loss         1.346",
        "  tokens per second  21,035",
        "  unigram            -",
        "  data.bytes         25",
        "  level slow         every 16 steps: 25 updates, 1 reduction, 92.5k parameters",
    ]


RUN_IN_A_TERMINAL = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_telemetry_terminal import train
from nlscale.telemetry.run import Telemetry, WandbOptions
with Telemetry(Path({run_dir!r}), 40, WandbOptions(), {{}}, 1024) as telemetry:
    for step in range(1, 41):
        telemetry.train_step(train(step))
    telemetry.note("a [bracketed] note")
    telemetry.finish({{"steps": 40}})
"""


def test_a_terminal_gets_a_live_display_and_the_log_the_plain_lines(tmp_path: Path) -> None:
    import pty

    code = RUN_IN_A_TERMINAL.format(tests=str(Path(__file__).parent), run_dir=str(tmp_path))
    pid, terminal_end = pty.fork()
    if pid == 0:
        os.environ.update(TERM="xterm", COLUMNS="100")
        os.execv(sys.executable, [sys.executable, "-c", code])
    output = b""
    while True:
        try:
            part = os.read(terminal_end, 4096)
        except OSError:  # how Linux says that the other end has closed
            break
        if not part:
            break
        output += part
    os.close(terminal_end)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.decode())
    assert "step 40/40" in text
    assert "updates base 40 medium 10 slow 2" in text
    assert "a [bracketed] note" in text
    assert b"\x1b[?25h" in output, "the cursor comes back"
    log = (tmp_path / "train.log").read_text()
    assert log.count("updates base") == 40
    assert "\x1b" not in log
