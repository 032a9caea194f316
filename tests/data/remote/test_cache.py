"""The cache of fetched files: whole files only, a bound that holds, nothing in use removed, whatever other processes do
or die of.
"""

import errno
import hashlib
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from diffmoe_ep.data.remote.cache import Cache, CacheFull, Damaged, Wanted

SIZE = 10_000


def content(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest() * (SIZE // 32) + bytes(SIZE % 32)


def wanted(number: int) -> Wanted:
    return Wanted(hashlib.sha256(content(number)).hexdigest(), SIZE, ".tar")


def pieces(data: bytes) -> Iterable[bytes]:
    return (data[place : place + 999] for place in range(0, len(data), 999))


def nothing() -> Iterable[bytes]:
    raise AssertionError("it should be there")


def taken(cache: Cache, number: int) -> bytes:
    """Get a file through the cache, read it, let it go."""
    descriptor = cache.get(wanted(number), lambda: pieces(content(number)))
    assert descriptor is not None
    with os.fdopen(descriptor, "rb") as file:
        return file.read()


def names(cache: Cache) -> set[str]:
    return {path.name for path in cache.folder.iterdir()} - {"lock"}


def test_what_was_fetched_is_kept(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "deep/cache", 3 * SIZE)
    assert cache.held(wanted(1)) is None
    assert taken(cache, 1) == content(1)
    descriptor = cache.get(wanted(1), nothing)
    assert descriptor is not None
    assert os.pread(descriptor, 5, 100) == content(1)[100:105]
    os.close(descriptor)
    assert names(cache) == {wanted(1).name}
    assert cache.size() == SIZE


def test_what_was_used_longest_ago_goes_first_and_the_bound_holds(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 3 * SIZE + 5)
    for number in (1, 2, 3):
        taken(cache, number)
        os.utime(tmp_path / wanted(number).name, (number, number))  # clocks of file systems are coarse
    os.close(cache.get(wanted(1), nothing) or 0)  # used again
    assert taken(cache, 4) == content(4)
    assert names(cache) == {wanted(number).name for number in (1, 3, 4)}
    assert cache.size() == 3 * SIZE


def test_what_is_in_use_or_named_stays(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 2 * SIZE)
    one = cache.get(wanted(1), lambda: [content(1)])
    taken(cache, 2)
    with pytest.raises(
        CacheFull, match=r"10,000 bytes do not fit beside the files in use \(20,000 bytes\), the bound is 20,000"
    ):
        cache.get(wanted(3), nothing, keep={wanted(2).name})
    assert names(cache) == {wanted(1).name, wanted(2).name}
    assert taken(cache, 3) == content(3)
    assert names(cache) == {wanted(1).name, wanted(3).name}
    assert one is not None
    os.close(one)
    taken(cache, 2)
    taken(cache, 4)
    assert wanted(1).name not in names(cache)


def test_other_files_in_the_folder_are_never_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tar").write_bytes(bytes(5 * SIZE))
    cache = Cache(tmp_path, SIZE)
    taken(cache, 1)
    taken(cache, 2)
    assert names(cache) == {"thesis.tar", wanted(2).name}


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (content(1)[:-1], "9,999 of 10,000 bytes came"),
        (content(1) + b"!", "more than the 10,000 bytes"),
        (b"!" + content(1)[1:], "sha256 is not the manifest's"),
        (b"", "0 of 10,000"),
    ],
)
def test_other_bytes_never_get_the_name(tmp_path: Path, sent: bytes, message: str) -> None:
    cache = Cache(tmp_path, 3 * SIZE)
    with pytest.raises(Damaged, match=re.escape(message)):
        cache.get(wanted(1), lambda: pieces(sent))
    assert names(cache) == set()
    assert taken(cache, 1) == content(1)


def test_errors_of_the_source_and_of_the_disk_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path, 3 * SIZE)

    def breaks() -> Iterator[bytes]:
        yield content(1)[:500]
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError):
        cache.get(wanted(1), breaks)
    assert names(cache) == set()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match="No space left"):
            cache.get(wanted(1), nothing)
    assert names(cache) == set()
    assert taken(cache, 1) == content(1)


def test_a_file_that_this_disk_changed_is_found_and_fetched_again(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 3 * SIZE)
    taken(cache, 1)
    path = tmp_path / wanted(1).name
    assert not cache.discard_damaged(wanted(1))
    path.write_bytes(b"!" + content(1)[1:])
    assert cache.discard_damaged(wanted(1))
    assert not path.exists()
    assert not cache.discard_damaged(wanted(1))
    taken(cache, 1)
    os.truncate(path, 100)  # seen without reading it
    assert taken(cache, 1) == content(1)


def test_who_does_not_wait_is_told(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 3 * SIZE)
    begun, may_go_on = threading.Event(), threading.Event()

    def slow() -> Iterator[bytes]:
        yield content(1)[:100]
        begun.set()
        may_go_on.wait()
        yield content(1)[100:]

    found: list[int | None] = []
    thread = threading.Thread(target=lambda: found.append(cache.get(wanted(1), slow)))
    thread.start()
    begun.wait()
    assert cache.get(wanted(1), nothing, wait=False) is None
    assert cache.size() == SIZE  # a file on its way counts whole
    with pytest.raises(CacheFull):
        Cache(tmp_path, SIZE).get(wanted(2), nothing)  # and is in use
    may_go_on.set()
    thread.join()
    assert found[0] is not None
    assert os.pread(found[0], SIZE, 0) == content(1)
    os.close(found[0])


def take_many(
    folder: Path, seed: int, fetched: "multiprocessing.Queue[int]", largest: "multiprocessing.Queue[int]"
) -> None:
    cache = Cache(folder, 3 * SIZE)
    most = 0
    for turn in range(40):
        number = (turn * seed) % 5

        def fetch(number: int = number) -> Iterator[bytes]:
            fetched.put(number)
            yield from pieces(content(number))

        descriptor = cache.get(wanted(number), fetch)
        assert descriptor is not None
        most = max(most, cache.size())
        assert os.pread(descriptor, SIZE, 0) == content(number)
        os.close(descriptor)
    largest.put(most)


def test_processes_share_it(tmp_path: Path) -> None:
    """Three processes want five files of which three fit: each reads the right bytes, and the bound holds at every
    look.
    """
    context = multiprocessing.get_context("fork")
    fetched, largest = context.Queue(), context.Queue()
    processes = [context.Process(target=take_many, args=(tmp_path, seed, fetched, largest)) for seed in (1, 2, 3)]
    for process in processes:
        process.start()
    most = [largest.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert max(most) <= 3 * SIZE
    assert {path.suffix for path in tmp_path.iterdir()} <= {".tar", ""}


def take_once(
    folder: Path, barrier: "multiprocessing.synchronize.Barrier", fetched: "multiprocessing.Queue[int]"
) -> None:
    def fetch() -> Iterator[bytes]:
        fetched.put(1)
        yield from pieces(content(1))

    barrier.wait()
    os.close(Cache(folder, 3 * SIZE).get(wanted(1), fetch) or -1)


def test_a_file_wanted_by_all_at_once_is_fetched_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, fetched = context.Barrier(4), context.Queue()
    processes = [context.Process(target=take_once, args=(tmp_path, barrier, fetched)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert fetched.get(timeout=10) == 1
    assert fetched.empty()
    assert names(Cache(tmp_path, SIZE)) == {wanted(1).name}


def test_a_fetch_that_is_killed_leaves_nothing_under_the_name(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 3 * SIZE)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:

        def hangs() -> Iterator[bytes]:
            yield content(1)[:4000]
            os.write(writer, b"!")
            signal.pause()

        cache.get(wanted(1), hangs)
        os._exit(0)
    assert os.read(reader, 1) == b"!"
    assert names(cache) == {wanted(1).name + ".partial"}
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert cache.held(wanted(1)) is None
    small = Cache(tmp_path, SIZE)
    assert taken(small, 2) == content(2)  # what the dead process left may go
    assert names(cache) == {wanted(2).name}
    assert taken(cache, 1) == content(1)
    for number in (reader, writer):
        os.close(number)


def test_a_dead_fetch_is_taken_over(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 3 * SIZE)
    (tmp_path / (wanted(1).name + ".partial")).write_bytes(b"x" * (SIZE + 77))
    assert taken(cache, 1) == content(1)
    assert names(cache) == {wanted(1).name}
