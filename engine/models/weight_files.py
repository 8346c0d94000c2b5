"""The safetensors files of a model folder: which ones count, and what their headers list. No weight is read here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import safe_open

from engine.files import is_plain_name, plain_file, read_object, refusing

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")  # what a weight may be stored as; other types are parts of a quantised model


def weight_files(folder: Path) -> dict[str, str] | None:
    """The index's map from tensor to file; None for a folder with one file, which counts even beside an index, as in transformers.

    Raises ValueError for an index that cannot be read or names anything but files directly in `folder`, and if there are no weights.
    """
    if not (folder / INDEX).exists() or (folder / SINGLE).exists():
        if not (folder / SINGLE).exists():
            raise ValueError(
                f"model folder {str(folder)!r} has no {SINGLE}; give a Hugging Face folder with config.json and safetensors weights"
            )
        plain_file(folder, SINGLE)
        return None
    found = read_object(folder / INDEX, "an index of weights").get("weight_map")
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{folder / INDEX} is not an index of weights; it needs a weight_map from tensor to file name")
    for tensor, file in found.items():
        if not is_plain_name(file) or not file.endswith(".safetensors"):
            raise ValueError(f"{folder / INDEX}: {tensor:.80} is said to be in {file!r:.80}; shards lie beside their index, not outside")
    for file in sorted(set(found.values())):
        plain_file(folder, file)
    return found


def read_headers(folder: Path) -> dict[str, tuple[str, str, tuple[int, ...]]]:
    """File, safetensors type and shape of every tensor in the weights of `folder`.

    Raises ValueError, which names the file, if a file is damaged, if two files hold a tensor, or if the index places it elsewhere.
    """
    index = weight_files(folder)
    found: dict[str, tuple[str, str, tuple[int, ...]]] = {}
    for file in sorted(set(index.values())) if index else [SINGLE]:
        here = _header(folder / file)
        if twice := found.keys() & here.keys():
            name = min(twice)
            raise ValueError(f"{folder / file}: {name} is in {found[name][0]} too; keep one of them")
        found |= {name: (file, *entry) for name, entry in here.items()}
    for name, file in (index or {}).items():
        if name not in found or found[name][0] != file:
            raise ValueError(f"{folder / file}: the index lists {name} in this file, but it is missing")
    return {name: found[name] for name in index or found}


def _header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    with opened(path) as handle:
        views = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118, a handle is no mapping
        return {name: (view.get_dtype(), tuple(view.get_shape())) for name, view in views.items()}


@contextmanager
def opened(path: Path) -> Iterator[safe_open]:
    """A safetensors file, opened. Raises ValueError, which names the file, for whatever goes wrong while it is open."""
    plain_file(path.parent, path.name)
    with refusing(path, "the file is truncated or corrupt: fetch it again"), safe_open(str(path), framework="pt") as handle:
        yield handle
