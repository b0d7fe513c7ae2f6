"""The tokenizer of what is asked in text."""

from __future__ import annotations

from pathlib import Path

from nlscale.data.tokenizer import SymbolTokenizer, Tokenizer
from nlscale.errors import UserError
from nlscale.generate.given import tokenizer_for
from nlscale.generate.model import Model


def tokenizer_of(model: Model, file: Path | None) -> Tokenizer:
    """The tokenizer of a model, which reads text.

    Args:
        model: that is asked.
        file: of `--tokenizer`; None: the model's own.

    Raises:
        UserError: as `tokenizer_for`; or its ids are no text.
    """
    tokenizer = tokenizer_for(model, file)
    if isinstance(tokenizer, SymbolTokenizer):
        raise UserError(
            f"the model reads symbols of {tokenizer.name}, and no text; ask it with nlscale eval "
            f"recall, automata, mad or babi"
        )
    return tokenizer
