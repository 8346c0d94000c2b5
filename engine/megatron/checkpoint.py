"""Atomic, verified checkpoints.

A checkpoint is written to `step-N.tmp`, every file is fsynced and listed with its sha256 in manifest.json, the folder is renamed
to `step-N`, and then the file LATEST names it. Nothing is ever overwritten. On load all hashes are verified first: a folder with
a wrong byte is reported, and the newest complete one is loaded instead. Tensors are stored by megatron's dist_checkpointing,
independent of the layout that saved them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as save_state

from engine.config import ModelShape, step_folder
from engine.distributed.world import World
from engine.files import read_object, refusing, sha256
from engine.megatron import optimizers, pickles
from engine.megatron.model import PackedModel
from engine.megatron.weights import is_finite
from engine.models.families import to_hf

MANIFEST, SEAL, MODEL, TENSORS = "manifest.json", "manifest.sha256", "model", "tensors"
DELETED = ".deleted"  # end of the name of a checkpoint that is being deleted


@dataclass(frozen=True)
class State:
    """State of this rank in a checkpoint: its stages and their optimizer, which may be None."""

    chunks: list[PackedModel]
    optimizer: Any

    @property
    def models(self) -> dict[str, PackedModel]:
        """The stages, by the names that megatron's optimizers use for them."""
        return {"model": self.chunks[0]} if len(self.chunks) == 1 else {f"model{i}": chunk for i, chunk in enumerate(self.chunks)}

    def sharded(self, *, loading: bool) -> dict[str, Any]:
        """megatron's sharded state dict: the shard of each global tensor that this rank holds."""
        models = {name: chunk.sharded_state_dict(metadata=dict(optimizers.SHARDING)) for name, chunk in self.models.items()}
        if self.optimizer is None:
            return models
        return models | {"optimizer": optimizers.sharded_state(self.optimizer, models.get("model", models), loading=loading)}

    def take(self, loaded: dict[str, Any]) -> None:
        """Copy a loaded state into the stages and the optimizer."""
        for name, chunk in self.models.items():
            chunk.load_state_dict(loaded[name])
        if self.optimizer is not None:
            optimizers.load_state(self.optimizer, loaded["optimizer"])


class _InProcess(TorchDistSaveShardedStrategy):
    """megatron's format, written by this process: megatron's own writers are spawned processes, which cost seconds per save and import
    __main__ again."""

    def save(self, sharded_state_dict: Any, checkpoint_dir: Any) -> None:
        tensors, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        planner = MCoreSavePlanner(dedup_replicated_tensors=not self.keep_only_main_replica, flatten_state_dict=False)
        writer = FileSystemWriter(checkpoint_dir, single_file_per_rank=True, sync_files=True)
        save_state(mcore_to_pyt_state_dict(tensors, False), storage_writer=writer, planner=planner)


def save(
    state: State,
    model: ModelShape,
    out: Path,
    step: int,
    assets: Path | None,
    keep_last: int,
    world: World,
    extra_files: Mapping[str, bytes],
) -> None:
    """Write `out/step-N` and delete all but the newest `keep_last` checkpoints.

    assets: folder of small files (tokenizer, config.json) to copy into the checkpoint, so that it can be exported on its own.
    extra_files: name -> content of further files; those of rank 0 are used.
    Raises OSError on every rank if it cannot be written; older checkpoints stay untouched and no partial files are left.
    """
    final = step_folder(out, step)
    work = final.with_name(final.name + ".tmp")
    problem = _attempt(lambda: _prepare(work, assets, extra_files), when=world.rank == 0)
    problem = world.first_error(problem) or world.first_error(_attempt(lambda: _write(state, work / TENSORS)))
    if problem is None:
        problem = world.first_error(_attempt(lambda: _seal(work, final, model, optimizers.kind(state.optimizer), step, world)))
    if problem is not None:
        if world.rank == 0:
            shutil.rmtree(work, ignore_errors=True)
        free = shutil.disk_usage(out).free / 2**30  # torch's writer reports a full disk as "unexpected pos"
        raise OSError(f"{final}: could not be saved ({problem}; {free:.1f} GiB are free there); earlier checkpoints are untouched")
    if world.rank == 0:
        _point_to(out, final)
        _prune(out, keep_last)
    dist.barrier()


def _attempt(work: Any, *, when: bool = True) -> str | None:
    try:
        if when:
            work()
    except (OSError, RuntimeError, CheckpointException) as error:
        return _cause(error)
    return None


def _cause(error: BaseException) -> str:
    """One line: a failed collective save holds one exception per rank."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (inner, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {inner}"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _prepare(work: Path, assets: Path | None, extra_files: Mapping[str, bytes]) -> None:
    shutil.rmtree(work, ignore_errors=True)
    (work / TENSORS).mkdir(parents=True)
    if assets is not None:
        shutil.copytree(assets, work / MODEL)
    for name, content in extra_files.items():
        (work / name).write_bytes(content)


def _write(state: State, folder: Path) -> None:
    dist_checkpointing.save(state.sharded(loading=False), str(folder), sharded_strategy=_InProcess("torch_dist", 1))


def _seal(work: Path, final: Path, model: ModelShape, optimizer: str, step: int, world: World) -> None:
    """Hash every file (each rank a share), write the manifest, fsync everything and rename the folder."""
    files = sorted(str(p.relative_to(work)) for p in work.rglob("*") if p.is_file())
    own_hashes = {name: sha256(work / name) for name in files[world.rank :: world.size]}
    all_hashes: list[dict[str, str] | None] = [None] * world.size
    dist.all_gather_object(all_hashes, own_hashes)
    if world.rank != 0:
        return
    hashes = {name: digest for part in all_hashes for name, digest in (part or {}).items()}
    manifest = {"format": 1, "step": step, "model": to_hf(model), "optimizer": optimizer, "sha256": dict(sorted(hashes.items()))}
    (work / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    (work / SEAL).write_text(sha256(work / MANIFEST) + "\n")
    for path in work.rglob("*"):
        _sync(path)
    _sync(work)
    if final.exists():  # it must be damaged: the run would have resumed from a complete one
        damaged = final.with_name(final.name + ".damaged")
        shutil.rmtree(damaged, ignore_errors=True)
        os.replace(final, damaged)
    os.replace(work, final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _point_to(out: Path, final: Path) -> None:
    pointer = out / "LATEST.tmp"
    pointer.write_text(final.name + "\n")
    _sync(pointer)
    os.replace(pointer, out / "LATEST")
    _sync(out)


def _prune(out: Path, keep_last: int) -> None:
    """Delete old checkpoints. They are renamed first, so that a folder under a checkpoint's name is never a part of one."""
    for old in checkpoint_folders(out)[keep_last:]:
        os.replace(old, old.with_name(old.name + DELETED))
    _sync(out)
    _remove_deleted(out)


def _remove_deleted(out: Path) -> None:
    for folder in out.glob(f"step-*{DELETED}"):
        shutil.rmtree(folder, ignore_errors=True)


def checkpoint_folders(out: Path) -> list[Path]:
    """Checkpoint folders under `out`, newest first. They may be incomplete; see damage_of."""
    folders = [path for path in out.glob("step-*") if re.fullmatch(r"step-\d{8}", path.name)]
    return sorted(folders, reverse=True)


def load_latest(state: State, model: ModelShape, out: Path, world: World, step: int | None = None) -> int:
    """Load the newest complete checkpoint under `out`, or exactly that of `step`. Returns its step, or 0 if there is none.

    Reports damaged checkpoints on stderr. Raises ValueError if all are damaged, if the newest complete one is of another model or could run
    code, or if that of `step` is missing.
    """
    if world.rank == 0 and state.optimizer is not None:  # without an optimizer, another process than the run's loads it
        _remove_deleted(out)
    folders = [checkpoint_folders(out) if world.rank == 0 else []]
    if world.rank == 0 and step is not None:
        folders = [[folder for folder in folders[0] if folder == step_folder(out, step)]]
    dist.broadcast_object_list(folders, src=0)
    for folder in folders[0]:
        if (damage := world.first_error(damage_of(folder, world.rank, world.size))) is None:
            return _load(state, model, folder, world)
        if world.rank == 0:
            print(f"WARNING: {folder} is damaged and is skipped: {damage}", file=sys.stderr, flush=True)
    if step is not None and not folders[0]:
        raise ValueError(
            f"{step_folder(out, step)} is missing; move the run's own {step_folder(out, step).name} away to resume from an earlier one"
        )
    if folders[0]:
        raise ValueError(
            f"{out}: none of its {len(folders[0])} checkpoints is complete; move them away to start over, or choose another out="
        )
    return 0


def damage_of(folder: Path, rank: int = 0, ranks: int = 1) -> str | None:
    """Why a checkpoint is damaged; None if all files of its manifest are present and correct. Each rank verifies a share of the files."""
    try:
        if (folder / SEAL).read_bytes() != f"{sha256(folder / MANIFEST)}\n".encode():
            return f"{MANIFEST} was changed after it was written (sha256 differs)"
        expected = _manifest(folder)["sha256"]
        present = _files(folder) - {MANIFEST, SEAL}
        if present != expected.keys():
            return f"its files differ from its manifest: {', '.join(sorted(present ^ expected.keys())[:3])}"
        for name in sorted(expected)[rank::ranks]:
            if sha256(folder / name) != expected[name]:
                return f"{name} was changed after it was written (sha256 differs)"
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    except ValueError as error:
        return str(error)
    return None


def _files(folder: Path) -> set[str]:
    """The names of all files in a folder and its subfolders. Raises ValueError for a link, a pipe or a device among them."""
    names = set()
    for place, folders, files in os.walk(folder):
        for path in (Path(place) / name for name in (*folders, *files)):
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise ValueError(f"{path.relative_to(folder)} is not a regular file")
        names |= {str((Path(place) / name).relative_to(folder)) for name in files}
    return names


def _manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises ValueError if it is not one, whatever its seal says."""
    found = read_object(folder / MANIFEST, "the manifest of a checkpoint")
    for name, kind in (("sha256", dict), ("model", dict), ("optimizer", str), ("step", int)):
        if type(found.get(name)) is not kind:
            raise ValueError(f"{MANIFEST}: {name}={found.get(name)!r:.60} must be of type {kind.__name__}")
    if step_folder(folder.parent, found["step"]).name != folder.name:
        raise ValueError(f"{MANIFEST}: step={found['step']} is not that of the folder's name")
    return found


def _load(state: State, model: ModelShape, folder: Path, world: World) -> int:
    manifest = _manifest(folder)
    if differences := [
        f"{k}={manifest['model'].get(k)!r}, expected {v!r}" for k, v in to_hf(model).items() if manifest["model"].get(k) != v
    ]:
        raise ValueError(f"{folder} is a checkpoint of another model ({'; '.join(differences)}); use that model or another out=")
    kind = optimizers.kind(state.optimizer)
    if kind not in ("", manifest["optimizer"]):
        raise ValueError(f"{folder} was saved with parallel.{manifest['optimizer']}; it cannot be resumed with {kind}")
    if problem := world.first_error(pickles.problem_of(folder / TENSORS) if world.rank == 0 else None):
        raise ValueError(problem)
    with refusing(folder, "it cannot be loaded: restore it, or choose another out="):
        loaded = dist_checkpointing.load(state.sharded(loading=True), str(folder / TENSORS))
        assert isinstance(loaded, dict)
        state.take(loaded)
    parameters = (item for chunk in state.chunks for item in chunk.named_parameters())
    bad = next((name for name, parameter in parameters if not is_finite(parameter.detach())), None)
    if problem := world.first_error(bad and f"{folder}: {bad} holds NaN or infinite values; resume from another checkpoint"):
        raise ValueError(problem)
    return manifest["step"]
