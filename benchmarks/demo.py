"""The demo: SmolLM2-135M learns to work word problems on two CPU processes, and another one to judge the work. Each stage is measured on
problems that nobody trained on."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.data.wordproblems import problems, write
from engine.hub import SMOLLM2, resolve
from engine.report import read_metrics

OUT = Path("runs/demo")
ENGINE = [sys.executable, "-m", "engine"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "engine"]


def main() -> None:
    """Fine-tune, learn rewards, learn preferences, ask; some minutes on two cores. Exits with an error when held-out data says that a stage
    learned nothing."""
    began = time.monotonic()
    torch.set_num_threads(2)
    shutil.rmtree(OUT, ignore_errors=True)
    question, right = problems(1, seed=7, held_out=True)[0]["messages"]
    # 9 heads and 3 key-value heads admit no tp=2: the layers are dealt to two stages, fewer where the output layer's work is.
    tuned = stage("sft", "parallel.stages=[17,13]")
    judge = stage("reward", "parallel.stages=[15,15]", f"model.path={tuned}")
    preferring = stage("dpo", "parallel.stages=[17,13]", f"model.path={tuned}")
    answers = {who: answer(folder, question) for who, folder in (("Before", resolve(SMOLLM2)), ("SFT", tuned), ("DPO", preferring))}
    answers["Right"] = right["content"]
    print(f"\nQuestion   {question['content']}")
    for (who, text), reward in zip(answers.items(), judged(judge, question["content"], list(answers.values())), strict=True):
        print(f"{who:<10} {text}   (reward {reward:+.2f})")
    print()
    learned = [held_out("sft", "loss"), held_out("reward", "loss", "accuracy"), held_out("dpo", "loss", "accuracy")]
    print(f"\nThe models are {tuned}, {judge} and {preferring}, folders that transformers loads. {time.monotonic() - began:.0f} s in all.")
    if not all(learned):
        sys.exit("a held-out loss did not fall")


def stage(name: str, *overrides: str) -> Path:
    """Train recipes/smollm2_<name>.py on two processes; the folder of what it learned."""
    out = OUT / name
    subprocess.run([*TORCHRUN, "run", f"recipes/smollm2_{name}.py", "parallel.pp=2", f"out={out}", *overrides], check=True)
    subprocess.run([*ENGINE, "export", out, out / "export"], check=True)
    return out / "export"


def held_out(name: str, *metrics: str) -> bool:
    """Print what held-out data said of a stage, and return whether its loss fell."""
    told = [record for record in read_metrics(OUT / name) if record["kind"] == "evaluation"]
    for metric in metrics:
        values = [f"{record[metric]:.3f} after step {record['step']}" for record in told]
        print(f"{name:<10} held-out {metric} {', '.join(values)}")
    return told[-1]["loss"] < told[0]["loss"]


def answer(folder: Path, question: dict[str, str]) -> str:
    """The model's greedy answer, at most 60 tokens, on one line."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template([question], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        tokens = model.generate(**prompt, max_new_tokens=60, do_sample=False)
    return " ".join(tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).split())


def judged(judge: Path, question: str, answers: list[str]) -> list[float]:
    """The reward of each answer."""
    data, out = OUT / "answers.jsonl", OUT / "rewards.jsonl"
    write(data, [{"prompt": question, "response": text} for text in answers])
    subprocess.run([*ENGINE, "score", "--reward", "--model", judge, "--data", data, "--out", out], check=True)
    return [json.loads(line)["reward"] for line in out.read_text().splitlines()]


if __name__ == "__main__":
    main()
