"""What a fit reads may be anything: points, or one error that names the file."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from fuzz import examples
from hypothesis import given
from hypothesis import strategies as st

from nlscale.errors import UserError
from nlscale.scaling.law.points import read_points

CELL = st.one_of(
    st.sampled_from(
        ["N", "D", "loss", "C", "flops", "1e9", "2.5", "", '"', "\x00", "nan", "-1", "1_0"]
    ),
    st.floats().map(repr),
    st.text(max_size=5),
)


@examples(300)
@given(st.lists(st.lists(CELL, max_size=5).map(",".join), max_size=6).map("\n".join), st.booleans())
def test_a_csv_file_is_read_or_refused(text: str, headed: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "runs.csv"
        path.write_bytes(("N,D,loss\n" * headed + text).encode("utf-8", "surrogatepass"))
        try:
            points, _ = read_points([path])
        except UserError as error:
            assert "runs.csv" in str(error) and "\n" not in str(error)
        else:
            assert (points.n > 0).all() and (points.d > 0).all() and (points.loss > 0).all()


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text("N,D,N,loss\n1,2,3,4\n")
    with pytest.raises(UserError, match="'N' is there twice"):
        read_points([path])


CONFIG = "# Resolved configuration\nmodel: {layers: 2}\n"
SUMMARY = {"final_val_loss": 2.0, "tokens": 10, "parameters": 5, "levels": [{"period_steps": 1}]}


@pytest.mark.parametrize(
    ("config", "summary"),
    [
        (CONFIG, ""),
        (CONFIG, "[]"),
        (CONFIG, "3"),
        (CONFIG, json.dumps(SUMMARY)[:20]),
        (CONFIG, json.dumps(SUMMARY | {"levels": [{}]})),
        (CONFIG, json.dumps(SUMMARY | {"levels": [{"period_steps": 0}]})),
        (CONFIG, json.dumps(SUMMARY | {"levels": 3})),
        (CONFIG, "\udcff"),
        ("", json.dumps(SUMMARY)),
        ("- 1", json.dumps(SUMMARY)),
        ("a: &a [*a]\nb: [", json.dumps(SUMMARY)),
    ],
    ids=range(11),
)
def test_a_damaged_run_is_named(config: str, summary: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(config)
    (run / "summary.json").write_bytes(summary.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=str(run)) as caught:
        read_points([tmp_path])
    assert "\n" not in str(caught.value)
