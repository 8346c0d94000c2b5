"""Policy: a model on a grid of ranks, with the operations that algorithms use: update, evaluate, logprobs, generate, save, export."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from engine.config import Model, ModelShape, Optim, Parallel
from engine.config.checks import check_generation, check_head
from engine.config.choices import CudaGraphs
from engine.distributed.world import World
from engine.megatron import backend
from engine.megatron.graphs import Graphs
from engine.megatron.microbatch import Finish, finish_for, finish_loss, finish_per_token, forward_step
from engine.models.families import read_shape
from engine.models.hub import resolve
from engine.types import LossFunction, Moments, Packed, Step, TokenLoss, TokenTerms

if TYPE_CHECKING:
    from engine.megatron.decode import SequenceGroup, TokenSampling
    from engine.megatron.weights import WeightSource


class Policy:
    """A model sharded over the ranks of `world` by `parallel`, with an optimizer if `optim` is given.

    Given a ModelShape instead of a Model, the weights stay uninitialized until load_latest.
    Raises ValueError if the grid cannot hold the model, or if its weights are missing, damaged or of another shape.
    """

    def __init__(self, model: Model | ModelShape, optim: Optim | None, parallel: Parallel, world: World, *, seed: int = 0):
        start = model if isinstance(model, Model) else Model(init=model)
        self.folder, own = locate_weights(start, world)
        self.model = start.with_head(own)
        self.has_fresh_head = self.folder is not None and self.model.head != own.head
        self.optim, self.parallel, self.world = optim, parallel, world
        self.dtype = compute_dtype(start, world)
        parallel.check(self.model, world.size)
        with ExitStack() as borrowed:
            borrowed.enter_context(backend.cpu_backend(world))
            self.grid = backend.make_grid(parallel, world, seed)
            borrowed.callback(backend.leave_grid, self.grid)
            self.graphs = Graphs(world, self.grid.tp_group)
            self._build(seed, fill=isinstance(model, Model) and world.backend != "meta")
            self.borrowed = borrowed.pop_all()

    def _build(self, seed: int, fill: bool) -> None:
        from engine.megatron import model, overlap, weights

        if self.parallel.tp_comm_overlap and self.world.on_gpu and self.grid.tp > 1:
            overlap.check(self.grid.tp_group, self.world.device, self.dtype)
        self.origin: WeightSource | None = self._origin(seed) if fill else None  # first: it fails before memory is allocated
        self.chunks = model.build(self.model, self.parallel, self.grid, self.world, self.dtype, learns=self.optim is not None)
        if self.origin is not None:
            weights.fill(self.chunks, self.model, self.origin, self.grid, self.world)
        self.stages: list[Any] = list(self.chunks)
        self.optimizer: Any = None
        if self.optim is not None:
            from engine.megatron import optimizers

            self.stages = optimizers.wrap_ddp(self.chunks, self.parallel)
            self.optimizer = optimizers.make_optimizer(self.stages, self.optim, self.parallel, self.dtype)

    def _origin(self, seed: int) -> WeightSource:
        from engine.megatron import weights

        random = weights.RandomWeights(self.model, seed)
        if self.folder is None:
            return random
        stored = weights.FolderWeights(self.folder, read_shape(self.folder))
        return weights.FreshHeadWeights(stored, random) if self.has_fresh_head else stored

    def close(self) -> None:
        """Release the process groups and the CPU backend. The policy cannot be used afterwards."""
        self.borrowed.close()

    @property
    def batch_options(self) -> dict[str, Any]:
        """Keyword arguments of batching.build.batch for this rank's share of a batch."""
        interleaved = self.parallel.pp if self.parallel.vpp > 1 else 1
        multiples = {"total_multiple": self.parallel.tp, "microbatch_multiple": interleaved}
        return {"rank": self.grid.dp_rank, "ranks": self.grid.dp, "cost": self.model.cost, **multiples}

    @property
    def is_replica_writer(self) -> bool:
        """True on the one rank of each replica that writes the replica's results."""
        return self.grid.pp_rank == self.grid.pp - 1 and self.grid.tp_rank == 0

    def origin_hash(self) -> str:
        """SHA-256 of the initial weights and the compute dtype; equal on every rank and for every layout.

        All ranks must call it: each hashes its share of the files.
        """
        assert self.origin is not None, "this policy was built without weights"
        parts: list[dict[str, str]] = [{} for _ in range(self.world.size)]
        dist.all_gather_object(parts, self.origin.digests(self.world.rank, self.world.size))
        digests = {name: digest for part in parts for name, digest in part.items()}
        return hashlib.sha256(json.dumps([str(self.dtype), sorted(digests.items())]).encode()).hexdigest()

    def update(self, step: Step, loss: LossFunction, lr: float, temperature: float = 1.0, *, entropy: bool = False) -> dict[str, float]:
        """One optimizer step on (sum of totals) / (sum of counts) over all microbatches of all ranks. The loss receives log-probs at
        `temperature`, and with `entropy` also entropies, as `logprobs` returns them.

        Returns the loss function's metrics (each a global sum / global count) and `grad_norm` before clipping, equal on every rank.
        Raises FloatingPointError on all ranks, with weights and optimizer unchanged, if the gradient is not finite.
        """
        from engine.megatron import optimizers

        assert self.optim is not None, "this policy was built without an optimizer"
        optimizers.start_param_gather(self.stages[0])  # megatron's schedules do it only for virtual stages
        for stage in self.stages:
            stage.train()
            stage.zero_grad_buffer()
        self.optimizer.zero_grad()
        terms = loss.terms if isinstance(loss, TokenLoss) else None
        outputs = self._run(step, finish_for(loss), forward_only=False, temperature=temperature, entropy=entropy, terms=terms)
        metrics = self._reduced(outputs)
        grad_norm = optimizers.step(self.optimizer, self.optim, lr)
        if not math.isfinite(grad_norm):
            raise FloatingPointError(
                f"gradient norm is {grad_norm} (loss {metrics.get('loss')}); the step was not applied; lower optim.lr or inspect this batch"
            )
        return metrics | {"grad_norm": grad_norm}

    @torch.no_grad()
    def evaluate(self, step: Step, loss: LossFunction) -> dict[str, float]:
        """The loss function's metrics on `step`, forward only; equal on every rank."""
        for stage in self.stages:
            stage.eval()
        return self._reduced(self._run(step, partial(finish_loss, loss), forward_only=True))

    def logprobs(self, step: Step, temperature: float = 1.0, *, masked: bool = False, entropy: bool = False) -> list[Tensor]:
        """Log-prob of every target token of each microbatch, float32 [T] on the host, the same on every rank of a replica.

        masked: only of tokens with mask 1, which is cheaper; the others are 0.
        entropy: returns [2, T], with the entropy in nats of each position's distribution in the second row.
        Raises ValueError if the model has a scalar head.
        """
        self.expect_head("lm")
        return self._per_token(step, (2,) if entropy else (), every=not masked, temperature=temperature, entropy=entropy)

    def values(self, step: Step) -> list[Tensor]:
        """The scalar head's output at each token of each microbatch, otherwise as `logprobs`. value_T[t] depends on tokens_T[: t + 1], not
        on the target. Raises ValueError if the model has no scalar head."""
        self.expect_head("scalar")
        return self._per_token(step)

    def expect_head(self, head: Literal["lm", "scalar"]) -> None:
        """Raise ValueError if the head of this model is not `head`."""
        check_head(self.model, head, f"model {self.folder or 'init'}")

    @torch.no_grad()
    def _per_token(self, step: Step, rows: tuple[int, ...] = (), **how: Any) -> list[Tensor]:
        for stage in self.stages:
            stage.eval()
        outputs = self._run(step, finish_per_token, forward_only=True, **how)
        sizes = [len(packed.tokens_T) for packed in step]
        if not sizes:
            return []
        flat = (
            torch.cat([out["output"][..., :size] for out, size in zip(outputs, sizes, strict=True)], -1)
            if outputs
            else torch.empty(*rows, sum(sizes), device=self.world.device)
        )
        dist.broadcast(flat, src=self.grid.last_stage, group=self.grid.pp_group)
        return list(flat.cpu().split(sizes, -1))

    def generate(
        self,
        groups: Sequence[SequenceGroup],
        slots: int,
        positions: int,
        sampling: TokenSampling,
        prefix: Sequence[int] = (),
        *,
        graphs: CudaGraphs = "off",
    ) -> None:
        """Generate tokens for `groups` until each is finished. A group holds up to `slots` sequences of at most `positions` tokens, which
        all continue the tokens of `prefix`.

        graphs: whether to decode with CUDA graphs, which live as long as the KV caches: until this returns.
        All ranks of a replica call it with equal groups; replicas are independent. Raises ValueError for pp=2 with vpp>1 on GPUs.
        """
        from engine.megatron import decode
        from engine.megatron.tokens import TokenSender

        if self.world.on_gpu:
            check_generation(self.parallel)
        self._finish_param_gather()
        for stage in self.stages:
            stage.eval()
        layers, like = decode.layers_of(self.chunks), torch.empty(0, dtype=self.dtype, device=self.world.device)
        heads, size = self.model.kv_heads // self.grid.tp, self.model.head_dim
        slots += -slots % self.grid.tp  # padding rows have their own cache slots
        with closing(TokenSender(self.grid, in_thread=self.world.on_gpu)) as tokens:
            decoder = decode.PipelineDecoder(self.chunks, self.model, self.grid, sampling, self.world, tokens, self.graphs.enabled(graphs))
            shared = decode.KVCache(layers, 1, heads, len(prefix), size, like) if prefix else None
            if shared:
                decoder.run([decode.Prefill(list(prefix))], [shared])
            decoder.run(groups, [decode.KVCache(layers, slots, heads, positions, size, like, shared) for _ in groups])

    def kv_bytes(self, positions: int) -> int:
        """Bytes of the KV cache of one sequence of `positions` tokens on the pipeline rank with the most layers; equal on all ranks."""
        return self.model.kv_cache_bytes(self.parallel.most_layers(self.model), self.grid.tp, positions, self.dtype.itemsize)

    def weights_on_host(self) -> list[Tensor]:
        """A copy of this rank's weights in host memory, in the order of its parameters."""
        self._finish_param_gather()
        return [parameter.detach().to("cpu", copy=True) for chunk in self.chunks for parameter in chunk.parameters()]

    @contextmanager
    def swapped_weights(self, weights: list[Tensor]) -> Iterator[None]:
        """Use other weights, as returned by weights_on_host, until the context exits."""
        own = self.weights_on_host()
        self._fill(weights)
        try:
            yield
        finally:
            self._fill(own)

    def send_weights(self, broadcast: Callable[[Tensor], None], *, receives: bool) -> int:
        """Pass this rank's weights to `broadcast` in buckets, or receive them from it; returns the number of bytes. The peer must be the
        rank at the same tp and pp position of an equal grid. With an optimizer, all ranks of the policy must call it."""
        from engine.megatron import weight_sync

        self._finish_param_gather()
        parameters = [parameter for chunk in self.chunks for parameter in chunk.parameters()]
        return weight_sync.sync_same_grid(parameters, broadcast, receives=receives)

    def hf_weights(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """Name and full tensor of every Hugging Face tensor, on the first rank of each replica; see weight_sync.hf_weights."""
        from engine.megatron import weight_sync

        self._finish_param_gather()
        return weight_sync.hf_weights(self.chunks, self.model, dtype or self.dtype, self.grid)

    @torch.no_grad()
    def _fill(self, weights: list[Tensor]) -> None:
        parameters = [parameter for chunk in self.chunks for parameter in chunk.parameters()]
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.copy_(weight)

    def _run(self, step: Step, finish: Finish, *, forward_only: bool, **how: Any) -> list[dict[str, Any]]:
        """Run every microbatch through the pipeline; `how` are the arguments of _packed_forward. Returns what `finish` returned for each
        microbatch on the last stage, and an empty list on the others."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        # Interleaved stages exchange hidden states without exchanging shapes first, so all microbatches are padded to the longest.
        longest = max((len(packed.tokens_T) for packed in step), default=0)
        equal = [packed.padded(longest) for packed in step] if self.parallel.vpp > 1 else step
        packed_forwards = [self._packed_forward(packed, **how) for packed in equal]

        return get_forward_backward_func()(
            forward_step_func=partial(forward_step, finish),
            data_iterator=[iter(packed_forwards) for _ in self.stages],
            model=self.stages,
            num_microbatches=len(step),
            seq_length=longest,
            micro_batch_size=1,
            forward_only=forward_only,
        )

    def _packed_forward(
        self,
        packed: Packed,
        *,
        every: bool = False,
        temperature: float = 1.0,
        entropy: bool = False,
        terms: Callable[[Packed], TokenTerms] | None = None,
    ) -> tuple[Packed, Any]:
        from engine.megatron.attention import PackedForward

        rows_M = torch.arange(len(packed.tokens_T)) if every else packed.mask_T.nonzero()[:, 0]
        packed_forward = PackedForward.of(packed, rows_M, self.model, self.world.device, 1 / temperature, entropy)
        moved = packed.to(self.world.device)
        if terms is not None and self.chunks[-1].post_process:
            packed_forward.terms = terms(moved)
        return moved, packed_forward

    def _reduced(self, outputs: list[dict[str, Any]]) -> dict[str, float]:
        """Reduce each metric over the microbatches of all replicas (sum / count, correlation or maximum); returned on all stages."""
        reduced: dict[str, float] = {}
        if outputs:
            metrics: list[dict[str, tuple[Any, ...]]] = [out["metrics"] for out in outputs]
            names = sorted(metrics[0])
            rows = [[torch.as_tensor(x, dtype=torch.float64, device=self.world.device) for name in names for x in m[name]] for m in metrics]
            sums = torch.stack([torch.stack(row) for row in rows]).sum(0)
            dist.all_reduce(sums, group=self.grid.dp_group)
            remaining = iter(sums.tolist())
            reduced = {name: _metric_value(metrics[0][name], list(islice(remaining, len(metrics[0][name])))) for name in names}
            reduced |= self._largest([out["maxima"] for out in outputs])
        if self.parallel.pp > 1:
            box = [reduced]
            dist.broadcast_object_list(box, src=self.grid.last_stage, group=self.grid.pp_group)
            reduced = box[0]
        return reduced

    def _largest(self, maxima: list[dict[str, Tensor]]) -> dict[str, float]:
        names = sorted(maxima[0])
        if not names:
            return {}
        largest = torch.stack([torch.stack([metrics[name].double() for name in names]) for metrics in maxima]).amax(0)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.grid.dp_group)
        return dict(zip(names, largest.tolist(), strict=True))

    def save(
        self, out: Path, step: int, assets: Path | None = None, keep_last: int = 2, extra_files: Mapping[str, bytes] | None = None
    ) -> None:
        """Write the checkpoint `out/step-N` atomically; see checkpoint.save."""
        from engine.megatron import checkpoint

        self._finish_param_gather()
        state = checkpoint.State(self.chunks, self.optimizer)
        checkpoint.save(state, self.model, out, step, assets, keep_last, self.world, extra_files or {})

    def load_latest(self, out: Path, step: int | None = None) -> int:
        """Load the newest complete checkpoint under `out`, or that of `step`. Returns the step to continue with, 0 if there is none; see
        checkpoint.load_latest."""
        from engine.megatron import checkpoint

        return checkpoint.load_latest(checkpoint.State(self.chunks, self.optimizer), self.model, out, self.world, step)

    def export(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Write the weights into `folder` as the safetensors files of a Hugging Face model."""
        from engine.megatron import weights

        self._finish_param_gather()
        weights.export(self.chunks, self.model, folder, dtype or self.dtype, self.grid, self.world)

    def _finish_param_gather(self) -> None:
        if self.optimizer is not None:
            from engine.megatron import optimizers

            optimizers.finish_param_gather(self.stages)


class Learner(NamedTuple):
    """A policy that a run trains, and its loss. The run's own policy is called "policy"."""

    name: str
    policy: Policy
    loss: LossFunction
    temperature: float = 1.0  # of the log-probs
    entropy: bool = False  # whether the loss needs entropies too

    def grouped(self, metrics: dict[str, float]) -> dict[str, float]:
        """`metrics` under their groups: policy/loss for loss, if this learner is called policy. Names with a group keep theirs."""
        return {key if "/" in key else f"{self.name}/{key}": value for key, value in metrics.items()}


def locate_weights(model: Model, world: World) -> tuple[Path | None, ModelShape]:
    """The folder of the weights of `model`, downloaded if necessary (None: random weights), and their shape. All ranks must call it.
    Raises ValueError if there is no such model."""
    if model.init is not None:
        return None, model.init
    folder = world.rank0_first(lambda: resolve(model.path))
    return folder, read_shape(folder)


def compute_dtype(model: Model, world: World) -> torch.dtype:
    """The compute dtype of `model`: model.dtype if set, else float32 on CPUs and bfloat16 elsewhere."""
    if model.dtype == "auto":
        return torch.float32 if world.backend == "cpu" else torch.bfloat16
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[model.dtype]


def _metric_value(kind: tuple[Any, ...], sums: list[float]) -> float:
    if isinstance(kind, Moments):
        return Moments(*sums).correlation()
    total, count = sums
    return total / count if count else 0.0
