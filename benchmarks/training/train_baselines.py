"""The contenders of bench_train: one forward and backward pass of SmolLM2-135M over the same rows. Each runs in its own processes."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from benchmarks.support.timing import report
from engine.batching.build import batch
from engine.config import Model, Optim, Parallel
from engine.data.template import ChatTemplate
from engine.data.tokenizer import load_tokenizer
from engine.data.wordproblems import problems
from engine.distributed.world import World
from engine.losses import SFT_LOSS
from engine.models.hub import SMOLLM2, resolve
from engine.types import Sample

GSM8K = Path(__file__).parents[3] / "shared/data/gsm8k_train.jsonl"
Row = dict[str, Any]
Pass = Callable[[list[Sample]], float]  # runs forward and backward over samples; returns the sum of their losses


def rows(count: int) -> list[Row]:
    """The first rows of GSM8K if the file exists, else generated word problems: {"messages": [user, assistant]}."""
    if not GSM8K.exists():
        return problems(count, seed=0)
    with GSM8K.open(encoding="utf-8") as file:
        loaded = [json.loads(line) for line, _ in zip(file, range(count), strict=False)]
    return [{"messages": [{"role": "user", "content": r["question"]}, {"role": "assistant", "content": r["answer"]}]} for r in loaded]


def encode(rows: Sequence[Row]) -> list[Sample]:
    """Tokenized with the model's chat template, with loss on the assistant's tokens."""
    chat = ChatTemplate(load_tokenizer(str(resolve(SMOLLM2))))
    return [Sample(*chat.encode_row(row)) for row in rows]


def balanced(samples: Sequence[Sample], shares: int) -> list[list[Sample]]:
    """Distributes samples, longest first, each to the share with the fewest tokens. Each share keeps the original order."""
    assigned: list[list[int]] = [[] for _ in range(shares)]
    for i in sorted(range(len(samples)), key=lambda i: -samples[i].length):
        min(assigned, key=lambda share: sum(samples[j].length for j in share)).append(i)
    return [[samples[i] for i in sorted(share)] for share in assigned]


def ours(rows: list[Row], parallel: Parallel, budget: int) -> None:
    """Policy.update: batching, forward, backward, reduction and the AdamW step. A learning rate of 0 keeps the weights."""
    from engine.megatron.policy import Policy

    samples, world = encode(rows), World.start("cpu")
    with closing(Policy(Model(SMOLLM2), Optim(lr=0.0), parallel, world)) as policy:

        def run_pass(samples: list[Sample]) -> float:
            loss = policy.update(batch(samples, budget, **policy.batch_options), SFT_LOSS, lr=0.0)["loss"]
            return loss * _trained(samples) if world.rank == 0 else 0.0

        _time(run_pass, samples, warm=samples[:2], counted=samples if world.rank == 0 else [])
    world.close()


def plain(rows: list[Row], *, size: int = 1, keep_all_logits: bool = True) -> None:
    """transformers, `size` rows at a time, right-padded to the longest. Several processes each take a share; gradients are not reduced.

    keep_all_logits=False computes logits only from the first trained token on (the model's argument logits_to_keep).
    """
    ranks = _join()
    all_samples = encode(rows)
    samples = balanced(all_samples, ranks)[dist.get_rank() if ranks > 1 else 0]
    model = _hf_model().train()
    total = _trained(all_samples)

    def run_pass(samples: list[Sample]) -> float:
        model.zero_grad()
        return sum(_forward_backward(model, samples[i : i + size], total, keep_all_logits) for i in range(0, len(samples), size))

    _time(run_pass, samples, warm=samples[:2], counted=samples)


def trl(rows: list[Row]) -> None:
    """TRL's SFTTrainer with its defaults, in fp32 on CPU: batches of 8 in random order, gradient checkpointing, AdamW."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer  # type: ignore[import-not-found]

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.began = now()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            self.spent = since(self.began)

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model, tokenizer, clock = _hf_model(), load_tokenizer(str(resolve(SMOLLM2))), Clock()
    split = [{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in rows]
    for part in (split[:2], split):  # the first is the warm-up
        config = SFTConfig(
            "runs/bench_trl", use_cpu=True, bf16=False, num_train_epochs=1, save_strategy="no", report_to="none", disable_tqdm=True
        )
        SFTTrainer(model, config, train_dataset=Dataset.from_list(part), processing_class=tokenizer, callbacks=[clock]).train()
    report(sum(sample.length for sample in encode(rows)), *clock.spent, {})


def _forward_backward(model: Any, samples: Sequence[Sample], total: int, keep_all_logits: bool) -> float:
    longest = max(sample.length for sample in samples)
    tokens = torch.zeros(len(samples), longest, dtype=torch.int64)
    target, visible = torch.full_like(tokens, -100), torch.zeros_like(tokens)
    for i, sample in enumerate(samples):
        tokens[i, : sample.length] = torch.from_numpy(sample.tokens[:-1].astype(np.int64))
        target[i, : sample.length] = torch.from_numpy(np.where(sample.mask, sample.tokens[1:], -100).astype(np.int64))
        visible[i, : sample.length] = 1
    padded = visible if len(samples) > 1 else None  # attention is fastest without a mask
    kept = longest if keep_all_logits else longest - min(int(np.argmax(sample.mask)) for sample in samples)
    logits = model(input_ids=tokens, attention_mask=padded, use_cache=False, logits_to_keep=kept).logits
    loss = F.cross_entropy(logits.flatten(0, 1), target[:, longest - kept :].flatten(), reduction="sum")
    (loss / total).backward()
    return loss.item()


def _time(run_pass: Pass, samples: list[Sample], warm: list[Sample], counted: list[Sample]) -> None:
    """Warm up, then time one pass between barriers, and report the tokens of `counted` for this process."""
    run_pass(warm)
    _barrier()
    began = now()
    loss = run_pass(samples)
    _barrier()
    report(sum(sample.length for sample in counted), *since(began), {"loss_sum": loss, "trained": _trained(counted)})


def now() -> tuple[float, float]:
    """(wall-clock seconds, CPU seconds of this process)."""
    return time.perf_counter(), time.process_time()


def since(began: tuple[float, float]) -> tuple[float, float]:
    """The differences of both since `began`."""
    clock, cores = now()
    return clock - began[0], cores - began[1]


def _trained(samples: Sequence[Sample]) -> int:
    return sum(int(sample.mask.sum()) for sample in samples)


def _hf_model() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(resolve(SMOLLM2), dtype=torch.float32)


def _join() -> int:
    """Initializes the process group of this contender, which is only used for barriers. Returns the number of processes."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1:
        dist.init_process_group("gloo")
    return ranks


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


PASSES: dict[str, Callable[[list[Row]], None]] = {
    "ours-dp2": lambda rows: ours(rows, Parallel(), budget=1024),
    "ours-pp2": lambda rows: ours(rows, Parallel(pp=2, stages=(17, 13)), budget=512),  # the last stage also has the output layer
    "ours-1x2": lambda rows: ours(rows, Parallel(), budget=1024),
    "plain-1x2": lambda rows: plain(rows),
    "plain-2x1": lambda rows: plain(rows),
    "trimmed-2x1": lambda rows: plain(rows, keep_all_logits=False),
    "padded-1x2": lambda rows: plain(rows, size=8),
    "padded-2x1": lambda rows: plain(rows, size=8),
    "trl": trl,
}
