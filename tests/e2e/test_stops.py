"""A chat model whose turns end in a token other than eos stops there: in its export, with our sampler and with transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.config import ModelShape
from engine.data.tokenizer import load_tokenizer
from tests.support import jobs
from tests.support.pool import ranks

SHAPE = ModelShape(layers=2, hidden=64, ffn=128, heads=4, kv_heads=2, vocab=262, max_length=128)
RECIPE = """
from engine.algorithms.sft import SFT
from engine.config import Logging, Model, ModelShape, Optim, Run
from engine.data.rows import Source

run = Run(
    model=Model(init={shape}, tokenizer={tokenizer!r}),
    algorithm=SFT(sources=(Source({data!r}),), batch_size=4, max_length=128, chat_template="chatml"),
    optim=Optim(lr=3e-3), tokens_per_microbatch=1024, steps=60, out={out!r}, logging=Logging(tensorboard=False),
)
"""


def run(*words: object) -> str:
    code, output, complaint = ranks(1).run(jobs.command, words=[str(word) for word in words])[0]
    assert code == 0, complaint
    return output


def test_an_export_stops_at_the_end_of_its_turn(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("bytes")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    row = {"messages": [{"role": "user", "content": "ping"}, {"role": "assistant", "content": "pong"}]}
    (tmp_path / "data.jsonl").write_text((json.dumps(row) + "\n") * 8)
    (tmp_path / "recipe.py").write_text(
        RECIPE.format(shape=SHAPE, tokenizer=str(tmp_path / "tokenizer"), data=str(tmp_path / "data.jsonl"), out=str(tmp_path / "out"))
    )
    run("run", tmp_path / "recipe.py")
    run("export", tmp_path / "out", tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "ping"}\n')
    words = ("temperature=0", "max_tokens=40")
    run("generate", tmp_path / "model", "--prompts", tmp_path / "prompts.jsonl", "--out", tmp_path / "answers.jsonl", *words)
    (answer,) = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert (answer["text"], answer["finish_reason"]) == ("pong", "stop")

    exported = AutoTokenizer.from_pretrained(tmp_path / "model")
    prompt = exported.apply_chat_template(row["messages"][:1], add_generation_prompt=True, return_dict=False)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    theirs = model.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)[0].tolist()
    assert theirs == answer["tokens"]
    assert exported.decode(theirs[len(prompt) :]) == "pong<|im_end|>"
    assert exported.eos_token == "<|end|>"
