"""Launches recipes/tulu3_405b_rlvr.py with torchrun on 16 CPU processes, with a tiny model instead of 405B.

    python -m tests.support.launch_405b     two steps at tp2 x pp4 x dp2, and the same on one process; fails if they differ

Only command-line settings differ from the real launch: models, rows, and sizes that depend on them.
"""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors.torch import save_file

from engine.config import ModelShape
from engine.data.tokenizer import load_tokenizer
from engine.data.wordproblems import tasks, write
from engine.models.families import to_hf
from engine.reporting.console import read_metrics

RECIPE = "recipes/tulu3_405b_rlvr.py"
POLICY = ModelShape(layers=6, hidden=64, ffn=128, heads=4, kv_heads=2, vocab=111, max_length=128)  # with embedding and loss: 8 units
CRITIC = ModelShape(layers=4, hidden=32, ffn=64, heads=4, kv_heads=2, vocab=111, max_length=128, head="scalar")
TIMES = ("second", "time", "memory")  # in names of metrics that differ between launches
METRICS = {"policy/loss", "policy/grad_norm", "critic/loss", "policy/kl", "reward/mean", "rollout/length"}


def prepared(folder: Path) -> list[str]:
    """Write both models and 64 word problems into `folder`. Returns the settings that replace Tülu 3's with them."""
    write_model(folder / "policy", POLICY)
    write_model(folder / "critic", CRITIC)
    write(folder / "tasks.jsonl", [row | {"verifier": "gsm8k"} for row in tasks(64, seed=0)])
    return [
        f"model.path={folder / 'policy'}",
        f"algorithm.critic.model.path={folder / 'critic'}",
        f'algorithm.sources=["{folder / "tasks.jsonl"}"]',
        'algorithm.stop=["0", " 0", " 1", " 2", ".", "="]',  # a random model samples a given stop token once in 111 tokens, so use several
        "algorithm.prompts_per_step=16",
        "algorithm.max_prompt_tokens=64",
        "algorithm.max_response_tokens=16",
        "algorithm.rollout.max_num_seqs=16",
        "algorithm.rollout.kv_cache_gb=0.1",
        "algorithm.critic.optim.lr=1e-3",
        "optim.lr=1e-3",
        "tokens_per_microbatch=128",
        "steps=2",
        "logging.tensorboard=false",
    ]


def write_model(folder: Path, model: ModelShape) -> None:
    """Write a Hugging Face folder with random weights of this shape."""
    from engine.megatron.weights import RandomWeights
    from engine.models.families import tensor_shapes

    folder.mkdir()
    drawn = RandomWeights(model, seed=0)
    save_file({name: drawn.draw(name) for name in tensor_shapes(model)}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(to_hf(model)))
    load_tokenizer("words").save_pretrained(folder)


def metric_records(out: Path) -> list[dict[str, float]]:
    """The metrics of each step of a run, without times and memory."""
    rows = [record for record in read_metrics(out) if record["kind"] == "step"]
    return [{name: x for name, x in row.items() if not isinstance(x, str) and not any(t in name for t in TIMES)} for row in rows]


def check_same(found: list[dict[str, float]], wanted: list[dict[str, float]]) -> None:
    """Assert that both runs have two steps whose metrics are finite and equal to a relative 1e-4."""
    assert len(found) == len(wanted) == 2
    for actual, expected in zip(found, wanted, strict=True):
        assert actual.keys() == expected.keys()
        assert actual.keys() >= METRICS, sorted(actual)
        for name, value in actual.items():
            assert math.isfinite(value), name
            assert math.isclose(value, expected[name], rel_tol=1e-4, abs_tol=1e-5), (name, value, expected[name])


def launched(processes: int, settings: list[str], out: Path) -> list[dict[str, float]]:
    """The metrics of two steps of the recipe, started by torchrun."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "-m", "engine", "run", RECIPE]
    began = time.monotonic()
    subprocess.run([*torchrun, *settings, f"out={out}"], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"{processes} processes: {time.monotonic() - began:.0f} s, the largest of them {largest:.2f} GiB resident", flush=True)
    return metric_records(out)


def main() -> None:
    """Launch on 16 processes and on one, and compare."""
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        settings = prepared(folder)
        alone = launched(1, [*settings, "parallel.tp=1", "parallel.pp=1"], folder / "alone")
        check_same(launched(16, [*settings, "parallel.tp=2", "parallel.pp=4"], folder / "sixteen"), alone)
    print("two steps of the recipe on tp2 x pp4 x dp2, equal to those on one process")


if __name__ == "__main__":
    main()
