"""Whatever a value holds, a shell reads it back as it was, or it is refused."""

from __future__ import annotations

import subprocess

import pytest

from nlscale.cluster.launch.quote import log_file, sbatch, shell, shell_words
from nlscale.errors import UserError

HOSTILE = [
    "", " ", "a b", "a  b ", "#", "try #1", "a#b", "$(touch X)", "`touch X`", "$HOME", "${IFS}",
    "~", "~root", "*", "?", "[a-z]", "{a,b}", "!", "!!", "a;b", "a&b", "a|b", "<a", ">a", "(a)",
    "'", "''", "it's", '"', 'say "no"', "\\", "\\\\", "a\\", "\\n", "$'a'", "%a", "%%", "50%",
    "-n", "--", "=", "a=b", "ä", "日本語", "🙂", "\u2028", "\u0085", "\u00a0", "\ufeff",
    "a\nb", "\n", "a\n", "\r\n", "\t", "\x1b[31m", "\x7f", "\x01\x02", "A; touch X; B",
    "x\n#SBATCH --partition=other", "# >>> of the cluster\n", "# <<< of the cluster\n",
]  # fmt: skip


def test_a_shell_reads_back_every_text() -> None:
    texts = HOSTILE + [chr(n) for n in range(1, 0x250)] + [f"a{chr(n)}1f" for n in range(1, 128)]
    for word in map(shell, texts):
        assert "\n" not in word and "\r" not in word, "one line, whatever it holds"
    script = f"printf '%s\\0' {shell_words(texts)}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, check=True)
    assert done.stdout.decode().split("\0")[:-1] == texts


def test_a_path_that_is_not_utf8_is_the_same_path() -> None:
    path = b"runs/caf\xe9 \xff1".decode(errors="surrogateescape")
    word = shell(path)
    word.encode("ascii")
    done = subprocess.run(["bash", "-c", f"printf %s {word}"], capture_output=True, check=True)
    assert done.stdout == b"runs/caf\xe9 \xff1"


@pytest.mark.parametrize("text", ["a\0b", "\ud800"], ids=["nul", "half"])
def test_what_no_shell_can_pass_on_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="no shell can pass on"):
        shell(text)


@pytest.mark.parametrize("text", ["a\nb", "a\rb", "\x1b", "\udcff"], ids=ascii)
def test_what_cannot_stand_in_a_line_for_sbatch_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="the account"):
        sbatch(text, "the account")


def test_words_for_sbatch_are_quoted_by_its_own_rules() -> None:
    assert sbatch("--time=1:00", "x") == "--time=1:00"
    assert sbatch('--x=a "b\\c #d', "x") == '"--x=a \\"b\\\\c #d"'
    assert "hetjob" not in sbatch("--output=/runs/hetjob", "x")
    assert "PackJob" not in sbatch("--output=/runs/PackJob", "x")


def test_the_name_of_a_log_is_no_pattern_but_for_its_own() -> None:
    assert log_file("/runs/50%a%j%%", "slurm-%j.log", "run.dir") == (
        "/runs/50%%a%%j%%%%/slurm-%j.log"
    )
    with pytest.raises(UserError, match=r"run.dir .* holds a backslash"):
        log_file("/runs/a\\b", "slurm-%j.log", "run.dir")
