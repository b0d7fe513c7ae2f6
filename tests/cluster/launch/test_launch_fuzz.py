"""Whatever a cluster file, a name or a folder holds: a script that says just that, or one error."""

from __future__ import annotations

import re
import shlex
import subprocess
import tempfile
from pathlib import Path

from cluster.launch.test_launch_quote import HOSTILE
from fuzz import examples
from hypothesis import given
from hypothesis import strategies as st

from nlscale.cluster.launch.batch import array_script, job_script
from nlscale.cluster.launch.torchrun import node_script
from nlscale.cluster.machines import Cluster, Launch, Slurm
from nlscale.errors import UserError

TEXTS = st.one_of(
    st.sampled_from(HOSTILE),
    st.text(max_size=20),
    st.text(alphabet="ab \\\"'#$%`\n\t;&|()<>{}[]*?!~=-:,/é", max_size=20),
    st.text(alphabet="hetjobpack", min_size=6, max_size=12),
)
MAYBE = st.one_of(st.none(), TEXTS)


def words(line: str) -> list[str]:
    """The words of an #SBATCH line as sbatch reads them; what real ones are, a Slurm is asked in
    tests/cluster/test_cluster_sbatch.py."""
    line = re.sub("hetjob|packjob", lambda found: " " * len(found[0]), line, flags=re.IGNORECASE)
    found: list[str] = []
    at = 0
    while at < len(line):
        if line[at].isspace():
            at += 1
            continue
        word, quote = "", ""
        while at < len(line) and (quote or not line[at].isspace()):
            if line[at] == "\\":
                at += 1
                word += line[at]
            elif line[at] == quote:
                quote = ""
            elif not quote and line[at] in "\"'":
                quote = line[at]
            elif not quote and line[at] == "#":
                return found
            else:
                word += line[at]
            at += 1
        assert not quote, f"a quote is not closed: {line}"
        found.append(word)
    return found


def asked(script: str) -> list[str]:
    """What sbatch reads in a script: it stops at the first command."""
    found: list[str] = []
    for line in script.split("\n"):
        if line.startswith("#SBATCH"):
            found += words(line.removeprefix("#SBATCH"))
        elif line.strip() and not line.lstrip().startswith("#"):
            break
    return found


@examples(150)
@given(name=TEXTS, folder=TEXTS, comment=TEXTS, partition=MAYBE, account=MAYBE, time=MAYBE)
def test_sbatch_is_asked_for_what_was_meant(
    name: str, folder: str, comment: str, partition: str | None, account: str | None,
    time: str | None,
) -> None:  # fmt: skip
    slurm = Slurm(
        partition=partition, account=account, time=time or "24:00:00",
        options=[f"--comment={shlex.quote(comment)}"],
    )  # fmt: skip
    cluster = Cluster("x", 2, 4, 1.0, 1.0, None, Launch(slurm=slurm))
    run = Path("/runs", folder.lstrip("/"))
    try:
        scripts = job_script("r", [], cluster, name, run), array_script(cluster, name, 7, run)
    except UserError as error:
        assert "\n" not in str(error)
        return
    log = str(run).replace("%", "%%")
    ends = ["--requeue", "--open-mode=append", f"--comment={comment}"]
    middle = ["--gpus-per-node=4"]
    middle += [f"--partition={partition}"] * bool(partition)
    middle += [f"--account={account}"] * bool(account)
    middle += [f"--time={time or '24:00:00'}", "--signal=USR1@300", *ends]
    assert asked(scripts[0]) == [
        f"--job-name={name}", "--nodes=2", "--ntasks-per-node=4", *middle,
        f"--output={log}/slurm-%j.log",
    ]  # fmt: skip
    assert asked(scripts[1])[:4] == [
        f"--job-name={name}", "--array=1-7%8", "--nodes=1", "--ntasks=1",
    ]  # fmt: skip
    assert asked(scripts[1])[-1] == f"--output={log}/slurm-%A-%a.log"


@examples(60)
@given(
    overrides=st.lists(TEXTS, max_size=4),
    variables=st.dictionaries(TEXTS | st.from_regex(r"[A-Z]{1,4}", fullmatch=True), TEXTS),
    setup=MAYBE,
    container=MAYBE,
    hosts=st.lists(TEXTS, max_size=2),
)
def test_a_shell_is_given_what_was_meant(
    overrides: list[str], variables: dict[str, str], setup: str | None, container: str | None,
    hosts: list[str],
) -> None:  # fmt: skip
    launch = Launch(environment=variables, setup=setup, slurm=Slurm(container=container))
    cluster = Cluster("x", 1, 4, 1.0, 1.0, None, launch)
    try:
        script = job_script("r", overrides, cluster, "n", Path("/runs/x"))
    except UserError as error:
        assert "\n" not in str(error)
        return
    lines = script.split("\n# <<< of the cluster\n")[0]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "script")
        show = 'printf "%s\\0" "$@" . "${environment[@]}" . "${container[@]:0:1}" . "$setup"'
        path.write_text(f"{lines}\n{show}\n", encoding="utf-8")
        done = subprocess.run(["bash", str(path)], capture_output=True, check=True)
    seen = done.stdout.decode("utf-8", "surrogateescape").split("\0")[:-1]
    image = [] if container is None else [f"--container-image={container}"]
    pairs = [f"{name}={value}" for name, value in variables.items()]
    given = ["r", *overrides, ".", *pairs, ".", *image, "."]
    assert seen[:-1] == given and (setup is None or seen[-1] == setup)
    try:
        text = node_script("r", overrides, Cluster("x", 1, 4, 1.0, 1.0, None, Launch(hosts)), None)
    except UserError:
        return
    subprocess.run(["bash", "-n"], input=text.encode(), check=True)
