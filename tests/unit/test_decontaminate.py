"""Decontamination: Tülu's rule compared with a brute-force implementation, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.data.bench_decontaminate import REPEATS, generate
from engine.__main__ import main
from engine.data.decontaminate import Index, Rule, Search, covered, grams, words
from engine.data.rows import Source
from tests.support.paths import SHARED

LETTERS = st.lists(st.sampled_from("abc"), max_size=24)
RULES = st.builds(Rule, ngram=st.integers(1, 5), instance=st.sampled_from([0.0, 0.2, 0.3, 0.5, 0.9]))


def share(instance: list[str], prompt: list[str], n: int) -> float:
    """Brute force: each token of the instance, each n-gram that contains it, each n-gram of the prompt."""
    matched = 0
    for token in range(len(instance)):
        starts = [start for start in range(token - n + 1, token + 1) if start >= 0 and start + n <= len(instance)]
        theirs = [prompt[start : start + n] for start in range(len(prompt) - n + 1)]
        matched += any(instance[start : start + n] in theirs for start in starts)
    return matched / len(instance)


@given(LETTERS, LETTERS, st.integers(1, 5))
def test_covered_counts_tokens_inside_shared_ngrams(instance: list[str], prompt: list[str], n: int) -> None:
    expected = share(instance, prompt, n) * len(instance) if instance else 0
    assert covered(instance, set(grams(prompt, n)), n) == pytest.approx(expected)


@given(st.lists(LETTERS, max_size=8), LETTERS, RULES)
def test_the_index_finds_every_hit_and_no_other(instances: list[list[str]], prompt: list[str], rule: Rule) -> None:
    """With three letters, many instances share n-grams, which the index omits where possible."""
    index = Index(instances, rule)
    shares = {i: share(tokens, prompt, min(rule.ngram, len(tokens))) for i, tokens in enumerate(instances) if tokens}
    tiny = {i for i, tokens in enumerate(instances) if len(tokens) < min(rule.ngram, 3) and tokens != prompt}
    found = dict(index.hits(prompt, index.candidates(prompt)))
    assert found == {i: pytest.approx(value) for i, value in shares.items() if value > rule.instance and i not in tiny}


@pytest.mark.parametrize(
    ("instance", "prompt", "hit"),
    [
        ("What is soft power?", "What is soft power?", True),
        ("What is soft power?", "Question: what is SOFT power\nAnswer:", True),
        ("What is soft power?", "What is power?", False),
        ("What is soft power?", "soft power: what is it?", False),
        ("Evaluate $102^2-98^2$.", "Evaluate $102^2-98^2$. Think first.", True),
        ("one two three four five six seven", "zero one two three four five six seven eight", True),
        ("one two three four five six seven", "one two three four five six 7", False),
        ("The trachea", "the trachea.", True),
        ("The trachea", "Describe the trachea", False),
        ("Why?", "why", True),
        ("Why?", "Say why it rains", False),
        ("?", "?", False),
    ],
)
def test_an_instance_shorter_than_an_ngram_is_matched_whole(instance: str, prompt: str, hit: bool) -> None:
    index = Index([words(instance), words("An instance of eight tokens or more is there too.")], Rule())
    assert dict(index.hits(words(prompt), index.candidates(words(prompt)))) == ({0: 1.0} if hit else {})


def test_verbatim_copies_of_every_problem_of_math_are_found() -> None:
    if not (SHARED / "math.jsonl").exists():
        pytest.skip("the shared data is not here")
    problems = [words(json.loads(line)["problem"]) for line in (SHARED / "math.jsonl").open()]
    index = Index(problems, Rule())
    assert sum(len(tokens) < 8 for tokens in problems) == 240
    for number, tokens in enumerate(problems):
        prompt = ["solve", *tokens, "step", "by", "step"] if len(tokens) > 2 else tokens
        assert number in dict(index.hits(prompt, index.candidates(prompt)))


def test_words_are_those_of_tulus_analyzer() -> None:
    assert words('Don\'t say "Hello, World!"; 3.5 - x_1*2\nback\\slash\ttab (é)') == [
        *("don't", "say", "hello", "world", "3", "5", "x_1*2", "back", "slash\ttab", "é")
    ]
    assert words("") == words(' ,.?!:;()"-\n\\') == []


def test_wording_that_all_instances_share_is_not_indexed() -> None:
    template = [f"t{i}" for i in range(12)]
    instances = [[*template, *(f"{number}-{i}" for i in range(20))] for number in range(50)]
    index = Index(instances, Rule())
    assert not index.postings[8].keys() & set(grams(template, 8))
    assert index.candidates(template) == set()
    assert index.candidates(instances[7]) == {7}


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


TEST = [f"evaluation question number {i} asks what {' '.join(f'w{i}x{j}' for j in range(12))} may be" for i in range(40)]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """bad.jsonl repeats 2 of 40 test questions (5 %), one of them twice; few.jsonl none of them, but half of another."""
    half = " ".join(TEST[5].split()[:10])
    bad = [
        {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": TEST[9]}]},
        {"messages": [{"role": "user", "content": "first"}, {"role": "user", "content": "PLEASE: " + TEST[3].upper() + "?!"}]},
        {"messages": [{"role": "user", "content": TEST[3]}]},
        {"prompt": TEST[4]},
    ]
    return {
        "bad": write(tmp_path / "bad.jsonl", bad),
        "few": write(tmp_path / "few.jsonl", [{"prompt": half}, {"prompt": "nothing of the kind: \ud800"}]),
        "eval": write(tmp_path / "test.jsonl", [{"question": text} for text in TEST]),
        "short": write(tmp_path / "short.jsonl", [{"problem": "2 + 2 = 4"}]),
    }


def test_the_report_names_sets_instances_and_rows(files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words_ = ["--train", files["bad"], files["few"], "--eval", files["eval"], files["short"], "--report", str(tmp_path / "r.json")]
    assert main(["decontaminate", *words_]) == 0
    bad, few = json.loads((tmp_path / "r.json").read_text())["sets"]
    assert (bad["contaminated"], few["contaminated"]) == (True, False)
    assert (bad["rows"], bad["rows_hitting"], few["rows_hitting"]) == (4, [1, 2, 3], [])
    long, short = bad["evaluations"]
    assert (long["instances"], long["share"], short["instances"], short["short"]) == (40, 0.05, 1, 1)
    assert long["hits"] == [
        {"instance": f"{files['eval']}:4", "row": f"{files['bad']}:2", "share": 1.0},
        {"instance": f"{files['eval']}:5", "row": f"{files['bad']}:4", "share": 1.0},
    ]
    assert "contaminated" in capsys.readouterr().out


def test_a_half_is_not_more_than_a_half() -> None:
    """8 of 16 tokens match: a share of 0.5, which does not exceed 0.5; 9 of 16 do."""
    tokens = [str(i) for i in range(16)]
    index = Index([tokens], Rule())
    assert dict(index.hits(tokens[:8], {0})) == {}
    assert dict(index.hits(tokens[:9], index.candidates(tokens[:9]))) == {0: 9 / 16}


@pytest.mark.parametrize(("remove", "kept"), [("instances", {"bad": 1, "few": 2}), ("sets", {"few": 2})])
def test_removal(files: dict[str, str], tmp_path: Path, remove: str, kept: dict[str, int]) -> None:
    words_ = ["--train", files["bad"], files["few"], "--eval", files["eval"], "--report", str(tmp_path / "r.json")]
    out = tmp_path / "clean"
    assert main(["decontaminate", *words_, "--remove", remove, "--out", str(out)]) == 0
    assert {path.stem: len(path.read_text().splitlines()) for path in out.iterdir()} == kept
    clean = Search([Source(files["eval"])], Rule()).finding(Source(str(out / "few.jsonl")))
    assert clean.hitting == []


def test_bad_input_is_answered_in_one_line(files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def complaint(*words_: str) -> str:
        assert main(["decontaminate", *words_, "--report", str(tmp_path / "r.json")]) == 1
        return capsys.readouterr().err

    assert "path='no.jsonl' does not exist" in complaint("--train", "no.jsonl", "--eval", files["eval"])
    assert "few.jsonl:1 has no question; it has prompt" in complaint(
        "--train", files["few"], "--eval", files["eval"], "--train-field", "question"
    )
    number = write(tmp_path / "n.jsonl", [{"prompt": 3}])
    assert "n.jsonl:1: prompt must be text, not int" in complaint("--train", number, "--eval", files["eval"])
    odd = write(tmp_path / "odd.jsonl", [{"messages": "hi"}])
    assert "odd.jsonl:1: messages must be a list of objects" in complaint("--train", odd, "--eval", files["eval"])
    assert "--remove needs --out" in complaint("--train", files["few"], "--eval", files["eval"], "--remove", "sets")
    same = write(tmp_path / "x.jsonl", [{"prompt": "a"}])
    doubled = complaint("--train", same, same, "--eval", files["eval"], "--remove", "sets", "--out", str(tmp_path / "o"))
    assert "2 training sets would be written to" in doubled
    there = complaint("--train", same, "--eval", files["eval"], "--remove", "sets", "--out", str(tmp_path))
    assert "x.jsonl already exists" in there
    assert main(["decontaminate", "--train", same, "--eval", files["eval"], "--report", "no/such/r.json"]) == 1
    assert "its folder does not exist" in capsys.readouterr().err
    assert "ngram=0 must be at least 1" in complaint("--train", same, "--eval", files["eval"], "--ngram", "0")


def test_what_the_benchmark_plants_is_found(tmp_path: Path) -> None:
    expected = generate(tmp_path, prompts=5000, tests=200)
    evaluations = [Source(str(path)) for path in sorted(tmp_path.glob("eval*.jsonl"))]
    found = Search(evaluations, Rule()).finding(Source(str(tmp_path / "train.jsonl")))
    assert set(found.hitting) == expected
    assert len(expected) == REPEATS
