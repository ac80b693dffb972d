"""A checkpoint's tensors: ranges of 1-D ones, through torch.distributed.checkpoint's planners, writer and reader.

DCP's own `save` and `load` would exchange the plans too; they warn where there is no process group, and raise a BaseException.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from fused_kopt.distributed.elastic import schema
from fused_kopt.distributed.elastic.pieces import Chunk
from fused_kopt.distributed.elastic.schema import OLDER, Schema
from fused_kopt.errors import CheckpointError

Chunks = Mapping[str, Chunk]


def _place(chunk: Chunk) -> ChunkStorageMetadata:
    """A chunk's range in DCP's words."""
    return ChunkStorageMetadata(torch.Size([chunk.start]), chunk.data.size())


class _Saver(DefaultSavePlanner):
    """The default planner for chunks, which it takes for ranges of tensors; it checks that those of all ranks are the whole."""

    def __init__(self, chunks: Chunks) -> None:
        super().__init__(flatten_state_dict=False)
        self.chunks = chunks

    def create_local_plan(self) -> SavePlan:
        return SavePlan([self._item(key, chunk) for key, chunk in self.chunks.items()])

    def _item(self, key: str, chunk: Chunk) -> WriteItem:
        data = TensorWriteData(_place(chunk), TensorProperties(chunk.data.dtype), torch.Size([chunk.size]))
        return WriteItem(MetadataIndex(key, [chunk.start]), WriteItemType.SHARD, tensor_data=data)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.chunks[index.fqn].data


class _Loader(DefaultLoadPlanner):
    """The default planner for chunks, whose `data` is filled."""

    def __init__(self, chunks: Chunks) -> None:
        super().__init__(flatten_state_dict=False)
        self.chunks = chunks

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        plan = LoadPlan([])
        for key, chunk in self.chunks.items():
            saved = self.metadata.state_dict_metadata.get(key)
            if not isinstance(saved, TensorStorageMetadata) or saved.size != (chunk.size,) or saved.properties.dtype != chunk.data.dtype:
                raise CheckpointError(f"{key!r} is {saved} in DCP's metadata, not {chunk.data.dtype} of size {chunk.size}.")
            items = create_read_items_for_chunk_list(key, saved, [_place(chunk)])
            if sum(item.lengths.numel() for item in items) != chunk.data.numel():
                raise CheckpointError(
                    f"{key!r}: elements {chunk.start} to {chunk.start + chunk.data.numel()} are not all in the checkpoint."
                )
            plan.items.extend(items)
        return plan

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.chunks[index.fqn].data


def planned(chunks: Chunks) -> SavePlan:
    """What this rank will write."""
    return _Saver(chunks).create_local_plan()


def joined(plans: Sequence[SavePlan]) -> tuple[list[SavePlan], Metadata]:
    """What every rank will write, each range once, and DCP's metadata. Raises ValueError where ranges are missing or overlap."""
    return _Saver({}).create_global_plan(list(plans))


class Written(NamedTuple):
    """What a rank has written."""

    results: Any
    files: dict[str, tuple[int, int]]
    """By name: bytes and CRC-32."""


def write(folder: Path, chunks: Chunks, plans: list[SavePlan], rank: int) -> Written:
    """Write this rank's file, flushed to the disk. plans: of `joined`."""
    writer = FileSystemWriter(folder)
    results = writer.write_data(writer.prepare_global_plan(plans)[rank], _Saver(chunks)).wait()
    return Written(results, {file.name: schema.summed(file) for file in folder.glob(f"__{rank}_*")})


def finish(folder: Path, metadata: Metadata, written: Sequence[Written], state: dict[str, Any]) -> None:
    """Complete a checkpoint of which every rank has written its part: DCP's metadata, then `state` and the files' sums as JSON."""
    FileSystemWriter(folder).finish(metadata, [mine.results for mine in written])
    files = {name: sums for mine in written for name, sums in mine.files.items()}
    files[".metadata"] = schema.summed(folder / ".metadata")
    schema.write(folder, Schema(state, files))


def read(folder: Path, chunks: Chunks) -> None:
    """Fill the chunks. DCP's metadata is unpickled. Raises CheckpointError for a damaged checkpoint."""
    planner, reader = _Loader(chunks), FileSystemReader(folder)
    try:
        metadata = reader.read_metadata()
        planner.set_up_planner({}, metadata)
        reader.set_up_storage_reader(metadata, is_coordinator=False)
        reader.read_data(planner.create_local_plan(), planner).wait()
    except OSError:
        raise
    except Exception as error:  # damaged files raise whatever the part that meets the damage raises
        raise CheckpointError(f"{folder} cannot be read: {error} {OLDER}") from error
