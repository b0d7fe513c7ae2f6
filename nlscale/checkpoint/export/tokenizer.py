"""Our tokenizers as the files of Hugging Face: `tokenizer.json` and `tokenizer_config.json`.

The same text has the same ids, and ids the same text: no token is put before a text or after it,
which the tokenizer of an imported Llama does by itself. The separator, which follows each document
in the data, is the token of its end.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import tokenizers as hf

from nlscale.data.tokenizer import (
    END_OF_TEXT,
    OURS,
    SETTINGS_NAME,
    TOKENIZER_NAME,
    ByteTokenizer,
    HuggingFaceTokenizer,
    SymbolTokenizer,
    Tokenizer,
)


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> list[str]:
    """Write both files; their names.

    `AutoTokenizer.from_pretrained(folder)` reads them. As in nlscale, a text that merely mentions
    the separator's name does not give its id (`split_special_tokens`).
    """
    tokenizer.save(folder)
    own = json.loads((folder / TOKENIZER_NAME).read_text(encoding="utf-8"))
    carrier = _CARRIERS[type(tokenizer)](folder / TOKENIZER_NAME)
    separator = carrier.id_to_token(tokenizer.separator)
    text = json.dumps(json.loads(carrier.to_str()), ensure_ascii=False, indent=1)
    (folder / TOKENIZER_NAME).write_text(f"{text}\n", encoding="utf-8")
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        **tokenizer.settings(),
        "eos_token": separator,
        "pad_token": separator,
        "padding_side": "left",
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        # by which `load_tokenizer` gives ours again
        **({OURS: own} if OURS in own else {}),
    }
    content = json.dumps(described, ensure_ascii=False, indent=2)
    (folder / SETTINGS_NAME).write_text(f"{content}\n", encoding="utf-8")
    return [TOKENIZER_NAME, SETTINGS_NAME]


def _bytes(saved: Path) -> hf.Tokenizer:
    """A BPE without merges over the characters that stand for bytes: an id is the byte's value."""
    vocabulary = {character: byte for byte, character in _characters().items()}
    del vocabulary[_characters()[ByteTokenizer.separator]]  # which no text has
    carrier = hf.Tokenizer(hf.models.BPE({**vocabulary, END_OF_TEXT: ByteTokenizer.separator}, []))
    # without the regular expression that cuts words: there are no merges that it would keep apart
    carrier.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    carrier.decoder = hf.decoders.ByteLevel()
    carrier.add_special_tokens([hf.AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return carrier


def _symbols(saved: Path) -> hf.Tokenizer:
    """Words between spaces; one that is no symbol is an error there too."""
    symbols = json.loads(saved.read_text(encoding="utf-8"))["symbols"]
    ids = {symbol: number for number, symbol in enumerate(symbols)}
    carrier = hf.Tokenizer(hf.models.WordLevel(ids))
    carrier.pre_tokenizer = hf.pre_tokenizers.WhitespaceSplit()
    carrier.add_special_tokens([hf.AddedToken(symbols[-1], special=True, normalized=False)])
    return carrier


def _bpe(saved: Path) -> hf.Tokenizer:
    """As it is, but for the template that begins or ends each text with a token."""
    content = json.loads(saved.read_text(encoding="utf-8"))
    content["post_processor"] = None
    return hf.Tokenizer.from_str(json.dumps(content))


def _characters() -> dict[int, str]:
    """The character by which byte-level tokenizers write each byte: printable ones are themselves,
    the others the characters from 256 on, in their order."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return {byte: chr(byte if byte in printable else next(others)) for byte in range(256)}


_CARRIERS: dict[type[Tokenizer], Callable[[Path], hf.Tokenizer]] = {
    ByteTokenizer: _bytes,
    HuggingFaceTokenizer: _bpe,
    SymbolTokenizer: _symbols,
}
