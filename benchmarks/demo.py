"""The demo: SmolLM2-135M learns to work word problems on two CPU processes; its held-out loss falls, and it answers before and after."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.data.wordproblems import problems
from engine.hub import SMOLLM2, resolve
from engine.report import read_metrics

OUT = Path("runs/demo")
ENGINE = ["-m", "engine"]


def main() -> None:
    """Train, export, ask; a few minutes on two cores. Exits with an error when the held-out loss did not fall."""
    began = time.monotonic()
    torch.set_num_threads(2)
    shutil.rmtree(OUT, ignore_errors=True)
    question = problems(1, seed=7, held_out=True)[0]["messages"]
    before = answer(resolve(SMOLLM2), question[:1])
    train = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *ENGINE, "run", "recipes/smollm2_sft.py"]
    # 9 heads and 3 key-value heads admit no tp=2: the layers are dealt to two stages, fewer where the output layer's work is.
    subprocess.run([*train, "parallel.pp=2", "parallel.stages=[17,13]", f"out={OUT}"], check=True)
    subprocess.run([sys.executable, *ENGINE, "export", OUT, OUT / "export"], check=True)
    after = answer(OUT / "export", question[:1])
    losses = [(record["step"], record["loss"]) for record in read_metrics(OUT) if record["kind"] == "evaluation"]
    print(f"\nHeld-out loss: {', '.join(f'{loss:.3f} after step {step}' for step, loss in losses)}")
    print(f"\nQuestion   {question[0]['content']}\nBefore     {before}\nAfter      {after}\nRight      {question[1]['content']}")
    print(f"\nThe fine-tuned model is in {OUT / 'export'}, a folder that transformers loads. {time.monotonic() - began:.0f} s in all.")
    if losses[-1][1] >= losses[0][1]:
        sys.exit("the held-out loss did not fall")


def answer(folder: Path, messages: list[dict[str, str]]) -> str:
    """The model's greedy answer, at most 60 tokens, on one line."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        tokens = model.generate(**prompt, max_new_tokens=60, do_sample=False)
    return " ".join(tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).split())


if __name__ == "__main__":
    main()
