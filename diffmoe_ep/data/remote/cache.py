"""A bounded folder of fetched files that all processes of a host share, safe against any of them dying at any moment.

    NAME             a whole file whose content was proved; NAME begins with its sha256, so it can never be stale
    NAME.partial     one that a process is fetching; it has its full size from the start, so that the bound counts it
    lock             held for moments, while room is made

Locks are flock's, which the kernel drops with the process that held them. Who fetches holds its .partial exclusively,
who reads holds the file shared, through the very descriptor that it reads from: what can be locked exclusively is in
nobody's use and may go.
"""

import errno
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

PARTIAL = ".partial"
OURS = re.compile(r"[0-9a-f]{64}\.[a-z.]+")  # nothing else in the folder is counted or removed
PAUSE = 0.05  # seconds between two looks at a file that another process fetches


class CacheFull(OSError):
    """The bound leaves no room beside the files that are in use."""


class Damaged(OSError):
    """The bytes that came are not those that were promised."""


@dataclass(frozen=True)
class Wanted:
    """A file by its content."""

    sha256: str
    size: int | None  # bytes; None: only to ask for what is held
    suffix: str  # of its name in the cache, so that a person sees what it is

    @property
    def name(self) -> str:
        """Its file name in the cache."""
        return self.sha256 + self.suffix


@dataclass(frozen=True)
class Cache:
    """The folder and its bound; holds nothing open, so it is cheap to pickle and safe to fork."""

    folder: Path
    most: int  # bytes of all files in it, whole and partial

    def held(self, wanted: Wanted) -> int | None:
        """A descriptor of a file that is there, which keeps it there until it is closed; None if it is not."""
        while True:
            try:
                descriptor = os.open(self.folder / wanted.name, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return None
            with _closing_on_error(descriptor):
                fcntl.flock(descriptor, fcntl.LOCK_SH)
                state = os.fstat(descriptor)
                if state.st_nlink and wanted.size in (state.st_size, None):
                    with suppress(PermissionError):  # another user's file
                        os.utime(descriptor)  # used last now
                    return descriptor
                if state.st_nlink:  # cut by someone else: no copy
                    self._remove(wanted)
            os.close(descriptor)

    def get(
        self,
        wanted: Wanted,
        fetch: Callable[[], Iterable[bytes]],
        wait: bool = True,
        keep: Container[str] = frozenset(),
    ) -> int | None:
        """As `held`, but a file that is not there is filled with the chunks of `fetch` first; None if not to wait for
        who fetches it now.

        Files named in `keep` are not removed for it. CacheFull, Damaged, any OSError of the disk or of `fetch`: nothing
        stands under the file's name then, and a later call starts anew.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        while (descriptor := self.held(wanted)) is None:
            with self._fetching(wanted) as partial:
                if partial is not None:
                    self._make_room(wanted, partial, keep)
                    _fill(partial, wanted, fetch())
                    os.fsync(partial)
                    with self._bookkeeping():  # who counts files must not meet it under both names, or under none
                        self._partial(wanted).rename(self.folder / wanted.name)
                    continue
            if not wait:
                return None
            time.sleep(PAUSE)
        return descriptor

    def discard_damaged(self, wanted: Wanted) -> bool:
        """Remove a file whose bytes changed on this disk since they were proved; whether it was so."""
        with suppress(FileNotFoundError), (self.folder / wanted.name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != wanted.sha256:
                self._remove(wanted)
                return True
        return False

    def size(self) -> int:
        """Bytes of all files in it; a partial one counts with its full size."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._bookkeeping():
            return sum(size for _, size, _ in self._files())

    def _partial(self, wanted: Wanted) -> Path:
        return self.folder / (wanted.name + PARTIAL)

    @contextmanager
    def _fetching(self, wanted: Wanted) -> Iterator[int | None]:
        """The descriptor of the .partial, this process its only writer; None if another one is, or has just
        finished.
        """
        path = self._partial(wanted)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if not (_locked(descriptor) and _is_at(descriptor, path)):
                yield None
                return
            try:
                if (self.folder / wanted.name).exists():
                    yield None
                else:
                    yield descriptor
            finally:
                if _is_at(descriptor, path):  # not renamed: nothing of it is kept
                    path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)

    def _make_room(self, wanted: Wanted, partial: int, keep: Container[str]) -> None:
        """Remove what was used longest ago until the file fits, and reserve its bytes on the disk."""
        assert wanted.size is not None
        with self._bookkeeping():
            files = sorted(self._files())
            room = self.most - sum(size for _, size, name in files if name != wanted.name + PARTIAL)
            for _, size, name in files:
                if room >= wanted.size:
                    break
                if name != wanted.name + PARTIAL and name not in keep and self._evict(self.folder / name):
                    room += size
            if room < wanted.size:
                used = f"the files in use ({self.most - room:,} bytes), the bound is {self.most:,}"
                raise CacheFull(errno.ENOSPC, f"{wanted.size:,} bytes do not fit beside {used}")
            os.ftruncate(partial, 0)  # what a process left that died
            os.posix_fallocate(partial, 0, wanted.size)

    def _evict(self, path: Path) -> bool:
        """Remove a file that nobody reads or fetches; whether it was so."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        try:
            if not _locked(descriptor):
                return False
            if not _is_at(descriptor, path):  # a partial one that has its final name now
                return False
            path.unlink(missing_ok=True)
            return True
        finally:
            os.close(descriptor)

    def _remove(self, wanted: Wanted) -> None:
        with self._bookkeeping():
            (self.folder / wanted.name).unlink(missing_ok=True)

    @contextmanager
    def _bookkeeping(self) -> Iterator[None]:
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _files(self) -> Iterator[tuple[int, int, str]]:
        """(time of last use, bytes, name) of every file."""
        with suppress(FileNotFoundError), os.scandir(self.folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    if OURS.fullmatch(entry.name):
                        state = entry.stat(follow_symlinks=False)
                        yield state.st_mtime_ns, state.st_size, entry.name


def _fill(descriptor: int, wanted: Wanted, chunks: Iterable[bytes]) -> None:
    """Write the chunks and prove that they are what was wanted."""
    assert wanted.size is not None
    digest, size = hashlib.sha256(), 0
    for chunk in chunks:
        size += len(chunk)
        if size > wanted.size:
            raise Damaged(errno.EBADMSG, f"more than the {wanted.size:,} bytes of the manifest came")
        digest.update(chunk)
        rest = memoryview(chunk)
        while rest:
            rest = rest[os.pwrite(descriptor, rest, size - len(rest)) :]
    if size < wanted.size:
        raise Damaged(errno.EBADMSG, f"{size:,} of {wanted.size:,} bytes came")
    if digest.hexdigest() != wanted.sha256:
        raise Damaged(errno.EBADMSG, "the bytes that came are damaged (their sha256 is not the manifest's)")


def _locked(descriptor: int) -> bool:
    """Whether this descriptor is the only one that holds its file now."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one that has this name."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


@contextmanager
def _closing_on_error(descriptor: int) -> Iterator[None]:
    try:
        yield
    except BaseException:
        os.close(descriptor)
        raise
