"""The cost of one torch operation, from its name, inputs and outputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from engine.dryrun.types import Collective, Matmul, Overlapped, Work

Axis = Literal["tp", "pp", "dp"]

PRODUCTS = {"mm": ("self", "mat2"), "bmm": ("self", "mat2"), "addmm": ("mat1", "mat2"), "baddbmm": ("batch1", "batch2")}
COLLECTIVES: dict[str, Literal["all_gather", "reduce_scatter", "all_reduce", "broadcast"]] = {
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "broadcast_": "broadcast",
}
MOVES_NOTHING = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_unsafe_view", "lift_fresh", "set_", "resize_"}
LIKE = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"}  # read only the shape of their first argument
OVERWRITES = {"copy_", "fill_", "zero_"}  # write their first argument without reading it
PICKS = {"index", "index_select", "embedding", "gather"}  # read as many elements of their first argument as they return


class Cost(NamedTuple):
    """Work of an operation. `scratch`: bytes of temporary buffers, allocated and freed while it runs."""

    work: Work
    scratch: int = 0


@dataclass(frozen=True)
class Call:
    """One call of an operation with at least one tensor on the device."""

    space: str  # namespace, such as "aten"
    name: str  # such as "mm"
    given: dict[str, Any]  # arguments, defaults included, by their names in the schema
    out: Any
    is_view: bool
    multiplies: bool  # listed in torch's flop_registry
    axes: Mapping[str, Axis]  # process group name -> axis

    @staticmethod
    def of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, axes: Mapping[str, Axis]) -> Call:
        space, _, name = str(func.overloadpacket).partition(".")
        schema = func._schema
        given = {a.name: value for a, value in zip(schema.arguments, args, strict=False)} | kwargs
        defaults = {a.name: a.default_value for a in schema.arguments if a.name not in given}
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        return Call(space, name, given | defaults, out, is_view, func.overloadpacket in flop_registry, axes)


def cost_of(call: Call) -> Cost:
    """Return the cost of a torch operation. Any other operation counts as one kernel that reads its inputs once and writes its outputs
    once."""
    if call.space == "c10d":
        return Cost(_communicated(call))
    if call.space == "symm_mem":
        return _overlapped(call)
    if call.space == "aten" and (factors := PRODUCTS.get(call.name.removesuffix("_"))):
        a, b = (call.given[name] for name in factors)
        return Cost(_multiplied(a, b, accumulates="add" in call.name and call.given["beta"] != 0))
    assert not call.multiplies, f"{call.space}.{call.name} is a matrix product that PRODUCTS does not list"
    if call.is_view or call.name in MOVES_NOTHING:
        return Cost(Work())
    traffic = moved(call)
    return Cost(Work(traffic=traffic, kernels=int(traffic > 0)))


def moved(call: Call) -> int:
    """Bytes of every input read and every output written, once each."""
    unread = {"out", "self"} if call.name in OVERWRITES | LIKE else {"out"}
    read = {name: value for name, value in call.given.items() if name not in unread}
    written = size_of(call.out)
    if call.name in PICKS:
        return size_of(list(read.values())[1:]) + 2 * written
    return size_of(read) + written


def size_of(values: Any) -> int:
    """Bytes of the tensors in `values`. An expanded tensor counts with the bytes of its storage."""
    tensors = [x for x in tree_leaves(values) if isinstance(x, Tensor)]
    return sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in tensors)


def _multiplied(a: Tensor, b: Tensor, accumulates: bool) -> Work:
    times = a.shape[0] if a.ndim == 3 else 1
    return Work(Counter({Matmul(a.shape[-2], a.shape[-1], b.shape[-1], accumulates): times}), kernels=1)


def _overlapped(call: Call) -> Cost:
    """Cost of PyTorch's fused products on symmetric memory (torch.ops.symm_mem); their buffers are scratch.

    Each block is a product and a copy between barriers. The all-gather copies this rank's block into a buffer that other ranks read; the
    reduce-scatter reads and sums the received blocks.
    """
    gathers = call.name == "fused_all_gather_matmul"
    rows, matrix = call.given["A"], call.given["Bs"][0] if gathers else call.given["B"]
    ranks = dist.distributed_c10d._get_group_size_by_name(call.given["group_name"])
    full = Matmul(len(rows) * (ranks if gathers else 1), *matrix.shape)
    size = rows.element_size() * full.m * (full.k if gathers else full.n)
    block = size // ranks
    work = Work(kernels=(2 if gathers else 4) * ranks, overlapped=Counter({Overlapped(full, size): 1}))
    if gathers:
        work.traffic = 2.0 * block
        return Cost(work, block + (0 if call.given["return_A"] else size))
    work.traffic = float(size + block)
    return Cost(work, size + 2 * block)


def _communicated(call: Call) -> Work:
    """The collective of a c10d call. Sends and receives are left out: schedule.py accounts for them."""
    if call.name not in COLLECTIVES:
        return Work()
    group = dist.ProcessGroup.unbox(call.given["process_group"]).group_name
    size = max(size_of(value) for value in call.given.values())  # the larger of input and output is the full tensor
    collective = Collective(COLLECTIVES[call.name], call.axes[group], size, waits=not call.given["async_op"])
    return Work(collectives=Counter({collective: 1}))
