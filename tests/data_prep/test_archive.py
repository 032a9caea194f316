"""Tars of other people: whole ones are read, damaged ones are named, and names inside them reach no path."""

import gzip
import io
import tarfile
from pathlib import Path

import pytest

from data_prep.archive import DamagedArchive, members, stream
from diffmoe_ep.data.manifest import DataError
from pictures import content, tar

FILES = {"a/1.jpg": b"one" * 300, "a/1.txt": b"", "../../escape.jpg": b"two" * 400, "/etc/absolute.jpg": b"three"}


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_every_file_is_read_in_order_and_nothing_is_unpacked(tmp_path: Path, mode: str) -> None:
    path = tar(tmp_path / "in" / "x.tar", FILES, mode)
    before = content(tmp_path)
    assert list(stream(path)) == list(FILES.items())
    assert content(tmp_path) == before


def test_files_are_listed_by_offset_in_nested_tars_too(tmp_path: Path) -> None:
    inner = tar(tmp_path / "n01.tar", FILES).read_bytes()
    outer = tar(tmp_path / "all.tar", {"b/0.jpg": b"zero", "n01.tar": inner, "last.jpg": b"end"})
    found = members(outer)
    assert [(member.holder, member.name) for member in found] == [
        ("all", "b/0.jpg"),
        *(("n01", name) for name in FILES),
        ("all", "last.jpg"),
    ]
    assert [member.read() for member in found] == [b"zero", *FILES.values(), b"end"]


def test_links_and_devices_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind in (
            ("link.jpg", tarfile.SYMTYPE),
            ("hard.jpg", tarfile.LNKTYPE),
            ("device.jpg", tarfile.CHRTYPE),
            ("folder", tarfile.DIRTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
        member = tarfile.TarInfo("a.jpg")
        member.size = 3
        archive.addfile(member, io.BytesIO(b"one"))
    assert list(stream(path)) == [("a.jpg", b"one")]
    assert [member.name for member in members(path)] == ["a.jpg"]


def test_a_huge_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.archive.MAX_MEMBER", 100)
    path = tar(tmp_path / "x.tar", {"big.jpg": bytes(101), "small.jpg": bytes(100)})
    assert list(stream(path)) == [("big.jpg", None), ("small.jpg", bytes(100))]


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize(
    "damage", ["cut in content", "cut in header", "cut between files", "broken header", "no tar", "empty"]
)
def test_a_damaged_archive_gives_what_is_whole_and_says_so(tmp_path: Path, mode: str, damage: str) -> None:
    files = {f"{number}.jpg": bytes([number]) * 1000 for number in range(4)}  # 512 + 1024 bytes each
    whole = bytearray(tar(tmp_path / "x.tar", files).read_bytes())
    if damage == "broken header":
        whole[2 * 1536 + 148] ^= 1  # the checksum of the third header
    changed = {
        "cut in content": whole[: 2 * 1536 + 600],
        "cut in header": whole[: 2 * 1536 + 100],
        "cut between files": whole[: 2 * 1536],
        "no tar": b"hello" * 200,
        "empty": b"",
    }
    damaged = bytes(changed.get(damage, whole))
    if mode == "w:gz":
        damaged = gzip.compress(damaged)
    (tmp_path / "x.tar").write_bytes(damaged)
    found = []
    with pytest.raises(DamagedArchive, match=r"^the archive is damaged after .*; what follows is lost$"):
        found += (entry for entry in stream(tmp_path / "x.tar"))  # a list keeps what came before an error
    assert found == (list(files.items())[:2] if damage not in ("no tar", "empty") else [])
    with pytest.raises(DataError, match="not a whole, uncompressed tar"):
        members(tmp_path / "x.tar")


def test_a_cut_gzip_is_damaged(tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tgz", {f"{number}.jpg": bytes(range(256)) * 40 for number in range(50)}, "w:gz")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DamagedArchive):
        list(stream(path))
