"""Responses of an evaluation: transformers' greedy ones, cut at stop strings, whatever else is asked and however it is computed."""

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
    """A random Llama of two layers that reads bytes, far from uniform in what it says, and greedily says printable ones or its end."""
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


def written(folder: Path, size: int = 1, prompts: list[list[int]] = PROMPTS, **how: Any) -> list[list[EvalResponse]]:
    """What each prompt is answered, the same on every rank."""
    first, *others = ranks(size).run(jobs_rollout.written, folder=folder, prompts=prompts, **how)
    assert all(found == first for found in others)
    return [[EvalResponse(*response) for response in group] for group in first]


def test_greedy_answers_are_those_of_transformers_one_by_one(folder: Path) -> None:
    model: Any = LlamaForCausalLM.from_pretrained(folder)
    tokenizer = load_tokenizer(str(folder))
    found = written(folder, decoding={"max_tokens": 24})
    for prompt, (response,) in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([prompt])
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, pad_token_id=256)
        new = whole[0, len(prompt) :].tolist()
        said = new[: new.index(END)] if END in new else new
        assert response == EvalResponse(str(tokenizer.decode(said)), len(said), "stop" if END in new else "length")


LAYOUTS = [
    (1, Parallel(), {"max_num_seqs": 1}),
    (2, Parallel(), {}),
    (2, Parallel(tp=2), {}),
    (2, Parallel(pp=2), {"max_num_seqs": 3, "prefix_caching": False}),
]


@pytest.mark.parametrize(("size", "parallel", "rollout"), LAYOUTS, ids=str)
def test_samples_do_not_depend_on_how_they_are_computed(folder: Path, size: int, parallel: Parallel, rollout: dict[str, Any]) -> None:
    how: dict[str, Any] = {"decoding": {"max_tokens": 16, "n": 3, "temperature": 0.8, "top_p": 0.95, "stop": ("e", "no")}, "seed": 5}
    together = written(folder, **how)
    assert written(folder, size, parallel=parallel, rollout=rollout, **how) == together
    assert len({response.text for response in together[0]}) > 1


def test_samples_depend_on_the_seed_and_the_place(folder: Path) -> None:
    how: dict[str, Any] = {"decoding": {"max_tokens": 16, "n": 2, "temperature": 0.8}}
    first = written(folder, seed=5, **how)
    assert written(folder, seed=5, prompts=PROMPTS[:1], **how) == first[:1]
    assert written(folder, seed=6, **how) != first
    assert written(folder, seed=5, prompts=[PROMPTS[1], PROMPTS[0]], **how)[1] != first[0]


def test_a_response_ends_before_its_stop_string(folder: Path) -> None:
    ((whole,),) = written(folder, prompts=PROMPTS[:1], decoding={"max_tokens": 24})
    stop = whole.text[10:13]
    ((cut,),) = written(folder, prompts=PROMPTS[:1], decoding={"max_tokens": 24, "stop": ("never there", stop)})
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.tokens == len(cut.text) + 3
    assert cut.finish == "stop"
    assert cut.tokens < whole.tokens == 24
    assert whole.finish == "length"


def test_a_stop_string_is_found_as_soon_as_it_is_there() -> None:
    """Of whichever tokens it is made, characters of several bytes too."""
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


def test_what_prompts_share_is_cut_off_before_the_last_token_of_any() -> None:
    def shared(*prompts: list[int]) -> list[int]:
        return common_prefix([Prompt(np.array(prompt, np.int32)) for prompt in prompts])

    assert shared([1, 2, 3], [1, 2, 4]) == [1, 2]
    assert shared([1, 2], [1, 2, 3]) == [1]
    assert shared([1, 2], [1, 2]) == [1]
    assert shared([1], [2, 3]) == []
    assert shared([1, 2]) == shared() == []


def test_what_cannot_be_asked(folder: Path) -> None:
    for wrong in ({"max_tokens": -1}, {"n": 0}, {"temperature": -1.0}, {"top_p": 0.0}):
        with pytest.raises(ValueError, match="must be"):
            Decoding(**({"max_tokens": 1} | wrong))  # type: ignore[arg-type]
    assert written(folder, prompts=[], decoding={"max_tokens": 1}) == []
