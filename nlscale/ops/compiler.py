"""What compiles the kernels for a GPU: Triton, and the ptxas that it calls."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import torch

SOUND = (13, 3)
"""ptxas of CUDA 12.8 to 13.2 may overwrite operands of Hopper's matrix instructions too early."""


@dataclass(frozen=True)
class Compiler:
    """Of a device."""

    triton: str
    """Its version."""
    ptxas: str
    """Likewise, such as 12.8."""
    setting: str
    """Environment variable that names another ptxas."""

    def __str__(self) -> str:
        return f"Triton {self.triton} with ptxas {self.ptxas}"

    @property
    def sound(self) -> bool:
        """Whether no miscompilation of kernels like these is known of its ptxas."""
        return tuple(map(int, self.ptxas.split("."))) >= SOUND


def compiler_for(device: torch.device) -> Compiler | None:
    """What compiles kernels for that device.

    None where there is nothing of it: no NVIDIA GPU, or no Triton, or one that finds no ptxas.
    """
    if device.type != "cuda" or torch.version.cuda is None or find_spec("triton") is None:
        return None
    import triton
    from triton import knobs
    from triton.backends.nvidia.compiler import get_ptxas

    major, minor = torch.cuda.get_device_capability(device)
    try:
        # which of the two that its wheel brings depends on the version of Triton, too
        called, second = get_ptxas(10 * major + minor), knobs.nvidia.ptxas_blackwell
    except RuntimeError:
        return None
    setting = "TRITON_PTXAS_BLACKWELL_PATH" if called.path == second.path else "TRITON_PTXAS_PATH"
    return Compiler(triton.__version__, called.version, setting)
