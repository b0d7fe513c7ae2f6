"""Opening a service by its URL, and what its client says in one line. fsspec is imported here."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from nlscale.errors import UserError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_LONGEST = 200  # characters of what a client says
_EXTRAS = {"s3": "s3", "s3a": "s3", "http": "http", "https": "http"}
"""Extras of nlscale that bring the package of a protocol."""


class ServiceError(UserError):
    """What a service could not do: which URL, what and why, in one line."""


def open_service(
    url: str, key: str, example: str, options: dict[str, Any] | None = None
) -> tuple[AbstractFileSystem, str]:
    """The client of a service, and the path below which it has what the URL names.

    Args:
        url: of a folder; see `nlscale.config.urls.wrong_with`.
        key: of the configuration, which errors name.
        example: a URL that would be right.
        options: for the client.

    Raises:
        UserError: a protocol that is unknown, or whose package is missing.
        ServiceError: the client refuses it.
    """
    protocol = url.partition("://")[0]
    try:
        import fsspec
        from fsspec.core import url_to_fs
    except ImportError:
        raise UserError(f"{key} needs fsspec: pip install fsspec") from None
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        fix = f"pip install 'nlscale[{extra}]', on every node" if extra else reason(error)
        raise UserError(f"{key} {url}: the package for {protocol}:// is missing: {fix}") from None
    except ValueError:
        raise UserError(
            f"{key} {url}: unknown protocol {protocol}://; give a URL such as "
            f"{example}, or of another protocol that fsspec knows"
        ) from None
    try:
        files, root = url_to_fs(url, **(options or {}))
    except Exception as error:
        raise ServiceError(f"cannot open {url}: {reason(error)}") from error
    return files, root.rstrip("/")


def reason(error: BaseException) -> str:
    """What an exception of a client says, in one line and without what may be secret in it."""
    said = isinstance(error, OSError) and error.strerror
    text = " ".join(str(said or error).split()) or type(error).__name__
    if isinstance(error, FileNotFoundError) and "bucket" not in text:
        text = "it is not there"
    text = re.sub(r"(://)[^/\s@]*@", r"\1", re.sub(r"\?\S*", "", text))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
