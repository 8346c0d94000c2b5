"""Reading what others wrote: strict JSON, plain names, bounded lines; and a flipped bit of a cache is found."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest

from engine.config import ModelShape
from engine.data import rows
from engine.data.corpus import Corpus, prepare
from engine.data.rows import Source, read_rows
from engine.data.tasks import Tasks
from engine.data.template import ChatTemplate
from engine.data.tokenizer import load_tokenizer, vocabulary_size
from engine.files import BLOCK, block_digests, damage, follow_umask, parse_json, refusing
from engine.types import Prompt


@pytest.mark.parametrize("text", ['{"a": 1}', '{"a": "é 😀"}', '{"a": "\\ud83d\\ude00"}', '[1e400, -0.0, "\\\\ud800"]', " 3 "])
def test_valid_json_is_what_json_reads(text: str) -> None:
    assert parse_json(text.encode()) == json.loads(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b'{"a": 1, "b": 2, "a": 3}', "duplicate key 'a'"),
        (b'"\xed\xa0\x80"', "not UTF-8 at byte 1"),
        (b"[" * 100_000, "nested too deep"),
        (b"9" * 5000, "not valid JSON"),
        (b"NaN", "NaN is not a JSON number"),
        (b"", "Expecting value"),
    ],
)
def test_invalid_json_is_one_line(text: bytes, expected: str) -> None:
    with pytest.raises(ValueError, match=expected) as caught:
        parse_json(text, constants=False)
    assert "\n" not in str(caught.value)


def test_an_object_of_many_equal_keys_is_refused_at_once() -> None:
    """Comparing each key with all others would take minutes."""
    with pytest.raises(ValueError, match="duplicate key 'k299999'"):
        parse_json(b"{" + b",".join(b'"k%d": 0' % min(i, 299_999) for i in range(300_001)) + b"}")


def test_a_panic_of_a_library_is_one_line() -> None:
    class Panic(BaseException):
        pass

    with pytest.raises(ValueError, match=r"^file: Panic: a b; try again$"), refusing("file", "try again"):
        raise Panic("a\nb")


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_what_stops_a_program_is_not_refused(stop: type[BaseException]) -> None:
    with pytest.raises(stop), refusing("file", "try again"):
        raise stop


def test_a_line_without_end_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n')
    os.truncate(path, 4 << 30)  # a hole: zeros to the end
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: the line is longer than 64 MiB"):
        list(read_rows(Source(str(path))))


def test_a_line_of_exactly_the_limit_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_LINE", 10)
    (tmp_path / "rows.jsonl").write_bytes(b'{"a": 12}\n{"a": 123}')
    assert [row for _, row in read_rows(Source(str(tmp_path / "rows.jsonl")))] == [{"a": 12}, {"a": 123}]
    (tmp_path / "rows.jsonl").write_bytes(b'{"a": 12}\n{"a": 1234}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: the line is longer"):
        list(read_rows(Source(str(tmp_path / "rows.jsonl"))))


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_follow_the_umask(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        (tmp_path / "ours").touch(0o600)
        follow_umask(tmp_path / "ours")
        assert (tmp_path / "ours").stat().st_mode & 0o777 == 0o666 & ~mask
    finally:
        assert os.umask(before) == mask


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK])
def test_each_rank_finds_damage_in_its_share(size: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(random.Random(0).randbytes(size))
    digests = block_digests(path)
    assert [damage(path, digests, rank, 2) for rank in range(2)] == [None, None]
    if size:
        with path.open("r+b") as file:
            file.seek(size - 1)
            last = file.read(1)
            file.seek(size - 1)
            file.write(bytes([last[0] ^ 1]))
        said = [damage(path, digests, rank, 2) for rank in range(2)]
        assert [bool(each) for each in said] == [(size - 1) // BLOCK % 2 == rank for rank in range(2)]
    path.write_bytes(bytes(size + BLOCK))
    assert damage(path, digests) == f"{path} is damaged (its size differs)"


# ---------------------------------------------------------------- caches


def corpus_of(path: Path, cache: Path, answers: list[str]) -> Corpus:
    path.write_text("".join(json.dumps({"prompt": "q", "response": answer}) + "\n" for answer in answers))
    return prepare(Source(str(path)), ChatTemplate(load_tokenizer("bytes")), max_length=99, cache=cache)


def test_a_flipped_bit_anywhere_in_a_corpus_is_found(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path / "rows.jsonl", tmp_path / "cache", ["one", "two", "three"])
    assert corpus.damage() is None
    files = sorted(corpus.folder.iterdir())
    assert {"tokens.bin", "trained.bin", "offsets.bin", "counts.json", "key.json", "digests.json"} == {path.name for path in files}
    for path in files:
        good = path.read_bytes()
        for place in random.Random(0).sample(range(len(good)), 20):
            path.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
            assert found_damaged(corpus.folder), (path, place)
        path.write_bytes(good)
    assert not found_damaged(corpus.folder)


def found_damaged(folder: Path) -> bool:
    try:
        return Corpus(folder).damage() is not None
    except ValueError as error:
        return "damaged" in str(error)


def test_a_digest_is_that_of_the_samples_and_nothing_else(tmp_path: Path) -> None:
    first = corpus_of(tmp_path / "a.jsonl", tmp_path / "cache", ["one", "two"])
    os.utime(tmp_path / "a.jsonl", ns=(1, 1))
    chat = ChatTemplate(load_tokenizer("bytes"))
    assert prepare(Source(str(tmp_path / "a.jsonl")), chat, max_length=99, cache=tmp_path / "cache").digest == first.digest
    assert corpus_of(tmp_path / "b.jsonl", tmp_path / "other", ["one", "two"]).digest == first.digest
    for answers in (["two", "one"], ["one"], ["one", "twO"]):
        assert corpus_of(tmp_path / "b.jsonl", tmp_path / "other", answers).digest != first.digest


def test_a_file_that_was_replaced_with_its_times_restored_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    before = corpus_of(path, tmp_path / "cache", ["one"])
    times = path.stat().st_mtime_ns
    path.write_text(path.read_text().replace("one", "two"))
    os.utime(path, ns=(times, times))
    after = prepare(Source(str(path)), ChatTemplate(load_tokenizer("bytes")), max_length=99, cache=tmp_path / "cache")
    assert after.digest != before.digest


def test_a_digest_of_tasks_is_that_of_prompts_and_truths(tmp_path: Path) -> None:
    def tasks(tokens: list[int], truth: object, path: str = "a") -> str:
        return Tasks(path, [Prompt(np.array(tokens, np.int32), truth, "exact", 0)], 0).digest

    assert tasks([1, 2], "x") == tasks([1, 2], "x", "b")
    assert len({tasks([1, 2], "x"), tasks([1, 3], "x"), tasks([1, 2], "y"), tasks([1, 2], ["x"])}) == 4


def test_the_vocabulary_of_a_tokenizer_ends_at_its_largest_id() -> None:
    tokenizer = load_tokenizer("bytes")
    assert vocabulary_size(tokenizer) == 260
    tokenizer.add_tokens("more")
    assert vocabulary_size(tokenizer) == 261


@pytest.mark.parametrize(
    "change",
    [
        {"hidden": True},
        {"layers": 1.0},
        {"vocab": 0},
        {"heads": "8"},
        {"rope_theta": float("nan")},
        {"rope_theta": 0.0},
        {"norm_eps": -1.0},
        {"norm_eps": float("inf")},
        {"head_dim": -16},
        {"head_dim": 5},
        {"max_length": 0},
    ],
)
def test_a_shape_checks_itself(change: dict[str, object]) -> None:
    sizes: dict[str, object] = {"layers": 1, "hidden": 8, "ffn": 8, "heads": 2, "kv_heads": 1, "vocab": 8}
    with pytest.raises(ValueError, match=f"model.{next(iter(change))}="):
        ModelShape(**sizes | change)  # pyright: ignore[reportArgumentType]
