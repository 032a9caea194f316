"""The rank grid (expert x data) and its process groups, by megatron-core's rank generator; the one place that reads the
environment.

Expert groups are runs of EP neighbouring ranks, so that dispatch stays inside a node where it can; ranks with the same
place in their groups hold copies of the same experts. Groups are made eagerly, all with one timeout, and only those
that are used: with NCCL each is a communicator that all ranks split off together (megatron-core's whole parallel state
makes 281 groups of 32 ranks, these two families are 12).
"""

import datetime
import os
import re
import socket
import warnings
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist

from diffmoe_ep.config import ConfigError
from diffmoe_ep.parallel.collectives import ALONE, Group, Traffic, gather_objects
from diffmoe_ep.parallel.joining import Place, join, no_connection


@dataclass(frozen=True)
class Mesh:
    """Where this process stands: its rank, its device and the groups that it talks to."""

    world: Group = ALONE  # all W ranks
    expert: Group = ALONE  # the EP ranks that share one copy of the experts
    replicas: Group = ALONE  # the EDP = W / EP ranks that hold the same experts as this one
    pool: Group = ALONE  # the ranks that one training pool spans (this rank alone if pools lie inside ranks)
    control: Group = ALONE  # all W ranks by gloo: numbers that hosts agree on, whatever their devices are doing
    device: torch.device = field(default=torch.device("cpu"))
    host: str = ""  # this machine's name, for reports
    store: dist.Store | None = field(default=None, compare=False, repr=False)  # where the ranks have met; None: alone

    @property
    def rank(self) -> int:
        """This process's number among all ranks."""
        return self.world.rank

    @property
    def size(self) -> int:
        """The number of ranks W."""
        return self.world.size

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks for all (progress, grids, messages)."""
        return self.world.rank == 0

    def agree(self, problem: str | None) -> None:
        """Raise ConfigError on every rank if any rank has a problem, so that none waits for one that has stopped."""
        problems = gather_objects(problem, self.world)
        found = [(rank, text) for rank, text in enumerate(problems) if text]
        if not found:
            return
        texts = {text for _, text in found}
        if len(texts) == 1 and len(found) == len(problems):
            raise ConfigError(found[0][1], everywhere=True)
        raise ConfigError("; ".join(f"rank {rank}: {text}" for rank, text in found[:4]), everywhere=True)

    def same(self, value: object) -> object:
        """Give every rank rank 0's value (a path found on disk, a step), so that all act on one view of the world."""
        return gather_objects(value if self.is_first else None, self.world)[0]


def launched_world(strict: bool = True) -> int:
    """The number of processes that the launcher (deepspeed, torchrun) started; 1 without one, and, if not strict, for
    nonsense.
    """
    return _integer("WORLD_SIZE", 1, strict, least=1)


def launched_rank(strict: bool = True) -> int:
    """This process's rank as the launcher tells it; 0 without one, and, if not strict, for nonsense."""
    return _integer("RANK", 0, strict)


def local_rank(strict: bool = True) -> int:
    """This process's number on its host as the launcher tells it; 0 without one, and, if not strict, for nonsense."""
    return _integer("LOCAL_RANK", 0, strict)


def launched_place() -> Place:
    """Where the launcher wants its processes to meet; ConfigError where it does not say."""
    absent = " and ".join(name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ)
    if absent:
        raise ConfigError(
            f"WORLD_SIZE is {launched_world()} but {absent} are not set; start with deepspeed or torchrun"
        )
    return Place(
        os.environ["MASTER_ADDR"],
        _integer("MASTER_PORT", 0),
        os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
        os.environ.get("GLOO_SOCKET_IFNAME"),
    )


def variables(*prefixes: str) -> dict[str, str]:
    """What the environment says under names that begin so: for reports, and for ranks that meet without a mesh."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(prefixes)}


def stand_as(rank: int, world: int, port: int) -> None:
    """Give this process the place that a launcher would have given it, all ranks being on this machine."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip


def is_initialized() -> bool:
    """Whether this process has joined the others in a process group."""
    return dist.is_initialized()


def use_device(device: str | None) -> None:
    """Let DeepSpeed, too, compute on this type of device; before it is imported, since it decides then. None: as the
    machine has it.
    """
    if device is not None:
        os.environ["DS_ACCELERATOR"] = device


def compute_deterministically() -> None:
    """Let this process add in one order on GPUs, too, at the price of speed; before `init_mesh`, since libraries read
    the environment once. What you export yourself wins.

    Operators that have no fixed order raise RuntimeError from now on.
    """
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # what is read is written
    torch.backends.cuda.enable_cudnn_sdp(False)  # torch's first choice on Hopper, whose backward has no fixed order
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "^NVLS,NVLSTree")  # sums inside the switch


def init_mesh(expert: int, pool_ranks: int, timeout_minutes: float, device: str | None = None) -> Mesh:
    """Join the process group and build the mesh of `expert` ranks per copy of the experts and pools over `pool_ranks`
    ranks; collective.

    Where a mesh was made before, this is another one of the same ranks: that one's groups live on until the process
    leaves. Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT as deepspeed and torchrun set them; without
    them the process is alone. Raises ConfigError when the launcher's variables are incomplete, or when the ranks do not
    find each other within the timeout (`joining`).
    """
    world, rank, local_rank = launched_world(), launched_rank(), _integer("LOCAL_RANK", 0)
    if rank >= world:
        raise ConfigError(f"RANK is {rank}, but WORLD_SIZE is {world}; start with deepspeed or torchrun")
    wants_cpu = (
        os.environ.get("DS_ACCELERATOR") == "cpu"
    )  # DeepSpeed's own switch; its launcher shows GPUs to the ranks all the same
    where = torch.device(device or ("cuda" if torch.cuda.is_available() and not wants_cpu else "cpu"))
    if where.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"LOCAL_RANK is {local_rank} but this machine has {torch.cuda.device_count()} GPUs; start at most one "
                "process per GPU, or set DS_ACCELERATOR=cpu to run on the CPU"
            )
        where = torch.device("cuda", local_rank)
        torch.cuda.set_device(where)
    # Images may set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE: then float32 is none, and routers' scores are rounded to 10 bits.
    torch.set_float32_matmul_precision("highest")
    os.environ.setdefault("LOCAL_RANK", str(local_rank))  # DeepSpeed insists on it, also for a process that is alone
    timeout = datetime.timedelta(minutes=timeout_minutes)
    backend = "nccl" if where.type == "cuda" else "gloo"
    bound = (
        where if where.type == "cuda" else None
    )  # a bound device makes NCCL's communicators now, not at the first step
    store: dist.Store | None = None
    if not dist.is_initialized():
        if world == 1:
            dist.init_process_group(
                backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout, device_id=bound
            )
        else:
            place = launched_place()
            store = join(place, world, rank, timeout_minutes)
            try:
                dist.init_process_group(
                    backend, store=store, rank=rank, world_size=world, timeout=timeout, device_id=bound
                )
            except (dist.DistError, RuntimeError) as error:
                raise no_connection(place, rank, error) from error

    all_ranks = dist.group.WORLD
    assert all_ranks is not None
    hosts = gather_objects(socket.gethostname(), Group(world, rank, all_ranks))
    everyone = _group(all_ranks, hosts)
    experts, replicas = _families(expert, everyone, hosts, timeout)
    control = _group(
        all_ranks if backend == "gloo" or world == 1 else dist.new_group(timeout=timeout, backend="gloo"), hosts
    )
    pool = ALONE
    if pool_ranks > 1:  # a group object of its own, so that its traffic is counted apart
        known = next((group.handle for group in (everyone, experts) if group.size == pool_ranks), None)
        runs = [list(range(first, first + pool_ranks)) for first in range(0, world, pool_ranks)]
        pool = _group(known or _mine(runs, timeout), hosts)
    return Mesh(everyone, experts, replicas, pool, control, where, hosts[rank], store)


def another_group(mesh: Mesh, timeout_minutes: float) -> Group:
    """All ranks once more, by gloo, for a thread that talks while the training does; collective."""
    handle = dist.new_group(timeout=datetime.timedelta(minutes=timeout_minutes), backend="gloo")
    return Group(mesh.size, mesh.rank, handle, mesh.world.nodes)


def destroy_mesh() -> None:
    """Leave the process group, so that a process can end (or a test start again) cleanly."""
    if dist.is_initialized():
        dist.destroy_process_group()


def pool_ranks(span: int, local: int) -> int:
    """Ranks that one pool of `span` samples covers when each rank has `local` samples of a micro-step."""
    return max(1, span // local)


def _group(handle: dist.ProcessGroup, hosts: list[str]) -> Group:
    nodes = len({hosts[rank] for rank in dist.get_process_group_ranks(handle)})
    return Group(dist.get_world_size(handle), dist.get_rank(handle), handle, nodes)


def _families(expert: int, everyone: Group, hosts: list[str], timeout: datetime.timedelta) -> tuple[Group, Group]:
    """This rank's expert group and its replicas: of both families every rank makes every group."""
    if expert == 1:  # all experts are on every rank, and nothing tells them from other parameters
        return Group(), replace(everyone, traffic=Traffic())
    with warnings.catch_warnings():  # its wishes for optional packages are no news to our users
        warnings.simplefilter("ignore")
        from megatron.core.parallel_state import RankGenerator  # seconds to import: only where ranks are set up

    grid = RankGenerator(tp=1, ep=expert, dp=everyone.size // expert, pp=1, cp=1, order="ep-dp")
    experts, replicas = (_group(_mine(grid.get_ranks(axis), timeout), hosts) for axis in ("ep", "dp"))
    return experts, replicas


def _mine(groups: list[list[int]], timeout: datetime.timedelta) -> dist.ProcessGroup:
    """This rank's group of these, which hold every rank once; every rank makes every group, as torch demands."""
    handles = [dist.new_group(ranks, timeout=timeout) for ranks in groups]
    return next(handle for handle, ranks in zip(handles, groups, strict=True) if dist.get_rank() in ranks)


def _integer(name: str, default: int, strict: bool = True, least: int = 0) -> int:
    text = os.environ.get(name, str(default))
    if re.fullmatch("[0-9]{1,9}", text) and int(text) >= least:
        return int(text)
    if not strict:
        return default
    raise ConfigError(
        f"the environment variable {name} is {text[:40]!r}, which is no whole number from {least} on; start with "
        "deepspeed or torchrun"
    )
