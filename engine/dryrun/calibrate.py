"""Measure the machine that this runs on, all ranks at once, so that what they take from each other is in it.

Products by shape, attention, memory, messages between ranks; and whole layers of this engine, forward and backward, whose time beyond
their products and attention says what its other kernels and their launches cost here.
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
KNOWN = ("H100", "H200", "B200", "A100")  # whose data sheets hardware.toml has


@dataclass(frozen=True)
class Sizes:
    """What is measured: small on CPUs, large enough on GPUs that a kernel takes longer than its launch."""

    products: tuple[Matmul, ...]
    attention: tuple[int, int, int]  # heads, length, size
    copied: int  # bytes
    messages: tuple[int, int]  # bytes
    layers: tuple[tuple[ModelShape, int], ...]  # a model and a microbatch's tokens


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
    """The machine as `world` finds it, by measuring at `sizes` (default: what suits it). What cannot be measured here is as hardware.toml
    says of the device, where it knows it: its peak rates and power; links between ranks, when there is one rank.

    All ranks must call it, without a policy open. Takes some seconds.
    """
    sizes, before = sizes or (ON_GPU if world.on_gpu else ON_CPU), _before(world)
    with nullcontext() if world.on_gpu else use_onednn():
        found = _products(world, sizes, before)
        copied = _copying(world, sizes)
        memory = {"streaming": copied / before.bandwidth} if world.on_gpu else {"bandwidth": copied}
        found = replace(found, attention=_attention(world, sizes) / found.peak, **memory)
    found = replace(found, inside=_link(world, sizes) or before.inside)
    found = replace(found, across=before.across if world.on_gpu else found.inside, decode_layer=_decode_layer(world))
    return _kernels(world, sizes, found)


def save(hardware: Hardware, path: Path) -> None:
    """Write it as a file that Hardware.load reads, saying which numbers were measured."""
    measured = {"attention", "bandwidth", "streaming", "launch", "dispatch", "decode_layer"} | {f"gemm.{f.name}" for f in fields(Gemm)}
    measured |= {f"inside.{f.name}" for f in fields(Link)}
    hardware.save(path, dict.fromkeys(measured, "measured") | {"overlap": "assumed", "watts": "not measured; 0: not known"})


def _before(world: World) -> Hardware:
    """What is known before anything is measured."""
    if world.on_gpu:
        device = torch.get_device_module(world.device)
        name = next((name for name in KNOWN if name in device.get_device_name()), KNOWN[0])
        known = Hardware.load(name.lower())
        return replace(known, name="measured", memory=float(device.get_device_properties(world.device).total_memory))
    here = Link(1e9, 1e-4, 0.0, 1e-4)  # where a rank alone cannot tell
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
        inside=here,
        across=here,
    )


def seconds(world: World, work: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Of `work`, the median of some, averaged over ranks that all do it at once."""
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
    """`work` so often that it is told from the clock's own grain and a barrier's tail."""

    def repeated() -> None:
        for _ in range(once):
            work()

    return repeated


def _products(world: World, sizes: Sizes, before: Hardware) -> Hardware:
    """Peak (on CPUs: the best rate there was) and efficiency by shape."""
    dtype = torch.bfloat16 if world.on_gpu else torch.float32
    rates = []
    for shape in sizes.products:
        a, b = (torch.randn(size, dtype=dtype, device=world.device) for size in ((shape.m, shape.k), (shape.k, shape.n)))
        once = max(1, int(1e8 // (shape.m * shape.k * shape.n))) if not world.on_gpu else 8
        rates.append(2 * shape.m * shape.k * shape.n * once / seconds(world, _many(lambda a=a, b=b: torch.mm(a, b), once)))
    peak = before.peak if world.on_gpu else max(rates)
    return replace(before, peak=peak, gemm=fit_gemm(sizes.products, [rate / peak for rate in rates]))


def fit_gemm(shapes: Sequence[Matmul], efficiencies: Sequence[float]) -> Gemm:
    """The ceiling, wave and fill of hardware.toml's formula that are least far from what was measured, by squares of logarithms."""
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
    """FLOP/s of causal attention, forward and backward: 4 and 10 a pair, head and number."""
    heads, length, size = sizes.attention
    dtype = torch.bfloat16 if world.on_gpu else torch.float32
    query, key, value = (torch.randn(1, heads, length, size, dtype=dtype, device=world.device, requires_grad=True) for _ in range(3))

    def both() -> None:
        F.scaled_dot_product_attention(query, key, value, is_causal=True).sum().backward()

    return 14 * heads * size * length * (length + 1) / 2 / seconds(world, both)


def _copying(world: World, sizes: Sizes) -> float:
    """Bytes/s read and written."""
    source = torch.zeros(sizes.copied, dtype=torch.uint8, device=world.device)
    target = torch.empty_like(source)
    return 2 * sizes.copied / seconds(world, lambda: target.copy_(source))


def _link(world: World, sizes: Sizes) -> Link | None:
    """From gathers and scatters among all ranks and between two, of a short and of a long message; and from one rank to the next."""
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
    """Seconds of an all_gather or reduce_scatter of `size` bytes in whole, the mean of the two."""
    whole = torch.zeros(size // 4 // ranks * ranks, device=world.device)
    part = torch.zeros(len(whole) // ranks, device=world.device)

    def both() -> None:
        dist.all_gather_into_tensor(whole, part, group=group)
        dist.reduce_scatter_tensor(part, whole, group=group)

    return seconds(world, both) / 2


def _sending(world: World, size: int) -> float:
    """Seconds until a message of `size` bytes has come to the next rank: round the ring, by the ranks it passes."""
    message = torch.zeros(size // 4, device=world.device)

    def around() -> None:
        if world.rank:
            dist.recv(message, world.rank - 1)
        dist.send(message, (world.rank + 1) % world.size)
        if not world.rank:
            dist.recv(message, world.size - 1)

    return seconds(world, around) / world.size


def _kernels(world: World, sizes: Sizes, known: Hardware) -> Hardware:
    """Seconds a byte and a launch of this engine's kernels, from layers of several sizes: on CPUs both at once. On GPUs the launch of
    short kernels is the host's, and a byte is that of a copy."""
    found = [_layers(world, model, tokens) for model, tokens in sizes.layers]
    if world.on_gpu:
        return replace(known, dispatch=min(taken / work.kernels for work, taken in found))
    clock = CostModel(replace(known, streaming=np.inf), Parallel(), 1)
    rests = [taken - clock.seconds(work) for work, taken in found]
    per_byte, launch = fit_kernels([work for work, _ in found], rests, [taken for _, taken in found])
    return replace(known, launch=launch, streaming=1 / max(per_byte * known.bandwidth, 1e-3))


def _decode_layer(world: World) -> float:
    """Seconds of the host for a layer of a decoding wave, launched kernel by kernel: between models so small that a device waits for it."""
    shallow, deep = (_wave_seconds(world, _llama(layers, 64, 8)) for layers in (2, 6))
    return max(0.0, deep - shallow) / 4


def _wave_seconds(world: World, model: ModelShape) -> float:
    """Of a wave of 8 rows, at the tenth position of each."""
    rows = 8
    wave = DecodeBatch([1] * rows, [9] * rows, rows, 10, [], [], list(range(rows)), np.zeros((rows, 2), np.int32))
    with torch.no_grad(), closing(Policy(Model(init=model), None, Parallel(), world)) as policy:
        policy.chunks[0].eval()
        like = torch.empty(0, dtype=policy.dtype, device=world.device)
        cache = KVCache(layers_of(policy.chunks), rows, model.kv_heads, 16, model.head_dim, like)
        decoder = DecodeRunner(policy.chunks, cache, TokenSampling(), model, 1, world, None)
        return seconds(world, _many(lambda: decoder.step(wave).forward(0), 4)) / 4


def fit_kernels(works: Sequence[Work], rests: Sequence[float], times: Sequence[float]) -> tuple[float, float]:
    """Seconds a byte and a kernel, neither below 0, that explain `rests`, off by the least share of `times` (by squares)."""
    columns = np.array([[work.traffic, work.kernels] for work in works]) / np.array(times)[:, None]
    wanted = np.array(rests) / np.array(times)
    both = np.linalg.lstsq(columns, wanted, rcond=None)[0]
    if (both >= 0).all():
        return float(both[0]), float(both[1])
    alone = [max(0.0, float(column @ wanted / (column @ column))) for column in columns.T]
    errors = [np.square(columns[:, i] * alone[i] - wanted).sum() for i in (0, 1)]
    return (alone[0], 0.0) if errors[0] < errors[1] else (0.0, alone[1])


def _layers(world: World, model: ModelShape, tokens: int) -> tuple[Work, float]:
    """What `model` does with one microbatch of one sequence, forward and backward, and the seconds it takes."""
    sample = Sample(np.zeros(tokens + 1, np.int32), np.ones(tokens, np.uint8))
    with closing(Policy(Model(init=model), Optim(lr=1e-5), Parallel(), world)) as policy:
        single = SingleStage(policy, 0, batch([sample], tokens)[0])

        def both() -> None:
            single.forward()
            single.backward()

        taken = seconds(world, both)
        with Meter(world.device, {}) as meter:
            both()
        return meter.taken(), taken
