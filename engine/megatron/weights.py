"""Import and export of Hugging Face folders: each rank reads and writes only its shards, by the tables of engine/models/families.py."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from engine.config import ModelShape
from engine.distributed.world import World
from engine.files import follow_umask, sha256
from engine.megatron.backend import Grid
from engine.megatron.model import PackedModel
from engine.models.families import OUTPUT, SCALAR_HEAD, Slice, slices, tensor_shapes
from engine.models.weight_files import FLOATS, INDEX, SINGLE, opened, read_headers

SHARD_BYTES = 4 << 30  # of an exported safetensors file


class WeightSource(Protocol):
    """Where initial weights come from. `digests` identifies them: each of `size` ranks computes a share."""

    def read(self, piece: Slice) -> Tensor: ...
    def digests(self, rank: int, size: int) -> dict[str, str]: ...


class RandomWeights:
    """N(0, 0.02) weights, a scalar head of N(0, 1 / sqrt(d + 1)) (arXiv 2411.15124), and norms of one. They depend on (seed, tensor name)
    only, so that every layout starts from the same model."""

    def __init__(self, model: ModelShape, seed: int):
        self.shapes, self.seed = tensor_shapes(model), seed
        self.draw = lru_cache(maxsize=3)(self._draw)  # q, k and v are read alternately

    def __str__(self) -> str:
        return "random weights"

    def read(self, piece: Slice) -> Tensor:
        return self.draw(piece.name).narrow(piece.dim, piece.source_offset, piece.length)

    def digests(self, rank: int, size: int) -> dict[str, str]:
        return {"random": f"{self.seed} {sorted(self.shapes.items())}"} if rank == 0 else {}

    def _draw(self, name: str) -> Tensor:
        shape = self.shapes[name]
        if len(shape) == 1:
            return torch.ones(shape)
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        deviation = (shape[1] + 1) ** -0.5 if name == SCALAR_HEAD else 0.02
        return torch.randn(shape, generator=torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))) * deviation


class FolderWeights:
    """A Hugging Face folder of one or more safetensors files, read lazily: a rank reads only its own slices.

    Raises ValueError, naming the file, if a shard is missing, truncated or corrupt, or if its tensors do not match config.json.
    """

    def __init__(self, folder: Path, model: ModelShape):
        self.folder = folder
        wanted, there = tensor_shapes(model), read_headers(folder)
        if model.tied:  # some folders store the tied copy too
            there.pop(OUTPUT, None)
        there = {name: entry for name, entry in there.items() if not name.endswith("rotary_emb.inv_freq")}
        if missing := sorted(wanted.keys() - there.keys()):
            raise ValueError(f"{folder}: {len(missing)} tensors of the model are missing from its safetensors, such as {missing[0]}")
        if extra := sorted(there.keys() - wanted.keys()):
            raise ValueError(f"{folder}: {extra[0]} is not a tensor of the model that config.json describes; {len(extra)} such tensors")
        for name, (file, dtype, shape) in there.items():
            if shape != wanted[name]:
                raise ValueError(f"{folder / file}: {name} has shape {shape}, but config.json requires {wanted[name]}")
            if dtype not in FLOATS:
                raise ValueError(f"{folder / file}: {name} has type {dtype}, which is not supported; use weights of {', '.join(FLOATS)}")
        self.files = {name: file for name, (file, _, _) in there.items()}

    def __str__(self) -> str:
        return str(self.folder)

    def read(self, piece: Slice) -> Tensor:
        run = slice(piece.source_offset, piece.source_offset + piece.length)
        # Opened for each slice: an open file keeps every page that was read from it in memory.
        with opened(self.folder / self.files[piece.name]) as handle:
            view = handle.get_slice(piece.name)
            return view[run] if piece.dim == 0 else view[:, run]

    def digests(self, rank: int, size: int) -> dict[str, str]:
        return {name: sha256(self.folder / name) for name in sorted(set(self.files.values()))[rank::size]}


@dataclass(frozen=True)
class FreshHeadWeights:
    """The weights of a language model's folder, with a randomly initialized scalar head."""

    folder: FolderWeights
    random: RandomWeights

    def __str__(self) -> str:
        return str(self.folder)

    def read(self, piece: Slice) -> Tensor:
        return (self.random if piece.name == SCALAR_HEAD else self.folder).read(piece)

    def digests(self, rank: int, size: int) -> dict[str, str]:
        return self.folder.digests(rank, size) | self.random.digests(rank, size)


def named_parameters(chunks: list[PackedModel]) -> Iterator[tuple[str, Tensor]]:
    """This rank's parameters, with layers numbered over the whole model."""
    for chunk in chunks:
        first = int(chunk.decoder.layers[0].layer_number) - 1 if len(chunk.decoder.layers) else 0  # type: ignore[arg-type]
        for name, parameter in chunk.named_parameters():
            if name.startswith("decoder.layers."):
                _, _, local, part = name.split(".", 3)
                name = f"decoder.layers.{first + int(local)}.{part}"
            yield name, parameter


def fill(chunks: list[PackedModel], model: ModelShape, origin: WeightSource, grid: Grid, world: World) -> None:
    """Write every parameter of this rank from `origin`; padding rows of the vocabulary become zeros. All ranks must call it.

    Raises ValueError on all ranks, naming the tensor, if a weight is NaN, infinite or too large for the parameter's dtype.
    """
    if problem := world.first_error(_fill(chunks, model, origin, grid)):
        raise ValueError(problem)


@torch.no_grad()
def _fill(chunks: list[PackedModel], model: ModelShape, origin: WeightSource, grid: Grid) -> str | None:
    for name, parameter in named_parameters(chunks):
        parameter.zero_()
        for piece in slices(name, model, grid.tp, grid.tp_rank):
            part = parameter.narrow(piece.dim, piece.offset, piece.length).copy_(origin.read(piece))
            if not is_finite(part):
                kind = str(parameter.dtype).removeprefix("torch.")
                return f"{origin}: {piece.name} holds values that are NaN, infinite or too large for {kind}; fetch the weights again"
    return None


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite, in one pass and without a copy."""
    return all(bound.isfinite().item() for bound in torch.aminmax(tensor))


@torch.no_grad()
def export(chunks: list[PackedModel], model: ModelShape, folder: Path, dtype: torch.dtype, grid: Grid, world: World) -> None:
    """Write the safetensors of a Hugging Face folder. Each pipeline stage writes its own layers, a file of about 4 GiB at a time."""
    files: dict[str, list[str]] = {}  # file -> tensors, of this rank
    if grid.dp_rank == 0:
        for batch in hf_buckets(chunks, model, dtype, grid, SHARD_BYTES):
            file = f"stage-{grid.pp_rank:03d}-{len(files):05d}.safetensors"
            save_file(batch, folder / file, metadata={"format": "pt"})
            follow_umask(folder / file)
            files[file] = sorted(batch)
    files_by_rank: list[dict[str, list[str]]] = [{} for _ in range(world.size)]
    dist.all_gather_object(files_by_rank, files)
    if world.rank == 0:
        _name_files(folder, [item for files in files_by_rank for item in files.items()])
    dist.barrier()


def hf_buckets(chunks: list[PackedModel], model: ModelShape, dtype: torch.dtype, grid: Grid, size: int) -> Iterator[dict[str, Tensor]]:
    """This stage's Hugging Face tensors on the host, by name, in buckets of about `size` bytes, on its first tensor-parallel rank; the
    other ranks of the tensor-parallel group get none and must exhaust the iterator too."""
    batch: dict[str, Tensor] = {}
    for name, parameter in named_parameters(chunks):
        if name == "output_layer.weight" and model.tied:
            continue
        batch |= _full_tensors(name, parameter, model, dtype, grid)
        if sum(tensor.nbytes for tensor in batch.values()) >= size:
            yield batch
            batch = {}
    if batch:
        yield batch


def _full_tensors(name: str, parameter: Tensor, model: ModelShape, dtype: torch.dtype, grid: Grid) -> dict[str, Tensor]:
    """On tensor-parallel rank 0, the full Hugging Face tensors that `parameter` is a shard of; empty on the other ranks."""
    parts = [torch.empty_like(parameter) for _ in range(grid.tp)] if grid.tp_rank == 0 else None
    dist.gather(parameter.contiguous(), parts, dst=dist.get_global_rank(grid.tp_group, 0), group=grid.tp_group)
    tensors: dict[str, Tensor] = {}
    for rank, part in enumerate(parts or []):
        for piece in slices(name, model, grid.tp, rank):
            tensor = tensors.setdefault(piece.name, torch.empty(tensor_shapes(model)[piece.name], dtype=dtype))
            tensor.narrow(piece.dim, piece.source_offset, piece.length).copy_(part.narrow(piece.dim, piece.offset, piece.length))
    return tensors


def _name_files(folder: Path, files: list[tuple[str, list[str]]]) -> None:
    """Rename the files of all stages to the names that transformers expects; write an index if there is more than one."""
    if len(files) == 1:
        os.replace(folder / files[0][0], folder / SINGLE)
        return
    weight_map = {}
    for i, (file, names) in enumerate(files, 1):
        final = f"model-{i:05d}-of-{len(files):05d}.safetensors"
        os.replace(folder / file, folder / final)
        weight_map |= dict.fromkeys(names, final)
    total = sum((folder / file).stat().st_size for file in set(weight_map.values()))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True) + "\n")
