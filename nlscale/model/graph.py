"""One token of every row as one CUDA graph: a launch in place of hundreds.

It has run on no GPU yet.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nlscale.model.one_token import DecoderOneToken

AFTER = 16
"""Tokens that are read one by one before a graph is worth its capture."""
_WARM_UP = 3
"""Times that a token is read on copies: libraries allocate when they are first called."""


class CapturedToken:
    """`DecoderOneToken.logits` of all rows, for the states that it is made with.

    They are written in place: the graph is of their addresses, and made anew where these change.
    """

    def __init__(self, one_token: DecoderOneToken, states: dict[str, Any], tokens: Tensor) -> None:
        """Reads nothing.

        Args:
            one_token: which is `capturable`.
            states: of the blocks, which share no memory.
            tokens: ids like those to come, [batch], on the GPU.
        """
        self.tokens = tokens.clone()
        rows = torch.arange(len(tokens))
        side = torch.cuda.Stream(tokens.device)
        side.wait_stream(torch.cuda.current_stream(tokens.device))
        with torch.cuda.stream(side):
            copies = {index: state.select(rows) for index, state in states.items()}
            for _ in range(_WARM_UP):
                one_token.logits(self.tokens, copies, None)
        torch.cuda.current_stream(tokens.device).wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(tokens.device), torch.cuda.graph(self.graph, stream=side):
            self.result = one_token.logits(self.tokens, dict(states), None)

    def logits(self, tokens: Tensor) -> Tensor:
        """tokens [batch] -> logits [batch, vocabulary]; what the host keeps account of is not."""
        self.tokens.copy_(tokens)
        self.graph.replay()
        return self.result.clone()
