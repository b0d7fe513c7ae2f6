"""URLs of folders on other services, such as s3://bucket/data, and folders that may be either."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TypeGuard

Location = Path | str
"""Of a folder or file: a path; or, as text, a URL."""
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.:-]*://")


def is_url(text: object) -> TypeGuard[str]:
    """Whether a text is meant as a URL."""
    return isinstance(text, str) and _URL.match(text) is not None


def location_of(text: str) -> Location:
    """What a text stands for that names a path or a URL."""
    return text if is_url(text) else Path(text)


def inside(folder: Location, name: str) -> Location:
    """A file of a folder."""
    return f"{folder}/{name}" if is_url(folder) else Path(folder) / name


def wrong_with(url: str, example: str) -> str | None:
    """Why a text is no URL of a folder that may stand in records, and what to do; None: it is one.

    Credentials in it are not repeated.

    Args:
        url: what was given.
        example: a URL that would be right.
    """
    protocol, separator, rest = url.partition("://")
    if "?" in rest or ("@" in rest and ":" in rest.partition("@")[0]):
        return (
            "holds credentials, or what looks like them (user:password@, or a "
            "query after ?), and would be in logs and records; give the URL without, and let "
            "the service's client find them (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
            "~/.aws/credentials)"
        )
    plain = url.isprintable() and url == url.strip()
    if "::" in url or not separator or not protocol or not rest.strip("/") or not plain:
        return f"{url!r} is not a URL of a folder; give one such as {example}"
    return None
