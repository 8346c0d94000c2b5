"""Generation for evaluations: greedy responses equal transformers', stop strings cut them, and batching does not change them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engine.config import Parallel
from engine.data.tokenizer import load_tokenizer
from engine.evals.generation import Decoding, EvalResponse
from engine.rollout.sampler import common_prefix
from engine.rollout.stopping import StopStrings
from engine.types import Prompt
from tests.support import jobs_rollout
from tests.support.pool import ranks

SHARED = list(b"Every prompt begins with this. ")
PROMPTS = [SHARED + list(text) for text in (b"a", b"a longer one", b"2 + 2 = ", b"yet another, the longest of them all")]
END = 259


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with the byte tokenizer. Its distributions are far from uniform, and greedy tokens are printable or EOS."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, vocab_size=260, max_position_embeddings=128, eos_token_id=END, initializer_range=0.3)  # type: ignore[arg-type]
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[:32] = model.lm_head.weight[127:END] = 0
    model.save_pretrained(path)
    load_tokenizer("bytes").save_pretrained(path)
    return path


def written(folder: Path, size: int = 1, prompts: list[list[int]] = PROMPTS, **options: Any) -> list[list[EvalResponse]]:
    """The response to each prompt, the same on every rank."""
    first, *others = ranks(size).run(jobs_rollout.written, folder=folder, prompts=prompts, **options)
    assert all(results == first for results in others)
    return [[EvalResponse(*response) for response in group] for group in first]


def test_greedy_answers_are_those_of_transformers_one_by_one(folder: Path) -> None:
    model: Any = LlamaForCausalLM.from_pretrained(folder)
    tokenizer = load_tokenizer(str(folder))
    results = written(folder, decoding={"max_tokens": 24})
    for prompt, (response,) in zip(PROMPTS, results, strict=True):
        ids = torch.tensor([prompt])
        full = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, pad_token_id=256)
        new = full[0, len(prompt) :].tolist()
        response_tokens = new[: new.index(END)] if END in new else new
        assert response == EvalResponse(str(tokenizer.decode(response_tokens)), len(response_tokens), "stop" if END in new else "length")


LAYOUTS = [
    (1, Parallel(), {"max_num_seqs": 1}),
    (2, Parallel(), {}),
    (2, Parallel(tp=2), {}),
    (2, Parallel(pp=2), {"max_num_seqs": 3, "prefix_caching": False}),
]


@pytest.mark.parametrize(("size", "parallel", "rollout"), LAYOUTS, ids=str)
def test_samples_do_not_depend_on_how_they_are_computed(folder: Path, size: int, parallel: Parallel, rollout: dict[str, Any]) -> None:
    options: dict[str, Any] = {"decoding": {"max_tokens": 16, "n": 3, "temperature": 0.8, "top_p": 0.95, "stop": ("e", "no")}, "seed": 5}
    together = written(folder, **options)
    assert written(folder, size, parallel=parallel, rollout=rollout, **options) == together
    assert len({response.text for response in together[0]}) > 1


def test_samples_depend_on_seed_and_position(folder: Path) -> None:
    options: dict[str, Any] = {"decoding": {"max_tokens": 16, "n": 2, "temperature": 0.8}}
    first = written(folder, seed=5, **options)
    assert written(folder, seed=5, prompts=PROMPTS[:1], **options) == first[:1]
    assert written(folder, seed=6, **options) != first
    assert written(folder, seed=5, prompts=[PROMPTS[1], PROMPTS[0]], **options)[1] != first[0]


def test_a_response_ends_before_its_stop_string(folder: Path) -> None:
    ((full,),) = written(folder, prompts=PROMPTS[:1], decoding={"max_tokens": 24})
    stop = full.text[10:13]
    ((cut,),) = written(folder, prompts=PROMPTS[:1], decoding={"max_tokens": 24, "stop": ("never there", stop)})
    assert cut.text == full.text[: full.text.index(stop)]
    assert cut.tokens == len(cut.text) + 3
    assert cut.finish == "stop"
    assert cut.tokens < full.tokens == 24
    assert full.finish == "length"


def test_a_stop_string_ends_generation_immediately() -> None:
    """Whichever tokens it consists of, also for multi-byte characters."""
    tokenizer = load_tokenizer("bytes")
    until = StopStrings(tokenizer, ("née", "\n\n", "Q:"))
    for text in ("a longer text, née somewhere", "one line\n\nQ: a next", "\n\n", "née"):
        tokens = list(text.encode())
        shortest = next(n for n in range(len(tokens) + 1) if until(tokens[:n]))
        assert until.before(tokens[:shortest]) == text[: min(text.find(s) for s in until.strings if s in text)]
        assert not any(s in str(tokenizer.decode(tokens[: shortest - 1])) for s in until.strings)
    assert not until(list(b"nee \n Q :"))
    assert not StopStrings(tokenizer, ())(list(b"anything"))


def test_the_first_of_several_stop_strings_counts() -> None:
    tokenizer = load_tokenizer("bytes")
    assert StopStrings(tokenizer, ("three", "two", "four")).before(list(b"one two three")) == "one "
    assert StopStrings(tokenizer, ("x",)).before(list(b"one")) == "one"


def test_a_shared_prefix_excludes_the_last_token_of_each_prompt() -> None:
    def shared(*prompts: list[int]) -> list[int]:
        return common_prefix([Prompt(np.array(prompt, np.int32)) for prompt in prompts])

    assert shared([1, 2, 3], [1, 2, 4]) == [1, 2]
    assert shared([1, 2], [1, 2, 3]) == [1]
    assert shared([1, 2], [1, 2]) == [1]
    assert shared([1], [2, 3]) == []
    assert shared([1, 2]) == shared() == []


def test_invalid_requests_are_refused(folder: Path) -> None:
    for wrong in ({"max_tokens": -1}, {"n": 0}, {"temperature": -1.0}, {"top_p": 0.0}):
        with pytest.raises(ValueError, match="must be"):
            Decoding(**({"max_tokens": 1} | wrong))  # type: ignore[arg-type]
    assert written(folder, prompts=[], decoding={"max_tokens": 1}) == []
