"""How two checkpoints differ, class by class; whatever the layouts of ranks that wrote them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nlscale.checkpoint.store.pieces import Piece, TensorInfo
from nlscale.checkpoint.store.store import Checkpoint

_CLASSES = {
    "weights": "parameters",
    "local_weights": "parameters",
    "window": "windows",
    "error": "windows",
    "owner_error": "windows",
}
"""By the first part of a tensor's name; the others are what the optimizer rule keeps."""
_LOSSES = ("recent", "first_loss", "last_losses")
_CIRCUMSTANCES = (
    "config",
    "versions",
    "layout",
    "data",
    "wandb_id",
    "pending",
    "gradient_noise",
)
"""What may differ between checkpoints of one state."""
_BOX = 1 << 26  # elements read of each side at once: 256 MB in fp32


def compare(a: Checkpoint, b: Checkpoint) -> dict[str, Any]:
    """Compare two checkpoints tensor by tensor; memory does not grow with the model.

    The difference of two tensors is |a - b| / |b| by norm, in float64; by |a| where b is all zeros,
    and infinite where one is not finite or they cannot be compared. Moments and windows that one
    side does not hold are zeros: nothing has been added to them. Windows that are kept node by
    node (`checkpoint.pending=exact`) are compared by their sum where the other side has others.

    Returns:
        `bitwise`: whether all of `classes` are; `max_relative_difference`: over all tensors; and
        `classes`:
        `parameters`, `optimizer`, `windows`, `losses`: each `bitwise`, `max_relative_difference`,
        `worst` (the name where it is largest; None where nothing differs), `relative_difference`
        (of all tensors of the class as one) and `unlike` (names that one side lacks or has in
        another shape);
        `progress` (counters and levels), `samples` (the number of the next): each `bitwise` and
        `differs`, dotted keys.

    Raises:
        CheckpointError: a tensor cannot be read.
    """
    tensors = a.tensors(), b.tensors()
    classes = {kind: _Class() for kind in ("parameters", "optimizer", "windows")}
    for name, sides in _pairs(*tensors):
        kind = class_of(name)
        infos = [infos[n] for infos, names in zip(tensors, sides, strict=True) for n in names]
        lacking = kind == "parameters" and not all(sides)
        if lacking or len({info.shape for info in infos}) > 1:
            classes[kind].cannot_compare(name)
        else:
            classes[kind].add(name, _compare(infos[0], (a, sides[0]), (b, sides[1])))
    apart = {*_LOSSES, *_CIRCUMSTANCES, "samples"}
    progress = differing(*({k: v for k, v in c.state.items() if k not in apart} for c in (a, b)))
    samples = differing(*({"samples": c.state["samples"]} for c in (a, b)))
    result: dict[str, Any] = {
        **{kind: found.to_plain() for kind, found in classes.items()},
        "losses": _losses(a.state, b.state).to_plain(),
        "progress": {"bitwise": not progress, "differs": list(progress)},
        "samples": {"bitwise": not samples, "differs": list(samples)},
    }
    return {
        "bitwise": all(entry["bitwise"] for entry in result.values()),
        "max_relative_difference": max(found.largest for found in classes.values()),
        "classes": result,
    }


def class_of(name: str) -> str:
    """The class that a stored tensor belongs to: parameters, optimizer or windows."""
    return _CLASSES.get(name.partition("/")[0], "optimizer")


def differing(a: Any, b: Any) -> dict[str, list[Any]]:
    """Where two nested structures of dicts, lists and scalars differ: [a, b] by dotted key.

    What one side lacks is None there.
    """
    left, right = dict(_leaves(a)), dict(_leaves(b))
    lacking = object()
    return {
        key: [left.get(key), right.get(key)]
        for key in dict.fromkeys([*left, *right])
        if left.get(key, lacking) != right.get(key, lacking)
    }


@dataclass(frozen=True)
class _Gap:
    """How two tensors, a and b, differ."""

    bitwise: bool
    squares: tuple[float, float, float]
    """|a - b|^2, |a|^2, |b|^2."""

    @property
    def relative(self) -> float:
        """|a - b| / |b|, or / |a| where b is zero; infinite where one is not finite."""
        gap, size_a, size_b = self.squares
        if self.bitwise or gap == 0:
            return 0.0
        relative = math.sqrt(gap / (size_b or size_a))
        return relative if math.isfinite(relative) else math.inf


@dataclass
class _Class:
    """How a class of tensors, or the losses, differ as far as they have been compared."""

    bitwise: bool = True
    largest: float = 0.0
    worst: str | None = None
    unlike: list[str] = field(default_factory=list)
    squares: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def add(self, name: str, gap: _Gap) -> None:
        self.bitwise &= gap.bitwise
        mine = zip(self.squares, gap.squares, strict=True)
        self.squares = tuple(x + y for x, y in mine)  # type: ignore[assignment]
        relative = gap.relative
        if relative > self.largest or (not gap.bitwise and self.worst is None):
            self.largest, self.worst = max(relative, self.largest), name

    def cannot_compare(self, name: str) -> None:
        self.unlike.append(name)
        self.add(name, _Gap(False, (math.inf, 0.0, 1.0)))

    def to_plain(self) -> dict[str, Any]:
        return {
            "bitwise": self.bitwise,
            "max_relative_difference": self.largest,
            "worst": self.worst,
            "relative_difference": _Gap(self.bitwise, self.squares).relative,
            "unlike": self.unlike,
        }


def _pairs(
    a: dict[str, TensorInfo], b: dict[str, TensorInfo]
) -> Iterator[tuple[str, tuple[list[str], list[str]]]]:
    """What is compared: a name to report it under, and the tensors of a and b that it stands for.

    One and the same of both, except windows of another form, which are added up.
    """
    groups: dict[str, tuple[list[str], list[str]]] = {}
    for side, names in enumerate((a, b)):
        for name in names:
            group = name.partition("@")[0] if class_of(name) == "windows" else name
            groups.setdefault(group, ([], []))[side].append(name)
    for group in sorted(groups):
        left, right = (sorted(names) for names in groups[group])
        if left == right or not left or not right:
            for name in left or right:
                yield name, ([name] * bool(left), [name] * bool(right))
        else:
            yield group, (left, right)


Side = tuple[Checkpoint, list[str]]


def _compare(info: TensorInfo, a: Side, b: Side) -> _Gap:
    """How two sums of tensors of that shape differ."""
    same = True
    gap = size_a = size_b = 0.0
    for offsets, sizes in _boxes(info.shape):
        x, y = (_sum(side, info, offsets, sizes) for side in (a, b))
        # against nothing, where there is no sign of zero to compare
        same = same and (_same_bits(x, y) if a[1] and b[1] else torch.equal(x, y))
        if not _same_bits(x, y):
            x, y = x.double(), y.double()
            gap += (x - y).square().sum().item()
        size_a += x.double().square().sum().item()
        size_b += y.double().square().sum().item()
    return _Gap(same, (gap, size_a, size_b))


def _sum(side: Side, info: TensorInfo, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
    """A box of the sum of some tensors of a checkpoint; zeros where there are none."""
    checkpoint, names = side
    boxes = [torch.zeros(sizes, dtype=info.dtype) for _ in names or [""]]
    for name, box in zip(names, boxes, strict=False):
        checkpoint.read([Piece(name, info.shape, offsets, box)])
    total = boxes[0]
    for box in boxes[1:]:
        total += box
    return total


def _same_bits(x: Tensor, y: Tensor) -> bool:
    return torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (x, y)))


def _boxes(shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Offsets and sizes of boxes of bounded size, or of one row, that make up a tensor."""
    if not shape:
        yield (), ()
        return
    rows = max(1, _BOX // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], rows):
        yield (start, *(0 for _ in shape[1:])), (min(rows, shape[0] - start), *shape[1:])


def _losses(a: dict[str, Any], b: dict[str, Any]) -> _Class:
    found = _Class()
    for key in _LOSSES:
        left, right = ([s] if isinstance(s, float) else s or [] for s in (a.get(key), b.get(key)))
        if len(left) != len(right):
            found.cannot_compare(key)
            continue
        for x, y in zip(left, right, strict=True):
            found.add(key, _Gap(x == y, ((x - y) ** 2, x**2, y**2)))
    return found


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        yield key, value
        return
    for name, inner in value.items():
        yield from _leaves(inner, f"{key}.{name}" if key else str(name))
