"""What is assumed of a machine: hardware.toml, or what a calibration measured, as typed values."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

OWN = Path(__file__).with_name("hardware.toml")
Table = TypeVar("Table")


@dataclass(frozen=True)
class Gemm:
    """How fast matrix products are, by shape; hardware.toml says the formula."""

    ceiling: float  # share of peak that a product without end reaches
    wave: float  # output elements that are lost to the last wave of tiles
    fill: float  # depth that is lost to filling each tile's pipeline


@dataclass(frozen=True)
class Link:
    """What collectives go over."""

    bandwidth: float  # bytes/s that each rank sends while all do
    latency: float  # seconds
    step: float  # seconds that each rank after the first adds
    message: float  # seconds until one of no length has come from a pipeline stage to the next


@dataclass(frozen=True)
class Hardware:
    """A device, its node, and the network between nodes. Seconds, bytes, FLOPs; shares of what the data sheet says."""

    name: str
    peak: float  # FLOP/s
    width: int  # bytes of an element of the matrices
    bandwidth: float  # bytes/s of the device's memory
    streaming: float  # share of it
    memory: float  # bytes
    allowance: float  # bytes of it that are not for tensors
    attention: float  # share of peak
    launch: float  # seconds a kernel
    dispatch: float  # seconds of the host a kernel, while the device computes the ones before
    decode_layer: float  # seconds of the host for a layer of a decoding wave that is launched kernel by kernel
    overlap: float  # share of computation that hides collectives
    node: int  # devices that `inside` connects
    watts: float
    gemm: Gemm
    inside: Link
    across: Link

    @staticmethod
    def load(name_or_path: str) -> Hardware:
        """A device of hardware.toml by name, or the one device of another such file by path.

        Raises ValueError for a name that is not known, and for a file that holds no device, several, or one with numbers missing.
        """
        path = Path(name_or_path)
        own = path.suffix != ".toml"
        found = _devices(OWN if own else path)
        if own and name_or_path not in found:
            raise ValueError(f"device={name_or_path!r} is not known; use {', '.join(sorted(found))}, or a .toml that --calibrate wrote")
        if not own and len(found) != 1:
            raise ValueError(f"device={name_or_path}: the file must hold one device's table; it holds {', '.join(found) or 'none'}")
        name = name_or_path if own else next(iter(found))
        return _read(Hardware, {"name": name} | found[name], f"{OWN.name if own else path}: {name}")

    @staticmethod
    def of_gpu(name: str) -> Hardware | None:
        """The device of hardware.toml whose name occurs in torch's name of a GPU ("NVIDIA H100 80GB HBM3"), or None."""
        own = next((device for device in _devices(OWN) if device in name.lower()), None)
        return Hardware.load(own) if own else None

    def save(self, path: Path, notes: dict[str, str] | None = None) -> None:
        """Write it as a file that `load` reads; notes["gemm.wave"] becomes the comment behind that number."""
        lines, tables = [f"[{self.name}]"], []
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Gemm | Link):
                tables += ["", f"[{self.name}.{field.name}]"]
                tables += [_line(f.name, getattr(value, f.name), (notes or {}).get(f"{field.name}.{f.name}")) for f in fields(value)]
            elif field.name != "name":
                lines.append(_line(field.name, value, (notes or {}).get(field.name)))
        path.write_text("\n".join(lines + tables) + "\n", encoding="utf-8")


def _devices(path: Path) -> dict[str, dict[str, Any]]:
    try:
        return {name: table for name, table in tomllib.loads(path.read_text(encoding="utf-8")).items() if isinstance(table, dict)}
    except OSError as error:
        raise ValueError(f"device={path} cannot be read ({error.strerror}); give a name, or a .toml file that --calibrate wrote") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"device={path} is not TOML: {error}") from None


def _read(kind: type[Table], table: dict[str, Any], where: str) -> Table:
    """A dataclass from a table that has exactly its fields, each a number above or at 0."""
    hints = get_type_hints(kind)
    if odd := hints.keys() ^ table.keys():
        name = sorted(odd)[0]
        raise ValueError(f"{where}.{name} is {'missing' if name in hints else 'not known'}; it must have {', '.join(hints)}")
    values: dict[str, Any] = {}
    for name, hint in hints.items():
        value = table[name]
        if hint in (Gemm, Link):
            values[name] = _read(hint, value if isinstance(value, dict) else {}, f"{where}.{name}")
        elif hint is str:
            values[name] = value
        elif isinstance(value, int | float) and value >= 0:
            values[name] = hint(value)
        else:
            raise ValueError(f"{where}.{name}={value!r} must be a number, at least 0")
    return kind(**values)


def _line(name: str, value: float, note: str | None) -> str:
    return f"{name} = {value if isinstance(value, int) else f'{value:.6g}'}" + (f"  # {note}" if note else "")
