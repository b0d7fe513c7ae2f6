"""Text in several languages from a Debian or Ubuntu machine: its translated manual pages.

    python tools/corpora/manuals.py --languages en de fr ru --out data/manuals

fetches the packages of the manual pages (`apt-get download`, 30 MB; needs no root and installs
nothing), and writes one file a page, OUT/LANGUAGE/NAME.SECTION.txt, without the marks of roff. Each
language is then a source: `nlscale data build --source data/manuals/de ...`. A language that has
its folder is left as it is. With --packages DIR nothing is fetched: the .deb files lie there.
"""

from __future__ import annotations

import argparse
import gzip
import io
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

PACKAGES = {
    "en": ("manpages", "manpages-dev"),
    "de": ("manpages-de", "manpages-de-dev"),
    "es": ("manpages-es",),
    "fr": ("manpages-fr", "manpages-fr-dev"),
    "pl": ("manpages-pl", "manpages-pl-dev"),
    "ru": ("manpages-ru", "manpages-ru-dev"),
}

HEADINGS = {"SH", "SS", "Sh", "Ss"}
FONTS = {"B", "I", "BR", "BI", "IR", "IB", "RB", "RI", "SM", "SB", "UR", "MT", "ME", "UE"}
"""Macros whose arguments are text. Those of two letters set them alternately and close together."""
BREAKS = {"PP", "P", "LP", "HP", "TP", "TQ", "IP", "sp", "Pp", "It", "br"}
SKIPPED_TO = {"TS": "TE", "de": ".", "ig": ".", "EQ": "EN"}
"""Tables, equations and definitions are left out, up to the macro that ends them."""
CHARACTERS = {
    "-": "-", "e": "\\", "(aq": "'", "(dq": '"', "(bu": "•", "(en": "–", "(em": "—", "(co": "©",
    "(lq": "“", "(rq": "”", "(oq": "‘", "(cq": "’", "(ha": "^", "(ti": "~", "(hy": "-", "(rs": "\\",
    "(at": "@", "(+-": "±", "(de": "°", "(ra": "⟩", "(la": "⟨", "(>=": "≥", "(<=": "≤", "(bv": "|",
    "(mu": "×", "(->": "→", "~": " ", " ": " ", "0": " ", "t": "\t", "'": "'", "`": "`", ".": ".",
}  # fmt: skip
ESCAPE = re.compile(
    r"\\(?:[fnmMgk*](?:\[[^]]*\]|\(..|.)"  # a font, a register, a colour, a string: nothing to read
    r"|s[-+]?(?:\[[^]]*\]|\d{1,2})|[hvwXZlLbDoA]'[^']*'"
    r"|\[([^]]*)\]|(\(..)|(.))"
)


class Unreadable(Exception):
    """The packages are not there, or are not what they should be; says what to do."""


def plain(text: str) -> str:
    """A line of roff without its escapes."""

    def character(found: re.Match[str]) -> str:
        bracket, two, one = found.groups()
        if bracket is not None and re.fullmatch("u[0-9A-F]{4,6}", bracket):
            return chr(int(bracket[1:], 16))
        return CHARACTERS.get(f"({bracket}" if bracket is not None else two or one or "", "")

    return ESCAPE.sub(character, text)


def arguments(rest: str) -> list[str]:
    """Of a macro: words, or what stands in quotation marks (in them, two are one)."""
    found = re.findall(r'"((?:[^"]|"")*)(?:"|$)|((?:\\.|[^\s\\])+)', rest)
    return [plain(quoted.replace('""', '"') or word) for quoted, word in found]


def text_of(roff: str) -> str:
    """What a reader of a manual page reads: headings, paragraphs and examples, by lines as they
    are there. Tables and macros that the page defines itself are left out.
    """
    lines: list[str] = []
    until = ""
    for whole in roff.splitlines():
        line = re.sub(r'\\["#].*', "", whole)  # without its comment
        macro, _, rest = line[1:].strip().partition(" ") if line[:1] in (".", "'") else ("", "", "")
        if until:
            until = "" if macro == until else until
        elif not macro:
            if line[:1] not in (".", "'"):
                lines.append(plain(line).rstrip())
        elif macro in SKIPPED_TO:
            until = SKIPPED_TO[macro]
        elif macro in HEADINGS:
            lines += ["", " ".join(arguments(rest))]
        elif macro in FONTS:
            lines.append(("" if len(macro) == 2 and macro.isupper() else " ").join(arguments(rest)))
        elif macro in BREAKS:
            lines.append("")
            lines += arguments(rest)[:1] if macro == "IP" else []
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def pages_of(package: Path, language: str) -> Iterator[tuple[str, str]]:
    """Name and text of each page of a language in a .deb; pages that only point to another are not
    counted."""
    try:
        archive = subprocess.run(
            ["dpkg-deb", "--fsys-tarfile", str(package)], check=True, capture_output=True
        ).stdout
    except FileNotFoundError as error:
        raise Unreadable("dpkg-deb is not here: this needs Debian or Ubuntu") from error
    except subprocess.CalledProcessError as error:
        raise Unreadable(f"{package}: {error.stderr.decode().strip()}; fetch it anew") from error
    folder = "usr/share/man" + ("" if language == "en" else f"/{language}")
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            if not member.isfile() or path.suffix != ".gz":
                continue
            if not path.parent.name.startswith("man") or str(path.parent.parent) != folder:
                continue
            file = tar.extractfile(member)
            assert file is not None, "a file has content"
            roff = gzip.decompress(file.read()).decode("utf-8", "replace")
            if not roff.startswith(".so "):
                yield path.stem, text_of(roff)


def fetch(names: list[str], folder: Path) -> None:
    print(f"fetching {', '.join(names)}", file=sys.stderr)
    try:
        subprocess.run(["apt-get", "-q", "download", *names], cwd=folder, check=True,
                       capture_output=True, text=True)  # fmt: skip
    except FileNotFoundError as error:
        raise Unreadable("apt-get is not here: this needs Debian or Ubuntu") from error
    except subprocess.CalledProcessError as error:
        reason = error.stderr.strip().splitlines()[-1:]
        raise Unreadable(
            f"{' '.join(reason)}; is `apt-get update` needed, or a network?"
        ) from error


def write_language(language: str, packages: Path, out: Path) -> tuple[int, int]:
    """Writes the pages of a language and says how many they are, and their bytes. The folder has
    its name only once it is whole.
    """
    count = size = 0
    part = out / f".{language}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for name in PACKAGES[language]:
        found = sorted(packages.glob(f"{name}_*.deb"))
        if not found:
            raise Unreadable(f"{packages}: no {name}_*.deb, the manual pages of '{language}'")
        for page, text in pages_of(found[-1], language):
            size += (part / f"{page}.txt").write_bytes(text.encode())
            count += 1
    if not count:
        raise Unreadable(f"{packages}: no pages of '{language}' in {', '.join(PACKAGES[language])}")
    part.rename(out / language)
    return count, size


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--languages", nargs="+", choices=PACKAGES, default=list(PACKAGES))
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--packages", type=Path, metavar="DIR", help="where the .deb files are")
    given = parser.parse_args()
    wanted = [language for language in given.languages if not (given.out / language).is_dir()]
    try:
        with tempfile.TemporaryDirectory() as temporary:
            packages = given.packages or Path(temporary)
            if wanted and not given.packages:
                fetch([name for language in wanted for name in PACKAGES[language]], packages)
            for language in wanted:
                count, size = write_language(language, packages, given.out)
                print(f"{given.out / language}: {count:,} pages, {size / 1e6:.1f} MB")
    except Unreadable as error:
        sys.exit(f"manuals: {error}")
    for language in sorted(set(given.languages) - set(wanted)):
        print(f"{given.out / language}: is there")


if __name__ == "__main__":
    main()
