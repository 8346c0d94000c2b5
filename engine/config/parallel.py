"""The parallel layout of a model: tensor, pipeline and data parallelism."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from engine.config.model import ModelShape

# Recomputed in backward: nothing, the output of SwiGLU, the MLPs, entire layers. Each takes more time and less memory than the one before.
Recompute = Literal["none", "swiglu", "selective", "full"]

MOST = 1 << 16  # ranks and stages; larger values are mistakes


@dataclass(frozen=True)
class Parallel:
    """The grid of ranks. Data parallelism follows from the world size: dp = world size / (tp * pp)."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1  # virtual stages per pipeline rank (interleaved 1F1B)
    count_embedding: bool = False  # count the embedding as one layer when layers are divided among stages
    count_loss: bool = False  # count the output layer as one layer
    stages: tuple[int, ...] = ()  # explicit number of layers of each of the pp * vpp stages, in order; (): even
    recompute: Recompute = "none"
    tp_comm_overlap: bool = False  # overlap tensor-parallel communication with matrix products; GPUs of one node only
    distributed_optimizer: bool = True  # optimizer state sharded over data-parallel ranks

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "vpp"):
            if getattr(self, name) < 1:
                raise ValueError(f"parallel.{name}={getattr(self, name)} must be at least 1")
        if self.tp > MOST or self.pp * self.vpp > MOST:
            raise ValueError(f"parallel.tp={self.tp} and parallel.pp={self.pp} x parallel.vpp={self.vpp} must be at most {MOST} each")
        if self.vpp > 1 and self.pp == 1:
            raise ValueError(f"parallel.vpp={self.vpp} needs parallel.pp of at least 2, or vpp=1")

    def check(self, model: ModelShape, world_size: int) -> None:
        """Raise ValueError unless this grid fits `model` on `world_size` ranks; the message names values that do."""
        if fault := self._fault(model, world_size):
            raise ValueError(f"{fault}; use {self._way_out(model, world_size)}")

    @property
    def model_ranks(self) -> int:
        """Ranks of one replica: tp * pp."""
        return self.tp * self.pp

    def with_even_stages(self) -> Parallel:
        """The same grid with layers divided evenly, for another model."""
        return replace(self, stages=(), count_embedding=False, count_loss=False)

    def layers_per_stage(self, model: ModelShape) -> list[int]:
        """Layers of each of the pp * vpp stages, in order; pipeline rank r holds stages r, r + pp, ..."""
        count = self.pp * self.vpp
        layers = list(self.stages) or [self._slots(model) // count] * count
        layers[0] -= 0 if self.stages else self.count_embedding
        layers[-1] -= 0 if self.stages else self.count_loss
        return layers

    def most_layers(self, model: ModelShape) -> int:
        """The largest number of layers on a pipeline rank."""
        layers = self.layers_per_stage(model)
        return max(sum(layers[rank :: self.pp]) for rank in range(self.pp))

    def _slots(self, model: ModelShape) -> int:
        return model.layers + self.count_embedding + self.count_loss

    def _fault(self, model: ModelShape, world_size: int) -> str:
        """Why this grid does not fit `model`; "" if it does."""
        ranks, count, slots = self.model_ranks, self.pp * self.vpp, self._slots(model)
        if model.heads % self.tp or model.kv_heads % self.tp or model.ffn % self.tp:
            sizes = f"model.heads={model.heads}, model.kv_heads={model.kv_heads} and model.ffn={model.ffn}"
            return f"parallel.tp={self.tp} must divide {sizes}"
        if self.stages and (len(self.stages) != count or sum(self.stages) != model.layers or min(self.stages) < 0):
            given = f"parallel.stages={list(self.stages)}"
            return f"{given} must have pp x vpp = {count} entries that add up to model.layers={model.layers}"
        if not self.stages and slots % count:
            counted = " and ".join(["embedding"] * self.count_embedding + ["loss"] * self.count_loss)
            more = f" ({slots} slots with {counted} counted)" if counted else ""
            return f"parallel.pp={self.pp} x parallel.vpp={self.vpp} must divide model.layers={model.layers}{more}"
        if world_size % ranks:
            return f"parallel.tp={self.tp} x parallel.pp={self.pp} = {ranks} must divide the world size of {world_size}"
        return ""

    def fits_model(self, model: ModelShape, world_size: int) -> bool:
        """Whether this grid fits `model` on `world_size` ranks. Memory is not checked."""
        return not self._fault(model, world_size)

    def alternatives(self, model: ModelShape, holds: Callable[[Parallel], bool]) -> list[str]:
        """Settings of one of tp, pp and vpp, with the others unchanged, for which `holds` is True."""
        ways = []
        for name, most in (("tp", model.kv_heads), ("pp", model.layers + 2), ("vpp", model.layers + 2)):
            least = 2 if name == "pp" and self.vpp > 1 else 1
            upper = 1 if name == "vpp" and self.pp == 1 else most  # vpp > 1 needs pp > 1
            if good := [n for n in range(least, upper + 1) if holds(replace(self, **{name: n}))]:
                ways.append(f"parallel.{name}={_one_of(good)}")
        return ways

    def _way_out(self, model: ModelShape, world_size: int) -> str:
        """Settings for which the grid fits: changes of one setting if possible."""

        def fits(**change: Any) -> bool:
            return replace(self, **change).fits_model(model, world_size)

        ways = self.alternatives(model, lambda other: other.fits_model(model, world_size))
        if not self.stages and fits(count_embedding=True, count_loss=True):
            ways.append("parallel.count_embedding=true with count_loss=true")
        below = world_size - world_size % self.model_ranks
        if good := [n for n in (below, below + self.model_ranks) if n and self.fits_model(model, n)]:
            ways.append(f"{_one_of(good)} ranks")
        even = even_split(model.layers, self.pp * self.vpp)
        if (len(even) <= 16 or not ways) and fits(stages=tuple(even)):
            ways.append(f"parallel.stages={even}")
        if not ways:
            grids = ((tp, pp) for tp in range(model.kv_heads, 0, -1) for pp in range(self.pp, 0, -1))
            tp, pp = next((tp, pp) for tp, pp in grids if fits(tp=tp, pp=pp, vpp=1, stages=()))
            ways.append(f"parallel.tp={tp} with parallel.pp={pp} and vpp=1")
        return ", or ".join(ways)


def even_split(layers: int, stages: int) -> list[int]:
    """Divide layers among stages as evenly as possible. The middle stages get the remainder, because the first also has the embedding and
    the last the output layer."""
    share, remainder = divmod(layers, stages)
    first = (stages - remainder) // 2
    return [share + (first <= stage < first + remainder) for stage in range(stages)]


def _one_of(values: list[int]) -> str:
    return ", ".join(map(str, values[:-1])) + (" or " if len(values) > 1 else "") + str(values[-1])
