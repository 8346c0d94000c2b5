"""SFT of SmolLM2-135M on 200 worked answers to word problems of SVAMP. recipes/smollm2_rlvr.py continues from it.

1. python -m benchmarks svamp SVAMP.jsonl cache/svamp (the data set of arXiv 2103.07191 as jsonl)
2. On two CPU processes: torchrun --nproc-per-node 2 -m engine run recipes/svamp_sft.py parallel.pp=2 'parallel.stages=[17,13]'"""

from engine.algorithms.sft import SFT
from engine.config import Model, Optim, Run
from engine.data.rows import Source

run = Run(
    model=Model("smollm2-135m-instruct"),
    algorithm=SFT(
        sources=(Source("cache/svamp/demonstrations.jsonl"),),
        batch_size=8,
        epochs=3,
        max_length=256,
        chat_template="chatml",
    ),
    optim=Optim(lr=1e-4, warmup_ratio=0.1),
    tokens_per_microbatch=512,
    out="runs/svamp_sft",
    gpus=2,
)
