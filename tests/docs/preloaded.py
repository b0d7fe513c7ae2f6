"""Commands of nlscale forked from a process that has imported what they import.

    python tests/docs/preloaded.py SOCKET

serves them: a client, which `client` writes as a program called `nlscale`, sends its arguments,
folder, environment and standard streams, and ends as the command ended. What runs is what would run
otherwise, but for the seconds in which each command imports torch.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

_CLIENT = """\
#!{python} -IS
import json, os, socket, sys

server = socket.socket(socket.AF_UNIX)
server.connect({path!r})
sent = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [len(sent).to_bytes(8, "big")], [0, 1, 2])
server.sendall(sent)
code = server.recv(1)
sys.exit(code[0] if code else "the command's server has ended")
"""

_TORCHRUN = """\
#!{python} -IS
import os, socket, subprocess, sys

standalone, option, ranks, *program = sys.argv[1:]
assert [standalone, option, *program[:2]] == ["--standalone", "--nproc-per-node", "-m", "nlscale"]
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = str(free.getsockname()[1])
shared = dict(WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
running = []
for rank in map(str, range(int(ranks))):
    environment = os.environ | shared | dict(RANK=rank, LOCAL_RANK=rank)
    running.append(subprocess.Popen([{nlscale!r}, *program[2:]], env=environment))
sys.exit(max(abs(process.wait()) for process in running))
"""


@contextmanager
def client(folder: Path, cwd: Path, environment: dict[str, str]) -> Iterator[Path]:
    """A folder for the PATH with programs `nlscale` and `torchrun`, as long as their server runs.

    `torchrun` starts ranks of `nlscale` on this machine.

    Args:
        folder: to make it in.
        cwd: of the server.
        environment: of the server, which decides what nlscale is imported.
    """
    path, program, ranks = folder / "socket", folder / "nlscale", folder / "torchrun"
    folder.mkdir()
    program.write_text(_CLIENT.format(python=sys.executable, path=str(path)))
    ranks.write_text(_TORCHRUN.format(python=sys.executable, nlscale=str(program)))
    for each in (program, ranks):
        each.chmod(0o755)
    server = subprocess.Popen([sys.executable, __file__, str(path)], cwd=cwd, env=environment)
    try:
        until = time.monotonic() + 120
        while not path.exists():
            assert server.poll() is None and time.monotonic() < until, "no server of commands"
            time.sleep(0.05)
        yield folder
    finally:
        server.kill()
        server.wait()


def serve(path: str) -> None:
    """Fork a process a command; returns in those, which are to run it, and nowhere else."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{path}.partial")
        listener.listen()
        os.rename(f"{path}.partial", path)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the guards
        while True:
            asks, _ = listener.accept()
            if os.fork() == 0:
                break
            asks.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, streams, _, _ = socket.recv_fds(asks, 8, 3)
    with asks.makefile("rb") as file:
        arguments, folder, environment = json.loads(file.read(int.from_bytes(size, "big")))
    command = os.fork()
    if command:
        _guard(asks, command)
    asks.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[1:] = arguments


def _guard(asks: socket.socket, command: int) -> NoReturn:
    """Tell the client how its command ends; the client's own end ends the command."""
    ended = os.pidfd_open(command)
    if asks in select.select([asks, ended], [], [])[0]:
        os.kill(command, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(command, 0)[1])
    with suppress(OSError):
        asks.sendall(bytes([code if code >= 0 else 128 - code]))
    os._exit(0)


if __name__ == "__main__":
    del sys.path[0]  # the folder of this file
    import nlscale.train.preload  # noqa: F401
    from nlscale.__main__ import program

    serve(sys.argv[1])
    program()
