"""Crafted metadata: whatever the pickle's program tries, it changes nothing and does not take long.

The first of these ran to their end with Python's own unpickler and a list of allowed classes.
"""

from __future__ import annotations

import os
import pickle
import pickletools
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint import stores
from fuzz import examples
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from nlscale.checkpoint.store import manifest, unpickle
from nlscale.checkpoint.store.safe import load_metadata
from nlscale.checkpoint.store.store import CheckpointError, Store

METADATA = "torch.distributed.checkpoint.metadata"
FILESYSTEM = "torch.distributed.checkpoint.filesystem"


def word(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


def name(module: str, what: str) -> bytes:
    return word(module) + word(what) + b"\x93"


def program(*instructions: bytes) -> bytes:
    return b"\x80\x04" + b"".join(instructions) + b"."


def set_attribute(key: str, value: bytes) -> bytes:
    """BUILD with a state of slots: `setattr(key, value)` on what lies on the stack."""
    return b"N}" + word(key) + value + b"s\x86b"


SIZE_OF_3 = name("torch", "Size") + b"K\x03\x85\x85R"
INDEX = name(METADATA, "MetadataIndex")
TARGETS = {
    "Metadata": name(METADATA, "Metadata"),
    "MetadataIndex": INDEX,
    "TensorProperties": name(METADATA, "TensorProperties"),
    "ChunkStorageMetadata": name(METADATA, "ChunkStorageMetadata"),
    "_StorageInfo": name(FILESYSTEM, "_StorageInfo"),
    "enum": name(METADATA, "_MEM_FORMAT_ENCODING"),
    "member": name(METADATA, "_MEM_FORMAT_ENCODING") + b"K\x00\x85R",
    "function": name("torch.serialization", "_get_layout"),
    "dtype": name("torch", "float32"),
    "instance": INDEX + b")\x81",
}


def refused(data: bytes, says: str = "is not the metadata of a checkpoint") -> None:
    started = time.monotonic()
    with pytest.raises(CheckpointError, match=says) as caught:
        load_metadata(Path("x/.metadata"), data)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    assert time.monotonic() - started < 20  # most take for ever, or all memory


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("key", ["injected", "__eq__", "__hash__", "_value_", "cache"])
def test_no_attribute_is_set_on_what_others_use(target: str, key: str) -> None:
    kinds = [*unpickle._FORMS, dcp._MEM_FORMAT_ENCODING, *dcp._MEM_FORMAT_ENCODING]
    kinds.append(torch.serialization._get_layout)
    before = [dict(vars(kind)) for kind in kinds]
    refused(program(TARGETS[target], set_attribute(key, b"K\x07")))
    plain = program(TARGETS[target], b"}", word(key), b"K\x07s", b"b")
    refused(plain)
    assert [dict(vars(kind)) for kind in kinds] == before


def test_the_hole_that_was_there(tmp_path: Path) -> None:
    """So that the programs above are known to do what they say."""

    class Allowed(pickle.Unpickler):
        def find_class(self, module: str, what: str) -> Any:
            return victim

    victim = type("Victim", (), {})
    (tmp_path / "x").write_bytes(program(TARGETS["Metadata"], set_attribute("injected", b"K\x07")))
    with open(tmp_path / "x", "rb") as file:
        Allowed(file).load()
    assert victim.injected == 7  # type: ignore[attr-defined]


def test_no_instance_becomes_of_another_class() -> None:
    other = name(METADATA, "Metadata")
    refused(program(INDEX, b")\x81", set_attribute("__class__", other)))
    refused(program(INDEX, b")\x81", b"}", word("__class__"), other, b"s", b"b"))


def test_no_object_is_made_twice() -> None:
    """A key of a dict would be another one than was hashed."""
    state = b"}" + word("fqn") + word("a") + b"sb"
    refused(program(INDEX, b")\x81", state, state), "MetadataIndex is altered")


@pytest.mark.parametrize(
    "instruction",
    [
        b"\x82\x01",  # EXT1, EXT2, EXT4: copyreg's table of this process
        b"\x83\x01\x00",
        b"\x84\x01\x00\x00\x00",
        word("id") + b"Q",  # persistent ids
        b"Pid\n",
        b"(" + word("a") + b"iposix\nsystem\n",  # INST, OBJ: calls by other names
        b"(" + name("torch", "Size") + b"o",
        name("torch", "Size") + b")}\x92",  # NEWOBJ_EX
        b"\x97",  # a buffer that lies elsewhere
        b"\x8f",  # a set
        b"C\x01a",  # bytes
        b"G" + struct.pack(">d", 0.5),
        b"L" + b"9" * 5000 + b"L\n",
        b"\x8b" + struct.pack("<i", 1) + b"\x01",
        b"\x8d" + struct.pack("<Q", 1 << 60),
        b"\x8e" + struct.pack("<Q", 1 << 60),
        b"\x96" + struct.pack("<Q", 1 << 60),
        b"X" + struct.pack("<I", (1 << 32) - 1),
        b"\x80\x63",
        b"N0",  # POP, DUP
        b"N2",
    ],
    ids=lambda instruction: instruction[:8].hex(),
)
def test_instructions_that_metadata_need_not(instruction: bytes) -> None:
    refused(program(b"]", instruction, b"a"))


@pytest.mark.parametrize(
    "call",
    [
        name("torch", "Size") + b"K\x03\x85R",
        name("torch", "Size") + b"\x8a\x01\xff\x85\x85R",  # -1
        name("torch", "Size") + b"\x8a\x10" + b"\x7f" * 16 + b"\x85\x85R",
        name("torch", "Size") + b"(" + b"K\x01" * 1000 + b"t\x85R",
        name("torch", "Size") + word("abc") + b"\x85R",
        name("torch", "Size") + b"\x88\x85\x85R",
        name("torch", "Size") + b")R",
        name("torch", "Size") + b"NR",
        name("torch.serialization", "_get_layout") + word("torch.float32") + b"\x85R",
        name("torch.serialization", "_get_layout") + b")\x85R",
        name(METADATA, "_MEM_FORMAT_ENCODING") + word("A") + word("B C") + b"\x86R",
        name(METADATA, "_MEM_FORMAT_ENCODING") + b"K\x63\x85R",
        name(METADATA, "Metadata") + b"}\x85R",
        name("torch", "float32") + b")R",
        b"}" + b")R",
        name("torch", "Size") + b")\x81",
        name(METADATA, "Metadata") + b"}\x85\x81",
    ],
    ids=lambda call: call[-12:].hex(),
)
def test_calls_with_surprising_arguments(call: bytes) -> None:
    refused(program(call))


def test_a_large_number_in_the_memo_takes_no_memory() -> None:
    """Python's own makes room for all numbers below it, and writes it."""
    refused(program(b"}", b"r" + struct.pack("<I", (1 << 32) - 1), b"0"), "instruction b'0'")


def test_a_key_that_takes_for_ever_to_hash() -> None:
    """A tuple of twice the same tuple, and so on: 60 instructions, 2**60 steps."""
    nested = b")\x94" + b"".join(b"h" + bytes([i]) + b"\x86\x94" for i in range(60))
    refused(program(b"}", nested, b"Ns"), "a key that is a tuple")


def test_a_name_that_takes_for_ever_to_print() -> None:
    forged = dcp.Metadata({}, storage_data={})
    forged.state_dict_metadata["x" * 1_000_000] = 1  # type: ignore[assignment]
    refused(pickle.dumps(forged), "is not a tensor")


def _metadata(boxes: int = 1, size: int = 4) -> dcp.Metadata:
    chunks = [
        dcp.ChunkStorageMetadata(torch.Size([i * size]), torch.Size([size])) for i in range(boxes)
    ]
    stored = dcp.TensorStorageMetadata(
        dcp.TensorProperties(dtype=torch.float32), torch.Size([boxes * size]), chunks
    )
    where = {
        dcp.MetadataIndex("a", chunk.offsets): _StorageInfo("__0_0.distcp", 0, 9)
        for chunk in chunks
    }
    return dcp.Metadata({"a": stored}, storage_data=where)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("python", [True, False])
def test_true_metadata_are_read_as_python_reads_them(protocol: int, python: bool) -> None:
    written = _metadata(boxes=300)
    written.planner_data = {"a": ("a", 0, [None, True])}
    dumps = pickle._dumps if python else pickle.dumps  # type: ignore[attr-defined]
    found = load_metadata(Path("x"), dumps(written, protocol=protocol))
    assert found == written


def test_large_metadata_are_read_in_time() -> None:
    """As of a model on thousands of ranks."""
    data = pickle.dumps(_metadata(boxes=5_000))
    started = time.monotonic()
    load_metadata(Path("x"), data)
    assert time.monotonic() - started < 20


def _overlap(metadata: Any) -> None:
    chunks = metadata.state_dict_metadata["a"].chunks
    chunks[1].offsets = torch.Size([2])
    metadata.storage_data[dcp.MetadataIndex("a", torch.Size([2]))] = _StorageInfo("f", 0, 9)


def _share(metadata: Any) -> None:
    metadata.state_dict_metadata["b"] = metadata.state_dict_metadata["a"]


def _negative(metadata: Any) -> None:
    next(iter(metadata.storage_data.values())).offset = -1


def _true(metadata: Any) -> None:
    next(iter(metadata.storage_data.values())).length = True


def _outside(metadata: Any) -> None:
    metadata.state_dict_metadata["a"].size = torch.Size([7])


@pytest.mark.parametrize("harm", [_share, _negative, _true, _outside])
def test_metadata_that_cannot_be(harm: Any) -> None:
    forged = _metadata(boxes=2)
    harm(forged)
    refused(pickle.dumps(forged))


def test_boxes_that_overlap_do_not_hide_a_hole(tmp_path: Path) -> None:
    """As many elements as there should be: the others would be what lay in memory."""
    stores.save(tmp_path, 1, seed=1)
    checkpoint = Store(tmp_path).checkpoints()[0]
    metadata = pickle.loads((checkpoint.path / ".metadata").read_bytes())
    stored = metadata.state_dict_metadata["windows/tokens"]
    (info,) = [i for k, i in metadata.storage_data.items() if k.fqn == "windows/tokens"]
    stored.chunks = [
        dcp.ChunkStorageMetadata(torch.Size([at]), torch.Size([size]))
        for at, size in ((0, 5), (1, 4))
    ]
    for chunk in stored.chunks:
        metadata.storage_data[dcp.MetadataIndex("windows/tokens", chunk.offsets)] = info
    (checkpoint.path / ".metadata").write_bytes(pickle.dumps(metadata))
    stores.vouch(checkpoint.path)
    with pytest.raises(CheckpointError, match="holds elements of windows/tokens twice"):
        checkpoint.read(stores.whole(stores.tensors(1)))


@pytest.mark.parametrize("listed", ["a\0b", "\ud800", "a/b", "..", "", "x" * 5000, "a\nb"])
def test_names_that_no_file_has(tmp_path: Path, listed: str) -> None:
    stores.save(tmp_path, 1, seed=1)
    checkpoint = Store(tmp_path).checkpoints()[0]
    files = {listed: manifest.Digest(1, "0" * 64)}
    (checkpoint.path / manifest.NAME).write_bytes(manifest.render(1, files))
    with pytest.raises(CheckpointError, match="was altered"):
        checkpoint.verify()


@pytest.mark.parametrize("step", [None, True, -1, "1", 1.0, [1]])
@pytest.mark.parametrize("size", [1, -1, True, 1.5])
def test_a_manifest_of_other_types(tmp_path: Path, step: Any, size: Any) -> None:
    files = {"a": manifest.Digest(size, "0" * 64)}
    with pytest.raises(CheckpointError, match="was altered"):
        manifest.parse(tmp_path, manifest.render(step, files))
    (tmp_path / "x").write_text("{}")
    whole = manifest._bytes({"format": 1, "files": {}})
    with pytest.raises(CheckpointError, match="was altered"):
        manifest.parse(tmp_path, whole)


@pytest.mark.parametrize("place", ["state.json", "manifest.json", "__0_0.distcp"])
def test_a_pipe_is_not_waited_for(tmp_path: Path, place: str) -> None:
    stores.save(tmp_path, 1, seed=1)
    checkpoint = Store(tmp_path).checkpoints()[0]
    path = checkpoint.path / place
    data = (checkpoint.path / manifest.NAME).read_bytes()
    files = {
        n: manifest.Digest(0 if n == place else e["bytes"], e["sha256"])
        for n, e in manifest.parse(path, data)["files"].items()
    }
    (checkpoint.path / manifest.NAME).write_bytes(manifest.render(1, files))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match=f"{place} is not a file"):
        checkpoint.verify()


TRUE = pickle.dumps(_metadata(boxes=3))
OPCODES = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]


@examples(300)
@given(st.data())
def test_any_program_is_refused_or_harmless(data: st.DataObject) -> None:
    """True metadata with bytes altered, instructions put in, or parts left out."""
    forged = bytearray(TRUE)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(2, len(forged) - 1))
        match data.draw(st.sampled_from(["byte", "instruction", "cut"])):
            case "byte":
                forged[at] = data.draw(st.integers(0, 255))
            case "instruction":
                forged[at:at] = data.draw(st.sampled_from(OPCODES))
            case "cut":
                del forged[at : at + data.draw(st.integers(1, 20))]
    before = [dict(vars(kind)) for kind in unpickle._FORMS]
    try:
        load_metadata(Path("x"), bytes(forged))
    except CheckpointError as error:
        assert "\n" not in str(error)
    assert [dict(vars(kind)) for kind in unpickle._FORMS] == before
