"""Responses by transformers: what a prompt is answered does not depend on its neighbours, and draws follow the distribution."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engine.data.tokenizer import load_tokenizer
from engine.evals.generation import Decoding, Response, Transformers, _common, _draw, before_stop
from engine.world import World

SHARED = list(b"Every prompt begins with this. ")
PROMPTS = [SHARED + list(text) for text in (b"a", b"a longer one", b"2 + 2 = ", b"yet another, the longest of them all")]
NAMES = range(len(PROMPTS))
END = 259


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers that reads bytes, far from uniform in what it says."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, vocab_size=260, max_position_embeddings=128, eos_token_id=END, initializer_range=0.3)  # type: ignore[arg-type]
    LlamaForCausalLM(config).save_pretrained(path)
    load_tokenizer("bytes").save_pretrained(path)
    return path


def load(folder: Path, batch_tokens: int = 4096) -> Transformers:
    """The model, held to printable bytes and its end."""
    world = World("cpu", 0, 1, torch.device("cpu"))
    model = Transformers(folder, load_tokenizer(str(folder)), world, torch.float32, batch_tokens)
    bias = torch.full((260,), -1e4)
    bias[32:127] = bias[END] = 0
    model.model.lm_head.bias = torch.nn.Parameter(bias)
    return model


def test_greedy_answers_are_those_of_transformers_one_by_one(folder: Path) -> None:
    model = load(folder)
    found = model.generate(PROMPTS, NAMES, Decoding(max_tokens=24), seed=0)
    for prompt, (response,) in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([prompt])
        whole = model.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, pad_token_id=256)
        new = whole[0, len(prompt) :].tolist()
        written = new[: new.index(END)] if END in new else new
        assert response == Response(model._text(written), len(written), "stop" if END in new else "length")


def test_samples_do_not_depend_on_the_batch(folder: Path) -> None:
    decoding = Decoding(max_tokens=16, n=3, temperature=0.8, top_p=0.95)
    together = load(folder).generate(PROMPTS, NAMES, decoding, seed=5)
    assert load(folder, batch_tokens=1).generate(PROMPTS, NAMES, decoding, seed=5) == together
    assert load(folder).generate(PROMPTS[1:2], [1], decoding, seed=5) == together[1:2]
    assert load(folder).generate(PROMPTS, NAMES, decoding, seed=6) != together
    assert len({response.text for response in together[0]}) > 1


def test_a_response_ends_before_its_stop_string(folder: Path) -> None:
    model = load(folder)
    ((whole,),) = model.generate(PROMPTS[:1], [0], Decoding(max_tokens=24), seed=0)
    stop = whole.text[10:13]
    ((cut,),) = model.generate(PROMPTS[:1], [0], Decoding(max_tokens=24, stop=("never there", stop)), seed=0)
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish == "stop"
    assert cut.tokens < whole.tokens == 24
    assert whole.finish == "length"


def test_the_first_of_several_stop_strings_counts() -> None:
    assert before_stop("one two three", ("three", "two", "four")) == "one "
    assert before_stop("one", ("x",)) == "one"


@pytest.mark.parametrize("top_p", [1.0, 0.75, 0.1])
def test_draws_follow_the_distribution(top_p: float) -> None:
    """Evenly spread places in [0, 1) give each token its probability; top_p keeps the fewest likeliest that reach it."""
    probs = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2])
    kept = {1.0: probs, 0.75: torch.tensor([0, 0.4, 0, 0.25, 0.2]), 0.1: torch.tensor([0, 1.0, 0, 0, 0])}[top_p]
    count = 10_000
    uniform = (torch.arange(count) + 0.5) / count
    logits = (2 * probs.log()).expand(count, -1)  # at temperature 2, these probabilities
    drawn = _draw(logits, uniform, Decoding(max_tokens=1, temperature=2.0, top_p=top_p))
    found = torch.bincount(drawn, minlength=5) / count
    torch.testing.assert_close(found, kept / kept.sum(), atol=3e-4, rtol=0)


def test_what_prompts_share_is_cut_off_before_the_last_token_of_any() -> None:
    assert _common([[1, 2, 3], [1, 2, 4]]) == [1, 2]
    assert _common([[1, 2], [1, 2, 3]]) == [1]
    assert _common([[1, 2], [1, 2]]) == [1]
    assert _common([[1], [2, 3]]) == []
    assert _common([[1, 2]]) == _common([]) == []


def test_what_cannot_be_asked(folder: Path) -> None:
    with pytest.raises(ValueError, match="exceed the model's context of 128; lower max_tokens"):
        load(folder).generate(PROMPTS, NAMES, Decoding(max_tokens=100), seed=0)
    for wrong in ({"max_tokens": -1}, {"n": 0}, {"temperature": -1.0}, {"top_p": 0.0}):
        with pytest.raises(ValueError, match="must be"):
            Decoding(**({"max_tokens": 1} | wrong))  # type: ignore[arg-type]
    assert load(folder).generate([], [], Decoding(max_tokens=1), seed=0) == []
