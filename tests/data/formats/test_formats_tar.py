"""Tar files: every sample of webdataset, and nothing that their headers only claim."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from data.corpora import PACK, everything, left_out, small
from data.formats.sources import TEXTS, read, tar_of, texts_of

from nlscale.data.documents import UnreadableError, read_documents
from nlscale.data.formats.tar import Tar
from nlscale.data.sources import find_files
from nlscale.errors import UserError


def put(folder: Path, data: bytes, name: str = "a.tar") -> Path:
    (folder / name).write_bytes(data)
    return folder / name


def test_what_webdataset_itself_writes(tmp_path: Path) -> None:
    import webdataset

    path = tmp_path / "a.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for number, text in enumerate(TEXTS):
            json_text = {"caption": text, "width": 5}
            writer.write({"__key__": f"{number:05d}", "txt": text, "json": json_text, "cls": 1})
    assert texts_of(path) == TEXTS
    assert texts_of(path, "caption") == TEXTS
    kinds = {document.kind for document in read(path) if document.left_out is not None}
    assert kinds == {".cls in a tar", "a .json beside a .txt"}


def test_of_a_sample_the_field_or_else_the_text(tmp_path: Path) -> None:
    """Each sample is one document; what is beside it is counted by what it is."""
    members = [
        ("1.txt", b"one"),
        ("1.jpg", b"\xff\xd8"),
        ("1.json", b'{"caption": "eins"}'),
        ("2.json", b'{"caption": "zwei"}'),
        ("3.JSON", b'{"caption": "drei", "text": "three"}'),
        ("3.txt", b"tres"),
        ("deep/3.txt", b"four"),
        ("5.caption.txt", b"five"),
        ("5.other.txt", b"six"),
        ("5.other.txt", b"seven"),
        ("README", b"-"),
    ]
    path = put(tmp_path, tar_of(members))
    found = [d for d in read(path) if d.left_out is None]
    assert [d.text or d.kind for d in found] == [
        *("one", "no such field", "three", "four", "five", "six", "seven")
    ]
    assert texts_of(path, "caption")[:3] == ["eins", "zwei", "drei"]
    build = small([str(path)], tmp_path / "out", max_lost=0.2)
    assert everything(tmp_path / "out") == sorted(["one", "three", "four", "five", "six", "seven"])
    assert left_out(build) == {
        **{".jpg in a tar": 1, "another member in a tar": 1, "a .json beside a .txt": 1},
        "a .txt beside a .json with the text": 1,
    }
    assert build["skipped"]["reasons"] == {"no such field": 1}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_form_of_long_names_and_sizes(tmp_path: Path, form: int) -> None:
    names = ["a" * 90 + ".txt", "d" * 90 + "/" + "b" * 60 + ".txt"]
    if form != tarfile.USTAR_FORMAT:
        names += ["e" * 3000 + ".txt", "ü" * 100 + ".txt"]
    path = put(tmp_path, tar_of([(name, name.encode()) for name in names], form))
    assert texts_of(path) == names
    with open(path, "rb") as file:
        tar = Tar(file, seekable=False)
        found = [(m.name, m.size) for m in iter(tar.next, None)]
    with tarfile.open(path) as tar_file:
        assert found == [(m.name, m.size) for m in tar_file.getmembers()]


def test_one_behind_the_other(tmp_path: Path) -> None:
    """As `cat a.tar b.tar` makes them, where the library's reader ends after the first."""
    both = tar_of([("a.txt", b"one")]) + tar_of([("b.txt", b"two")])
    assert texts_of(put(tmp_path, both)) == ["one", "two"]


def special(kind: bytes, **fields: object) -> bytes:
    """A tar file of a member of that type between two that are read."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name in ("a.txt", "b.txt", "c.txt"):
            info = tarfile.TarInfo(name)
            info.size = 1
            if name == "b.txt":
                info.type = kind
                info.size = 0
                for key, value in fields.items():
                    setattr(info, key, value)
            tar.addfile(info, io.BytesIO(b"x" * info.size))
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (special(tarfile.SYMTYPE, linkname="/etc/passwd"), "link in a tar"),
        (special(tarfile.LNKTYPE, linkname="../a.txt"), "link in a tar"),
        (special(tarfile.CHRTYPE, devmajor=1, devminor=3), "device or pipe in a tar"),
        (special(tarfile.BLKTYPE), "device or pipe in a tar"),
        (special(tarfile.FIFOTYPE), "device or pipe in a tar"),
        (special(tarfile.REGTYPE, name="../../b.txt"), "path outside of its tar"),
        (special(tarfile.REGTYPE, name="/etc/b.txt"), "path outside of its tar"),
        (special(tarfile.REGTYPE, name=".b.txt"), "hidden in a tar"),
        (special(tarfile.REGTYPE, name="b.\x1b[2Jx"), "another member in a tar"),
        (special(b"z"), "member of type z in a tar"),
        (
            special(tarfile.REGTYPE, pax_headers={"GNU.sparse.size": "1099511627776"}),
            "sparse file in a tar",
        ),
        (special(tarfile.GNUTYPE_SPARSE), "sparse file in a tar"),
    ],
)
def test_what_is_no_file_is_left_out(tmp_path: Path, data: bytes, kind: str) -> None:
    here = sorted(os.listdir(tmp_path))
    path = put(tmp_path, data)
    found = [document.kind or document.text for document in read(path)]
    assert found == ["x", kind, "x"] or found == [kind, "x", "x"]
    assert sorted(os.listdir(tmp_path)) == sorted([*here, "a.tar"])


def test_folders_in_it_are_nothing(tmp_path: Path) -> None:
    assert texts_of(put(tmp_path, special(tarfile.DIRTYPE))) == ["x", "x"]


def resized(size: bytes, name: bytes = b"a.txt") -> bytes:
    """A tar file whose only header says that size."""
    header = bytearray(tar_of([(name.decode(), b"x")])[:512])
    header[124:136] = size.ljust(12, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + b"x".ljust(512, b"\0") + bytes(1024)


HUGE = b"\x80" + (100 << 30).to_bytes(11, "big")  # 100 GiB


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("size", "name", "kinds"),
    [
        (HUGE, b"a.txt", ["too large"]),
        (HUGE, b"a.jpg", [".jpg in a tar"]),
        (b"%o" % (1 << 31), b"a.txt", []),
    ],
    ids=["text", "image", "just not"],
)
def test_a_size_that_is_only_claimed(
    tmp_path: Path, size: bytes, name: bytes, kinds: list[str], packed: bool
) -> None:
    """Nothing is allocated for it, and the file breaks off."""
    data = resized(size, name)
    path = put(tmp_path, gzip.compress(data) if packed else data, f"a.tar{'.gz' * packed}")
    found: list[str] = []
    (file,) = find_files([str(path)]).files
    with pytest.raises(UnreadableError, match=r"damaged .*breaks off"):
        found.extend(document.kind for document in read_documents(file))
    assert found == kinds
    with pytest.raises(UserError, match=r"holds no documents .*damaged 1"):
        small([str(path)], tmp_path / "out", max_lost=1.0)


CUT = tar_of([("a.txt", b"one"), ("b.txt", b"x" * 600), ("c.txt", b"three")])


@pytest.mark.parametrize("at", [100, 512, 600, 1024, 1536, 1600, 2100, 2560, 3583])
def test_a_tar_that_breaks_off(tmp_path: Path, at: int) -> None:
    """Also between two members, where the library's reader sees nothing."""
    with pytest.raises(UnreadableError, match="breaks off"):
        read(put(tmp_path, CUT[:at]))


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:1024] + b"\xff" + data[1025:],
        lambda data: b"not a tar".ljust(2048, b"-"),
        lambda data: resized(b"\x80" + b"\xff" * 11),
        lambda data: resized(b"9"),
        lambda data: tar_pax(b"x" * 100),
        lambda data: tar_pax(b"9999999999 a=b\n"),
        lambda data: tar_pax(b"0 a=b\n"),
        lambda data: tar_pax(b"11 size=-5\n"),
        lambda data: tar_pax(b"x", claimed=HUGE),
    ],
    ids=["byte", "text", "size", "digit", "no pax", "long pax", "no length", "minus", "huge pax"],
)
def test_headers_that_cannot_be(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    """The library's reader takes the first for the end of the file."""
    with pytest.raises(UnreadableError, match="damaged") as caught:
        read(put(tmp_path, change(CUT)))
    assert "\n" not in str(caught.value)


def tar_pax(records: bytes, claimed: bytes | None = None) -> bytes:
    """A tar file whose member has such a header of pax."""
    head = bytearray(resized(claimed or b"%o" % len(records))[:512])
    head[156:157] = b"x"
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head) + records.ljust(512, b"\0") + CUT


def test_a_document_that_is_no_text(tmp_path: Path) -> None:
    members = [("a.txt", b"\xff"), ("b.json", b"{"), ("c.json", json.dumps([1]).encode())]
    found = [document.kind for document in read(put(tmp_path, tar_of(members)))]
    assert found == ["not UTF-8", "not JSON", "not an object"]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_what_is_left_out_of_a_compressed_tar_is_a_share_of_its_bytes(
    tmp_path: Path, suffix: str
) -> None:
    """Its members are larger than it is, and with leave to lose all of it, it can be built."""
    members = []
    for i in range(20):
        members.append((f"{i:02}.txt", f"text number {i} ".encode() * 30))
        members.append((f"{i:02}.xml", b"<a/>" * 20_000))
    path = tmp_path / f"a.tar{suffix}"
    path.write_bytes(PACK[suffix](tar_of(members)))
    with pytest.raises(UserError, match=r"are not read \(9\d(\.\d)?%\): \.xml in a tar 20"):
        small([str(path)], tmp_path / "out")
    index = small([str(path)], tmp_path / "out", max_lost=1.0)
    (entry,) = index["left_out"]
    assert entry["count"] == 20 and 0.96 < entry["bytes"] / path.stat().st_size < 1
    assert len(everything(tmp_path / "out")) == 20
