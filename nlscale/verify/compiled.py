"""`nlscale bench scan --compiled`: what the compiler makes of the kernels for a GPU. Needs no GPU.

The launches of a forward and backward pass are noted while tensors without numbers go through it.
Each is then compiled as Triton's own launch would compile it: Triton specialises a kernel on which
of its integers are 1 or divisible by 16, so that other sizes may be other machine code.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from nlscale.bench.progress import each
from nlscale.bench.scan import Size, model_of, triton_version
from nlscale.errors import UserError
from nlscale.model.mixers.memory.facts import MemoryFacts
from nlscale.model.mixers.table import mixer
from nlscale.ops.device import assuming
from nlscale.ops.memory.kernels.sizes import SIZES as KERNEL_SIZES
from nlscale.ops.memory.kernels.sizes import takes

if TYPE_CHECKING:
    from nlscale.ops.memory.rules import MemoryRules

SIZES = ["8x4096x16x64", "8x4096x8x128"]
"""Compiled for where none is given."""
MIXERS = ["hope", "gated-delta", "hope-pure"]
_VOCABULARY = 32000
"""Columns of the logits: that of the recipes."""


@dataclass(frozen=True)
class Limits:
    """Of a multiprocessor; all have 65,536 registers, dealt to warps in units of 256."""

    shared_bytes: int
    program_shared_bytes: int
    """What one program may have at most."""
    warps: int = 64
    programs: int = 32
    tensor_columns: int = 0
    """Of tensor memory."""


TARGETS = {
    "sm_80": Limits(164 * 1024, 163 * 1024),
    "sm_90": Limits(228 * 1024, 227 * 1024),
    "sm_100": Limits(228 * 1024, 227 * 1024, tensor_columns=512),
}
"""A100, H100 and H200, B200."""


class Launch(NamedTuple):
    """Of a kernel: its grid, arguments and options."""

    kernel: Any
    grid: tuple[int, ...]
    given: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__).removesuffix("_kernel")

    @property
    def programs(self) -> int:
        count = 1
        for size in self.grid:
            count *= size
        return count


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Inside, Triton's kernels are not run: their launches are noted in the list."""
    from triton.runtime.jit import JITFunction

    noted: list[Launch] = []
    run = JITFunction.run

    def note(kernel: Any, *given: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> None:
        noted.append(Launch(kernel, grid, given, options))

    JITFunction.run = note  # type: ignore[method-assign]
    try:
        yield noted
    finally:
        JITFunction.run = run  # type: ignore[method-assign]


def scan_launches(
    rules: MemoryRules, size: Size, modifies_itself: bool, documents: bool = False
) -> tuple[list[Launch], list[Launch]]:
    """Of the forward and of the backward pass of a bf16 scan, in their order.

    Args:
        rules: of the memory.
        size: of what is scanned; nothing of it is allocated.
        modifies_itself: whether memories make k, v and the gates.
        documents: whether rows hold several documents, as with `data.document_mask`.
    """
    from nlscale.ops.memory.kernels.fused import FusedScan

    batch, length, heads, d = size.batch, size.length, size.heads, size.head_dim

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=True)

    fed = [empty(batch, heads, length, d, dtype=torch.bfloat16) for _ in range(3)]
    logits = [empty(batch, heads, length) for _ in range(2)]
    pi = empty(batch, heads, d, d) if modifies_itself else None
    main = empty(batch, heads, d, d) if rules.main_memory else None
    makers: list[torch.Tensor | None] = [None] * 3
    if modifies_itself:
        makers = [empty(heads, d, d), empty(heads, d, d), empty(heads, 2, d)]
    chunks = -(-length // rules.chunk)
    carried = torch.empty(batch, chunks, device="meta") if documents else None
    additive = rules.main_memory or not modifies_itself
    with recorded() as forward:
        reads, *_ = FusedScan.apply(*fed, *logits, pi, main, carried, *makers, additive, rules)
    with recorded() as backward:
        reads.backward(torch.empty_like(reads))
    return forward, backward


def loss_launches(rows: int, columns: int = _VOCABULARY) -> tuple[list[Launch], list[Launch]]:
    """Of the loss of so many bf16 logits, forward and backward."""
    from nlscale.ops.loss.kernel import row_statistics, to_gradient_

    logits = torch.empty(rows, columns, dtype=torch.bfloat16, device="meta")
    targets = torch.empty(rows, dtype=torch.int64, device="meta")
    log_sum = torch.empty(rows, device="meta")
    with recorded() as forward:
        row_statistics(logits, targets)
    with recorded() as backward:
        to_gradient_(logits, targets, log_sum, log_sum)
    return forward, backward


class _Device:
    """Stands in for Triton's driver of a GPU, which is asked what to compile for."""

    def __init__(self, target: str) -> None:
        # Triton keeps compiled kernels by device, and does not mind what a device is
        self.target = target

    def get_current_device(self) -> str:
        return self.target

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", _capability(self.target), 32)


def compiled(launch: Launch, target: str) -> Any:
    """Triton's compiled kernel, by what its own launch does before it runs one.

    Raises:
        UserError: the compiler fails.
    """
    from triton.runtime.driver import driver

    driver.set_active(_Device(target))  # type: ignore[arg-type]
    try:
        return launch.kernel.run(*launch.given, grid=launch.grid, warmup=True, **launch.options)
    except Exception as failure:  # LLVM's and ptxas's have no class in common
        why = str(failure).strip().splitlines() or [type(failure).__name__]
        raise UserError(
            f"{launch.name} does not compile for {target} with Triton {triton_version()}: {why[0]}"
        ) from failure
    finally:
        driver.set_active(None)  # type: ignore[arg-type]  # the machine's own, when it is asked for


class Usage(NamedTuple):
    """What machine code takes, a thread."""

    registers: int
    stack_bytes: int
    """Next to all of it registers that were spilled."""


def usage_of(cubin: bytes) -> Usage:
    """Of machine code.

    Raises:
        UserError: there is no cuobjdump.
    """
    said = _read(cubin, "cuobjdump", "--dump-resource-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found is not None, said
    return Usage(*map(int, found.groups()))


def is_serialized(cubin: bytes) -> bool:
    """Whether Hopper's matrix instructions wait for each other one by one.

    ptxas makes them, where it runs out of registers; else the few of one product run together.

    Raises:
        UserError: there is no nvdisasm.
    """
    products = re.findall(r"HGMMA.*", _read(cubin, "nvdisasm", "-c"))
    return bool(products) and all("gsb0" in line for line in products)  # what closes a group


def _read(cubin: bytes, name: str, option: str) -> str:
    tool = _tool(name)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [tool, option, file.name], capture_output=True, text=True, check=True
        ).stdout


def resident_programs(
    limits: Limits, warps: int, registers: int, shared_bytes: int, tensor_columns: int = 0
) -> int:
    """How many of a kernel's programs a multiprocessor holds at once; 0: it cannot be launched."""
    if shared_bytes > limits.program_shared_bytes:
        return 0
    each_warp = -(-registers * 32 // 256) * 256
    bounds = [
        limits.programs,
        limits.warps // warps,
        4 * (65536 // 4 // each_warp) // warps,  # warps belong to one of four schedulers
        limits.shared_bytes // (shared_bytes + 1024),  # the system has 1 KiB of each program
    ]
    if tensor_columns:
        bounds.append(limits.tensor_columns // tensor_columns)
    return min(bounds)


def compile_scan(
    target: str, sizes: list[Size], mixers: list[str], chunk: int, documents: bool = False
) -> dict[str, Any]:
    """Compile every kernel of a training step of each mixer and size, and of the loss.

    Args:
        target: one of `TARGETS`.
        sizes: of what is scanned.
        mixers: with a memory that the kernels take.
        chunk: a chunk's tokens.
        documents: as of `scan_launches`.

    Returns:
        The target, the compilers, and `rows`, one a kernel: `programs` it is launched in, `warps`,
        `stages`, `registers` and `stack_bytes` a thread, `shared_bytes` a program, how many
        programs a multiprocessor holds (`resident`; 0: it has too little shared memory), and
        whether matrix instructions wait for each other (`serialized`).

    Raises:
        UserError: the target or a mixer is unknown, the kernels do not take one of these, or there
            is no Triton, no ptxas, or one that fails.
    """
    versions = compilers(target)
    with assuming(_capability(target) // 10):
        parts = [(str(size), name, *_launches(name, size, chunk, documents))
                 for size in sizes for name in mixers]  # fmt: skip
    tokens = max(size.batch * size.length for size in sizes)
    parts.append((f"{tokens}x{_VOCABULARY}", "loss", *loss_launches(tokens)))
    rows = []
    for size, name, *passes in each("scan --compiled", parts, lambda part: f"{part[0]}, {part[1]}"):
        for way, launches in zip(("forward", "backward"), passes, strict=True):
            for launch in launches:
                row = {"size": size, "mixer": name, "pass": way, "kernel": launch.name}
                rows.append({**row, **_measure(launch, target)})
    return {"target": target, **versions, "chunk": chunk, "rows": rows}


def _launches(
    name: str, size: Size, chunk: int, documents: bool
) -> tuple[list[Launch], list[Launch]]:
    facts = mixer(name)
    if not isinstance(facts, MemoryFacts):
        raise UserError(f"mixer {name} scans no memory; --mixers knows {', '.join(MIXERS)}")
    rules = facts.rules(model_of(name, size, chunk))
    if not takes(rules, size.head_dim, not facts.modifies_itself):
        raise UserError(
            f"there are no kernels for {name} with heads of {size.head_dim} and --chunk {chunk}; "
            f"there are for {', '.join(MIXERS)}, heads and chunks of "
            f"{', '.join(f'{d}/{c}' for c, d in sorted(KERNEL_SIZES))}"
        )
    return scan_launches(rules, size, facts.modifies_itself, documents)


def _measure(launch: Launch, target: str) -> dict[str, Any]:
    kernel = compiled(launch, target)
    made, used = kernel.metadata, usage_of(kernel.asm["cubin"])
    return {
        "programs": launch.programs,
        "warps": made.num_warps,
        "stages": made.num_stages,
        **used._asdict(),
        "serialized": is_serialized(kernel.asm["cubin"]),
        "shared_bytes": made.shared,
        "resident": resident_programs(
            TARGETS[target], made.num_warps, used.registers, made.shared, made.tmem_size or 0
        ),
    }


def compilers(target: str) -> dict[str, str]:
    """Versions of Triton and of the ptxas that it calls for a target.

    Raises:
        UserError: the target is unknown, or one of them is not there.
    """
    if target not in TARGETS:
        raise UserError(f"--compiled {target} is not known; it is one of {', '.join(TARGETS)}")
    version = triton_version()
    if version is None:
        raise UserError("--compiled needs Triton, which is not installed; pip install triton")
    from triton import knobs
    from triton.backends.nvidia.compiler import get_ptxas_version

    if knobs.runtime.interpret:
        raise UserError("--compiled cannot compile while TRITON_INTERPRET is set; unset it")
    try:
        said = get_ptxas_version(_capability(target))
    except (RuntimeError, OSError) as failure:
        raise UserError(
            f"Triton {version} finds no ptxas for {target}; install Triton from its wheel, or name "
            f"one in TRITON_PTXAS_PATH or, where it calls the newer, TRITON_PTXAS_BLACKWELL_PATH"
        ) from failure
    found = re.search(r"V([\d.]+)", said)
    return {"triton": version, "ptxas": found[1] if found else said.strip()}


def _tool(name: str) -> str:
    from triton import knobs

    try:
        return str(getattr(knobs.nvidia, name).path)
    except RuntimeError as failure:
        raise UserError(
            f"Triton finds no {name}; install Triton from its wheel, or name one in "
            f"TRITON_{name.upper()}_PATH"
        ) from failure


def _capability(target: str) -> int:
    return int(target.removeprefix("sm_"))


def print_compiled(result: dict[str, Any]) -> None:
    """Print what `compile_scan` returns, a table for each size and mixer."""
    console = Console(soft_wrap=True, highlight=False)
    console.print(
        f"{result['target']}, Triton {result['triton']}, ptxas {result['ptxas']}; chunks of "
        f"{result['chunk']}\nregisters and bytes of stack (spilled registers) a thread, KiB of "
        f"shared memory a program, and\nprograms that a multiprocessor holds at once; *: short of "
        f"registers, matrix instructions wait\nfor each other; first the forward pass, then the "
        f"backward pass"
    )
    names = ("programs", "warps", "stages", "registers", "stack", "KiB", "at once")
    tables: dict[tuple[str, str], Table] = {}
    last = ""
    for row in result["rows"]:
        which = row["size"], row["mixer"]
        if which not in tables:
            tables[which] = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
            tables[which].add_column("kernel", no_wrap=True, min_width=len("writes_backward *"))
            for name in names:
                tables[which].add_column(name, justify="right")
        elif row["pass"] != last:
            tables[which].add_section()
        last = row["pass"]
        numbers = (
            row["programs"], row["warps"], row["stages"], row["registers"], row["stack_bytes"],
            row["shared_bytes"] // 1024, row["resident"],
        )  # fmt: skip
        label = row["kernel"] + " *" * row["serialized"]
        tables[which].add_row(label, *map(str, numbers))
    for (size, name), table in tables.items():
        console.print(f"\n{name}, {size}")
        console.print(table)
