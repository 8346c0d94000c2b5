"""Ahead-of-time compilation: what a kernel is compiled for, on machines with no GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AotCase:
    """One kernel with one configuration that is shipped."""

    name: str
    kernel: Any  # a triton.JITFunction
    signature: dict[str, str]  # argument -> Triton's type, "constexpr" for constants
    constexprs: dict[str, Any]
    divisible: tuple[str, ...]  # arguments whose value or address is a multiple of 16
    num_warps: int
    num_stages: int = 2
