"""Fragments to and from torch.distributed.checkpoint: its planners, writer, reader and the restricted reading of its
`.metadata`.

Errors here are ValueErrors; torch.distributed.checkpoint carries them to all ranks, and `store` says which checkpoint
they are about.
"""

import contextlib
import dataclasses
import enum
import hashlib
import io
import math
import os
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from diffmoe_ep.checkpoint.fragments import Box, Fragment, boxes, coverage_fault

ALLOWED = {  # all that the `.metadata` of a checkpoint of tensors names
    "torch": {"Size"}
    | {str(value).removeprefix("torch.") for value in vars(torch).values() if isinstance(value, torch.dtype)},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}


class FragmentSavePlanner(SavePlanner):
    """Gives each box of each fragment as a chunk of its logical tensor, and lets rank 0 refuse what is not covered
    exactly once.
    """

    def __init__(self, fragments: Sequence[Fragment]) -> None:
        self.fragments = fragments
        self.blocks: dict[MetadataIndex, torch.Tensor] = {}

    def set_up_planner(
        self, state_dict: Any, storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        """Nothing: the fragments are the state."""

    def create_local_plan(self) -> SavePlan:
        """This rank's chunks, and its intervals for the check."""
        items, intervals = [], []
        for fragment in self.fragments:
            intervals.append((fragment.name, (fragment.shape, fragment.data.dtype), (fragment.start, fragment.stop)))
            properties, size = TensorProperties(dtype=fragment.data.dtype), torch.Size(fragment.shape)
            for box in boxes(fragment.shape, fragment.start, fragment.stop):
                index = MetadataIndex(fragment.name, box.offsets)
                self.blocks[index] = box.view(fragment.data)
                items.append(
                    WriteItem(index, WriteItemType.SHARD, tensor_data=TensorWriteData(_chunk(box), properties, size))
                )
        return SavePlan(items, planner_data=intervals)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """All ranks' chunks as one description, on rank 0.

        The default planner's check would miss gaps when one rank saves, any fault of a 0-dimensional tensor, and chunks
        that begin at the same place (it drops the second).
        """
        kinds: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        intervals: dict[str, list[tuple[int, int]]] = {}
        for rank, plan in enumerate(all_plans):
            for name, kind, interval in plan.planner_data:
                if kinds.setdefault(name, kind) != kind:
                    raise ValueError(
                        f"{name} is {_say(kind)} on rank {rank} and {_say(kinds[name])} on a rank before it"
                    )
                intervals.setdefault(name, []).append(interval)
        for name, kind in kinds.items():
            if (wrong := coverage_fault(intervals[name], math.prod(kind[0]))) is not None:
                raise ValueError(f"of {name}, {_say(kind)}, {wrong}")
        plans, metadata = create_default_global_save_plan(
            [dataclasses.replace(plan, planner_data=None) for plan in all_plans]
        )
        for name, (shape, dtype) in kinds.items():  # a tensor without elements has no chunk
            metadata.state_dict_metadata.setdefault(
                name, TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), [])
            )
        return plans, metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """The plan as it is."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        """The box's elements; the writer copies them to the CPU."""
        return self.blocks[write_item.index]


class FragmentLoadPlanner(LoadPlanner):
    """Asks for each box of each fragment, and has the stored pieces copied into it."""

    def __init__(self, fragments: Sequence[Fragment], metadata: Metadata) -> None:
        self.fragments = fragments
        self.stored = metadata.state_dict_metadata
        self.targets: list[torch.Tensor] = []

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        """Nothing: the fragments are the state, and the metadata is known."""

    def create_local_plan(self) -> LoadPlan:
        """Which pieces of which stored chunks go into which box."""
        items: list[ReadItem] = []
        for fragment in self.fragments:
            stored, numel = self.stored[fragment.name], 0
            assert isinstance(stored, TensorStorageMetadata)
            for box in boxes(fragment.shape, fragment.start, fragment.stop):
                for item in create_read_items_for_chunk_list(fragment.name, stored, [_chunk(box)]):
                    target = MetadataIndex(fragment.name, box.offsets, len(self.targets))
                    items.append(dataclasses.replace(item, dest_index=target))
                    numel += math.prod(item.lengths)
                self.targets.append(box.view(fragment.data))
            if numel != fragment.data.numel():
                raise ValueError(
                    f"it has {numel} of the {fragment.data.numel()} elements of {fragment.name} that are requested"
                )
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Each rank reads what it requested."""
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """The plan as it is."""
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:  # noqa: ARG002  # the names are the interface's
        """Never: an object other than a tensor would have to be unpickled."""
        raise ValueError(f"{read_item.dest_index.fqn} is no tensor")

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        """The part of a box that a piece is copied to."""
        assert read_item.dest_index.index is not None
        where = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return self.targets[read_item.dest_index.index][
            tuple(slice(offset, offset + length) for offset, length in where)
        ]

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing: it was copied in place."""


class ChunkWriter(FileSystemWriter):
    """Knows which files this rank wrote, with their sizes and checksums, and leaves this machine's paths out of the
    checkpoint.
    """

    def __init__(self, folder: Path, on_host: bool) -> None:
        """on_host: the tensors lie in host memory, and nothing is fetched ahead from a device: a thread beside the
        training has no business with it.
        """
        super().__init__(folder, sync_files=True, per_thread_copy_ahead=0 if on_host else 10_000_000)
        self.fs = self.files = _HashedFiles()
        self.written: dict[str, Sum] = {}

    def storage_meta(self) -> StorageMeta:
        """Nothing about where or by whom."""
        return StorageMeta()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's chunks and note the names of their files."""
        try:
            future = super().write_data(plan, planner)
        except RuntimeError as error:  # on a full disk torch.save only reports how many bytes it misses
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            raise cause or error from None
        self.written = {
            name: self.files.sums[name] for name in {each.storage_data.relative_path for each in future.value()}
        }
        return future


@dataclasses.dataclass(frozen=True)
class Sum:
    """What was written to a file, before it went to the disk."""

    size: int
    digest: str  # sha256


class _HashedFiles(FileSystem):
    """Opens files whose content is hashed on its way to the disk."""

    def __init__(self) -> None:
        self.sums: dict[str, Sum] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        """Open a file; its sum is known once it is closed."""
        with Path(path).open(mode) as file:
            hashed = _Hashed(file)
            yield cast(io.IOBase, hashed)
        self.sums[Path(path).name] = Sum(hashed.size, hashed.sha.hexdigest())


class _Hashed:
    """As much of a file as its writers ask for."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.size, self.sha = file, 0, hashlib.sha256()
        self.flush, self.fileno, self.close = file.flush, file.fileno, file.close

    def write(self, data: bytes | memoryview) -> int:
        """Write and hash."""
        self.sha.update(data)
        self.size += memoryview(data).nbytes
        return self.file.write(data)

    def tell(self) -> int:
        """Bytes written so far."""
        return self.size


class ChunkReader(FileSystemReader):
    """Reads chunks (each by `torch.load(weights_only=True)`) by metadata that `read_metadata` below has read before."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self.metadata = metadata

    def read_metadata(self, *_args: Any, **_options: Any) -> Metadata:
        """The checked metadata, where the parent class would unpickle the file without restriction."""
        return self.metadata


class MetadataUnpickler(pickle.Unpickler):
    """Reads `.metadata`. Torch's own format for it is a pickle; here it can name nothing but inert classes, so it can
    run no code.
    """

    def find_class(self, module: str, name: str) -> Any:
        """An allowed class, or an error."""
        if (module, name) == ("builtins", "getattr"):  # how Python 3.11.0 to 3.11.3 write a member of an enumeration
            return _member
        if name not in ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, as only a forged file would")
        return super().find_class(module, name)


def _member(enumeration: Any, name: str) -> enum.Enum:
    """In the place of getattr: a member of an enumeration, and nothing else."""
    if not isinstance(enumeration, enum.EnumMeta) or name not in enumeration.__members__:
        raise pickle.UnpicklingError(
            f"it asks for {str(name)[:40]!r} of {str(enumeration)[:80]}, as only a forged file would"
        )
    member: enum.Enum = enumeration.__members__[name]
    return member


def read_metadata(content: bytes, files: Sequence[str]) -> Metadata:
    """The description of a checkpoint of tensors from its `.metadata`; raises ValueError if it is anything else or
    leads beyond `files`.
    """
    try:
        metadata = MetadataUnpickler(io.BytesIO(content)).load()
        sound = isinstance(metadata, Metadata)
        sound = sound and all(_is_tensor(*each) for each in metadata.state_dict_metadata.items())
        sound = sound and all(_is_place(index, place, files) for index, place in metadata.storage_data.items())
    except (  # whatever bytes make of an unpickler that can name nothing but inert classes
        pickle.UnpicklingError, EOFError, LookupError, AttributeError, TypeError, ValueError, RuntimeError,
        OverflowError, MemoryError,
    ) as error:  # fmt: skip
        raise ValueError(f"its .metadata cannot be read: {error}") from error
    if not sound:
        raise ValueError("its .metadata does not describe tensors in the files of its folder")
    return metadata


def _is_tensor(name: Any, value: Any) -> bool:
    """Whether an entry of a description is that of a tensor and of chunks that lie in it."""
    return (
        isinstance(name, str)
        and isinstance(value, TensorStorageMetadata)
        and _is_size(value.size)
        and isinstance(value.properties, TensorProperties)
        and isinstance(value.properties.dtype, torch.dtype)
        and isinstance(value.chunks, list)
        and all(
            isinstance(chunk, ChunkStorageMetadata)
            and _is_size(chunk.offsets)
            and _is_size(chunk.sizes)
            and len(chunk.offsets) == len(chunk.sizes) == len(value.size)
            and all(map(lambda low, size, end: low + size <= end, chunk.offsets, chunk.sizes, value.size))
            for chunk in value.chunks
        )
    )


def _is_size(size: Any) -> bool:
    return isinstance(size, torch.Size) and all(type(part) is int and part >= 0 for part in size)


def _is_place(index: Any, place: Any, files: Sequence[str]) -> bool:
    """Whether an entry of a description says where in one of the files a chunk lies."""
    return (
        isinstance(index, MetadataIndex)
        and isinstance(place, _StorageInfo)
        and place.relative_path in files
        and all(type(part) is int and part >= 0 for part in (place.offset, place.length))
        and not place.transform_descriptors
    )


def kinds(metadata: Metadata) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Logical shape and type of every tensor, by name."""
    stored = metadata.state_dict_metadata.items()
    return {
        name: (tuple(value.size), value.properties.dtype)
        for name, value in stored
        if isinstance(value, TensorStorageMetadata)
    }


def _chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))


def _say(kind: tuple[tuple[int, ...], torch.dtype]) -> str:
    return f"{kind[1]} of shape {kind[0]}"
