"""Jobs that tests run on ranks: job(world, ...) -> plain values. Every rank runs the job."""

from __future__ import annotations

import ctypes
import gc
import io
import resource
from contextlib import ExitStack, closing, redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor

from engine import losses
from engine.batching.build import batch, scatter
from engine.config import Model, ModelShape, Optim, Parallel
from engine.data.pairs import Pair, grouped
from engine.data.template import TULU
from engine.distributed.world import World
from engine.losses import SFT_LOSS, nll, reward_bt
from engine.types import Loss, LossFunction, Packed, Sample, Step, TokenLoss, TokenTerms
from tests.support.allocator import allocated

TINY = ModelShape(layers=4, hidden=64, ffn=128, heads=8, kv_heads=4, vocab=250)  # padded to 256 in every layout
OPTIM = Optim(lr=1e-3, weight_decay=0.1)


def samples(seed: int, count: int = 16, longest: int = 24, vocab: int = 250) -> list[Sample]:
    """Random sequences of different lengths with random masks, determined by the arguments."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, longest + 1, count)
    return [Sample(draw.integers(0, vocab, n + 1, dtype=np.int32), (draw.random(n) < 0.7).astype(np.uint8)) for n in lengths]


def pairs_with_reference(seed: int, count: int = 8) -> list[Pair]:
    """Random pairs with common prompts and random reference log-probs, determined by the arguments."""
    draw = np.random.default_rng(seed)

    def half(prompt: np.ndarray) -> Sample:
        answer = draw.integers(0, 250, draw.integers(1, 13), dtype=np.int32)
        mask = np.repeat(np.array([0, 1], np.uint8), [len(prompt) - 1, len(answer)])
        return Sample(np.concatenate([prompt, answer]), mask, ref_logprob=draw.normal(-5.5, 0.3, len(mask)).astype(np.float32))

    prompts = [draw.integers(0, 250, draw.integers(1, 13), dtype=np.int32) for _ in range(count)]
    return [(half(prompt), half(prompt)) for prompt in prompts]


DPO_LOSSES = (
    partial(losses.dpo, beta=5.0, label_smoothing=0.1, nll_weight=0.2),
    partial(losses.dpo, beta=0.1, normalize=False),
)


def dpo_steps(world: World, parallel: Parallel, model: Model, *, budget: int = 64, order: int = 0) -> list[dict[str, float]]:
    """Metrics of two steps with each of DPO_LOSSES, and of held-out pairs afterwards."""
    from engine.megatron.policy import Policy

    with closing(Policy(model, OPTIM, parallel, world)) as policy:
        results = []
        for step in range(4):
            shuffled = np.random.default_rng(order).permutation(8) if order else range(8)
            batch_ = pairs_with_reference(step)
            samples_ = grouped([batch_[i] for i in shuffled])
            results.append(policy.update(batch(samples_, budget, **policy.batch_options), DPO_LOSSES[step // 2], OPTIM.lr_at(step, 10)))
        return [*results, policy.evaluate(batch(grouped(pairs_with_reference(99)), budget, **policy.batch_options), DPO_LOSSES[0])]


def keep_reference(
    world: World,
    parallel: Parallel,
    root: Path,
    folder: Path,
    *,
    die_after: int = 0,
    chat_template: str = "",
    max_length: int = 256,
    other_data: bool = False,
) -> tuple[int, list[float], str]:
    """Compute the log-probs of root/train.jsonl and root/held_out.jsonl (other_data: only the former) with root/model and save them in
    `folder`, in blocks of one microbatch per replica, optionally failing after some. Returns the number of computed blocks, all values, and
    the error if there was one."""
    from engine.data.pairs import prepare_pairs
    from engine.data.rows import Source
    from engine.data.template import ChatTemplate
    from engine.data.tokenizer import load_tokenizer
    from engine.megatron.policy import Policy
    from engine.rollout import scoring

    blocks = 0

    def say(_: str) -> None:
        nonlocal blocks
        blocks += 1
        if blocks == die_after:
            raise ValueError("killed here")

    chat = ChatTemplate(load_tokenizer("bytes"), "{{ '' }}" + TULU if chat_template else None)
    sources = [Source(str(root / f"{name}.jsonl")) for name in ("train", "held_out")[: 1 if other_data else 2]]
    corpora = [world.rank0_first(lambda s=s: prepare_pairs(s, chat, max_length=max_length, cache=root / "cache")).corpus for s in sources]
    with (
        closing(Policy(Model(str(root / "model")), None, parallel, world)) as policy,
        mock.patch.object(scoring, "MICROBATCHES_PER_BLOCK", 1),
    ):
        try:
            values = scoring.cached_logprobs(folder, policy, corpora, 300, say)
        except ValueError as error:
            return blocks, [], str(error)
    return blocks, [float(x) for part in values for x in part], ""


def _cut(policy: Any, batch_: list[Sample], budget: int, alone: bool) -> Step:
    """This rank's microbatches: packed to `budget`, or one sequence each."""
    if not alone:
        return batch(batch_, budget, **policy.batch_options)
    cut = policy.batch_options | {"rank": 0, "ranks": 1, "microbatch_multiple": 1}
    mine = batch_[policy.grid.dp_rank :: policy.grid.dp]
    return [packed for sample in mine for packed in batch([sample], budget, **cut)]


def sft_steps(
    world: World, parallel: Parallel, model: Model, *, steps: int = 3, budget: int = 64, alone: bool = False, order: int = 0
) -> list[dict[str, float]]:
    """Metrics of `steps` optimizer steps, and the held-out loss afterwards."""
    from engine.megatron.policy import Policy

    with closing(Policy(model, OPTIM, parallel, world)) as policy:
        results = []
        for step in range(steps):
            shuffled = np.random.default_rng(order).permutation(16) if order else range(16)
            batch_ = samples(step)
            results.append(policy.update(_cut(policy, [batch_[i] for i in shuffled], budget, alone), SFT_LOSS, OPTIM.lr_at(step, 10)))
        held_out = batch(samples(99), budget, **policy.batch_options)
        return [*results, policy.evaluate(held_out, SFT_LOSS)]


def reward_steps(
    world: World, parallel: Parallel, model: Model, *, steps: int = 3, budget: int = 64, order: int = 0
) -> list[dict[str, float]]:
    """Metrics of `steps` steps on pairs, and of held-out pairs afterwards."""
    from engine.megatron.policy import Policy

    with closing(Policy(model, OPTIM, parallel, world)) as policy:
        results = []
        for step in range(steps):
            batch_ = pairs_with_reference(step)
            shuffled = np.random.default_rng(order).permutation(8) if order else range(8)
            halves = grouped([batch_[i] for i in shuffled])
            # A tenth of the usual learning rate: AdamW divides by moments that are nearly 0, and a loss per sequence has a larger variance.
            results.append(policy.update(batch(halves, budget, **policy.batch_options), reward_bt, OPTIM.lr_at(step, 10) / 10))
        return [*results, policy.evaluate(batch(grouped(pairs_with_reference(99)), budget, **policy.batch_options), reward_bt)]


def critic_steps(world: World, parallel: Parallel, model: Model) -> list[dict[str, float]]:
    """Metrics of three steps that fit the values of all tokens with mask 1 to 1."""
    from engine.megatron.policy import Policy

    def squares(value_T: Tensor, packed: Packed) -> Loss:
        total, count = (0.5 * (value_T - 1) ** 2 * packed.mask_T).sum(), int(packed.mask_T.sum())
        return Loss(total, count, {"loss": (total.detach(), count)})

    with closing(Policy(model, OPTIM, parallel, world)) as policy:
        return [policy.update(batch(samples(step), 64, **policy.batch_options), squares, OPTIM.lr / 10) for step in range(3)]


def _lesson(policy: Any, step: int) -> tuple[list[Sample], LossFunction]:
    return (grouped(pairs_with_reference(step)), reward_bt) if policy.model.head == "scalar" else (samples(step), SFT_LOSS)


def logprobs(world: World, parallel: Parallel, model: Model, *, budget: int = 64, **options: Any) -> dict[int, list[Any]]:
    """The log-probs, or values, of samples(7) computed by this rank's replica."""
    from engine.megatron.policy import Policy

    with closing(Policy(model, None, parallel, world)) as policy:
        batch_ = samples(7)
        step = batch(batch_, budget, **policy.batch_options)
        per_token = policy.values(step) if policy.model.head == "scalar" else policy.logprobs(step, **options)
        values = scatter(per_token, step, len(batch_))
        return {i: v.tolist() for i, v in enumerate(values) if v is not None}


def train_and_save(
    world: World, parallel: Parallel, model: Model, out: Path, *, first: int, last: int, save_at: int = 0
) -> list[dict[str, float]]:
    """Train from the newest checkpoint in `out`, or from the start, to step `last`; save after `save_at` steps. Returns the metrics of the
    steps from `first` on."""
    from engine.megatron.policy import Policy

    with closing(Policy(model, OPTIM, parallel, world)) as policy:
        start = policy.load_latest(out)
        assert start == first, (start, first)
        results = []
        for step in range(start, last):
            batch_, loss = _lesson(policy, step)
            results.append(policy.update(batch(batch_, 64, **policy.batch_options), loss, OPTIM.lr_at(step, 10)))
            if step + 1 == save_at:
                policy.save(out, save_at)
        return results


def load(world: World, parallel: Parallel, model: Model, out: Path) -> int:
    """The step that load_latest finds."""
    from engine.megatron.policy import Policy

    with closing(Policy(model, OPTIM, parallel, world)) as policy:
        return policy.load_latest(out)


def hf_weights(world: World, parallel: Parallel, model: Model) -> dict[str, bytes]:
    """The bytes of every Hugging Face tensor that this rank receives, sent in small buckets."""
    from engine.megatron import weight_sync
    from engine.megatron.policy import Policy

    with mock.patch.object(weight_sync, "BUCKET_BYTES", 1 << 12), closing(Policy(model, None, parallel, world)) as policy:
        return {name: tensor.numpy().tobytes() for name, tensor in policy.hf_weights()}


def export(world: World, parallel: Parallel, model: Model, folder: Path, *, steps: int = 0) -> None:
    """Export the weights of `model`, after `steps` steps, to `folder`."""
    from engine.megatron.policy import Policy

    with closing(Policy(model, OPTIM if steps else None, parallel, world)) as policy:
        for step in range(steps):
            batch_, loss = _lesson(policy, step)
            policy.update(batch(batch_, 64, **policy.batch_options), loss, OPTIM.lr)
        policy.export(folder)


def command(world: World, words: list[str], largest_file: int = 0) -> tuple[int, str, str]:
    """Runs `python -m engine words...` in this world: exit code, stdout, stderr. largest_file: limit of file sizes in bytes; 0: none."""
    from engine.__main__ import main

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    message, complained = io.StringIO(), io.StringIO()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(World, "start", return_value=world))
        stack.enter_context(mock.patch.object(World, "close", return_value=None))
        stack.enter_context(redirect_stdout(message))
        stack.enter_context(redirect_stderr(complained))
        stack.callback(resource.setrlimit, resource.RLIMIT_FSIZE, limit)
        if largest_file:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, limit[1]))
        return main(words), message.getvalue(), complained.getvalue()


def bad_step(world: World, parallel: Parallel, model: Model, by_layer: bool) -> tuple[str, dict[str, float], dict[str, float]]:
    """The error of a step with a NaN in one sequence's loss, computed by the output layer or by autograd; the metrics of the next step; and
    the metrics of that step without the bad one before."""
    from engine.megatron.policy import Policy

    def spoiled(logprob_T: Tensor, packed: Packed) -> Loss:
        found = nll(logprob_T, packed)
        return replace(found, total=found.total * float("nan")) if 3 in packed.index_S else found

    def spoiled_terms(packed: Packed) -> TokenTerms:
        return TokenTerms(packed.mask_T * (float("nan") if 3 in packed.index_S else 1.0))

    bad = TokenLoss(spoiled, spoiled_terms) if by_layer else spoiled

    results = []
    complaint = ""
    for spoil in (True, False):
        with closing(Policy(model, OPTIM, parallel, world)) as policy:
            policy.update(batch(samples(0), 64, **policy.batch_options), SFT_LOSS, OPTIM.lr)
            if spoil:
                try:
                    policy.update(batch(samples(1), 64, **policy.batch_options), bad, OPTIM.lr)
                except FloatingPointError as error:
                    complaint = str(error)
            results.append(policy.update(batch(samples(2), 64, **policy.batch_options), SFT_LOSS, OPTIM.lr))
    return complaint, results[0], results[1]


def gather_started_early(world: World, parallel: Parallel, model: Model) -> list[bool]:
    """For each wait for gathered weights in the forward of a second step: whether gathering had been started before."""
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup as Group

    from engine.megatron.policy import Policy

    asked: list[bool] = []
    finish = Group.finish_param_sync

    def watched(self: Any, *arguments: Any, **options: Any) -> None:
        asked.append(self.param_gather_dispatched)
        finish(self, *arguments, **options)

    with closing(Policy(model, OPTIM, parallel, world)) as policy:
        policy.update(batch(samples(0), 64, **policy.batch_options), SFT_LOSS, OPTIM.lr)
        with mock.patch.object(Group, "finish_param_sync", watched):
            policy.update(batch(samples(1), 64, **policy.batch_options), SFT_LOSS, OPTIM.lr)
    return asked


def _resident(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    return next(int(line.split()[1]) << 10 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))


def _reset_peak() -> int:
    """Resets the peak of resident memory. Returns what is resident now."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # returns memory freed earlier, which would hide new allocations
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def longest(world: World, parallel: Parallel, model: Model) -> float:
    """The largest position in a batch, from a metric with the maximum of each microbatch."""
    from engine.megatron.policy import Policy

    def loss(logprob_T: Tensor, packed: Packed) -> Loss:
        return replace(nll(logprob_T, packed), maxima={"position": packed.positions_T.max()})

    with closing(Policy(model, None, parallel, world)) as policy:
        return policy.evaluate(batch(samples(0), 32, **policy.batch_options), loss)["position"]


def load_memory(world: World, parallel: Parallel, model: Model) -> float:
    """The peak of resident memory while `model` is built and loaded, divided by the bytes of this rank's parameters."""
    from engine.megatron.policy import Policy

    with closing(Policy(Model(init=replace(TINY, heads=6, kv_heads=3, head_dim=8, ffn=96)), None, parallel, world)):
        pass  # warm-up of imports and process groups
    before = _reset_peak()
    with closing(Policy(model, None, parallel, world)) as policy:
        return (_resident("VmHWM") - before) / sum(p.nbytes for chunk in policy.chunks for p in chunk.parameters())


def step_memory(world: World, parallel: Parallel, model: Model) -> tuple[float, float]:
    """Peak MiB of a step in addition to what is allocated between steps: for SFT, and for DPO on the same sequences with known reference
    log-probs."""
    from engine.megatron.policy import Policy

    draw = np.random.default_rng(0)
    halves = [Sample(draw.integers(0, 250, 257, dtype=np.int32), np.ones(256, np.uint8), n // 2) for n in range(16)]
    samples_ = [replace(half, ref_logprob=np.full(256, -5.5, np.float32)) for half in halves]
    with closing(Policy(model, OPTIM, parallel, world)) as policy:

        def worst(loss: LossFunction) -> float:
            return allocated(lambda: policy.update(batch(samples_, 1024, **policy.batch_options), loss, OPTIM.lr))[1] / 2**20

        worst(SFT_LOSS)  # the first step allocates what is kept
        return worst(SFT_LOSS), worst(DPO_LOSSES[0])


def threads_after(world: World, parallel: Parallel, model: Model, policies: int) -> list[int]:
    """The number of threads of this process after each of `policies` policies has been created and closed."""
    from engine.megatron.policy import Policy

    results = []
    for _ in range(policies):
        with closing(Policy(model, OPTIM, parallel, world)) as policy:
            policy.update(batch(samples(0), 64, **policy.batch_options), SFT_LOSS, OPTIM.lr)
        gc.collect()
        results.append(len(list(Path("/proc/self/task").iterdir())))
    return results
