"""Two ranks train, save after every step, and are killed, 20 times in a row. Prints the metrics of all steps of all runs.

Run as a separate program: it forks after its imports and before it starts threads, so that a run takes a second instead of ten.
"""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import socket
import sys
import time
from contextlib import closing
from pathlib import Path

import megatron.core.optimizer  # noqa: F401
import torch

import engine.megatron.checkpoint
import engine.megatron.model
import engine.megatron.optimizers  # noqa: F401
from engine.batching.build import batch
from engine.config import Model, Parallel
from engine.distributed.world import World
from engine.losses import SFT_LOSS
from engine.megatron.policy import Policy
from tests.support import jobs

LIVES, RANKS, FAR = 20, 2, 1000


def live(rank: int, port: int, out: Path) -> None:
    """One rank of one run: train from the newest checkpoint until killed."""
    environment = {"RANK": rank, "WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    os.environ.update({name: str(value) for name, value in environment.items()})
    world = World.start("cpu")
    with closing(Policy(Model(init=jobs.TINY), jobs.OPTIM, Parallel(tp=RANKS), world)) as policy:
        start = policy.load_latest(out)
        tell(out, {"start": start}, rank)
        for step in range(start, FAR):
            metrics = policy.update(batch(jobs.samples(step), 64, **policy.batch_options), SFT_LOSS, jobs.OPTIM.lr_at(step, 10))
            tell(out, {"step": step, "metrics": metrics}, rank)
            policy.save(out, step + 1)


def tell(out: Path, record: dict[str, object], rank: int) -> None:
    if rank == 0:
        with (out / "told.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")


def records_of(out: Path) -> list[dict[str, object]]:
    path = out / "told.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main(out: Path) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # excludes imported modules from garbage collection
    draw = random.Random(0)
    for _ in range(LIVES):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        before = len(records_of(out))
        children = []
        for rank in range(RANKS):
            child = os.fork()
            if child == 0:
                try:
                    live(rank, port, out)
                finally:
                    os._exit(1)
            children.append(child)
        began = time.monotonic()
        while len(records_of(out)) < before + 2:  # until its first step, after which it saves
            assert time.monotonic() < began + 60, "a life did not start"
            time.sleep(0.01)
        time.sleep(draw.uniform(0, max(0.8, time.monotonic() - began)))  # saves take longer on a busy machine
        os.kill(draw.choice(children), signal.SIGKILL)
        time.sleep(draw.uniform(0, 0.05))
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    records = records_of(out)
    starts = [r["start"] for r in records if "start" in r]
    print(json.dumps({"kills": len(starts), "starts": starts, "steps": [r for r in records if "step" in r]}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
