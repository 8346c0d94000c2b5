"""Jobs of the RLVR tests: a tiny random model that is rewarded for short responses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.algorithms.rlvr import RLVR, Critic
from engine.batching.ragged import Arena
from engine.config import Logging, Model, ModelShape, Optim, Parallel, Run
from engine.data.rows import Source
from engine.distributed.world import World
from engine.rollout.config import RolloutConfig
from engine.types import Sample
from engine.verify import VERIFIERS, Unjudged
from tests.support.golden_run import MACHINE_METRICS

SHAPE = ModelShape(layers=4, hidden=64, ffn=128, heads=8, kv_heads=4, vocab=260, max_length=128)
SMALLER = ModelShape(layers=4, hidden=32, ffn=64, heads=4, kv_heads=4, vocab=260, max_length=128, head="scalar")


SHORT = r"(?s)\A.{1,8}\Z"


def tasks(path: Path, truths: Sequence[str] = (SHORT,) * 12) -> Source:
    """Prompts of different lengths. A response is correct if it is short or matches another pattern."""
    draw = np.random.default_rng(5)
    lengths = draw.integers(2, 9, len(truths)).tolist()
    rows = [{"tokens": draw.integers(97, 123, n).tolist(), "truth": truth} for n, truth in zip(lengths, truths, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(str(path))


def make_run(folder: Path, parallel: Parallel, **changes: Any) -> Run:
    """A run of two steps with 8 prompts each. `changes` are fields of RLVR or of Run."""
    ours = {name: changes.pop(name) for name in ("tokens_per_microbatch", "steps", "save_every", "seed") if name in changes}
    critic = Critic(Model(init=SMALLER), Optim(lr=1e-3, weight_decay=0.01), loss_coef=0.5)
    settings = {
        "sources": (tasks(folder / "tasks.jsonl"),),
        "verifier": "regex",
        "critic": critic,
        "prompts_per_step": 8,
        "samples_per_prompt": 2,
        "epochs": 2,
        "minibatches": 2,
        "max_prompt_tokens": 16,
        "max_response_tokens": 24,
        # A random model samples a given stop token once in 260 tokens, so use several.
        "stop": tuple(f"<0x{byte:02X}>" for byte in range(16)),
        "rollout": RolloutConfig(max_num_seqs=6, kv_cache_gb=1.0, max_prefill_tokens=24),
    } | changes
    defaults: dict[str, Any] = {"tokens_per_microbatch": 96, "steps": 2} | ours
    return Run(
        model=Model(init=SHAPE, tokenizer="bytes"),
        algorithm=RLVR(**settings),
        optim=Optim(lr=1e-3, weight_decay=0.01),
        parallel=parallel,
        out=str(folder / "run"),
        logging=Logging(tensorboard=False),
        **defaults,
    )


@dataclass(frozen=True)
class ReadFirst(RLVR):
    """Computes the trainer's log-probs before every update, even if there is only one per step."""

    single_update = False  # type: ignore[assignment]


def read_first(world: World, folder: Path, **changes: Any) -> list[dict[str, Any]]:
    """`steps` on one rank with ReadFirst."""
    from engine.megatron.policy import Policy

    settings = make_run(folder, Parallel(), **changes)
    settings = replace(settings, algorithm=ReadFirst(**vars(settings.algorithm)), out=f"{settings.out}-first")
    with (
        closing(Policy(settings.model, settings.optim, Parallel(), world, seed=settings.seed)) as policy,
        closing(settings.algorithm.start(policy, settings)) as algorithm,
    ):
        return learned(algorithm, settings)


def plain(samples: list[Sample]) -> list[dict[str, Any]]:
    """Samples as lists, for comparison."""
    fields = ("tokens", "mask", "reward", "advantage", "old_logprob", "ref_logprob", "value", "returns")
    return [{f: x.tolist() if isinstance(x := getattr(sample, f), np.ndarray) else x for f in fields} for sample in samples]


def steps(world: World, folder: Path, parallel: Parallel, **changes: Any) -> list[dict[str, Any]]:
    """For each step: samples, rollout metrics ("said") and update metrics ("learned")."""
    from engine.megatron.policy import Policy

    settings = make_run(folder, parallel, **changes)
    settings = replace(settings, out=f"{settings.out}-{world.size}-{world.rank}")
    with (
        closing(Policy(settings.model, settings.optim, parallel, world, seed=settings.seed)) as policy,
        closing(settings.algorithm.start(policy, settings)) as algorithm,
    ):
        return learned(algorithm, settings)


def critic_values(world: World, folder: Path, tokens: list[list[int]]) -> list[list[float]]:
    """The values that the critic of `asked` starts with, at each predicted token of the sequences."""
    from engine.megatron.policy import Policy
    from engine.rollout.token_values import token_values

    settings = make_run(folder, Parallel())
    critic, samples = settings.algorithm.critic, [Sample(np.array(t, np.int32), np.ones(len(t) - 1, np.uint8)) for t in tokens]
    with closing(Policy(critic.model, None, Parallel(), world, seed=settings.seed)) as policy:
        return [values.tolist() for values in token_values(policy, samples, 96, policy.values)]


def learned(algorithm: Any, settings: Run) -> list[dict[str, Any]]:
    """The results of `steps`."""
    from engine.train import learn

    results = []
    for step in range(settings.steps):
        samples, collected = algorithm.collect(step)
        metrics, _ = learn(algorithm, step, 10, samples, settings.tokens_per_microbatch, Arena())
        collected = {name: value for name, value in collected.items() if not MACHINE_METRICS.match(name)}
        results.append({"samples": plain(samples), "said": collected, "learned": metrics})
    return results


def whole_run(world: World, folder: Path, parallel: Parallel, **changes: Any) -> None:
    """A run of engine.train, with checkpoints."""
    from engine.train import train

    train(make_run(folder, parallel, **changes), world)


def steps_with_missing_verdicts(world: World, **options: Any) -> Any:
    """`steps` with a verifier that sometimes returns no verdict, or their error."""
    VERIFIERS["moody"] = "tests.verify.verify_faults:MOODY"
    try:
        return steps(world, parallel=Parallel(), verifier="moody", **options)
    except Unjudged as error:
        return str(error)
    finally:
        del VERIFIERS["moody"]


def refused(world: World, folder: Path, **changes: Any) -> str:
    """The error of an invalid run."""
    from engine.train import train

    try:
        train(make_run(folder, Parallel(), **changes), world)
    except (ValueError, Unjudged) as error:
        return str(error)
    return ""


def trained(world: World, run: Run) -> None:
    """Any run of engine.train."""
    from engine.train import train

    train(run, world)
