"""What keys that a recipe leaves null mean, by what else it chooses."""

from __future__ import annotations

_STATIC: dict[str, float | bool] = {
    "lambda_init": 0.0,
    "anchored": True,
    "c": 0.0,
    "normalize_value": True,
    "separate_inputs": True,
    "static_gates": True,
    "output_gate": True,
    "read_norm": True,
    "eta_bias": 0.0,
}

MIXER_PRESETS: dict[str, dict[str, float | bool]] = {
    "hope": {**_STATIC, "lambda_init": 0.3},
    "hope-pure": {
        "lambda_init": 1.0,
        "anchored": True,
        "c": 1.0,
        "normalize_value": True,
        "separate_inputs": True,
        "static_gates": True,
        "output_gate": True,
        "read_norm": True,
        "eta_bias": -2.0,
    },
    "hope-paper": {
        "lambda_init": 1.0,
        "anchored": False,
        "c": 1.0,
        "normalize_value": False,
        "separate_inputs": False,
        "static_gates": False,
        "output_gate": False,
        "read_norm": False,
        "eta_bias": -2.0,
    },
    "gated-delta": dict(_STATIC),
    "deltanet": dict(_STATIC),
    "retnet": {**_STATIC, "static_gates": False},
    "linear-attention": dict(_STATIC),
}
"""What a null field of `model.memory` means for each mixer with a memory.

docs/concepts/memory.md says why.
"""
