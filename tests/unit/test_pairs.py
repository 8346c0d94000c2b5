"""Preference rows: all formats give the same pair, and each invalid row gives one clear error."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from engine.batching.build import batch
from engine.data.mixture import Mixture
from engine.data.pairs import Pairs, encode_pair, grouped, prepare_pairs
from engine.data.rows import Source
from engine.data.template import ChatTemplate
from engine.data.tokenizer import load_tokenizer
from engine.data.wordproblems import write
from engine.losses import dpo
from engine.types import Sample
from tests.support import tulu3_definition

TOKENIZER, BARE = load_tokenizer("bytes"), load_tokenizer("bytes")
BARE.chat_template = None
CHAT, PLAIN = ChatTemplate(TOKENIZER), ChatTemplate(BARE)


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


Q, GOOD, BAD = turn("user", "2+2?"), turn("assistant", "4"), turn("assistant", "five")
SHAPES: list[dict[str, Any]] = [
    {"prompt": "2+2?", "chosen": "4", "rejected": "five"},
    {"prompt": [Q], "chosen": "4", "rejected": "five"},
    {"messages": [Q], "chosen": "4", "rejected": "five"},
    {"prompt": [Q], "chosen": [GOOD], "rejected": [BAD]},
    {"messages": [Q], "prompt": None, "chosen": [GOOD], "rejected": [BAD]},
    {"chosen": [Q, GOOD], "rejected": [Q, BAD]},
    {"prompt": "2+2?", "chosen": [Q, GOOD], "rejected": [Q, BAD]},  # the Tülu preference mixtures
    {"prompt": "2+2?", "messages": [Q, GOOD], "chosen": [Q, GOOD], "rejected": [Q, BAD], "score": 3},  # UltraFeedback
]


def prepared(tmp_path: Path, rows: list[dict[str, Any]], chat: ChatTemplate = CHAT, max_length: int = 200, **options: Any) -> Pairs:
    write(tmp_path / "pairs.jsonl", rows)
    return prepare_pairs(Source(str(tmp_path / "pairs.jsonl")), chat, max_length=max_length, cache=tmp_path / "cache", **options)


def trained(tokens: np.ndarray, mask: np.ndarray) -> str:
    return str(TOKENIZER.decode(tokens[1:][mask.astype(bool)]))


@pytest.mark.parametrize("row", SHAPES, ids=lambda row: "-".join(f"{k}:{type(v).__name__}" for k, v in row.items()))
def test_every_format_gives_the_same_pair(row: dict[str, Any]) -> None:
    for (tokens, mask), answer in zip(encode_pair(CHAT, row), (GOOD, BAD), strict=True):
        expected_tokens, expected_mask = CHAT.encode([Q, answer])
        assert tokens.tolist() == expected_tokens.tolist()
        assert mask.tolist() == expected_mask.tolist()


def test_a_system_prompt_comes_before_messages() -> None:
    (tokens, _), _ = encode_pair(CHAT, {"prompt": [turn("system", "Brief.")], "messages": [Q], "chosen": "4", "rejected": "five"})
    assert tokens.tolist() == CHAT.encode([turn("system", "Brief."), Q, GOOD])[0].tolist()


def test_only_tokens_after_the_common_prefix_are_trained() -> None:
    shared = [Q, turn("assistant", "four"), turn("user", "digits!")]
    (chosen, rejected) = encode_pair(CHAT, {"chosen": [*shared, GOOD], "rejected": [*shared, BAD]})
    eos = TOKENIZER.eos_token
    assert (trained(*chosen), trained(*rejected)) == (f"4{eos}", f"five{eos}")
    early = encode_pair(CHAT, {"chosen": [Q, GOOD, turn("user", "so?"), GOOD], "rejected": [Q, BAD]})
    assert (trained(*early[0]), trained(*early[1])) == (f"4{eos}4{eos}", f"five{eos}")


SYSTEM, SO, MORE = turn("system", "Brief."), turn("user", "so?"), turn("assistant", "four!")
MANY_TURNS: list[tuple[list[dict[str, str]], list[dict[str, str]], list[dict[str, str]]]] = [  # shared, chosen, rejected
    ([Q], [GOOD], [BAD]),
    ([Q, MORE, SO], [GOOD], [BAD]),
    ([SYSTEM, Q, MORE, SO, MORE, SO], [GOOD], [BAD]),
    ([Q, MORE, SO], [GOOD, SO, MORE], [BAD]),
    ([Q], [GOOD, SO, GOOD], [BAD, Q, MORE]),
]


@pytest.mark.parametrize(("shared", "chosen", "rejected"), MANY_TURNS)
def test_all_turns_are_trained_as_in_tulu_3(shared: Any, chosen: Any, rejected: Any) -> None:
    """Labels and loss: every answer is trained, and divides the sums of log-probs, the shared ones on both sides."""
    chat, draw = ChatTemplate(TOKENIZER, "tulu"), np.random.default_rng(0)
    whole = {"chosen": [*shared, *chosen], "rejected": [*shared, *rejected]}
    apart = {"prompt": shared, "chosen": chosen, "rejected": rejected}
    halves, sides, policy = encode_pair(chat, whole, all_turns=True), [], []
    for (tokens, mask), again, half in zip(halves, encode_pair(chat, apart, all_turns=True), whole.values(), strict=True):
        pieces = tulu3_definition.labelled(half, str(TOKENIZER.eos_token))
        encoded = [(TOKENIZER.encode(text, add_special_tokens=False), is_trained) for text, is_trained in pieces]
        assert tokens.tolist() == [token for ids, _ in encoded for token in ids] == again[0].tolist()
        assert [0, *mask.tolist()] == [int(is_trained) for ids, is_trained in encoded for _ in ids] == [0, *again[1].tolist()]
        pair = draw.normal(-1, 0.5, (2, len(mask))).astype(np.float32)
        sides.append(Sample(tokens, mask, group=0, ref_logprob=pair[1]))
        policy.append((pair[0], tuple(row[mask > 0].tolist() for row in pair)))
    (packed,) = batch(sides, 1000)
    loss = dpo(torch.from_numpy(np.concatenate([logprob for logprob, _ in policy])), packed, beta=5.0)
    expected = tulu3_definition.dpo_norm(policy[0][1], policy[1][1], 5.0)
    assert float(loss.total) == pytest.approx(expected, rel=1e-5)
    trained_by_default = sum(int(mask.sum()) for _, mask in encode_pair(chat, whole))
    assert (trained_by_default < sum(int(s.mask.sum()) for s in sides)) == (len(shared) > 1)


def test_a_conversation_that_the_assistant_opens_is_kept() -> None:
    """Its greeting answers nothing and stays untrained, in either mode; the answers after it are all trained."""
    before = [turn("assistant", "Hello!"), Q, MORE, SO]
    for all_turns, answers in ((False, "4"), (True, "four!|4")):
        (chosen, _) = encode_pair(CHAT, {"prompt": before, "chosen": "4", "rejected": "five"}, all_turns=all_turns)
        eos = str(TOKENIZER.eos_token)
        assert trained(*chosen) == answers.replace("|", eos) + eos


def test_all_turns_have_a_cache_of_their_own(tmp_path: Path) -> None:
    row = {"prompt": [Q, MORE, SO], "chosen": "4", "rejected": "five"}
    counts = [prepared(tmp_path, [row], all_turns=all_turns).counts.trained for all_turns in (False, True, False, True)]
    assert counts == [len("4|five|"), len("four!|4|four!|five|")] * 2  # | for the end token


def test_plain_text_without_a_template() -> None:
    for (tokens, mask), answer in zip(encode_pair(PLAIN, SHAPES[0]), ("4", "five"), strict=True):
        expected = PLAIN.encode_row({"prompt": "2+2?", "response": answer})
        assert (tokens.tolist(), mask.tolist()) == (expected[0].tolist(), expected[1].tolist())
    with pytest.raises(ValueError, match="chosen must be text, not list"):
        encode_pair(PLAIN, SHAPES[5])


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen and rejected are equal"),
    ({"chosen": [Q, GOOD], "rejected": [Q, GOOD]}, "chosen and rejected are equal"),
    ({"prompt": "q", "chosen": "a", "rejected": " \n"}, "rejected is empty"),
    ({"prompt": "q", "chosen": [turn("assistant", "")], "rejected": [BAD]}, "chosen is empty"),
    ({"prompt": "q", "chosen": [], "rejected": [BAD]}, "chosen must be text or a list of messages, not []"),
    ({"prompt": "q", "chosen": "a"}, "this one has no rejected"),
    ({"prompt": "q"}, "this one has no chosen and no rejected"),
    ({"chosen": "a", "rejected": "b"}, "needs prompt or messages"),
    ({"prompt": 3, "chosen": "a", "rejected": "b"}, "prompt must be text or a list of messages, not 3"),
    ({"prompt": "q", "chosen": [Q, GOOD], "rejected": [BAD]}, "use the same format for both"),
    ({"chosen": [Q, GOOD], "rejected": [turn("user", "other"), BAD]}, "differ at message 0, where chosen has role='user'"),
    ({"chosen": [Q, GOOD], "rejected": [Q, GOOD, Q, BAD]}, "chosen is the beginning of the other conversation"),
    ({"chosen": [Q], "rejected": [Q, BAD]}, "chosen must end in an assistant's message"),
    ({"prompt": "q", "chosen": 4, "rejected": "b"}, "chosen must be text or a list of messages, not 4"),
    ({"prompt": [{"role": "user"}], "chosen": "a", "rejected": "b"}, "must be an object with role and content"),
]


@pytest.mark.parametrize(("row", "complaint"), BROKEN, ids=[complaint[:40] for _, complaint in BROKEN])
def test_a_bad_row_is_reported_in_one_line(row: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(complaint)) as error:
        prepared(tmp_path, [SHAPES[0], row])
    assert "pairs.jsonl:2: " in str(error.value)
    assert "\n" not in str(error.value)


def test_dropped_bad_rows_are_counted_and_reported(tmp_path: Path) -> None:
    pairs = prepared(tmp_path, [SHAPES[0], BROKEN[0][0], SHAPES[5], BROKEN[2][0]], bad_rows="drop")
    assert len(pairs) == 2
    assert (pairs.counts.rows, pairs.counts.kept, pairs.counts.bad) == (4, 2, 2)
    note = pairs.counts.note("x")
    assert "4 rows, 0 truncated, 0 dropped, 2 bad" in note
    assert "pairs.jsonl:2: chosen and rejected are equal" in note
    assert "pairs.jsonl:4: rejected is empty" in note
    with pytest.raises(ValueError, match=r"all 1 rows are bad; the first: .*chosen and rejected are equal"):
        prepared(tmp_path, [BROKEN[0][0]], bad_rows="drop")


def test_too_long_is_an_error_by_default(tmp_path: Path) -> None:
    long_answer = {"prompt": "q", "chosen": "a" * 70, "rejected": "b"}
    long_prompt = {"prompt": "q" * 90, "chosen": "a", "rejected": "b"}
    same_when_cut = {"prompt": "q", "chosen": "a" * 70, "rejected": "a" * 71}
    with pytest.raises(ValueError, match=r"pairs.jsonl:1 has \d+ tokens, more than max_length=60"):
        prepared(tmp_path, [long_answer], max_length=60)
    with pytest.raises(ValueError, match=r"pairs.jsonl:1 has \d+ tokens, \d+ of them in the prompt, more than max_length=60"):
        prepared(tmp_path, [long_prompt], max_length=60)
    rows = [SHAPES[0], long_answer, long_prompt, same_when_cut]
    cut = prepared(tmp_path, rows, max_length=60, too_long="truncate")
    assert (len(cut), cut.counts.truncated, cut.counts.dropped) == (2, 1, 2)
    assert cut.lengths.max() == 60
    dropped = prepared(tmp_path, rows, max_length=60, too_long="drop")
    assert (len(dropped), dropped.counts.truncated, dropped.counts.dropped) == (1, 0, 3)


def test_a_pair_must_fit_a_microbatch(tmp_path: Path) -> None:
    pairs = prepared(tmp_path, [SHAPES[0], {"prompt": "q", "chosen": "a" * 50, "rejected": "b"}])
    longest = int(pairs.lengths.sum(1).max())
    pairs.check_fit("x.jsonl", longest)
    with pytest.raises(ValueError, match=rf"x.jsonl: 1 of 2 pairs .* {longest} tokens, .*tokens_per_microbatch={longest - 1}; raise it"):
        pairs.check_fit("x.jsonl", longest - 1)


def test_pairs_mix_and_group(tmp_path: Path) -> None:
    pairs = prepared(tmp_path, [{"prompt": f"{n}", "chosen": "a" * n, "rejected": "b" * n} for n in range(1, 6)])
    batch = Mixture([pairs, pairs], [1.0, 2.0], seed=0).batch(0, 15)
    samples = grouped(batch)
    assert [s.group for s in samples] == [p for p in range(15) for _ in range(2)]
    for chosen, rejected in zip(samples[::2], samples[1::2], strict=True):
        assert trained(chosen.tokens, chosen.mask).replace("a", "b") == trained(rejected.tokens, rejected.mask)


def test_datasets_and_files_give_the_same_pairs(tmp_path: Path) -> None:
    ours = prepared(tmp_path, SHAPES[5:6] * 3)
    datasets.Dataset.from_list(SHAPES[5:6] * 3).save_to_disk(str(tmp_path / "set"))
    theirs = prepare_pairs(Source(str(tmp_path / "set")), CHAT, max_length=200, cache=tmp_path / "cache")
    assert [half.tokens.tolist() for pair in ours for half in pair] == [half.tokens.tolist() for pair in theirs for half in pair]
