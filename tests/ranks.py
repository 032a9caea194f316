"""Runs a function on gloo ranks that are started once per test session and world size: `run(2, function, argument)`."""

import atexit
import faulthandler
import gc
import importlib
import importlib.util
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from functools import cache
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from types import ModuleType
from typing import Any

START_SECONDS = 180.0  # a rank's imports, on a machine that is busy with other work
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}  # gloo, also beside GPUs
MOST_THREADS = 60  # of a rank: DeepSpeed's engines keep their process groups, whose threads wake up all the time
GRACE_SECONDS = 15.0  # what the other ranks get to notice a failed one, and every rank to take down its groups


class RankError(AssertionError):
    """A rank raised, ended or hung; `errors` holds the text of each rank that did not hang, by rank."""

    def __init__(self, message: str, errors: dict[int, str]):
        super().__init__(message)
        self.errors = errors


def run(world: int, function: Callable[..., Any], *args: Any, timeout: float = 240.0) -> list[Any]:
    """Returns [function(rank, *args) for rank in range(world)], each computed in a process of its own.

    RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are set as a launcher would; the function, which must
    stand at the top level of a module, initialises the process groups, and they are taken down when every rank has
    returned. Raises RankError with the traceback of the rank that failed first, or with the stacks of those that hang
    after `timeout` seconds. The next call finds working ranks in either case.
    """
    if world not in _pools:
        _pools[world] = Pool(world)
    try:
        return _pools[world].call(function, args, timeout)
    finally:
        if not _pools[world].clean:
            _pools.pop(world).close()


class Pool:
    """The long-lived processes of one world size, each waiting at its pipe for the next call."""

    def __init__(self, world: int):
        context = _context()
        self.world = world
        self.clean = False  # whether every rank waits for a call, with nothing initialised
        self.folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(rank, world, theirs, self._stacks(rank)),
                name=f"rank {rank} of {world}",
                daemon=True,
            )
            process.start()
            theirs.close()  # or the end of this rank would go unnoticed here
            self.pipes.append(ours)
            self.processes.append(process)
        if len(self._receive(range(world), START_SECONDS)) < world or not all(
            process.is_alive() for process in self.processes
        ):
            self.close()
            raise RankError(f"{world} ranks did not start within {START_SECONDS:g} s", {})
        self.clean = True

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        """One call on every rank; groups are taken down when all have returned, or at once on a rank that raised."""
        address = (function.__module__, sys.modules[function.__module__].__file__, function.__qualname__)
        message = (address, pickle.dumps(args), _free_port(), timeout)
        self.clean = False
        for pipe in self.pipes:
            pipe.send(message)
        answers = self._receive(range(self.world), timeout)
        returned = [rank for rank, (kind, _) in answers.items() if kind == "result"]
        for rank in returned:
            self.pipes[rank].send("clear")
        cleared = self._receive(returned, GRACE_SECONDS)
        threads = [value for kind, value in cleared.values() if kind == "cleared"]
        self.clean = (
            len(answers) == self.world
            and len(cleared) == len(returned)
            and max(threads, default=0) <= MOST_THREADS
            and all(p.is_alive() for p in self.processes)
        )

        failures = sorted(
            (value, rank) for rank, (kind, value) in (answers | cleared).items() if kind == "error"
        )  # by time
        errors = {rank: text for (_, text), rank in failures}
        hanging = [
            rank for rank in range(self.world) if rank not in answers or (rank in returned and rank not in cleared)
        ]
        if failures:
            rest = f"; ranks {hanging} still ran and were ended" if hanging else ""
            raise RankError(f"rank {failures[0][1]} of {self.world} failed first{rest}:\n{failures[0][0][1]}", errors)
        if hanging:
            stacks = "\n".join(f"rank {rank}:\n{self._stacks(rank).read_text()}" for rank in hanging)
            raise RankError(f"ranks {hanging} of {self.world} gave no answer within {timeout:g} s\n{stacks}", errors)
        return [pickle.loads(answers[rank][1]) for rank in range(self.world)]

    def close(self) -> None:
        """Ends this pool's own processes, whatever they are doing."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        for pipe in self.pipes:
            pipe.close()
        self.folder.cleanup()

    def _receive(self, ranks: Sequence[int], seconds: float) -> dict[int, tuple[str, Any]]:
        """One message of each of these ranks; those are missing that do not answer in time, or soon after a failure."""
        deadline = time.monotonic() + seconds
        answers: dict[int, tuple[str, Any]] = {}
        waiting = {self.pipes[rank]: rank for rank in ranks}
        while waiting:
            ready = wait(
                list(waiting), timeout=max(0.0, deadline + 1.0 - time.monotonic())
            )  # 1 s in which it writes its stacks
            if not ready:
                break
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    answers[rank] = pipe.recv()
                except (EOFError, ConnectionResetError):
                    self.processes[rank].join()
                    text = f"its process ended with exit code {self.processes[rank].exitcode}"
                    answers[rank] = ("error", (time.monotonic(), text))
                if answers[rank][0] == "error":
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        return answers

    def _stacks(self, rank: int) -> Path:
        """Where a rank that is over its time writes what each of its threads is doing."""
        return Path(self.folder.name) / f"stacks-{rank}.txt"


_pools: dict[int, Pool] = {}


@cache
def _context() -> ForkServerContext:
    """Ranks are forked from a process that has imported what they all need, and has computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megatron.core.parallel_state", "diffmoe_ep.train.trainer"])
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT)
    try:
        ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


@atexit.register
def _close() -> None:
    while _pools:
        _pools.popitem()[1].close()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    assert isinstance(port, int)
    return port


def _serve(rank: int, world: int, pipe: Connection, stacks: Path) -> None:
    """The life of one rank: import torch, then answer calls until the test session ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the session ends its ranks itself
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
    )
    os.environ.update(ENVIRONMENT)
    import torch

    environment, folder = dict(os.environ), Path.cwd()
    pipe.send(("ready", None))
    while True:
        address, arguments, port, timeout = pipe.recv()
        os.environ["MASTER_PORT"] = str(port)
        torch.set_num_threads(1)
        failure = None
        with stacks.open("w") as file:
            faulthandler.dump_traceback_later(timeout, file=file)
            try:
                result = pickle.dumps(
                    _function(*address)(rank, *pickle.loads(arguments))
                )  # tensors by value: no shared memory
                pipe.send(("result", result))
                pipe.recv()
            except BaseException:  # an exit and a failed pytest.raises are this call's end, not this rank's
                failure = (time.monotonic(), traceback.format_exc())
            finally:
                faulthandler.cancel_dump_traceback_later()
        try:
            take_down()
        except Exception:
            failure = failure or (time.monotonic(), traceback.format_exc())
        torch.set_default_dtype(torch.float32)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        threads = len(os.listdir("/proc/self/task")) if sys.platform == "linux" else 0
        pipe.send(("error", failure) if failure else ("cleared", threads))


def _end_with_parent() -> None:
    """Ends this rank when the test session is gone, also when it was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _function(module: str, file: str, name: str) -> Callable[..., Any]:
    """A function by reference; test modules come from their file, since the name `tests` may be somebody else's,
    too.
    """
    if module not in sys.modules and Path(__file__).parent in Path(file).parents:
        specification = importlib.util.spec_from_file_location(module, file)
        assert specification is not None and specification.loader is not None
        sys.modules[module] = importlib.util.module_from_spec(specification)
        try:
            specification.loader.exec_module(sys.modules[module])
        except BaseException:
            del sys.modules[module]
            raise
    function: Any = importlib.import_module(module)
    for part in name.split("."):
        function = getattr(function, part)
    return function


def take_down() -> None:
    """Leaves torch, megatron-core and DeepSpeed as if nothing had been initialised, so that the next call can."""
    loaded: dict[str, ModuleType] = sys.modules
    if "megatron.core.parallel_state" in loaded:
        loaded["megatron.core.parallel_state"].destroy_model_parallel()
    if "deepspeed.utils.groups" in loaded:
        loaded["deepspeed.utils.groups"]._release_process_group_references()
        loaded["deepspeed.comm.comm"].cdb = None  # type: ignore[attr-defined]
    distributed = loaded["torch.distributed"]
    if distributed.is_initialized():
        distributed.destroy_process_group()
    gc.collect()
