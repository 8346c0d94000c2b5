"""Hardware parameters as typed values, read from hardware.toml or from the file that a calibration wrote."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

OWN = Path(__file__).with_name("hardware.toml")
Table = TypeVar("Table")


@dataclass(frozen=True)
class Gemm:
    """Efficiency of matrix products by shape; the formula is in hardware.toml."""

    ceiling: float  # share of peak that an infinitely large product reaches
    wave: float  # output elements lost to the last, partly filled wave of tiles
    fill: float  # elements of depth k lost to filling each tile's pipeline


@dataclass(frozen=True)
class Link:
    """Communication between devices."""

    bandwidth: float  # bytes/s that each rank sends while all ranks send
    latency: float  # seconds per collective
    step: float  # seconds per ring step; n ranks take n - 1 steps
    message: float  # seconds of an empty message from one pipeline stage to the next


@dataclass(frozen=True)
class Hardware:
    """A device, its node, and the network between nodes, in seconds, bytes and FLOPs. Shares are relative to the data sheet's value."""

    name: str
    peak: float  # FLOP/s
    width: int  # bytes of a matrix element
    bandwidth: float  # bytes/s of device memory
    streaming: float  # share of `bandwidth` that kernels reach
    memory: float  # bytes
    allowance: float  # bytes of `memory` not available for tensors
    attention: float  # share of `peak` that attention kernels reach
    launch: float  # device seconds per kernel
    dispatch: float  # host seconds per kernel; overlaps with device work
    decode_layer: float  # host seconds to launch one decoding layer kernel by kernel
    overlap: float  # share of computation time that can hide collectives
    node: int  # devices per node
    watts: float  # per device; 0: unknown
    gemm: Gemm
    inside: Link  # within a node
    across: Link  # between nodes

    @staticmethod
    def load(name_or_path: str) -> Hardware:
        """Load a device of hardware.toml by name, or the only device of another such file by path.

        Raises ValueError for an unknown name, and for a file that cannot be read, does not hold exactly one device or lacks a number.
        """
        path = Path(name_or_path)
        built_in = path.suffix != ".toml"
        devices = _devices(OWN if built_in else path)
        if built_in and name_or_path not in devices:
            raise ValueError(f"device={name_or_path!r} is unknown; use {', '.join(sorted(devices))}, or a .toml from --calibrate")
        if not built_in and len(devices) != 1:
            raise ValueError(f"device={name_or_path}: the file must have the table of one device; it has {', '.join(devices) or 'none'}")
        name = name_or_path if built_in else next(iter(devices))
        return _read(Hardware, {"name": name} | devices[name], f"{OWN.name if built_in else path}: {name}")

    @staticmethod
    def of_gpu(name: str) -> Hardware | None:
        """The device of hardware.toml whose name occurs in torch's name of a GPU ("NVIDIA H100 80GB HBM3"), or None."""
        own = next((device for device in _devices(OWN) if device in name.lower()), None)
        return Hardware.load(own) if own else None

    def save(self, path: Path, notes: dict[str, str] | None = None) -> None:
        """Write a file that `load` reads. `notes` maps a field, such as "gemm.wave", to the comment after its value."""
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
        raise ValueError(f"device={path} cannot be read ({error.strerror}); give a name, or a .toml file written by --calibrate") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"device={path} is not valid TOML: {error}") from None


def _read(kind: type[Table], table: dict[str, Any], where: str) -> Table:
    """Build dataclass `kind` from a table with exactly its fields, each a number of at least 0."""
    hints = get_type_hints(kind)
    if odd := hints.keys() ^ table.keys():
        name = sorted(odd)[0]
        raise ValueError(f"{where}.{name} is {'missing' if name in hints else 'unknown'}; the fields are {', '.join(hints)}")
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
