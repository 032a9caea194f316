"""A dataset that lies elsewhere: its files are fetched whole into the cache, tried again when that fails, and never
replaced by others.

    https://host/path            through webdataset's opener (which runs curl, without a shell); http:// on this machine
    gs://, hf://, ais://         through webdataset's opener and the command that it names for them
    s3://bucket/prefix           through boto3 (an extra), with the user's own AWS settings
    pipe:command {name}          a shell command whose output is the file; only where data.allow_commands = true

A URL may hold {name}, which stands for the file's name; else the name is put behind it. Every shard and index is proved
by the manifest's sha256 before anything is read from it, so a server can withhold data but not change them.
"""

import errno
import ipaddress
import itertools
import os
import random
import re
import select
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import TimeoutExpired
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

from diffmoe_ep.config import ConfigError, DataConfig
from diffmoe_ep.config.foreign import parse_json
from diffmoe_ep.data.manifest import MANIFEST_NAME, DataError, Manifest, Shard, parse_manifest
from diffmoe_ep.data.remote.cache import Cache, CacheFull, Damaged, Wanted

T = TypeVar("T")
CHUNK = 1 << 20  # bytes read at once
LONGEST_PAUSE = 60.0  # seconds between two attempts
LARGEST_SMALL = 1 << 30  # bytes that a manifest or an index may have
OPENER_SCHEMES = ("https", "http", "gs", "hf", "ais", "pipe")
CURL_CODES = {
    6: "the server's name is unknown",
    7: "no connection to the server",
    18: "the connection broke before the end",
    22: "the server answered with an HTTP error, such as 403, 404 or 500",
    28: "the connection timed out",
    35: "no TLS connection",
    52: "the server answered with nothing",
    56: "the connection broke",
    60: "the server's certificate is not trusted",
    92: "the connection broke",
}


class Unavailable(DataError):
    """A file of a dataset that cannot be had now, however often it was tried; the order of samples waits for it, so the
    run ends.
    """


class Refused(OSError):
    """The server said no; what it may say only for a moment has been tried again."""


@dataclass(frozen=True)
class Access:
    """How remote files are fetched; the defaults are those of the config's section `data`."""

    cache: str = "cache"  # folder of fetched files, shared by all processes of a host
    cache_gb: float = 100.0  # its bound, in 10^9 bytes
    allow_commands: bool = False  # whether `pipe:` may run a shell command
    retries: int = 5  # further attempts after one that failed
    # seconds without a byte after which an attempt has failed; above the minute for which curl tries again itself
    silence: float = 90.0
    slowest: float = 65536.0  # bytes per second below which an attempt has failed
    pause: float = 1.0  # seconds before the second attempt; doubled for each further one

    @classmethod
    def of(cls, data: DataConfig) -> "Access":
        """As the config says."""
        return cls(data.cache, data.cache_gb, data.allow_commands, data.retries)


def is_remote(folder: str | Path) -> bool:
    """Whether a dataset's place is a URL, not a folder."""
    return isinstance(folder, str) and re.match(r"[a-z][a-z0-9+.-]+:", folder) is not None


class RemoteFolder:
    """A dataset's folder at a URL; holds nothing open but its background thread, which neither pickle nor fork carry
    along.
    """

    def __init__(self, url: str, access: Access) -> None:
        """ConfigError for a URL that cannot be used as it is."""
        check_url(url, access)
        if url.startswith("pipe:") and "{name}" not in url:
            raise ConfigError(
                f"data.folder = {url} does not say where the file's name stands; put {{name}} into the command"
            )
        self.url = url
        self.access = access
        self.cache = Cache(Path(access.cache), int(access.cache_gb * 1e9))
        self._ahead: _Ahead | None = None

    def place(self, name: str) -> str:
        """Where a file lies, as messages may show it: without passwords and signatures."""
        return shown(_url_of(self.url, name))

    def manifest(self) -> Manifest:
        """Fetch and check the manifest; a server that denies it is not asked again."""
        content = self._tried(MANIFEST_NAME, lambda: self._small(MANIFEST_NAME), patient=False)
        where = self.place(MANIFEST_NAME)
        try:
            manifest = parse_manifest(parse_json(content), where)
        except DataError:
            raise
        except ValueError as error:
            raise DataError(
                f"{where}: not a JSON file ({error}); give the URL of a prepared dataset's folder"
            ) from error
        largest = max(manifest.shards, key=lambda shard: shard.bytes)
        if largest.bytes > self.cache.most:
            raise ConfigError(
                f"data.cache_gb = {self.access.cache_gb:g} holds no shard such as {self.place(largest.name)}"
                f" ({largest.bytes / 1e9:.3g} GB); raise data.cache_gb"
            )
        return manifest

    def open(self, shard: Shard, release: Callable[[], None]) -> int:
        """A descriptor of the shard's cached copy; `release` lets go of shards that this process holds, when the cache
        is full of them.
        """
        wanted = _wanted(shard)

        def fetch() -> int:
            try:
                descriptor = self.cache.get(wanted, lambda: self._chunks(shard.name, shard.bytes))
            except CacheFull:
                release()
                raise
            assert descriptor is not None
            return descriptor

        return self._tried(shard.name, fetch)

    def index(self, shard: Shard) -> bytes:
        """The shard's index file."""

        def fetch() -> bytes:
            descriptor = self.cache.held(Wanted(shard.index_sha256, None, ".index.npy"))
            if descriptor is None:
                content = self._small(shard.index_name)
                descriptor = self.cache.get(Wanted(shard.index_sha256, len(content), ".index.npy"), lambda: [content])
            assert descriptor is not None
            with os.fdopen(descriptor, "rb") as file:
                return file.read()

        return self._tried(shard.index_name, fetch)

    def discard_damaged(self, shard: Shard) -> bool:
        """Remove the cached copy if this host's disk has changed it; whether it was so."""
        return self.cache.discard_damaged(_wanted(shard))

    def prefetch(self, shards: Sequence[Shard]) -> None:
        """Fetch shards in the background, in this order, as far as they fit beside each other; failures are left to who
        needs the shard.
        """
        if self._ahead is None or not self._ahead.is_mine():
            self._ahead = _Ahead(self)
        self._ahead.want(shards)

    def close(self) -> None:
        """End the background thread."""
        if self._ahead is not None and self._ahead.is_mine():
            self._ahead.close()
        self._ahead = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_ahead": None}

    def _chunks(self, name: str, size: int) -> Iterator[bytes]:
        return chunks(_url_of(self.url, name), size, self.access)

    def _small(self, name: str) -> bytes:
        parts, size = [], 0
        for chunk in self._chunks(name, LARGEST_SMALL):
            parts.append(chunk)
            size += len(chunk)
            if size > LARGEST_SMALL:
                raise Damaged(errno.EFBIG, f"more than {LARGEST_SMALL:,} bytes came")
        return b"".join(parts)

    def _tried(self, name: str, action: Callable[[], T], patient: bool = True) -> T:
        """What the action returns, tried again after pauses; Unavailable names file, reason and remedy. Not patient: no
        is no.
        """
        for attempt in itertools.count(1):
            try:
                return action()
            except OSError as error:
                if attempt > self.access.retries or (isinstance(error, Refused) and not patient):
                    times = "once" if attempt == 1 else f"{attempt} times"
                    reason = error.strerror or str(error)
                    raise Unavailable(
                        f"{self.place(name)} is unavailable, tried {times} ({reason}); {self._remedy(error)}"
                    ) from error
            # Ranks that failed together should not come back together; a generator of its own, for torch's and numpy's
            # are the run's.
            time.sleep(
                random.SystemRandom().uniform(0.5, 1.0) * min(self.access.pause * 2 ** (attempt - 1), LONGEST_PAUSE)
            )
        raise AssertionError("the count never ends")

    def _remedy(self, error: OSError) -> str:
        cache = f"data.cache = {self.cache.folder}"
        match error:
            case CacheFull():
                return f"raise data.cache_gb ({self.access.cache_gb:g} in {cache}), or lower data.shuffle_block"
            case Damaged():
                return "put a sound copy there, the one that the manifest was written for"
            case OSError(errno=errno.ENOSPC | errno.EDQUOT):
                return f"free space on the disk of {cache}, or lower data.cache_gb ({self.access.cache_gb:g})"
            case OSError(filename=str() | Path()):
                return f"{error.filename} must be usable: choose another data.cache"
        remedy = "see that the file is there and may be read, or raise data.retries"
        return f"{remedy}; the run continues from its last checkpoint"


class _Ahead:
    """A background thread that fetches what will be needed next; a process has its own."""

    def __init__(self, folder: RemoteFolder) -> None:
        self._folder = folder
        self._process = os.getpid()
        self._changed = threading.Condition()
        self._wanted: list[Shard] = []
        self._number = 0  # of the list, to see that it was replaced
        self._done = 0  # number of the list that was taken up last
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self._thread.start()

    def is_mine(self) -> bool:
        """Whether this process started the thread: a forked one has only its shell."""
        return self._process == os.getpid()

    def want(self, shards: Sequence[Shard]) -> None:
        """Replace the list of what to fetch."""
        with self._changed:
            self._wanted = list(shards)
            self._number += 1
            self._changed.notify()

    def close(self) -> None:
        """End the thread, also within a file."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._number > self._done)
                if self._closed:
                    return
                wanted, self._done = self._wanted, self._number
            keep = {_wanted(shard).name for shard in wanted}
            for shard in wanted:
                if self._closed or self._number > self._done or not self._fetch(shard, keep):
                    break

    def _fetch(self, shard: Shard, keep: set[str]) -> bool:
        """Whether to go on with the next shard."""

        def chunks() -> Iterator[bytes]:
            for chunk in self._folder._chunks(shard.name, shard.bytes):
                if self._closed:
                    raise OSError(errno.ECANCELED, "closed")
                yield chunk

        try:
            descriptor = self._folder.cache.get(_wanted(shard), chunks, wait=False, keep=keep)
        except CacheFull:
            return False
        except OSError:  # who needs the shard tries again, and tells
            return True
        except DataError:  # a client is missing
            return False
        if descriptor is not None:
            os.close(descriptor)
        return True


def shown(url: str) -> str:
    """A URL without user, password and query, which may hold secrets; commands are shown as they are."""
    if url.startswith("pipe:"):
        return url
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _wanted(shard: Shard) -> Wanted:
    return Wanted(shard.sha256, shard.bytes, ".tar")


def _url_of(url: str, name: str) -> str:
    """The URL of a file; names are plain (letters, digits, '_', '-', '.'), so a command cannot be changed by one."""
    return url.replace("{name}", name) if "{name}" in url else f"{url.rstrip('/')}/{name}"


def check_url(url: str, access: Access) -> None:
    """ConfigError for a URL that cannot be used as it is."""
    scheme = url.partition(":")[0]
    if scheme != "s3" and scheme not in OPENER_SCHEMES:
        raise ConfigError(
            f"data.folder = {shown(url)}: {scheme}: is not one of s3, {', '.join(OPENER_SCHEMES)}; give one of these, "
            "or a folder"
        )
    if scheme == "pipe":
        if not access.allow_commands:
            raise ConfigError(f"data.folder = {url} runs a command; set data.allow_commands = true if you trust it")
        return
    host = urlsplit(url).hostname
    if not host:
        raise ConfigError(f"data.folder = {shown(url)} names no host or bucket; give {scheme}://NAME/PATH")
    if scheme == "http" and not _is_this_machine(host):
        raise ConfigError(
            f"data.folder = {shown(url)} can be read and changed on its way; use https:// (http:// is for this machine "
            "only)"
        )


def _is_this_machine(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def chunks(url: str, size: int, access: Access) -> Iterator[bytes]:
    """The content of a URL, up to about `size` bytes long; OSError says what went wrong."""
    return _from_s3(url, access) if url.startswith("s3:") else _from_opener(url, size, access)


def _from_opener(url: str, size: int, access: Access) -> Iterator[bytes]:
    """Through webdataset's opener, which starts a command for each of these schemes; one that falls silent or crawls is
    ended.
    """
    from webdataset.gopen import gopen

    try:
        pipe = gopen(url, "rb", bufsize=0)
    except (FileNotFoundError, ImportError) as error:
        missing = getattr(error, "filename", None) or getattr(error, "name", None)
        raise DataError(f"{shown(url)} is read with {missing}, which is not installed; install it") from error
    end = time.monotonic() + access.silence + size / access.slowest
    ready = select.poll()
    ready.register(pipe.stream, select.POLLIN)
    try:
        while True:
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError(errno.ETIMEDOUT, f"it came at less than {access.slowest:,.0f} bytes per second")
            if not ready.poll(1000 * min(access.silence, left)):
                if left <= access.silence:
                    continue
                raise TimeoutError(errno.ETIMEDOUT, f"no byte came for {access.silence:g} seconds")
            chunk = pipe.stream.read(CHUNK)
            if not chunk:
                break
            yield chunk
        code = pipe.proc.wait(access.silence)
        if code:
            raise _failure(url, code)
    except TimeoutExpired as error:
        raise TimeoutError(
            errno.ETIMEDOUT, f"the command did not end within {access.silence:g} seconds of its last byte"
        ) from error
    finally:
        pipe.ignore_errors = True  # its exit code was looked at above
        pipe.proc.kill()
        pipe.close()


def _failure(url: str, code: int) -> OSError:
    if not url.startswith("http"):
        return OSError(errno.EIO, f"the command ended with code {code}")
    kind = Refused if code == 22 else OSError
    return kind(errno.EIO, f"{CURL_CODES.get(code, 'the transfer failed')}; curl ended with code {code}")


def _from_s3(url: str, access: Access) -> Iterator[bytes]:
    try:
        from boto3.session import Session
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError as error:
        raise DataError(f"{url} is read with boto3, which is not installed; pip install 'diffmoe_ep[s3]'") from error
    bucket, _, key = url.removeprefix("s3://").partition("/")
    settings = Config(connect_timeout=access.silence, read_timeout=access.silence, retries={"total_max_attempts": 1})
    end = time.monotonic() + access.silence
    try:
        answer = Session().client("s3", config=settings).get_object(Bucket=bucket, Key=key)
        end += answer["ContentLength"] / access.slowest
        for chunk in answer["Body"].iter_chunks(CHUNK):
            yield chunk
            if time.monotonic() > end:
                raise TimeoutError(errno.ETIMEDOUT, f"it came at less than {access.slowest:,.0f} bytes per second")
    except ClientError as error:
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        raise (Refused if 400 <= status < 500 and status != 429 else OSError)(errno.EIO, str(error)) from error
    except BotoCoreError as error:
        raise OSError(errno.EIO, str(error)) from error
