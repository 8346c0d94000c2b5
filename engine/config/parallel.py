"""How a model is laid out over ranks: tensor, pipeline and data parallelism."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from engine.config.model import ModelShape

Recompute = Literal["none", "swiglu", "selective", "full"]  # in backward: nothing, SwiGLU's output, MLPs, layers; slower, and smaller

MOST = 1 << 16  # ranks and stages; larger values are mistakes


@dataclass(frozen=True)
class Parallel:
    """The grid. Data parallelism is what is left of the world: dp = world size / (tp * pp)."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1  # virtual stages a pipeline rank holds (interleaved 1F1B)
    count_embedding: bool = False  # the embedding takes a layer's slot when layers are dealt to stages
    count_loss: bool = False  # and so does the output layer
    stages: tuple[int, ...] = ()  # or deal by hand: layers of each of the pp * vpp stages, in order
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
        """Raise ValueError unless this grid can hold `model` on `world_size` ranks; the message names values that can."""
        if fault := self._fault(model, world_size):
            raise ValueError(f"{fault}; use {self._way_out(model, world_size)}")

    @property
    def model_ranks(self) -> int:
        """Ranks of one replica: tp * pp."""
        return self.tp * self.pp

    def with_even_stages(self) -> Parallel:
        """The same grid for another model, whose layers are dealt evenly."""
        return replace(self, stages=(), count_embedding=False, count_loss=False)

    def layers_per_stage(self, model: ModelShape) -> list[int]:
        """Layers of each of the pp * vpp stages, in order; pipeline rank r holds stages r, r + pp, ..."""
        count = self.pp * self.vpp
        layers = list(self.stages) or [self._slots(model) // count] * count
        layers[0] -= 0 if self.stages else self.count_embedding
        layers[-1] -= 0 if self.stages else self.count_loss
        return layers

    def most_layers(self, model: ModelShape) -> int:
        """Layers of the pipeline rank that holds most."""
        dealt = self.layers_per_stage(model)
        return max(sum(dealt[rank :: self.pp]) for rank in range(self.pp))

    def _slots(self, model: ModelShape) -> int:
        return model.layers + self.count_embedding + self.count_loss

    def _fault(self, model: ModelShape, world_size: int) -> str:
        """Why this grid cannot hold `model`; "" when it can."""
        ranks, count, slots = self.model_ranks, self.pp * self.vpp, self._slots(model)
        if model.heads % self.tp or model.kv_heads % self.tp or model.ffn % self.tp:
            sizes = f"model.heads={model.heads}, model.kv_heads={model.kv_heads} and model.ffn={model.ffn}"
            return f"parallel.tp={self.tp} must divide {sizes}"
        if self.stages and (len(self.stages) != count or sum(self.stages) != model.layers or min(self.stages) < 0):
            given = f"parallel.stages={list(self.stages)}"
            return f"{given} must give the layers of pp x vpp = {count} stages, in sum model.layers={model.layers}"
        if not self.stages and slots % count:
            counted = " and ".join(["embedding"] * self.count_embedding + ["loss"] * self.count_loss)
            more = f" ({slots} slots with {counted} counted)" if counted else ""
            return f"parallel.pp={self.pp} x parallel.vpp={self.vpp} must divide model.layers={model.layers}{more}"
        if world_size % ranks:
            return f"the world has {world_size} ranks, which parallel.tp={self.tp} x parallel.pp={self.pp} = {ranks} must divide"
        return ""

    def fits_model(self, model: ModelShape, world_size: int) -> bool:
        """Whether this grid can hold `model` on `world_size` ranks."""
        return not self._fault(model, world_size)

    def alternatives(self, model: ModelShape, holds: Callable[[Parallel], bool]) -> list[str]:
        """Values of tp, of pp and of vpp, the others left as they are, for which `holds`."""
        ways = []
        for name, most in (("tp", model.kv_heads), ("pp", model.layers + 2), ("vpp", model.layers + 2)):
            least = 2 if name == "pp" and self.vpp > 1 else 1
            upper = 1 if name == "vpp" and self.pp == 1 else most  # virtual stages want a pipeline
            if good := [n for n in range(least, upper + 1) if holds(replace(self, **{name: n}))]:
                ways.append(f"parallel.{name}={_one_of(good)}")
        return ways

    def _way_out(self, model: ModelShape, world_size: int) -> str:
        """Values of one setting, the others left as they are, that do."""

        def fits(**change: Any) -> bool:
            return replace(self, **change).fits_model(model, world_size)

        ways = self.alternatives(model, lambda other: other.fits_model(model, world_size))
        if not self.stages and fits(count_embedding=True, count_loss=True):
            ways.append("parallel.count_embedding=true with count_loss=true")
        below = world_size - world_size % self.model_ranks
        if good := [n for n in (below, below + self.model_ranks) if n and self.fits_model(model, n)]:
            ways.append(f"{_one_of(good)} ranks")
        by_hand = even_split(model.layers, self.pp * self.vpp)
        if (len(by_hand) <= 16 or not ways) and fits(stages=tuple(by_hand)):
            ways.append(f"parallel.stages={by_hand}")
        if not ways:
            grids = ((tp, pp) for tp in range(model.kv_heads, 0, -1) for pp in range(self.pp, 0, -1))
            tp, pp = next((tp, pp) for tp, pp in grids if fits(tp=tp, pp=pp, vpp=1, stages=()))
            ways.append(f"parallel.tp={tp} with parallel.pp={pp} and vpp=1")
        return ", or ".join(ways)


def even_split(layers: int, stages: int) -> list[int]:
    """Layers dealt to stages as evenly as can be, the outer ones lighter: they have the embedding and the loss besides."""
    share, left = divmod(layers, stages)
    first = (stages - left) // 2
    return [share + (first <= stage < first + left) for stage in range(stages)]


def _one_of(values: list[int]) -> str:
    return ", ".join(map(str, values[:-1])) + (" or " if len(values) > 1 else "") + str(values[-1])
