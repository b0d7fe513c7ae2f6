"""Manual pages as text: what roff says, packages of several languages, and what is refused."""

from __future__ import annotations

import gzip
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "tools" / "corpora" / "manuals.py"
PAGE = r"""'\" t
.\" A comment of the translator
.TH kill 2 2023-02-05 "Linux"
.SH BEZEICHNUNG
kill \- ein \fISignal\fP an einen Proze\[u00DF] senden
.SH "SIEHE AUCH"
.nf
.BI "int kill(pid_t " pid ", int " sig );
.fi
.PP
\(bu Die Option \fB\-\-quiet\fP\&: siehe
.BR signal (7).\" hier auch
.TS
l l.
EINE	TABELLE
.TE
.IP "\[lq]zwei\[rq]" 5
.de Eigenes
.B nie zu sehen
..
.Eigenes
Ende\e.
"""
TEXT = """BEZEICHNUNG
kill - ein Signal an einen Prozeß senden

SIEHE AUCH
int kill(pid_t pid, int sig);

• Die Option --quiet: siehe
signal(7).

“zwei”
Ende\\.
"""


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, PROGRAM, *map(str, arguments)], capture_output=True, text=True
    )


def package(folder: Path, name: str, pages: dict[str, str]) -> None:
    root = folder / f"{name}.root"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN" / "control").write_text(
        f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: a\n"
    )
    for path, text in pages.items():
        file = root / "usr" / "share" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(gzip.compress(text.encode()))
    build = ["dpkg-deb", "--build", str(root), str(folder / f"{name}_1_all.deb")]
    subprocess.run(build, check=True, capture_output=True)


def test_each_page_of_each_language_is_a_file_of_text(tmp_path: Path) -> None:
    package(
        tmp_path,
        "manpages-es",
        {
            "man/es/man2/kill.2.gz": PAGE,
            "man/es/man2/killpg.2.gz": ".so man2/kill.2\n",
            "man/fr/man1/other.1.gz": PAGE,
            "doc/manpages-es/changelog.gz": "changes\n",
        },
    )
    package(tmp_path, "manpages", {"man/man7/signal.7.gz": "signals\n"})
    package(tmp_path, "manpages-dev", {"man/man3/raise.3.gz": "raise\n"})
    out = tmp_path / "out"
    given = ("--languages", "en", "es", "--packages", tmp_path, "--out", out)
    done = run(*given)
    assert done.returncode == 0, done.stderr
    found = {str(path.relative_to(out)): path.read_text() for path in out.rglob("*.txt")}
    assert found == {
        "es/kill.2.txt": TEXT,
        "en/signal.7.txt": "signals\n",
        "en/raise.3.txt": "raise\n",
    }
    (out / "es" / "kill.2.txt").write_text("kept")
    assert "is there" in run(*given).stdout
    assert (out / "es" / "kill.2.txt").read_text() == "kept"


def test_a_package_that_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    given = ("--packages", tmp_path, "--out", tmp_path / "out")
    missing = run("--languages", "pl", *given)
    assert missing.returncode == 1
    assert "no manpages-pl_*.deb" in missing.stderr
    (tmp_path / "manpages-es_1_all.deb").write_bytes(b"torn")
    torn = run("--languages", "es", *given)
    assert torn.returncode == 1
    assert "manpages-es_1_all.deb" in torn.stderr
    assert "fetch it anew" in torn.stderr
    assert not (tmp_path / "out" / "es").exists()


@pytest.mark.parametrize("line", [r".B a \(xx", r"\fBunended", r'.BR "open', r"\[u12", "\\"])
def test_roff_that_is_not_well_formed_is_read_all_the_same(tmp_path: Path, line: str) -> None:
    package(tmp_path, "manpages-es", {"man/es/man1/odd.1.gz": f".SH ODD\n{line}\nend\n"})
    done = run("--languages", "es", "--packages", tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "es" / "odd.1.txt").read_text().endswith("\nend\n")
