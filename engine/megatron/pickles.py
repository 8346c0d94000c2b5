"""Checks the pickles of a checkpoint before torch reads them: a pickle can call any function, and a checkpoint may come from anywhere.

torch's distributed checkpoints hold three kinds: the file .metadata, objects within the .distcp files, and megatron's common.pt. The first
is read here by an unpickler that knows nothing but the classes of such metadata, the others by torch with weights_only=True. What passes
holds no other function, so it is harmless when torch and megatron read it once more.
"""

from __future__ import annotations

import io
import pathlib
import pickle
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.serialization import _get_layout

from engine.files import one_line, plain_file, refusing

_RECORDS = (
    metadata.BytesStorageMetadata,
    metadata.ChunkStorageMetadata,
    metadata.Metadata,
    metadata.MetadataIndex,
    metadata.StorageMeta,
    metadata.TensorProperties,
    metadata.TensorStorageMetadata,
    filesystem._StorageInfo,
)
_ADMITTED: dict[tuple[str, str], Any] = {
    **{(each.__module__, each.__name__): each for each in (*_RECORDS, metadata._MEM_FORMAT_ENCODING)},
    **{("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype) or value is torch.Size},
    ("torch.serialization", "_get_layout"): _get_layout,
    **{(module, "PosixPath"): pathlib.PosixPath for module in ("pathlib", "pathlib._local")},  # the latter in Python 3.13
}
_UNUSED = (  # opcodes that such metadata does not need: sets, extensions, old ways to call a class
    *(pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET, pickle.DICT, pickle.EXT1, pickle.EXT2, pickle.EXT4),
    *(pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX, pickle.PERSID, pickle.BINPERSID),
)
_Unpickler: Any = pickle._Unpickler  # pyright: ignore[reportAttributeAccessIssue]  # the one in Python, whose opcodes can be overridden


class _MetadataUnpickler(_Unpickler):
    """Admits the classes of a checkpoint's metadata, sets the fields of its records only, and takes only plain values as keys."""

    def refuse(self) -> None:
        raise pickle.UnpicklingError("it has an instruction that no checkpoint needs")

    dispatch: ClassVar[dict[int, Any]] = _Unpickler.dispatch | dict.fromkeys((code[0] for code in _UNUSED), refuse)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs".replace("\n", " "))
        return _ADMITTED[module, name]

    def load_build(self) -> None:
        state, record = self.stack.pop(), self.stack[-1]
        if type(record) is metadata.TensorProperties:
            record.__setstate__(state)
        elif type(record) in _RECORDS and type(state) is dict:
            record.__dict__.update(state)
        else:
            raise pickle.UnpicklingError(f"it changes a {type(record).__name__}")

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def load_setitems(self) -> None:
        self._set(self.pop_mark())

    def _set(self, items: list[Any]) -> None:
        keys = items[::2]
        if type(self.stack[-1]) is not dict or not all(type(key) is str or _is_index(key) for key in keys):
            raise pickle.UnpicklingError("it has a key that is neither text nor the index of a tensor")
        self.stack[-1].update(zip(keys, items[1::2], strict=True))

    dispatch |= {pickle.BUILD[0]: load_build, pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems}


def _is_index(key: Any) -> bool:
    return type(key) is metadata.MetadataIndex and type(key.fqn) is str and type(key.offset) in (torch.Size, type(None))


def problem_of(folder: Path) -> str | None:
    """Why the checkpoint of torch in `folder` must not be loaded; None if it is safe to."""
    try:
        with refusing(folder / ".metadata", "it is not loaded, because it could run code"), (folder / ".metadata").open("rb") as file:
            found = _MetadataUnpickler(file).load()
        _check_places(folder, found)
        with refusing(folder / "common.pt", "it is not loaded, because it could run code"):
            torch.load(plain_file(folder, "common.pt"), map_location="cpu", weights_only=True)
    except ValueError as error:
        return str(error)
    return None


def _check_places(folder: Path, found: Any) -> None:
    """Raise ValueError unless every part lies within a file of the folder and every object among them is plain data."""
    tensors, places = getattr(found, "state_dict_metadata", None), getattr(found, "storage_data", None)
    if type(found) is not metadata.Metadata or type(tensors) is not dict or type(places) is not dict:
        raise ValueError(f"{folder / '.metadata'} does not describe a checkpoint; restore it")
    sizes: dict[str, int] = {}
    for index, place in places.items():
        name: Any = getattr(place, "relative_path", None)
        if type(name) is not str or name not in sizes:
            sizes[name] = plain_file(folder, name).stat().st_size
        start, length = place.offset, place.length
        if type(start) is not int or type(length) is not int or not 0 <= start <= start + length <= sizes[name]:
            raise ValueError(f"{folder / '.metadata'}: {index!r:.80} is not within {name}; restore it")
        if getattr(place, "transform_descriptors", None):
            raise ValueError(f"{folder / '.metadata'}: {index!r:.80} is transformed, which is not supported")
        if type(tensors.get(getattr(index, "fqn", None))) is not metadata.TensorStorageMetadata:
            _check_object(folder / name, start, length)


def _check_object(path: Path, start: int, length: int) -> None:
    with path.open("rb") as file:
        file.seek(start)
        content = io.BytesIO(file.read(length))
    try:
        torch.load(content, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path}: {one_line(error)}; it is not loaded, because it could run code") from None
