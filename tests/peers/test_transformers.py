"""Log-probs, chat templates, stop tokens and greedy responses beside transformers', of tiny random models.

Other layouts give the log-probs of one rank (tests/distributed/test_invariance.py), so that one rank is compared here.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

from engine.config import Model, Parallel
from engine.data.stops import known_stops, stop_tokens
from engine.data.template import ChatTemplate
from engine.data.tokenizer import load_tokenizer
from tests.support import jobs, jobs_rollout
from tests.support.chat_templates import FORMATS
from tests.support.pool import ranks

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
MODELS: dict[str, dict[str, Any]] = {
    "heads share keys": {"num_key_value_heads": 2},
    "one key head, tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "wide heads": {"num_key_value_heads": 4, "head_dim": 32, "rms_norm_eps": 1e-3},
    "theta": {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "llama3": {"num_key_value_heads": 2, "rope_parameters": {"rope_theta": 10000.0} | LLAMA3},
    "llama3, other factors": {
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_theta": 500000.0} | LLAMA3 | {"factor": 32.0, "high_freq_factor": 2.0, "low_freq_factor": 0.5},
    },
}
MESSAGES = [
    {"role": "user", "content": "What is 2 + 3?\nnaïve 你好 <b>"},
    {"role": "assistant", "content": "Five."},
    {"role": "user", "content": "And 3 + 4?"},
    {"role": "assistant", "content": "Seven"},
]
BYTES = list(range(97, 123))  # what a sampled response consists of: letters
PROMPTS = [list(text) for text in (b"a", b"Every river ends ", b"2 + 2 = ", b"A longer prompt than the others, to be sure")]


def saved(folder: Path, vocab: int, spread: float, **changes: Any) -> Path:
    torch.manual_seed(0)
    defaults = SIZES | {"vocab_size": vocab, "max_position_embeddings": 128, "tie_word_embeddings": False, "eos_token_id": None}
    model = LlamaForCausalLM(LlamaConfig(**defaults | changes))
    for parameter in model.parameters():  # norms too
        torch.nn.init.normal_(parameter, 0.0, spread)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_logprobs_of_tokens(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Also at temperature 0.7, of packed sequences of ragged length, beyond the length that llama3's scaling starts from."""
    folder = saved(tmp_path, 250, 0.2, **changes)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    for temperature in (1.0, 0.7):
        (found,) = ranks(1).run(jobs.logprobs, parallel=Parallel(), model=Model(str(folder)), temperature=temperature)
        for index, sample in enumerate(jobs.samples(7)):
            tokens = torch.from_numpy(sample.tokens).long()[None]
            with torch.no_grad():
                logits = model(tokens).logits[0, :-1] / temperature
            expected = logits.log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
            assert found[index] == pytest.approx(expected.tolist(), abs=2e-5)


def test_rope_scaling_changes_logprobs(tmp_path: Path) -> None:
    """Without it, the comparison above would not see a scaling that is not applied."""
    found = [
        ranks(1).run(jobs.logprobs, parallel=Parallel(), model=Model(str(saved(tmp_path / name.split(",")[0], 250, 0.2, **MODELS[name]))))[
            0
        ]
        for name in ("heads share keys", "llama3")
    ]
    assert max(abs(a - b) for i in found[0] for a, b in zip(found[0][i], found[1][i], strict=True)) > 1e-2


@pytest.mark.parametrize("name", [name for name, each in FORMATS.items() if each.turns])
def test_tokens_of_a_conversation(name: str) -> None:
    tokenizer, chat = FORMATS[name].tokenizer(), ChatTemplate(FORMATS[name].tokenizer())
    for count in range(1, 2 * FORMATS[name].turns + 1):
        asked = tokenizer.apply_chat_template(MESSAGES[:count], return_dict=False, add_generation_prompt=True)
        if MESSAGES[count - 1]["role"] == "user":
            assert chat.prompt(MESSAGES[:count]).tolist() == asked
        else:
            assert chat.encode(MESSAGES[:count])[0].tolist() == tokenizer.apply_chat_template(MESSAGES[:count], return_dict=False)


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that greedily says letters, far from uniformly."""
    folder = saved(tmp_path_factory.mktemp("talker"), 260, 0.3, num_key_value_heads=2, eos_token_id=259)
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        silent = [token for token in range(260) if token not in BYTES]
        model.lm_head.weight[silent] = 0.0
    model.save_pretrained(folder)
    load_tokenizer("bytes").save_pretrained(folder)
    return folder


def continued(folder: Path, prompt: list[int], most: int = 24) -> list[int]:
    """transformers' greedy response, with the stop tokens of the folder's generation_config.json."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([prompt])
    config = GenerationConfig.from_pretrained(folder)
    config.update(max_new_tokens=most, max_length=None, do_sample=False, pad_token_id=256)
    return model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("eos", [259, [259], [101, 259], list(b"xyz"), list(b"aeiou"), list(b"aeioubcdfgh")], ids=str)
def test_greedy_responses_and_where_they_end(talker: Path, eos: Any, tmp_path: Path) -> None:
    """An eos list of generation_config.json ends a response at the same token, and counts the same tokens before it."""
    folder = Path(shutil.copytree(talker, tmp_path / "model"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos, "pad_token_id": 256}))
    tokenizer = load_tokenizer(str(folder))
    stops = stop_tokens(ChatTemplate(tokenizer), folder)
    listed = eos if isinstance(eos, list) else [eos]
    assert set(stops) == {*listed, 259}
    (found,) = ranks(1).run(jobs_rollout.written, folder=folder, prompts=PROMPTS, decoding={"max_tokens": 24})
    for prompt, (response,) in zip(PROMPTS, found, strict=True):
        text, tokens, reason = response
        new = continued(folder, prompt)
        said = new[:-1] if new[-1] in listed else new
        assert (text, tokens, reason) == (str(tokenizer.decode(said)), len(said), "stop" if new[-1] in listed else "length")


def test_stops_of_a_generation_config_that_transformers_wrote(talker: Path, tmp_path: Path) -> None:
    chat = ChatTemplate(load_tokenizer(str(talker)))
    for eos in (5, [5], [5, 6, 7]):
        GenerationConfig(eos_token_id=eos).save_pretrained(tmp_path)
        assert set(known_stops(chat, tmp_path)) == {259, *(eos if isinstance(eos, list) else [eos])}
