"""Parts of the Python standard library by subject, as text; nothing is downloaded.

    python tools/corpora/stdlib_subjects.py --out data/code

copies the sources of each subject of the running Python to a folder of its name in --out, such as
data/code/network, for `nlscale data build --source`.
"""

from __future__ import annotations

import argparse
import shutil
import sysconfig
from pathlib import Path

SUBJECTS = {
    "network": (
        "asyncio/*.py email/*.py http/*.py urllib/*.py xmlrpc/*.py socket*.py ssl.py "
        "ftplib.py imaplib.py poplib.py smtplib.py selectors.py"
    ),
    "language": (
        "ast.py bdb.py dataclasses.py dis.py functools.py importlib/*.py inspect.py pdb.py "
        "pickle*.py tokenize.py traceback.py typing.py unittest/*.py"
    ),
    "numbers": (
        "_pydecimal.py _pydatetime.py _strptime.py calendar.py colorsys.py datetime.py decimal.py "
        "fractions.py numbers.py random.py statistics.py"
    ),
}
"""Patterns of files under the standard library; not every Python has a file for each."""


def copy_subjects(library: Path, out: Path) -> dict[str, int]:
    """Copy the files of each subject.

    Args:
        library: of the Python whose files they are.
        out: gets a folder a subject.

    Returns:
        Bytes of each subject.

    Raises:
        SystemExit: a subject has no file there.
    """
    sizes = {}
    for subject, patterns in SUBJECTS.items():
        files = sorted({f for pattern in patterns.split() for f in library.glob(pattern)})
        if not files:
            raise SystemExit(f"{library} has none of the files of {subject}: {patterns}")
        for file in files:
            target = out / subject / file.relative_to(library)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
        sizes[subject] = sum(file.stat().st_size for file in files)
    return sizes


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="where the folders go")
    out = parser.parse_args().out
    for subject, size in copy_subjects(Path(sysconfig.get_path("stdlib")), out).items():
        print(f"{out / subject}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
