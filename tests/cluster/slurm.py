"""A real Slurm on this machine: a controller and two nodes, for as long as a test session needs it.

Nothing is installed into the machine's own configuration: munge and Slurm run on files of a folder
of the test's and on free ports. Clients find it by SLURM_CONF.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType

from ports import free_port

NODES = ("n0", "n1")
_TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "runuser")
_FINAL = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}

# A job that is requeued waits until its credential has expired (cred_expire, by default 120 s).
_CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=30
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
MpiDefault=none
{nodes}
PartitionName=test Nodes={names} Default=YES MaxTime=60 State=UP
"""


class Slurm:
    """A Slurm that lives inside a `with`; jobs are submitted with its `environment`."""

    def __init__(self) -> None:
        missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
        assert not missing, f"{', '.join(missing)} not found: apt-get install slurm-wlm munge"
        assert os.geteuid() == 0, "a Slurm of the tests' own needs root, to run munge as its user"
        # not below pytest's own folder, which munge's user may not enter
        self.folder = Path(tempfile.mkdtemp(prefix="nlscale-slurm-"))
        self.folder.chmod(0o755)
        self.environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        for name in [name for name in self.environment if name.startswith("SLURM_JOB")]:
            del self.environment[name]
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Slurm:
        try:
            self._start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if (self.folder / "slurm.conf").exists():
            self.run("scancel", "--full", "--signal=KILL", "--user=root", check=False)
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
        self._kill_what_jobs_left()
        for daemon in self._daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, *command: str, check: bool = True) -> str:
        """Run a client command; what it printed."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def state(self, job: str) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        shown = self.run("scontrol", "--oneliner", "show", "job", job)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def wait(self, job: str, seconds: float = 400) -> dict[str, str]:
        """Wait until a job is over; its fields."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            state = self.state(job)
            if state["JobState"] in _FINAL:
                return state
            time.sleep(0.3)
        raise AssertionError(f"job {job} is {state['JobState']} after {seconds:.0f} s\n{state}")

    def wait_pending(self, job: str, seconds: float = 120) -> None:
        """Wait until a job has been requeued."""
        until = time.monotonic() + seconds
        while (state := self.state(job))["JobState"] != "PENDING":
            assert time.monotonic() < until, state
            time.sleep(0.2)

    def _start(self) -> None:
        self._start_munge()
        ports = [free_port() for _ in range(1 + len(NODES))]
        host = socket.gethostname().split(".")[0]
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 "
            f"RealMemory=4000 State=UNKNOWN"
            for name, port in zip(NODES, ports[1:], strict=True)
        )
        (self.folder / "slurm.conf").write_text(
            _CONFIGURATION.format(
                folder=self.folder,
                host=host,
                controller=ports[0],
                nodes=nodes,
                names=",".join(NODES),
            )
        )
        (self.folder / "state").mkdir()
        self._spawn("slurmctld", "-D", "-c")
        for name in NODES:
            (self.folder / f"spool-{name}").mkdir()
            self._spawn("slurmd", "-D", "-N", name)
        until = time.monotonic() + 30
        while "idle" not in (states := self.run("sinfo", "-h", "-o", "%t", check=False)).split():
            assert time.monotonic() < until, f"Slurm did not come up: {states}\n{self._logs()}"
            time.sleep(0.1)
        while self.run("sinfo", "-h", "-N", "-o", "%t").split() != ["idle"] * len(NODES):
            assert time.monotonic() < until, f"a node did not come up\n{self._logs()}"
            time.sleep(0.1)

    def _kill_what_jobs_left(self) -> None:
        mine = f"SLURM_CONF={self.folder / 'slurm.conf'}".encode()
        for process in Path("/proc").iterdir():
            try:
                if mine in (process / "environ").read_bytes().split(b"\0"):
                    os.kill(int(process.name), signal.SIGKILL)
            except (OSError, ValueError):
                continue

    def _start_munge(self) -> None:
        folder = self.folder / "munge"
        folder.mkdir()
        key = folder / "key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        for path in (folder, key):
            shutil.chown(path, "munge", "munge")
        files = [f"--{name}-file={folder / name}" for name in ("key", "log", "pid", "seed")]
        files[0] = f"--key-file={key}"
        # munged wants every folder above its socket to be safe or to be told not to mind
        self._daemons.append(
            subprocess.Popen(
                ["runuser", "-u", "munge", "--", "munged", "--foreground", "--force", *files,
                 f"--socket={folder / 'socket'}"],
                stdout=subprocess.DEVNULL,
                stderr=(self.folder / "munged.err").open("wb"),
            )
        )  # fmt: skip
        until = time.monotonic() + 10
        while not (folder / "socket").exists():
            assert time.monotonic() < until, (self.folder / "munged.err").read_text()
            time.sleep(0.05)

    def _spawn(self, *command: str) -> None:
        self._daemons.append(
            subprocess.Popen(
                command,
                env=self.environment,
                stdout=(self.folder / "daemons.out").open("ab"),
                stderr=subprocess.STDOUT,
            )
        )

    def _logs(self) -> str:
        return "\n".join(path.read_text()[-2000:] for path in sorted(self.folder.glob("*.log")))
