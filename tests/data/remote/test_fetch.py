"""A dataset behind a server that drops, cuts, corrupts, hangs and refuses: sound bytes or an error by name, never
others.
"""

import hashlib
import os
import pickle
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from data_prep.write import write_dataset
from diffmoe_ep.config import ConfigError, DataConfig
from diffmoe_ep.data.codec import encode
from diffmoe_ep.data.manifest import DataError, Manifest
from diffmoe_ep.data.remote.cache import Cache
from diffmoe_ep.data.remote.fetch import Access, Unavailable, is_remote, shown
from diffmoe_ep.data.shards import Dataset

FACTS = Manifest("tiny", "pixels", (1, 8, 9), "uint8", 0.5, -1.0, 4, (), "made up")
ARRAYS = np.random.default_rng(1).integers(0, 255, (16, 1, 8, 9)).astype(np.uint8)
SHARDS = [f"tiny-{number:06d}.tar" for number in range(4)]


@dataclass
class Server:
    """A folder served on this machine, and what goes wrong with it."""

    url: str = ""
    faults: dict[str, list[str]] = field(default_factory=dict)  # file -> what goes wrong with its next requests
    asked: list[str] = field(default_factory=list)  # files, in the order of requests
    hanging: threading.Event = field(default_factory=threading.Event)  # set: hanging answers go on

    def count(self, name: str) -> int:
        return self.asked.count(name)


class Handler(SimpleHTTPRequestHandler):
    """Serves files as they are, or with the next fault."""

    def __init__(self, *arguments: Any, server_state: Server, **named: Any) -> None:
        self.state = server_state
        super().__init__(*arguments, **named)

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2].partition("?")[0]
        self.state.asked.append(name)
        faults = self.state.faults.get(name, [])
        fault = faults.pop(0) if faults else ""
        if fault.isdigit():
            self.send_error(int(fault))
            return
        if not fault:
            super().do_GET()
            return
        if fault == "drop":  # before a single byte of an answer
            self.close_connection = True
            return
        content = bytearray((Path(self.directory) / name).read_bytes())
        if fault == "corrupt":
            content[len(content) // 2] ^= 1
        sent = (
            content[: len(content) // 2] if fault in ("cut", "hang") else content + b"!" if fault == "long" else content
        )
        self.send_response(200)
        if fault in ("cut", "hang"):  # announces more than comes
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(sent)
        if fault == "hang":
            self.wfile.flush()
            self.state.hanging.wait(30)
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "tiny"
    write_dataset(
        folder, [(f"k{n:03d}", encode(array, n % 4, FACTS)) for n, array in enumerate(ARRAYS)], FACTS, shard_size=4
    )
    return folder


@pytest.fixture
def server(prepared: Path) -> Iterator[Server]:
    state = Server()
    serving = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(prepared), server_state=state))
    serving.daemon_threads = True
    thread = threading.Thread(target=partial(serving.serve_forever, poll_interval=0.01))
    thread.start()
    state.url = f"http://127.0.0.1:{serving.server_address[1]}"
    yield state
    state.hanging.set()
    serving.shutdown()
    thread.join()
    serving.server_close()


@pytest.fixture
def access(tmp_path: Path) -> Access:
    return Access(cache=str(tmp_path / "cache"), cache_gb=1, retries=2, silence=5.0, pause=0.0)


def everything(dataset: Dataset) -> list[dict[str, bytes]]:
    return [dataset.read(shard, sample) for shard, size in enumerate(dataset.sizes) for sample in range(size)]


def test_a_remote_dataset_reads_as_a_local_one_and_each_file_is_fetched_once(
    prepared: Path, server: Server, access: Access
) -> None:
    local, remote = Dataset.open(prepared), Dataset.open(server.url, access)
    assert server.asked == ["manifest.json"]
    assert remote.fingerprint == local.fingerprint
    assert everything(remote) == everything(local)
    assert remote.where(1, 0) == f"{server.url}/{SHARDS[1]}, key k004"
    again = pickle.loads(pickle.dumps(remote))
    assert everything(again) == everything(local)
    assert sorted(server.asked) == sorted(
        ["manifest.json", *SHARDS, *(name.replace(".tar", ".index.npy") for name in SHARDS)]
    )
    for dataset in (remote, again):
        dataset.close()


@pytest.mark.parametrize("fault", ["drop", "cut", "corrupt", "long", "404"])
@pytest.mark.parametrize("name", [SHARDS[2], "tiny-000002.index.npy"])
def test_a_fault_that_passes_changes_nothing(
    prepared: Path, server: Server, access: Access, fault: str, name: str
) -> None:
    dataset = Dataset.open(server.url, access)
    server.faults[name] = [fault] * 2
    assert everything(dataset) == everything(Dataset.open(prepared))
    assert server.count(name) == 3
    dataset.close()


REASONS = {
    "drop": "the server answered with nothing; curl ended with code 52",
    "cut": "the connection broke before the end; curl ended with code 18",
    "corrupt": "the bytes that came are damaged (their sha256 is not the manifest's)); put a sound copy there",
    "404": "the server answered with an HTTP error, such as 403, 404 or 500; curl ended with code 22); see that the "
    "file is there",
}


@pytest.mark.parametrize("fault", REASONS)
def test_a_fault_that_stays_is_unavailable_by_name(server: Server, access: Access, fault: str) -> None:
    dataset = Dataset.open(server.url, access)
    server.faults[SHARDS[1]] = [fault] * 9
    with pytest.raises(
        Unavailable, match=re.escape(f"{server.url}/{SHARDS[1]} is unavailable, tried 3 times ({REASONS[fault]}")
    ):
        dataset.read(1, 2)
    assert server.count(SHARDS[1]) == 3
    assert not list(Path(access.cache).glob("*.tar*"))
    server.faults.clear()
    assert dataset.read(1, 2)  # once the server is well again
    dataset.close()


def test_a_server_that_falls_silent_is_given_up(server: Server, access: Access) -> None:
    server.faults[SHARDS[0]] = ["hang"]
    dataset = Dataset.open(server.url, replace(access, retries=0, silence=0.3))
    with pytest.raises(Unavailable, match=r"tried once \(no byte came for 0\.3 seconds\)"):
        dataset.read(0, 0)
    assert dataset.read(0, 0)
    dataset.close()


def test_a_server_that_crawls_is_given_up(server: Server, access: Access, prepared: Path) -> None:
    size = (prepared / SHARDS[0]).stat().st_size
    server.faults[SHARDS[0]] = ["hang"]
    dataset = Dataset.open(server.url, replace(access, retries=0, silence=0.2, slowest=size * 10.0))
    with pytest.raises(Unavailable, match=r"tried once \((no byte came for|it came at less than)"):
        dataset.read(0, 0)
    dataset.close()


@pytest.mark.slow
def test_a_server_error_is_tried_again_by_curl_itself(server: Server, access: Access) -> None:
    server.faults["manifest.json"] = ["503"]
    assert Dataset.open(server.url, access).manifest.num_samples == 16
    assert server.count("manifest.json") == 2


def test_a_url_without_a_dataset_is_told_at_once(server: Server, access: Access) -> None:
    with pytest.raises(
        Unavailable, match=r"/else/manifest\.json is unavailable, tried once \(the server answered with an HTTP error"
    ):
        Dataset.open(f"{server.url}/else", access)
    with pytest.raises(DataError, match="not a JSON file"):
        Dataset.open(f"{server.url}/{SHARDS[0]}?{{name}}", access)


def test_a_server_that_is_down(access: Access) -> None:
    with pytest.raises(Unavailable, match=r"tried 3 times \(no connection to the server; curl ended with code 7\)"):
        Dataset.open("http://127.0.0.1:9/data", access)


def test_curl_may_be_missing(server: Server, access: Access, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DataError, match="is read with curl, which is not installed"):
        Dataset.open(server.url, access)


def test_the_bound_holds_and_shards_in_use_are_let_go_for_it(prepared: Path, server: Server, access: Access) -> None:
    most = 2 * (prepared / SHARDS[0]).stat().st_size + 2000  # two shards and their indexes
    dataset = Dataset.open(server.url, replace(access, cache_gb=most / 1e9))
    assert everything(dataset) == everything(Dataset.open(prepared)) == everything(dataset)
    assert dataset.remote is not None
    assert 0 < dataset.remote.cache.size() <= most
    other = Dataset.open(server.url, replace(access, cache_gb=most / 1e9, retries=0))
    held = [dataset.read(shard, 0) for shard in (0, 1)]
    assert len(held) == 2
    with pytest.raises(Unavailable, match=r"do not fit beside the files in use .* raise data\.cache_gb"):
        other.read(2, 0)
    dataset.close()
    assert other.read(2, 0)
    other.close()


def test_a_cache_smaller_than_a_shard_is_a_mistake(server: Server, access: Access) -> None:
    with pytest.raises(ConfigError, match=r"data\.cache_gb = 1e-06 holds no shard such as .*; raise data\.cache_gb"):
        Dataset.open(server.url, replace(access, cache_gb=1e-6))


def test_a_full_disk_is_named(server: Server, access: Access, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    dataset = Dataset.open(server.url, access)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        Unavailable, match=r"tried 3 times \(No space left on device\); free space on the disk of data\.cache"
    ):
        dataset.read(0, 0)


def test_a_cache_that_cannot_be_made_is_named(server: Server, access: Access, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    dataset = Dataset.open(server.url, access)
    with pytest.raises(Unavailable, match=r"cache must be usable: choose another data\.cache|cache/.* must be usable"):
        dataset.read(0, 0)


def test_what_the_cache_s_disk_damaged_is_fetched_again(prepared: Path, server: Server, access: Access) -> None:
    dataset = Dataset.open(server.url, access)
    expected = everything(dataset)
    for path in Path(access.cache).glob("*.tar"):
        path.write_bytes(bytes(path.stat().st_size))
    assert everything(dataset) == expected
    assert [server.count(name) for name in SHARDS] == [2] * 4
    dataset.close()


def test_damage_in_the_source_is_damage_of_the_sample(prepared: Path, tmp_path: Path, access: Access) -> None:
    """The manifest vouches for the shard, but its index says otherwise: another copy would be the same."""
    index = np.load(prepared / "tiny-000000.index.npy")
    index["cls"]["crc32"][1] ^= 1
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in prepared.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    np.save(folder / "tiny-000000.index.npy", index)
    content = (folder / "tiny-000000.index.npy").read_bytes()
    manifest = Dataset.open(prepared).manifest
    shards = (replace(manifest.shards[0], index_sha256=hashlib.sha256(content).hexdigest()), *manifest.shards[1:])
    (folder / "manifest.json").write_text(replace(manifest, shards=shards).to_json())
    dataset = Dataset.open(f"pipe:cat {folder}/{{name}}", replace(access, allow_commands=True))
    with pytest.raises(DataError, match="key k001: cls is damaged") as caught:
        dataset.read(0, 1)
    assert not isinstance(caught.value, Unavailable)
    assert dataset.read(0, 2)
    dataset.close()


def test_prefetch_brings_what_fits_and_leaves_failures_to_the_reader(
    prepared: Path, server: Server, access: Access
) -> None:
    two = (2 * (prepared / SHARDS[0]).stat().st_size + 2000) / 1e9
    dataset = Dataset.open(server.url, replace(access, cache_gb=two))
    assert dataset.remote is not None
    server.faults[SHARDS[3]] = ["cut"]
    dataset.prefetch([3, 1, 0, 2])
    ahead = dataset.remote._ahead
    assert ahead is not None
    while ahead._folder.cache.size() < 2 * (prepared / SHARDS[0]).stat().st_size:
        ahead._thread.join(0.01)
    assert SHARDS[2] not in server.asked
    asked = server.count(SHARDS[1])
    assert dataset.read(1, 0) == everything(Dataset.open(prepared))[4]
    assert server.count(SHARDS[1]) == asked == 1
    child = os.fork()
    if child == 0:  # a thread does not survive a fork: the child starts its own
        dataset.prefetch([1])
        dataset.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    dataset.close()
    assert not ahead._thread.is_alive()


def test_two_processes_fetch_each_file_once(prepared: Path, server: Server, access: Access) -> None:
    expected = everything(Dataset.open(prepared))
    children = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            try:
                found = everything(Dataset.open(server.url, access))
            finally:
                os._exit(0 if found == expected else 1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert [server.count(name) for name in SHARDS] == [1] * 4


def test_a_killed_reader_leaves_no_broken_file(prepared: Path, server: Server, access: Access) -> None:
    server.faults[SHARDS[0]] = ["hang"]
    child = os.fork()
    if child == 0:
        Dataset.open(server.url, access).read(0, 0)
        os._exit(0)
    while SHARDS[0] not in server.asked:
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert not list(Path(access.cache).glob("*.tar"))
    dataset = Dataset.open(server.url, access)
    assert dataset.read(0, 0) == everything(Dataset.open(prepared))[0]
    assert server.count(SHARDS[0]) == 2
    dataset.close()


def test_closing_ends_a_fetch_that_hangs(server: Server, access: Access) -> None:
    server.faults[SHARDS[0]] = ["hang"]
    dataset = Dataset.open(server.url, replace(access, silence=0.5))
    dataset.prefetch([0])
    while SHARDS[0] not in server.asked:
        assert dataset.remote is not None and dataset.remote._ahead is not None
        dataset.remote._ahead._thread.join(0.01)
    dataset.close()
    assert not list(Path(access.cache).glob("*.partial"))


def test_commands_need_permission(prepared: Path, access: Access) -> None:
    url = f"pipe:cat {prepared}/{{name}}"
    with pytest.raises(ConfigError, match=r"runs a command; set data\.allow_commands = true"):
        Dataset.open(url, access)
    dataset = Dataset.open(url, replace(access, allow_commands=True))
    assert everything(dataset) == everything(Dataset.open(prepared))
    dataset.close()
    with pytest.raises(ConfigError, match=r"put \{name\} into the command"):
        Dataset.open("pipe:cat all", replace(access, allow_commands=True))
    with pytest.raises(Unavailable, match=r"tried 3 times \(the command ended with code 3\)"):
        Dataset.open("pipe:exit 3; {name}", replace(access, allow_commands=True))
    with pytest.raises(Unavailable, match=r"the command did not end within 0\.2 seconds"):
        Dataset.open(
            "pipe:exec >&-; exec sleep 5; {name}", replace(access, allow_commands=True, silence=0.2, retries=0)
        )


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://example.org/data", "use https://"),
        ("ftp://example.org/data", "ftp: is not one of s3, https"),
        ("https:///data", "names no host"),
        ("s3:bucket", "names no host or bucket"),
        ("file:///data", "file: is not one of"),
    ],
)
def test_other_urls_are_refused(access: Access, url: str, message: str) -> None:
    assert is_remote(url)
    with pytest.raises(ConfigError, match=message):
        Dataset.open(url, access)


def test_paths_are_no_urls_and_secrets_are_not_shown() -> None:
    assert not any(is_remote(path) for path in ("data/digits", "/data", "a:b/c".upper(), ".", Path("https://a")))
    assert shown("https://me:secret@host:80/a/b?signature=1#x") == "https://host:80/a/b"


def s3(prepared: Path, monkeypatch: pytest.MonkeyPatch, fails: list[Exception]) -> Callable[[str, int], Exception]:
    """Put a boto3 in place that serves the folder; its errors are of the type returned."""

    class ClientError(Exception):
        def __init__(self, text: str, status: int) -> None:
            super().__init__(text)
            self.response = {"ResponseMetadata": {"HTTPStatusCode": status}}

    class Body:
        def __init__(self, content: bytes) -> None:
            self.content = content

        def iter_chunks(self, size: int) -> Iterator[bytes]:
            return (self.content[place : place + 100] for place in range(0, len(self.content), 100))

    class Session:
        def client(self, service: str, config: Any) -> "Session":
            assert (service, config["retries"]) == ("s3", {"total_max_attempts": 1})
            return self

        def get_object(self, Bucket: str, Key: str) -> dict[str, Any]:
            if fails:
                raise fails.pop()
            content = (prepared / Key.removeprefix("deep/prefix/")).read_bytes()
            assert Bucket == "bucket"
            return {"ContentLength": len(content), "Body": Body(content)}

    modules = {
        "boto3": {}, "boto3.session": {"Session": Session}, "botocore": {}, "botocore.config": {"Config": dict},
        "botocore.exceptions": {"ClientError": ClientError, "BotoCoreError": type("BotoCoreError", (Exception,), {})},
    }  # fmt: skip
    for name, members in modules.items():
        module = ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
    return ClientError


def test_s3_goes_through_boto3(prepared: Path, access: Access, monkeypatch: pytest.MonkeyPatch) -> None:
    fails: list[Exception] = []
    error = s3(prepared, monkeypatch, fails)
    fails += [error("SlowDown", 503)]
    dataset = Dataset.open("s3://bucket/deep/prefix", access)
    fails += [error("SlowDown", 503), error("SlowDown", 503)]
    assert everything(dataset) == everything(Dataset.open(prepared))
    fails += [error("NoSuchKey", 404)] * 9
    with pytest.raises(
        Unavailable, match=r"s3://bucket/deep/prefix/manifest\.json is unavailable, tried once \(NoSuchKey\)"
    ):
        Dataset.open("s3://bucket/deep/prefix", access)
    dataset.close()


def test_s3_without_boto3_names_the_extra(access: Access, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3.session", None)
    with pytest.raises(DataError, match=r"is read with boto3, which is not installed; pip install 'diffmoe_ep\[s3\]'"):
        Dataset.open("s3://bucket/prefix", access)


def test_the_cache_is_the_one_of_the_settings(access: Access, server: Server) -> None:
    dataset = Dataset.open(server.url, replace(access, cache_gb=0.5))
    assert dataset.remote is not None
    assert dataset.remote.cache == Cache(Path(access.cache), 500_000_000)


def test_defaults_are_those_of_the_config() -> None:
    data, access = DataConfig(), Access()
    for name in ("cache", "cache_gb", "allow_commands", "retries"):
        assert getattr(access, name) == getattr(data, name), name
