"""What keys of `model.memory` come to, for who counts. No torch is imported."""

from __future__ import annotations

from nlscale.config.vocabulary import MemoryGain, MemoryGates, ModelConfig, head_dim

SERIAL = ("gates", "gain", "reads_state", "chunk_momentum")
"""Keys of what the scan does chunk by chunk."""


def inputs(model: ModelConfig) -> int:
    """Projections that feed keys and values: one for both, or one each."""
    return 2 if model.memory.separate_inputs else 1


def convolved(model: ModelConfig) -> int:
    """Sections of the projection that the convolution takes."""
    return inputs(model) + model.memory.query_convolution


def sections(model: ModelConfig) -> int:
    """Of the projection: what feeds keys and values, queries, and the gate of the output."""
    return inputs(model) + 1 + bool(model.memory.output_gate)


def gate_rows(model: ModelConfig) -> int:
    """Logits of the gates of a head and token: eta and alpha, or b, w and alpha by channel."""
    return 3 * head_dim(model) if model.memory.gates == MemoryGates.channel else 2


def serial_keys(model: ModelConfig) -> list[str]:
    """Those of `SERIAL` that are on."""
    memory = model.memory
    on = (
        memory.gates == MemoryGates.channel,
        memory.gain == MemoryGain.kalman,
        memory.reads_state,
        memory.chunk_momentum,
    )
    return [name for name, is_on in zip(SERIAL, on, strict=True) if is_on]
