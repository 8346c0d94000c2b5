"""Policy: a model on the grid, and the verbs that algorithms know it by."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine.config import Llama, Model, Optim, Parallel
from engine.hub import resolve
from engine.megatron import seat
from engine.types import LossFunction, Packed, Step
from engine.world import World

Finish = Callable[[Packed, Tensor], tuple[Tensor, Tensor, dict[str, Any]]]  # what megatron wants of a loss: (sum, count, anything)


class Policy:
    """A Llama laid over `world` by `parallel`: with an optimizer where `optim` is given, else only to be read. Given a bare
    Llama, its weights are left empty for load_latest.

    Raises ValueError when the grid cannot hold the model, or its weights are missing, damaged or of another shape.
    """

    def __init__(self, model: Model | Llama, optim: Optim | None, parallel: Parallel, world: World, *, seed: int = 0):
        start = model if isinstance(model, Model) else Model(init=model)
        self.folder = world.first(lambda: resolve(start.path)) if start.path else None
        self.model = start.init or shape_of(self.folder)
        self.optim, self.parallel, self.world = optim, parallel, world
        self.dtype = _dtype(start, world)
        parallel.check(self.model, world.size)
        self.seat = ExitStack()
        self.seat.enter_context(seat.taken(world))
        self.grid = seat.make_grid(parallel, world, seed)
        self._build(seed, fill=isinstance(model, Model) and world.seat != "meta")

    def _build(self, seed: int, fill: bool) -> None:
        from engine.megatron import model, weights

        self.chunks = model.build(self.model, self.parallel, self.grid, self.world, self.dtype)
        if fill:
            origin = weights.FolderOrigin(self.folder, self.model) if self.folder else weights.RandomOrigin(self.model, seed)
            weights.fill(self.chunks, self.model, origin, self.grid)
        self.stages: list[Any] = list(self.chunks)
        self.optimizer: Any = None
        if self.optim is not None:
            from engine.megatron import training

            self.stages = training.wrap(self.chunks, self.parallel)
            self.optimizer = training.make_optimizer(self.stages, self.optim, self.parallel, self.dtype)

    def close(self) -> None:
        """Give the seat and the grid back; the policy is of no use afterwards."""
        seat.leave_grid(self.grid)
        self.seat.close()

    @property
    def cut(self) -> dict[str, Any]:
        """How this rank's share of a batch must be cut: keyword arguments of batching.batch."""
        interleaved = self.parallel.pp if self.parallel.vpp > 1 else 1
        multiples = {"total_multiple": self.parallel.tp, "microbatch_multiple": interleaved}
        return {"rank": self.grid.dp_rank, "ranks": self.grid.dp, "cost": self.model.cost, **multiples}

    @property
    def speaks(self) -> bool:
        """True on one rank of each replica: the rank that writes down what the replica computed."""
        return self.grid.pp_rank == self.grid.pp - 1 and self.grid.tp_rank == 0

    def update(self, step: Step, loss: LossFunction, lr: float) -> dict[str, float]:
        """One optimizer step on the gradient of sum of totals / sum of counts, over all microbatches of all ranks.

        Returns the loss function's metrics (each its global sum / global count) and `grad_norm` before clipping, equal on every rank.
        Raises FloatingPointError on all ranks, with weights and optimizer as they were, when the gradient is not finite.
        """
        from engine.megatron import training

        assert self.optim is not None, "this policy was built without an optimizer"
        for stage in self.stages:
            stage.train()
            stage.zero_grad_buffer()
        self.optimizer.zero_grad()
        outputs = self._run(step, partial(_finish_loss, loss), forward_only=False)
        metrics = self._reduced([out["metrics"] for out in outputs])
        grad_norm = training.step(self.optimizer, self.optim, lr)
        if not math.isfinite(grad_norm):
            raise FloatingPointError(
                f"gradient norm is {grad_norm} (loss {metrics.get('loss')}); the step was not taken. Lower optim.lr or look at this batch"
            )
        return metrics | {"grad_norm": grad_norm}

    @torch.no_grad()
    def evaluate(self, step: Step, loss: LossFunction) -> dict[str, float]:
        """The loss function's metrics on `step`, forward only; equal on every rank."""
        for stage in self.stages:
            stage.eval()
        return self._reduced([out["metrics"] for out in self._run(step, partial(_finish_loss, loss), forward_only=True)])

    @torch.no_grad()
    def logprobs(self, step: Step) -> list[Tensor]:
        """logprob_T of every token of each microbatch, masked or not, float32 on the host; the same on every rank of a replica."""
        for stage in self.stages:
            stage.eval()
        outputs = self._run(step, _finish_logprobs, forward_only=True, every=True)
        sizes = [len(packed.tokens_T) for packed in step]
        if not sizes:
            return []
        flat = (
            torch.cat([out["logprob"][:size] for out, size in zip(outputs, sizes, strict=True)])
            if outputs
            else torch.empty(sum(sizes), device=self.world.device)
        )
        dist.broadcast(flat, src=self.grid.last_stage, group=self.grid.pp_group)
        return list(flat.cpu().split(sizes))

    def _run(self, step: Step, finish: Finish, *, forward_only: bool, every: bool = False) -> list[dict[str, Any]]:
        """Every microbatch through the pipeline; what `finish` said of each, on the last stage (empty on the others)."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        # Interleaved stages exchange hidden states without telling shapes first: there, all microbatches are made as long as the longest.
        longest = max((len(packed.tokens_T) for packed in step), default=0)
        equal = [packed.padded(longest) for packed in step] if self.parallel.vpp > 1 else step
        flights = [self._flight(packed, every) for packed in equal]

        def forward(flights: Any, model: Any) -> tuple[Tensor, Any]:
            packed, flight = next(flights)
            out = model(packed.tokens_T[None], None, None, labels=packed.targets_T[None], packed_seq_params=flight)
            return out, partial(finish, packed)

        return get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=[iter(flights) for _ in self.stages],
            model=self.stages,
            num_microbatches=len(step),
            seq_length=longest,
            micro_batch_size=1,
            forward_only=forward_only,
        )

    def _flight(self, packed: Packed, every: bool) -> tuple[Packed, Any]:
        from engine.megatron.attention import Flight

        rows_M = torch.arange(len(packed.tokens_T)) if every else packed.mask_T.nonzero()[:, 0]
        return packed.to(self.world.device), Flight.of(packed, rows_M, self.model, self.world.device)

    def _reduced(self, metrics: list[dict[str, tuple[Any, Any]]]) -> dict[str, float]:
        """Each metric's sum over its count, over the microbatches of all replicas; told to every stage."""
        found: dict[str, float] = {}
        if metrics:
            names = sorted(metrics[0])
            rows = [[torch.as_tensor(x, dtype=torch.float64, device=self.world.device) for x in m[name]] for m in metrics for name in names]
            sums = torch.stack([torch.stack(row) for row in rows]).view(len(metrics), len(names), 2).sum(0)
            dist.all_reduce(sums, group=self.grid.dp_group)
            found = {name: total / count if count else 0.0 for name, (total, count) in zip(names, sums.tolist(), strict=True)}
        if self.parallel.pp > 1:
            box = [found]
            dist.broadcast_object_list(box, src=self.grid.last_stage, group=self.grid.pp_group)
            found = box[0]
        return found

    def save(self, out: Path, step: int, assets: Path | None = None, keep_last: int = 2) -> None:
        """Write the checkpoint `out/step-N`, whole or not at all; see checkpoint.save."""
        from engine.megatron import checkpoint

        self._settle()
        checkpoint.save(checkpoint.State(self.chunks, self.optimizer), self.model, out, step, assets, keep_last, self.world)

    def load_latest(self, out: Path) -> int:
        """Take up the newest whole checkpoint under `out`; returns the step to go on with, 0 where there is none; see
        checkpoint.load_latest."""
        from engine.megatron import checkpoint

        return checkpoint.load_latest(checkpoint.State(self.chunks, self.optimizer), self.model, out, self.world)

    def export(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Write the weights into `folder` as safetensors that transformers loads beside a config.json."""
        from engine.megatron import weights

        self._settle()
        weights.export(self.chunks, self.model, folder, dtype or self.dtype, self.grid, self.world)

    def _settle(self) -> None:
        if self.optimizer is not None:
            from engine.megatron import training

            training.settle(self.stages)


def shape_of(folder: Path | None) -> Llama:
    """The Llama that a folder's config.json describes. Raises ValueError when it describes none."""
    assert folder is not None
    path = folder / "config.json"
    try:
        return Llama.from_hf(json.loads(path.read_text()))
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a model's config ({type(error).__name__}: {error})") from None


def _dtype(model: Model, world: World) -> torch.dtype:
    if model.dtype == "auto":
        return torch.float32 if world.seat == "cpu" else torch.bfloat16
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[model.dtype]


def _finish_loss(loss: LossFunction, packed: Packed, logprob_T: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
    found = loss(logprob_T, packed)
    return found.total, torch.as_tensor(found.count, dtype=torch.int), {"metrics": found.metrics}


def _finish_logprobs(packed: Packed, logprob_T: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
    return logprob_T.sum(), torch.tensor(0, dtype=torch.int), {"logprob": logprob_T.detach()}
