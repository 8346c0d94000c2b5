"""The DPO loss and its gradients equal those of TRL's DPOTrainer for the same weights, pairs and reference."""

from __future__ import annotations

import importlib.util
import sys
from contextlib import closing
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.data import preferences
from benchmarks.support.tables import table
from benchmarks.support.timing import RESULTS, environment
from benchmarks.training import dpo_baselines
from engine import losses
from engine.batching.build import batch, scatter
from engine.config import Model, Optim, Parallel
from engine.data.pairs import Pair, encode_pair, grouped
from engine.data.rows import Source, read_rows
from engine.data.template import ChatTemplate
from engine.data.tokenizer import load_tokenizer
from engine.distributed.world import World
from engine.models import families
from engine.models.hub import resolve
from engine.types import Sample
from tests.support.paths import SHARED
from tests.support.pool import ranks

SOLUTIONS = SHARED / "gsm8k_model_solutions.jsonl"
KINDS = {"sigmoid_norm": {"beta": 5.0, "normalize": True}, "sigmoid": {"beta": 0.1, "normalize": False}}


def real_pairs(folder: Path, count: int) -> list[Pair]:
    """Pairs of right and wrong solutions of the same problems, tokenized with the tokenizer of `folder`."""
    chat = ChatTemplate(load_tokenizer(str(folder)))
    made = [row for row in preferences.pairs(row for _, row in read_rows(Source(str(SOLUTIONS)))) if len(row["prompt"]) < 300]
    halves = [[Sample(*half) for half in encode_pair(chat, row)] for row in made[:count]]
    return [(chosen, rejected) for chosen, rejected in halves]


def ours(world: World, folder: Path, pairs: list[Pair]) -> tuple[list[Pair], dict[str, tuple[float, dict[str, Tensor]]]]:
    """The pairs with the log-probs of a reference that differs slightly from the policy; and by kind the loss, and its gradients by the
    names of transformers."""
    from engine.megatron import weights
    from engine.megatron.policy import Policy

    results = {}
    with closing(Policy(Model(str(folder)), Optim(lr=0.0, max_grad_norm=0.0), Parallel(), world)) as policy:
        samples, draw = grouped(pairs), np.random.default_rng(0)
        step = batch(samples, 4096)
        logprobs = [values.numpy() for values in scatter(policy.logprobs(step), step, len(samples)) if values is not None]
        off = [v + draw.normal(0.0, 0.2, len(v)).astype(np.float32) for v in logprobs]
        samples = [replace(sample, ref_logprob=values) for sample, values in zip(samples, off, strict=True)]
        for kind, settings in KINDS.items():
            records = policy.update(batch(samples, 2048), partial(losses.dpo, **settings), 0.0)
            gradient: dict[str, Tensor] = {}
            for name, parameter in weights.named_parameters(policy.chunks):
                for piece in families.slices(name, policy.model, 1, 0):
                    full = gradient.setdefault(piece.name, torch.empty(families.tensor_shapes(policy.model)[piece.name]))
                    part = parameter.main_grad.narrow(piece.dim, piece.offset, piece.length)  # type: ignore[attr-defined]
                    full.narrow(piece.dim, piece.source_offset, piece.length).copy_(part)
            results[kind] = records["loss"], gradient
    return list(zip(samples[::2], samples[1::2], strict=True)), results


def theirs(folder: Path, pairs: list[Pair], kind: str, out: Path) -> tuple[float, dict[str, Tensor]]:
    """The same with TRL."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    embedding: Any = model.get_input_embeddings()
    embedding.padding_idx = None  # SmolLM2 pads with <|im_end|>, whose embedding would get no gradient
    rows = dpo_baselines.rows(pairs)
    settings = {"loss_type": [kind], "beta": KINDS[kind]["beta"], "gradient_checkpointing": False}
    trainer = dpo_baselines.trainer(model, load_tokenizer(str(folder)), rows, str(out), **settings)
    trainer.model.train()
    total = 0.0
    for row in rows:  # one at a time, because the logits of a padded batch would take gigabytes
        loss = trainer.compute_loss(trainer.model, trainer.data_collator([row])) / len(rows)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def difference(folder: Path, out: Path, count: int = 32) -> dict[str, tuple[float, float]]:
    """By kind: the difference of the losses, and the cosine of the gradients over all weights."""
    pairs, results = ranks(1).run(ours, folder=folder, pairs=real_pairs(folder, count))[0]
    result = {}
    for kind, (loss, gradient) in results.items():
        expected, grads = theirs(folder, pairs, kind, out)
        assert gradient.keys() >= grads.keys()
        a, b = (torch.cat([g[name].flatten().double() for name in grads]) for g in (gradient, grads))
        result[kind] = abs(loss - expected), float(a @ b / (a.norm() * b.norm()))
    return result


def tiny(folder: Path) -> Path:
    """A random Llama with the byte-level tokenizer."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8}
    config = LlamaConfig(**sizes, num_key_value_heads=4, vocab_size=260, max_position_embeddings=4096, tie_word_embeddings=False)
    LlamaForCausalLM(config).save_pretrained(folder)
    load_tokenizer("bytes").save_pretrained(folder)
    return folder


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed; pip install -e '.[peers]'")
@pytest.mark.skipif(not SOLUTIONS.exists(), reason="the solutions are not here")
def test_loss_and_gradient_equal_trls(tmp_path: Path) -> None:
    for kind, (apart, cosine) in difference(tiny(tmp_path / "model"), tmp_path / "trl").items():
        assert apart <= 1e-5, kind
        assert cosine >= 0.99999, kind


def page(model: str, count: int, found: dict[str, tuple[float, float]]) -> str:
    """The page with the results of `difference` and the environment."""
    rows = [[kind, f"{apart:.1e}", f"{1 - cosine:.1e}"] for kind, (apart, cosine) in found.items()]
    facts = environment() | {"date": date.today().isoformat(), "command": f"python -m tests.peers.test_dpo {model} {count}"}
    where = [f"- {key}: {value}" for key, value in facts.items()]
    summary = f"{model}, fp32, {count} real pairs, references that differ slightly from the policy. Differences from TRL's DPOTrainer:"
    header = ["loss", "difference of the losses", "1 - cosine of the gradients"]
    return "\n".join(["# DPO's loss and gradient compared with TRL's", "", summary, "", *table(header, rows), "", *where]) + "\n"


if __name__ == "__main__":  # python -m tests.peers.test_dpo smollm2-135m-instruct 32: a real model, takes minutes
    text = page(sys.argv[1], int(sys.argv[2]), difference(resolve(sys.argv[1]), Path("runs/trl"), int(sys.argv[2])))
    (RESULTS / f"dpo_equal_{date.today().isoformat()}.md").write_text(text, encoding="utf-8")
    print(text)
