"""Makes `tests/` importable, shares what several rooms need, and deals tests to workers.

`seconds.json` says how long tests took that take more than half a second: they begin first, so that
no worker is left alone with a long one at the end, and `tests/run.sh --quick` leaves them out.
`tests/run.sh --record` writes it anew.
"""

from __future__ import annotations

import gc
import json
import signal
import sys
from collections import defaultdict
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER))
# A shell that begins something in the background has it ignore Ctrl-C, and all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)
gc.disable()  # until all modules are imported: else all of torch is looked through again and again

from ops.interpreter import Call, interpreter  # noqa: E402

SECONDS_FILE = FOLDER / "seconds.json"
SECONDS: dict[str, float] = json.loads(SECONDS_FILE.read_text())
"""By the name of a test without its parameters: of one case, on the average."""
_taken: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Call]:
    """`interpreted(function, *arguments)` runs it where Triton's kernels run on CPU tensors."""
    assert find_spec("triton"), (
        "triton not found: pip install triton (Linux; it is in nlscale[dev])"
    )
    with interpreter() as call:
        yield call


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", action="store_true", help=f"write {SECONDS_FILE.name} anew")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Tests that share what is costly to make go to one worker."""
    if _name(item.nodeid) in SECONDS:
        item.add_marker(pytest.mark.slow)
    if _shared(item) and not item.get_closest_marker("xdist_group"):
        item.add_marker(pytest.mark.xdist_group(_shared(item)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins first."""
    seconds: dict[str, float] = defaultdict(float)
    for item in items:
        seconds[_group(item)] += SECONDS.get(_name(item.nodeid), 0.0)
    items.sort(key=lambda item: -seconds[_group(item)])  # stable: files stay in their order


def pytest_collection_finish() -> None:
    """What all modules hold is never searched for garbage."""
    gc.freeze()
    gc.enable()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    case = report.nodeid.partition("@")[0]
    _taken[_name(case)][case] += report.duration


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("--record") and not hasattr(session.config, "workerinput"):
        means = {name: sum(cases.values()) / len(cases) for name, cases in _taken.items()}
        slow = {name: round(mean, 1) for name, mean in sorted(means.items()) if mean >= 0.5}
        SECONDS_FILE.write_text(json.dumps(slow, indent=1) + "\n")


def _name(nodeid: str) -> str:
    """Without parameters, and without the group that pytest-xdist writes after an @."""
    return nodeid.partition("[")[0].partition("@")[0]


def _group(item: pytest.Item) -> str:
    """What is run by one worker."""
    marker = item.get_closest_marker("xdist_group")
    return marker.args[0] if marker else item.nodeid


def _shared(item: pytest.Item) -> str:
    """The file of a test with a fixture that is made once for several tests; empty: it has none."""
    assert isinstance(item, pytest.Function)
    for definitions in item._fixtureinfo.name2fixturedefs.values():
        if definitions[-1].scope in ("module", "package"):
            return item.path.stem
    return ""
