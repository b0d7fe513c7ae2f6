"""Whether a mirror can be used, before anything expensive. No torch is imported."""

from __future__ import annotations

import uuid

from nlscale.checkpoint.mirror.remote import MirrorError, Remote
from nlscale.config.vocabulary import Config
from nlscale.errors import UserError


def check_mirror(config: Config) -> None:
    """See that `checkpoint.mirror` is a URL that this process has the package for.

    Raises:
        UserError: one line that names checkpoint.mirror, what is wrong and what to do.
    """
    if config.checkpoint.mirror is not None:
        Remote(config.checkpoint.mirror)


def probe_mirror(config: Config) -> None:
    """See that objects can be listed, written, read and removed where `checkpoint.mirror` says.

    Called by one process, which tries with a small object of its own.

    Raises:
        UserError: one line that names checkpoint.mirror, what is wrong and what to do.
    """
    url = config.checkpoint.mirror
    if url is None:
        return
    remote, name = Remote(url), f"probe-{uuid.uuid4().hex}"
    try:
        remote.listing()
        remote.write(name, name.encode())
        whole = remote.read(name) == name.encode()
        remote.remove(name)
    except MirrorError as error:
        raise UserError(
            f"checkpoint.mirror: {error}; the bucket must exist, and this user may list, read, "
            f"write and remove objects there; or checkpoint.mirror=null"
        ) from None
    if not whole:
        raise UserError(
            f"checkpoint.mirror: {url} does not give back what was written there; see to the "
            f"service, or checkpoint.mirror=null"
        )
