"""What is written in some boxes is read in any others; what cannot be is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import world
from checkpoint import stores

from nlscale.checkpoint.store import boxes as stored_boxes
from nlscale.checkpoint.store.pieces import Piece
from nlscale.checkpoint.store.store import CheckpointError, Store, Written


def _write(folder: Path, seed: int) -> Written:
    """Every rank writes some of the random boxes of each tensor; the last rank none."""
    dist.init_process_group("gloo")
    generator = torch.Generator().manual_seed(seed)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    pieces = []
    for name, tensor in stores.tensors(seed).items():
        for box in stores.cut(tuple(tensor.shape), 9, generator):
            if int(torch.randint(ranks - 1, (), generator=generator)) == rank:
                pieces.append(Piece(name, tuple(tensor.shape), box[0], stores.view(tensor, box)))
    state = {"step": seed, "seed": seed} if rank == 0 else {}
    return Store(folder).write(seed, pieces, state, dist.group.WORLD)


def _read(folder: Path, seed: int, in_parts: bool) -> None:
    """Every rank reads random boxes, overlapping ones too, into views of larger tensors."""
    if in_parts:
        stored_boxes._TO_FIND_A_PART = -(1 << 40)  # of whatever is stored only what is wanted
    dist.init_process_group("gloo")
    generator = torch.Generator().manual_seed(1000 * seed + dist.get_rank())
    (checkpoint,) = Store(folder).checkpoints()
    expected = stores.tensors(seed)
    wanted = []
    for name, tensor in expected.items():
        shape = tuple(tensor.shape)
        boxes = stores.cut(shape, 5, generator) + stores.cut(shape, 3, generator)
        for number, box in enumerate(boxes[dist.get_rank() % 2 :]):
            sizes = box[1]
            data = torch.full([size + 2 for size in reversed(sizes)], 7).to(tensor.dtype)
            inner = data.permute(tuple(reversed(range(data.dim()))))[
                tuple(slice(1, 1 + s) for s in sizes)
            ]
            wanted.append((Piece(name, shape, box[0], inner), box, data, number))
    checkpoint.read([piece for piece, *_ in wanted])
    for piece, box, data, _ in wanted:
        assert stores.same_bits(piece.data, stores.view(expected[piece.name], box))
        # what is around the view is as it was
        assert int((data != 7).sum()) <= piece.data.numel()
    dist.barrier()  # none leaves while another is still joining


@pytest.mark.parametrize("seed", range(3))
def test_any_boxes_are_read_from_any_boxes(tmp_path: Path, seed: int) -> None:
    written = world.run(4, _write, tmp_path, seed)
    assert len(set(written)) == 1
    (checkpoint,) = Store(tmp_path).checkpoints()
    assert stores.holds(checkpoint, seed)
    names = {path.name: path.stat().st_size for path in checkpoint.path.iterdir()}
    assert len(names) == written[0].files and sum(names.values()) == written[0].bytes
    assert len(names) <= 3 + 3  # the fourth rank had nothing to write
    for readers in (1, 2, 3):
        world.run(readers, _read, tmp_path, seed, readers != 2)


def test_what_is_stored_is_known_without_reading_it(tmp_path: Path) -> None:
    stores.save(tmp_path, 37, seed=0)
    (checkpoint,) = Store(tmp_path).checkpoints()
    (checkpoint.path / "__0_0.distcp").unlink()
    found = {name: (info.shape, info.dtype) for name, info in checkpoint.tensors().items()}
    assert found == stores.SHAPES
    assert checkpoint.tensors()["weights/embedding.weight"].bytes == 61 * 48 * 2
    assert checkpoint.step == checkpoint.manifest["step"] == 37
    assert checkpoint.path.name == "step-00000037"


def test_dtype_is_converted_into_the_destination(tmp_path: Path) -> None:
    contents = stores.save(tmp_path, 1, seed=3)
    name = "weights/embedding.weight"
    data = torch.nn.Parameter(torch.empty(61, 48))
    Store(tmp_path).checkpoints()[0].read([Piece(name, (61, 48), (0, 0), data)])
    assert torch.equal(data, contents[name].float())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_reads_it_too(tmp_path: Path) -> None:
    contents = stores.save(tmp_path, 1, seed=4)
    read = {name: torch.empty_like(tensor) for name, tensor in contents.items()}
    torch.distributed.checkpoint.load(read, checkpoint_id=tmp_path / "step-00000001", no_dist=True)
    assert all(stores.same_bits(read[name], contents[name]) for name in contents)


def test_what_is_not_stored_is_named(tmp_path: Path) -> None:
    stores.save(tmp_path, 1, seed=0)
    (checkpoint,) = Store(tmp_path).checkpoints()
    with pytest.raises(CheckpointError, match="holds no tensor weights/other"):
        checkpoint.read([Piece("weights/other", (2,), (0,), torch.empty(2))])
    with pytest.raises(CheckpointError, match=r"windows/tokens of shape \(9,\).*\(10,\) is wanted"):
        checkpoint.read([Piece("windows/tokens", (10,), (0,), torch.empty(3))])


def test_a_hole_or_an_overlap_is_not_saved(tmp_path: Path) -> None:
    store, a = Store(tmp_path), torch.arange(12.0).view(3, 4)
    left, right = Piece("a", (3, 4), (0, 0), a[:, :2]), Piece("a", (3, 4), (0, 2), a[:, 2:])
    with pytest.raises(CheckpointError, match="a: 6 of 12 elements are written"):
        store.write(1, [left], {}, None)
    with pytest.raises(CheckpointError, match="a: an element is written twice"):
        store.write(1, [left, right, right], {}, None)
    with pytest.raises(CheckpointError, match="a: an element is written twice"):
        store.write(1, [Piece("a", (3, 4), (0, 1), a[:, 1:]), left], {}, None)
    with pytest.raises(CheckpointError, match=r"both torch\.float32.*and torch\.float64"):
        store.write(1, [left, Piece("a", (3, 4), (0, 2), a[:, 2:].double())], {}, None)
    assert store.checkpoints() == [] and store.newest_valid(print) is None
    store.write(1, [left, right], {}, None)
    assert [checkpoint.step for checkpoint in store.checkpoints()] == [1]


def test_a_box_with_a_hole_under_it_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = torch.arange(12.0)
    Store(tmp_path).write(
        1, [Piece("a", (12,), (0,), a[:5]), Piece("a", (12,), (5,), a[5:])], {}, None
    )
    (checkpoint,) = Store(tmp_path).checkpoints()
    del checkpoint._metadata.state_dict_metadata["a"].chunks[0]  # type: ignore[union-attr]
    whole = Piece("a", (12,), (3,), torch.empty(9))
    with pytest.raises(
        CheckpointError, match=r"not hold all of a: 2 elements are missing of \(9,\)"
    ):
        checkpoint.read([whole])
    checkpoint.read([Piece("a", (12,), (6,), whole.data[:4])])
    assert torch.equal(whole.data[:4], a[6:10])


@pytest.mark.parametrize(
    ("shape", "offsets", "sizes"), [((3,), (2,), 2), ((3,), (-1,), 2), ((3, 1), (0, 0), 3)]
)
def test_a_box_outside_its_tensor_is_a_mistake(
    shape: tuple[int, ...], offsets: tuple[int, ...], sizes: int
) -> None:
    with pytest.raises(ValueError, match="is not inside a tensor"):
        Piece("a", shape, offsets, torch.empty(sizes))
