"""Measure this machine's speed for the dry run. All ranks measure at the same time, so contention between them is included.

Measured: matrix products by shape, attention, memory bandwidth, communication between ranks, and complete layers of this engine, forward
and backward. A layer's time beyond its matrix products and attention gives the cost of all other kernels and of kernel launches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
import torch.nn.functional as F

from engine.batching.build import batch
from engine.config import Model, ModelShape, Optim, Parallel
from engine.distributed.world import World
from engine.dryrun.clock import CostModel
from engine.dryrun.hardware import Gemm, Hardware, Link
from engine.dryrun.meter import Meter
from engine.dryrun.types import Matmul, Work
from engine.megatron.decode import DecodeBatch, DecodeRunner, KVCache, TokenSampling, layers_of
from engine.megatron.onednn import use_onednn
from engine.megatron.policy import Policy
from engine.megatron.single_stage import SingleStage
from engine.types import Sample

REPEATS = 7
KNOWN = ("H100", "H200", "B200", "A100")  # devices in hardware.toml


@dataclass(frozen=True)
class Sizes:
    """Problem sizes to measure: small on CPUs; on GPUs large enough that a kernel takes longer than its launch."""

    products: tuple[Matmul, ...]
    attention: tuple[int, int, int]  # heads, sequence length, head size
    copied: int  # bytes
    messages: tuple[int, int]  # bytes of the short and of the long message
    layers: tuple[tuple[ModelShape, int], ...]  # (model, tokens in the microbatch)


def _llama(layers: int, hidden: int, heads: int) -> ModelShape:
    return ModelShape(layers=layers, hidden=hidden, ffn=3 * hidden, heads=heads, kv_heads=heads // 2, vocab=512)


ON_CPU = Sizes(
    products=tuple(Matmul(m, k, n) for m in (32, 128, 512) for k, n in ((64, 256), (256, 64), (256, 768), (768, 256))),
    attention=(8, 128, 32),
    copied=1 << 25,
    messages=(1 << 10, 1 << 20),
    layers=tuple((_llama(2, hidden, 8), tokens) for hidden in (64, 256) for tokens in (64, 256)),
)
ON_GPU = Sizes(
    products=tuple(Matmul(m, k, n) for m in (1024, 4096, 8192) for k, n in ((4096, 6144), (4096, 28672), (14336, 4096), (16384, 13312))),
    attention=(32, 4096, 128),
    copied=1 << 30,
    messages=(1 << 12, 1 << 28),
    layers=tuple((_llama(2, hidden, 16), tokens) for hidden in (128, 2048, 4096) for tokens in (512, 4096)),
)


def calibrate(world: World, sizes: Sizes | None = None) -> Hardware:
    """Measure the machine of `world` and return it as Hardware.

    sizes   problem sizes; default: ON_GPU or ON_CPU

    Numbers that cannot be measured come from hardware.toml if the device is listed there: peak FLOP/s, power, and with one rank the links.

    Collective: all ranks must call it, and none may have a Policy open. Takes a few seconds.
    """
    sizes, known = sizes or (ON_GPU if world.on_gpu else ON_CPU), _before(world)
    with nullcontext() if world.on_gpu else use_onednn():
        measured = _products(world, sizes, known)
        copied = _copying(world, sizes)
        memory = {"streaming": copied / known.bandwidth} if world.on_gpu else {"bandwidth": copied}
        measured = replace(measured, attention=_attention(world, sizes) / measured.peak, **memory)
    measured = replace(measured, inside=_link(world, sizes) or known.inside)
    measured = replace(measured, across=known.across if world.on_gpu else measured.inside, decode_layer=_decode_layer(world))
    return _kernels(world, sizes, measured)


def save(hardware: Hardware, path: Path) -> None:
    """Write `hardware` as a file that Hardware.load reads; comments in it say which numbers were measured."""
    measured = {"attention", "bandwidth", "streaming", "launch", "dispatch", "decode_layer"} | {f"gemm.{f.name}" for f in fields(Gemm)}
    measured |= {f"inside.{f.name}" for f in fields(Link)}
    hardware.save(path, dict.fromkeys(measured, "measured") | {"overlap": "assumed", "watts": "not measured; 0: not known"})


def _before(world: World) -> Hardware:
    """Hardware before any measurement: from hardware.toml on a GPU, placeholders on a CPU."""
    if world.on_gpu:
        device = torch.get_device_module(world.device)
        name = next((name for name in KNOWN if name in device.get_device_name()), KNOWN[0])
        known = Hardware.load(name.lower())
        return replace(known, name="measured", memory=float(device.get_device_properties(world.device).total_memory))
    default = Link(1e9, 1e-4, 0.0, 1e-4)  # used if there is one rank, so links cannot be measured
    process, machine = psutil.Process().memory_info().rss, psutil.virtual_memory().total
    return Hardware(
        name="measured",
        peak=1.0,
        width=4,
        bandwidth=1e10,
        streaming=1.0,
        memory=machine / world.size,
        allowance=float(process),
        attention=1.0,
        launch=0.0,
        dispatch=0.0,
        decode_layer=0.0,
        overlap=0.0,  # gloo's threads need the cores that compute
        node=world.size,
        watts=0.0,
        gemm=Gemm(1.0, 0.0, 0.0),
        inside=default,
        across=default,
    )


def seconds(world: World, work: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Return the median time of `work` in seconds over `repeats` calls, averaged over ranks, which all run it at the same time."""
    device = torch.get_device_module(world.device)
    times = []
    for _ in range(2 + repeats):
        device.synchronize()
        dist.barrier()
        began = time.perf_counter()
        work()
        device.synchronize()
        times.append(time.perf_counter() - began)
    return _averaged(world, median(times[2:]))


def _averaged(world: World, value: float) -> float:
    total = torch.tensor([value], dtype=torch.float64, device=world.device)
    dist.all_reduce(total)
    return float(total) / world.size


def _many(work: Callable[[], Any], once: int) -> Callable[[], None]:
    """`work`, called `once` times, so that clock resolution and the end of the barrier do not distort the time."""

    def repeated() -> None:
        for _ in range(once):
            work()

    return repeated


def _products(world: World, sizes: Sizes, before: Hardware) -> Hardware:
    """Measure the efficiency of matrix products by shape, and on CPUs the peak, which is the best rate measured."""
    dtype = torch.bfloat16 if world.on_gpu else torch.float32
    rates = []
    for shape in sizes.products:
        a, b = (torch.randn(size, dtype=dtype, device=world.device) for size in ((shape.m, shape.k), (shape.k, shape.n)))
        once = max(1, int(1e8 // (shape.m * shape.k * shape.n))) if not world.on_gpu else 8
        rates.append(2 * shape.m * shape.k * shape.n * once / seconds(world, _many(lambda a=a, b=b: torch.mm(a, b), once)))
    peak = before.peak if world.on_gpu else max(rates)
    return replace(before, peak=peak, gemm=fit_gemm(sizes.products, [rate / peak for rate in rates]))


def fit_gemm(shapes: Sequence[Matmul], efficiencies: Sequence[float]) -> Gemm:
    """Fit ceiling, wave and fill of hardware.toml's formula to measured shares of peak: least squares of logarithms, over a grid."""
    measured, best = np.log(efficiencies), (np.inf, Gemm(1.0, 0.0, 0.0))
    outputs, depths = np.array([s.m * s.n for s in shapes]), np.array([s.k for s in shapes])
    for wave in (0.0, *np.geomspace(1e2, 1e7, 41)):
        for fill in (0.0, *np.geomspace(4, 4096, 31)):
            shaped = -np.log1p(wave / outputs) - np.log1p(fill / depths)
            ceiling = np.mean(measured - shaped)
            error = float(np.square(measured - shaped - ceiling).sum())
            if error < best[0]:
                best = error, Gemm(float(np.exp(ceiling)), float(wave), float(fill))
    return best[1]


def _attention(world: World, sizes: Sizes) -> float:
    """FLOP/s of causal attention, forward and backward. FLOPs per pair of positions, head and head dimension: 4 forward, 10 backward."""
    heads, length, size = sizes.attention
    dtype = torch.bfloat16 if world.on_gpu else torch.float32
    query, key, value = (torch.randn(1, heads, length, size, dtype=dtype, device=world.device, requires_grad=True) for _ in range(3))

    def both() -> None:
        F.scaled_dot_product_attention(query, key, value, is_causal=True).sum().backward()

    return 14 * heads * size * length * (length + 1) / 2 / seconds(world, both)


def _copying(world: World, sizes: Sizes) -> float:
    """Bytes/s of a copy, bytes read and bytes written both counted."""
    source = torch.zeros(sizes.copied, dtype=torch.uint8, device=world.device)
    target = torch.empty_like(source)
    return 2 * sizes.copied / seconds(world, lambda: target.copy_(source))


def _link(world: World, sizes: Sizes) -> Link | None:
    """Measure collectives of a short and a long message among all ranks and between two, and a message to the next rank. None for one
    rank."""
    if world.size == 1:
        return None
    short, long = sizes.messages
    quick, slow = (_gathering(world, size, None, world.size) for size in (short, long))
    n = world.size
    bandwidth = (n - 1) / n * (long - short) / max(slow - quick, 1e-9)
    start = max(0.0, quick - (n - 1) / n * short / bandwidth)
    step = 0.0
    if n > 2 and n % 2 == 0:
        pair: Any = dist.new_subgroups(2)[0]
        two = max(0.0, _gathering(world, short, pair, 2) - short / 2 / bandwidth)
        step = max(0.0, (start - two) / (n - 2))
        dist.destroy_process_group(pair)
    return Link(bandwidth, max(0.0, start - (n - 1) * step), step, _sending(world, short))


def _gathering(world: World, size: int, group: dist.ProcessGroup | None, ranks: int) -> float:
    """Mean seconds of an all_gather and a reduce_scatter of `size` bytes (of the full tensor)."""
    full = torch.zeros(size // 4 // ranks * ranks, device=world.device)
    shard = torch.zeros(len(full) // ranks, device=world.device)

    def both() -> None:
        dist.all_gather_into_tensor(full, shard, group=group)
        dist.reduce_scatter_tensor(shard, full, group=group)

    return seconds(world, both) / 2


def _sending(world: World, size: int) -> float:
    """Seconds for a message of `size` bytes to reach the next rank: the time around the ring, divided by the number of ranks."""
    message = torch.zeros(size // 4, device=world.device)

    def around() -> None:
        if world.rank:
            dist.recv(message, world.rank - 1)
        dist.send(message, (world.rank + 1) % world.size)
        if not world.rank:
            dist.recv(message, world.size - 1)

    return seconds(world, around) / world.size


def _kernels(world: World, sizes: Sizes, known: Hardware) -> Hardware:
    """Fit seconds per byte and per launch of this engine's kernels to the times of layers of several sizes.

    On CPUs both are fitted together. On GPUs only `dispatch` is fitted, from kernels so short that the host limits them; the time per byte
    is that of a copy.
    """
    timed = [_layers(world, model, tokens) for model, tokens in sizes.layers]
    if world.on_gpu:
        return replace(known, dispatch=min(elapsed / work.kernels for work, elapsed in timed))
    clock = CostModel(replace(known, streaming=np.inf), Parallel(), 1)
    residuals = [elapsed - clock.seconds(work) for work, elapsed in timed]
    per_byte, launch = fit_kernels([work for work, _ in timed], residuals, [elapsed for _, elapsed in timed])
    return replace(known, launch=launch, streaming=1 / max(per_byte * known.bandwidth, 1e-3))


def _decode_layer(world: World) -> float:
    """Host seconds to launch one decoding layer kernel by kernel: the difference of two models so small that the device waits for the
    host."""
    shallow, deep = (_wave_seconds(world, _llama(layers, 64, 8)) for layers in (2, 6))
    return max(0.0, deep - shallow) / 4


def _wave_seconds(world: World, model: ModelShape) -> float:
    """Seconds of one decoding step of 8 sequences, each at its tenth position."""
    rows = 8
    wave = DecodeBatch([1] * rows, [9] * rows, rows, 10, [], [], list(range(rows)), np.zeros((rows, 2), np.int32))
    with torch.no_grad(), closing(Policy(Model(init=model), None, Parallel(), world)) as policy:
        policy.chunks[0].eval()
        like = torch.empty(0, dtype=policy.dtype, device=world.device)
        cache = KVCache(layers_of(policy.chunks), rows, model.kv_heads, 16, model.head_dim, like)
        decoder = DecodeRunner(policy.chunks, cache, TokenSampling(), model, 1, world, None)
        return seconds(world, _many(lambda: decoder.step(wave).forward(0), 4)) / 4


def fit_kernels(works: Sequence[Work], residuals: Sequence[float], times: Sequence[float]) -> tuple[float, float]:
    """Fit (seconds per byte, seconds per kernel), both at least 0, to `residuals` in seconds: least squares, weighted by 1 / `times`."""
    columns = np.array([[work.traffic, work.kernels] for work in works]) / np.array(times)[:, None]
    target = np.array(residuals) / np.array(times)
    both = np.linalg.lstsq(columns, target, rcond=None)[0]
    if (both >= 0).all():
        return float(both[0]), float(both[1])
    alone = [max(0.0, float(column @ target / (column @ column))) for column in columns.T]
    errors = [np.square(columns[:, i] * alone[i] - target).sum() for i in (0, 1)]
    return (alone[0], 0.0) if errors[0] < errors[1] else (0.0, alone[1])


def _layers(world: World, model: ModelShape, tokens: int) -> tuple[Work, float]:
    """The Work and the seconds of a forward and backward of `model` on one microbatch of one sequence."""
    sample = Sample(np.zeros(tokens + 1, np.int32), np.ones(tokens, np.uint8))
    with closing(Policy(Model(init=model), Optim(lr=1e-5), Parallel(), world)) as policy:
        single = SingleStage(policy, 0, batch([sample], tokens)[0])

        def both() -> None:
            single.forward()
            single.backward()

        elapsed = seconds(world, both)
        with Meter(world.device, {}) as meter:
            both()
        return meter.taken(), elapsed
