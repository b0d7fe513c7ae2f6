"""Text to hide needles in: of a data folder, or a file."""

from __future__ import annotations

from pathlib import Path

from nlscale.config.urls import Location, is_url
from nlscale.data.index import INDEX_NAME
from nlscale.data.tokenizer import SymbolTokenizer, load_tokenizer
from nlscale.errors import UserError

_MOST_TOKENS = 1 << 23
"""Of a split, from its start: far more than one haystack."""


def text_of(source: Location, split: str) -> str:
    """The text of a split of a data folder, without what is between its documents; or of a file.

    Raises:
        UserError: it cannot be read, or is no text.
    """
    if is_url(source) or (Path(source) / INDEX_NAME).is_file():
        return _of_folder(source, split)
    try:
        return Path(source).read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(
            f"cannot read the haystack {source}: {error.strerror}; name a text file, or a folder "
            f"made by nlscale data build"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"the haystack {source} is not UTF-8, at byte {error.start:,}") from None


def _of_folder(folder: Location, split: str) -> str:
    from nlscale.data.shards import TokenShards

    shards, tokenizer = TokenShards(folder, split), load_tokenizer(folder)
    if isinstance(tokenizer, SymbolTokenizer):
        raise UserError(
            f"the haystack {folder} holds {tokenizer.name}, and no text; name a text file, or a "
            f"folder of text, with --haystack"
        )
    return tokenizer.decode(shards.read(0, min(shards.tokens, _MOST_TOKENS)))
