"""Loads a run and lets its model continue a text, byte by byte, through a stream.

python examples/continue_text.py [RUN [TEXT]]
"""

from __future__ import annotations

import sys

import torch

import nlscale

LENGTH = 200  # tokens to draw
TEMPERATURE = 0.8


def main(run: str = "runs/quickstart", text: str = "def read(path):\n    ") -> None:
    """Print the text and what the model makes of it."""
    model = nlscale.load(run)
    stream = model.stream()
    logits = stream.feed(model.encode(text))
    drawn: list[int] = []
    for _ in range(LENGTH):
        chances = torch.softmax(logits[0, -1] / TEMPERATURE, dim=-1)
        drawn.append(int(torch.multinomial(chances, 1)))
        logits = stream.feed([drawn[-1:]])  # the stream holds what all tokens before have left
    print(text + model.decode(drawn))


if __name__ == "__main__":
    main(*sys.argv[1:])
