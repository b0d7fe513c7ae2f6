"""wandb, kept at arm's length: whatever fails in it is a warning and the run goes on."""

from __future__ import annotations

import netrc
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from nlscale.errors import UserError
from nlscale.telemetry.files import replace

_MODES = ("auto", "online", "offline", "disabled")
_ID_FILE = "wandb_id"
_ID = re.compile(rb"[\w.-]{1,128}")
_TEMPORARY = "wandb/tmp"
# A network that swallows packets must hold the run up for seconds, not for wandb's own minutes.
_INIT_SECONDS = 20
_FINISH_SECONDS = 60


@dataclass
class WandbOptions:
    """Whether and where to track a run with wandb."""

    enabled: bool = False
    """Track at all; metrics.jsonl is written either way."""
    project: str = "nlscale"
    """The wandb project."""
    name: str | None = None
    """The name of the run; by default that of its directory."""
    mode: str = "auto"
    """online, offline, disabled, or auto: what WANDB_MODE says, else online where there is an API
    key (WANDB_API_KEY or netrc) and the server answers, else offline."""


class WandbRun:
    """One wandb run, in `run_dir`/wandb; a resumed run goes on under the same id.

    Args:
        run_dir: the run's directory.
        options: see `WandbOptions`.
        config: the run's configuration as plain dicts and lists.
        note: takes a line for the user.
        warn: takes a warning; called once, after which wandb is off.

    Raises:
        UserError: `options.mode` is unknown.
    """

    def __init__(
        self,
        run_dir: Path,
        options: WandbOptions,
        config: Mapping[str, Any],
        note: Callable[[str], None],
        warn: Callable[[str], None],
    ) -> None:
        if options.mode not in _MODES:
            raise UserError(
                f"wandb mode {options.mode!r} is unknown; use one of {', '.join(_MODES)}"
            )
        self._run_dir, self._options, self._config = run_dir, options, dict(config)
        self._note, self._warn = note, warn
        self._run: Any = None
        self._id: str | None = None
        mode = options.mode
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE") or ("online" if has_api_key() else "offline")
        elif mode == "online" and not has_api_key():
            # wandb would ask for the key at the terminal and wait.
            warn(
                "wandb: no API key (WANDB_API_KEY or `wandb login`), so the run is tracked offline"
            )
            mode = "offline"
        self._remove_temporary()  # of a start that was killed
        try:
            self._start(mode)
        except Exception as error:
            if options.mode != "auto" or mode != "online":
                self._give_up("start", error)
                return
            note(f"wandb: no connection ({_reason(error)}), so the run is tracked offline")
            try:
                # wandb still holds the id of the attempt that failed.
                self._start("offline", id_suffix="-offline")
            except Exception as again:
                self._give_up("start", again)

    def log(self, kind: str, record: Mapping[str, Any]) -> None:
        """Log a record; keys become `kind`/key, those of levels levels/name/key.

        Of a train record, those of sources sources/name/key; of others, `kind`/sources/name/key.
        """
        if self._run is None:
            return
        try:
            self._run.log(dict(_flat(kind, record)))
        except Exception as error:
            self._give_up("log", error)

    def finish(self, summary: Mapping[str, Any] | None = None, failed: bool = False) -> None:
        """End the run, after a minute at most; twice does no harm."""
        run, self._run = self._run, None
        if run is None:
            return
        self._finish(run, summary, failed)
        self._remove_temporary()

    def _finish(self, run: Any, summary: Mapping[str, Any] | None, failed: bool) -> None:
        try:
            if summary:
                run.summary.update(dict(summary))
            run.finish(exit_code=int(failed))
        except Exception as error:
            self._give_up("finish", error)

    # mode: Any, because wandb's own type is a closed Literal.
    def _start(self, mode: Any, id_suffix: str = "") -> None:
        with _temporary_folders_in(self._run_dir / _TEMPORARY):
            self._init(mode, id_suffix)

    def _init(self, mode: Any, id_suffix: str) -> None:
        import wandb  # slow to import, and most runs do not use it

        settings: dict[str, Any] = {
            "init_timeout": _INIT_SECONDS,
            "console": "off",  # its capture of standard output tears the live display
            "silent": True,
        }
        if "finish_timeout" in getattr(wandb.Settings, "model_fields", {}):  # not in older ones
            settings |= {"finish_timeout": _FINISH_SECONDS}
        self._run = wandb.init(
            project=self._options.project,
            name=self._options.name or self._run_dir.resolve().name,
            id=self.id + id_suffix,
            resume="allow" if mode == "online" else None,
            dir=str(self._run_dir),
            mode=mode,
            config=self._config,
            settings=wandb.Settings(**settings),
        )
        # Our own step: wandb's refuses to go back, which a resumed run does.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        if mode == "offline":
            self._note(
                f"wandb: offline; to upload later: wandb sync {self._run_dir}/wandb/offline-*"
            )
        elif mode != "disabled":
            self._note(f"wandb: {self._run.url}")

    @property
    def id(self) -> str:
        """The id of the run, kept in its directory.

        Raises:
            UserError: the file cannot be read or written.
        """
        if self._id is None:
            self._id = self._kept_id()
        return self._id

    def _kept_id(self) -> str:
        path = self._run_dir / _ID_FILE
        try:
            kept = path.read_bytes() if path.exists() else None
            if kept is not None and _ID.fullmatch(kept.strip()):
                return kept.strip().decode()
            if kept is not None:
                self._note(f"warning: {path} holds no id; this run is tracked under a new one")
            new = secrets.token_hex(4)
            replace(path, f"{new}\n".encode())
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        return new

    def _remove_temporary(self) -> None:
        shutil.rmtree(self._run_dir / _TEMPORARY, ignore_errors=True)

    def _give_up(self, action: str, error: Exception) -> None:
        self._run = None
        self._remove_temporary()
        self._warn(
            f"wandb: {action} failed ({_reason(error)}); off for the rest of this run, "
            "metrics.jsonl goes on"
        )


@contextmanager
def _temporary_folders_in(folder: Path) -> Iterator[None]:
    """Let wandb make its temporary folders there, as it does when it is imported, and anew.

    In the machine's own they would stay for ever where the process is killed, or forked and so
    ends without the clean-up that wandb relies on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    before, tempfile.tempdir = tempfile.tempdir, str(folder.resolve())
    try:
        yield
    finally:
        tempfile.tempdir = before


def has_api_key() -> bool:
    """Whether wandb would find an API key: in WANDB_API_KEY, or in netrc for its server."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    named = os.environ.get("NETRC")
    paths = [Path(named)] if named else [Path("~/.netrc"), Path("~/_netrc")]
    for path in paths:
        try:
            if netrc.netrc(path.expanduser()).authenticators(host):
                return True
        except (OSError, RuntimeError, netrc.NetrcParseError):
            continue  # no file, no home or not readable: no key there
    return False


def _reason(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:100]}" if text else type(error).__name__


def _flat(kind: str, record: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in record.items():
        if key in ("kind", "step"):
            if key == "step":
                yield key, value
        elif isinstance(value, Mapping):
            group = key if kind == "train" else f"{kind}/{key}"
            yield from _flat(group, value)
        elif value is not None:
            yield f"{kind}/{key}", value
