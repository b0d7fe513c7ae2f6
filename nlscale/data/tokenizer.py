"""Which tokenizer: plain bytes, a BPE trained on the text itself, or one that a file describes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nlscale.config.urls import Location, inside, is_url
from nlscale.data.encoders.base import (
    END_OF_TEXT,
    LARGEST_VOCABULARY,
    OURS,
    SETTINGS_NAME,
    TOKENIZER_NAME,
    Tokenizer,
)
from nlscale.data.encoders.huggingface import (
    SEPARATOR_KEY,
    VOCABULARY_KEY,
    HuggingFaceTokenizer,
    padded,
    train_bpe,
)
from nlscale.data.encoders.plain import ByteTokenizer, SymbolTokenizer
from nlscale.data.index import read_index
from nlscale.data.remote.service import copied
from nlscale.errors import UserError

if TYPE_CHECKING:
    import tokenizers as hf

__all__ = [
    "END_OF_TEXT",
    "OURS",
    "SETTINGS_NAME",
    "TOKENIZER_NAME",
    "ByteTokenizer",
    "HuggingFaceTokenizer",
    "SymbolTokenizer",
    "Tokenizer",
    "bpe_vocabulary",
    "decided_beside",
    "given_file",
    "load_tokenizer",
    "read_tokenizer",
    "train_bpe",
]

FILE = "file:"
"""What a tokenizer begins with that a file describes, as `file:PATH/tokenizer.json`."""
SMALLEST_BPE = 257  # the 256 bytes and the separator


def given_file(spec: str) -> Path | None:
    """The tokenizer.json that is named by itself, or by its folder; None: no file is named.

    Raises:
        UserError: there is none at that path.
    """
    if spec.startswith(FILE):
        path = Path(spec.removeprefix(FILE)).expanduser()
        if not path.is_file():
            raise UserError(f"no tokenizer at {path}; name a {TOKENIZER_NAME} of Hugging Face")
        return path
    named = spec == "bytes" or spec.startswith("bpe:")
    return Path(spec) / TOKENIZER_NAME if not named and Path(spec).is_dir() else None


def bpe_vocabulary(spec: str) -> int | None:
    """The vocabulary N of "bpe:N"; None for "bytes". Raises UserError for anything else."""
    if spec == "bytes":
        return None
    kind, _, size = spec.partition(":")
    if kind != "bpe" or not (size.isascii() and size.isdecimal()):
        raise UserError(
            f"unknown tokenizer {spec!r}; use bytes, bpe:N such as bpe:32000, "
            f"{FILE}PATH/{TOKENIZER_NAME}, or a folder with a {TOKENIZER_NAME}"
        )
    if len(size) > 9 or int(size) > LARGEST_VOCABULARY:
        raise UserError(f"tokenizer {spec[:40]}: it must have at most {LARGEST_VOCABULARY:,} ids")
    if int(size) < SMALLEST_BPE:
        raise UserError(
            f"tokenizer {spec}: a byte-level BPE needs at least {SMALLEST_BPE} ids (256 bytes and "
            f"the separator); use bpe:{SMALLEST_BPE} or more, or bytes"
        )
    return int(size)


def load_tokenizer(directory: Location) -> Tokenizer:
    """The tokenizer saved in `directory` (a data folder, for example, or a URL of one).

    Raises:
        UserError: there is none, or it cannot be read; or behind a URL it is not that of the index.
    """
    if is_url(directory):
        with copied(directory, TOKENIZER_NAME, SETTINGS_NAME) as here:
            tokenizer = load_tokenizer(here)
        digest = read_index(directory).get("tokenizer_sha256", tokenizer.identity())
        if digest != tokenizer.identity():
            raise UserError(
                f"{inside(directory, TOKENIZER_NAME)} has not made the data there: its sha256 is "
                f"{tokenizer.identity()}, the index says {digest}; copy the folder there again"
            )
        return tokenizer
    return read_tokenizer(Path(directory) / TOKENIZER_NAME)


def read_tokenizer(
    path: Path, separator: str | None = None, multiple: int | None = None
) -> Tokenizer:
    """The tokenizer of a tokenizer.json, of ours or of Hugging Face.

    Args:
        path: of it; a tokenizer_config.json beside it may say which token ends a text.
        separator: that token. None: what a build has written down there; <|endoftext|> where the
            tokenizer has it; the `eos_token` there.
        multiple: the vocabulary is rounded up to a multiple of it, and may have gaps.

    Raises:
        UserError: there is none, or it cannot be read; or there is no such token.
    """
    try:
        text = path.read_text(encoding="utf-8")
        settings = _settings(path.with_name(SETTINGS_NAME))
        content = settings.get(OURS, json.loads(text))
    except FileNotFoundError:
        raise UserError(
            f"no tokenizer at {path}; name a folder made by `nlscale data build`"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}; restore or rebuild it") from None
    try:
        if isinstance(content, dict) and "nlscale" in content:
            return _ours(content, separator, multiple)
        import tokenizers as hf

        carrier = hf.Tokenizer.from_str(text)
        end = separator if separator is not None else _end_of_text(carrier, settings)
        vocabulary = settings.get(VOCABULARY_KEY) if multiple is None else padded(carrier, multiple)
        if not isinstance(vocabulary, int | None) or isinstance(vocabulary, bool):
            raise UserError(f"{SETTINGS_NAME} beside it: {VOCABULARY_KEY} is no whole number")
        return HuggingFaceTokenizer(carrier, end, vocabulary)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except BaseException as error:  # bare Exception, and PanicException, which is none
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        reason = str(error).partition("\n")[0]
        raise UserError(f"cannot read {path}: {reason}; restore or rebuild it") from None


def decided_beside(
    path: Path, tokenizer: Tokenizer, separator: str | None, multiple: int | None
) -> bool:
    """Whether the tokenizer_config.json beside a tokenizer.json decides what is not asked for.

    Args:
        path, separator, multiple: as of `read_tokenizer`, which has not refused them.
        tokenizer: that it gave.
    """
    settings, made = _settings(path.with_name(SETTINGS_NAME)), tokenizer.settings()
    return (
        OURS in settings
        or (separator is None and bool(settings) and SEPARATOR_KEY in made)
        or (multiple is None and VOCABULARY_KEY in made)
    )


def _settings(path: Path) -> dict[str, Any]:
    """What a file of Hugging Face beside a tokenizer says; nothing where there is none."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} beside it is not a JSON object")
    return content


def _end_of_text(carrier: hf.Tokenizer, settings: dict[str, Any]) -> str:
    """The token that ends a text: ours where there is one, else what the file beside it says."""
    if (chosen := settings.get(SEPARATOR_KEY)) is not None:
        if not isinstance(chosen, str):
            raise UserError(f"{SETTINGS_NAME} beside it: {SEPARATOR_KEY} is no text")
        return chosen
    if carrier.token_to_id(END_OF_TEXT) is not None or not settings:
        return END_OF_TEXT
    end = settings.get("eos_token")
    end = end.get("content") if isinstance(end, dict) else end
    if not isinstance(end, str):
        raise UserError(
            f"{SETTINGS_NAME} beside it names no eos_token; add it, or name the token that ends a "
            f"text with --separator"
        )
    return end


def _ours(content: dict[str, Any], separator: str | None, multiple: int | None) -> Tokenizer:
    """A tokenizer that no library carries."""
    tokenizer: Tokenizer = ByteTokenizer() if content == {"nlscale": "bytes"} else _symbols(content)
    refuse_options(tokenizer.name, separator, multiple, tokenizer.vocabulary)
    return tokenizer


def refuse_options(
    name: str, separator: str | None, multiple: int | None, vocabulary: int | None = None
) -> None:
    """Refuse, by a UserError, what cannot be chosen of a tokenizer of ours.

    Args:
        name: of it.
        separator, multiple: as of `read_tokenizer`.
        vocabulary: which cannot be another; None: it can.
    """
    if separator is not None:
        raise UserError(f"{name} has a separator of its own; leave out --separator")
    if multiple is not None and vocabulary is not None and vocabulary % multiple:
        raise UserError(
            f"{name} has {vocabulary} ids, no multiple of {multiple}; leave out "
            f"--vocabulary-multiple, and give model.vocabulary to a run"
        )


def _symbols(content: dict[str, object]) -> SymbolTokenizer:
    name, symbols = content.get("name"), content.get("symbols")
    if content.get("nlscale") != "symbols":
        raise UserError("it is of a kind that this version does not know")
    if not isinstance(name, str) or not isinstance(symbols, list):
        raise UserError("it has no name or no list of symbols; build the data again")
    return SymbolTokenizer(name, symbols)
