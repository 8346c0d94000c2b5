"""Evaluation: published prompts and scoring rules, standard errors, and every suite end to end."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from engine.config import Model
from engine.data.tokenizer import load_tokenizer
from engine.distributed.world import World
from engine.evals.evaluate import Result, judged
from engine.evals.exam import EvalConfig, Exam, prepare
from engine.evals.generation import EvalResponse
from engine.evals.statistics import Estimate, pass_at_k
from engine.evals.suite import SUITES, suite
from tests.e2e.test_cli import complaint, engine
from tests.support import jobs
from tests.support.paths import GOLDEN
from tests.support.pool import ranks

ROWS: dict[str, list[dict[str, Any]]] = {
    "gsm8k": [{"question": f"Ann has {n} pens and finds {n}. How many?", "answer": f"{n} + {n} = {2 * n}\n#### {2 * n}"} for n in (3, 600)],
    "math": [{"problem": f"What is ${n}^2$?", "solution": f"It is $\\boxed{{{n * n}}}$."} for n in (2, 3)],
    "ifeval": [
        {
            "prompt": "Say it without commas, in quotation marks.",
            "instruction_id_list": ["punctuation:no_comma", "startend:quotation"],
            "kwargs": [{}, {"num_words": None}],
        }
    ],
    "humaneval": [
        {
            "prompt": 'def double(x: int) -> int:\n    """Twice x."""\n',
            "entry_point": "double",
            "test": "def check(candidate):\n    assert candidate(2) == 4\n",
        }
    ],
    "nq_open": [{"question": "where is the louvre", "answer": ["Paris", "the city of Paris"]}],
    "popqa": [{"question": "Where is the Louvre?", "possible_answers": '["Paris"]'}],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with the byte tokenizer that generates ASCII only, so that different tokens give different text."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, vocab_size=260, max_position_embeddings=6144, eos_token_id=259, initializer_range=0.2)  # type: ignore[arg-type]
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[:128] *= 4
        model.lm_head.weight[128:] = 0
    model.save_pretrained(folder)
    load_tokenizer("bytes").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The paths of the rows of each suite."""
    folder = tmp_path_factory.mktemp("data")
    paths = {}
    for name, rows in ROWS.items():
        paths[name] = str(folder / f"{name}.jsonl")
        Path(paths[name]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for part, count in (("dev", 5), ("val", 3)):
        with (folder / f"plain_sums_{part}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([[f"{n} + 1, is?", n, n + 1, n + 2, n + 3, "B"] for n in range(count)])
    return paths | {"mmlu": str(folder)}


def exam(name: str, model: Path, data: dict[str, str], chat: bool = False) -> Exam:
    world = World("cpu", 0, 1, torch.device("cpu"))
    return prepare(EvalConfig(Model(str(model))), [name], {name: data[name]}, 0, chat, world)[1][0]


@pytest.mark.parametrize("name", SUITES)
def test_the_first_prompt_equals_the_published_one(name: str, model: Path, data: dict[str, str]) -> None:
    """Golden files contain the exact prompts, without and with a chat template."""
    for chat in (False, True):
        golden = GOLDEN / f"eval_{name}{'_chat' if chat else ''}.txt"
        assert exam(name, model, data, chat).prompt_text(0) == golden.read_text()


def metrics(exam: Exam, *texts: str) -> dict[str, float]:
    """The scores of these responses to the first item."""
    first = Exam(**{**exam.__dict__, "items": exam.items[:1]})
    result = Result(first, judged(first, [[EvalResponse(text, len(text), "stop") for text in texts]]))
    return {name: estimate.value for name, estimate in result.metrics.items()}


def test_gsm8k_reads_the_last_number_and_the_stated_answer(model: Path, data: dict[str, str]) -> None:
    asked = exam("gsm8k", model, data)
    assert metrics(asked, " 3 + 3 = 6. The answer is 6.\n\n") == {"flexible": 1, "strict": 1}
    assert metrics(asked, " 3 + 3 = 6, so 6") == {"flexible": 1, "strict": 0}
    assert metrics(asked, " The answer is 6. She had 3") == {"flexible": 0, "strict": 1}
    assert metrics(asked, " The answer is 16") == {"flexible": 0, "strict": 0}
    assert metrics(asked, "") == {"flexible": 0, "strict": 0}
    assert asked.items[1].truth == "1200"


def test_math_and_open_questions(model: Path, data: dict[str, str]) -> None:
    assert metrics(exam("math", model, data), r" $\boxed{4.0}$. I hope it is correct.") == {"accuracy": 1}
    assert metrics(exam("math", model, data), r" $\boxed{5}$") == {"accuracy": 0}
    for name in ("nq_open", "popqa"):
        assert metrics(exam(name, model, data), " It is in paris, France!") == {"accuracy": 1}
        assert metrics(exam(name, model, data), " the comparison") == {"accuracy": 0}


def test_ifeval_counts_prompts_and_instructions_strictly_and_loosely(model: Path, data: dict[str, str]) -> None:
    asked = exam("ifeval", model, data)
    levels = ("prompt, strict", "prompt, loose", "instruction, strict", "instruction, loose")
    assert metrics(asked, '"So it is"') == dict.fromkeys(levels, 1.0)
    assert metrics(asked, 'Sure, here:\n"So it is"') == dict(zip(levels, (0, 1, 0, 1), strict=True))
    assert metrics(asked, '"So, it is"') == dict(zip(levels, (0, 0, 0.5, 0.5), strict=True))


def test_humaneval_runs_completions_and_blocks(model: Path, data: dict[str, str]) -> None:
    right, wrong = "    return 2 * x\n", "    return x\n"
    block = "Here:\n```python\ndef double(x):\n    return x + x\n```\nDone."
    results = metrics(exam("humaneval", model, data), right, block, *[wrong] * 10)
    assert results == {"pass@1": pytest.approx(2 / 12), "pass@10": pytest.approx(1 - 1 / 66)}
    assert metrics(exam("humaneval", model, data), right) == {"pass@1": 1}


def test_stop_strings_are_for_plain_text_only(model: Path, data: dict[str, str]) -> None:
    """By chat, "```python\\n\\ndef" must not end at "\\ndef", nor an answer at its first line."""
    for name in SUITES:
        plain, chat = (exam(name, model, data, chat).decoding for chat in (False, True))
        if plain is None or chat is None:
            assert plain is chat
        else:
            assert chat.stop == ()
            assert chat == replace(plain, stop=())
    plain = exam("humaneval", model, data).decoding
    assert plain is not None
    assert "\ndef" in plain.stop


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(correct: list[bool], draw: st.DataObject) -> None:
    k = draw.draw(st.integers(1, len(correct)))
    draws = list(combinations(correct, k))
    assert pass_at_k(len(correct), sum(correct), k) == pytest.approx(sum(map(any, draws)) / len(draws))


@given(st.lists(st.booleans(), min_size=1, max_size=50))
def test_one_value_per_item_has_the_binomial_error(values: list[bool]) -> None:
    p, n = sum(values) / len(values), len(values)
    estimate = Estimate.of([[float(value)] for value in values])
    assert estimate == (pytest.approx(p), pytest.approx((p * (1 - p) / n) ** 0.5), n)


def test_values_of_one_item_are_not_independent() -> None:
    """Repeating each value four times must not halve the error. Pairs of independent values hardly change it."""
    values = [0.0, 1.0, 1.0, 1.0, 0.0, 1.0]
    assert Estimate.of([[x] * 4 for x in values]) == pytest.approx(Estimate.of([[x] for x in values]))
    free = np.random.default_rng(0).integers(0, 2, 4000).astype(float)
    assert Estimate.of(free.reshape(-1, 2).tolist()).error == pytest.approx(Estimate.of(free.reshape(-1, 1).tolist()).error, rel=0.05)


def test_wilsons_interval_at_known_points() -> None:
    assert Estimate.of([[1.0]] * 8 + [[0.0]] * 2).interval() == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert Estimate.of([[0.0]] * 200).interval() == pytest.approx((0.0, 0.01885), abs=1e-5)


def results_of(folder: Path) -> dict[str, Any]:
    """results.json, and the lines of each suite."""
    results = {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in folder.glob("*.jsonl")}
    return results | {"results": json.loads((folder / "results.json").read_text())["suites"]}


def test_every_suite_end_to_end(model: Path, data: dict[str, str], tmp_path: Path) -> None:
    pairs = [word for name, path in data.items() for word in ("--data", f"{name}={path}")]
    words = [model, "--suite", ",".join(data), *pairs, "--limit", 1, "--no-chat", "--out", tmp_path / "o", "max_tokens=4", "samples=2"]
    code, stdout, stderr = engine("eval", *words)
    assert code == 0, stderr
    results = results_of(tmp_path / "o")
    for name in data:
        assert name in stdout
        (line,) = results[name]
        assert line["prompt"] == (GOLDEN / f"eval_{name}.txt").read_text()
        assert len(line["responses"]) == (1 if name == "mmlu" else 2)
        assert all(0 < r["tokens"] <= 4 and r["verdicts"] for r in line["responses"])
        for metric in results["results"][name]["metrics"].values():
            assert 0 <= metric["value"] <= 1
            assert metric["items"] == 1


def test_two_ranks_equal_one(model: Path, data: dict[str, str], tmp_path: Path) -> None:
    """Sampled responses and log-probs do not depend on the number of ranks or the batch size."""
    pairs = [word for name in ("gsm8k", "mmlu") for word in ("--data", f"{name}={data[name]}")]
    words = ["eval", str(model), "--suite", "gsm8k,mmlu", *pairs, "--no-chat", "max_tokens=6", "samples=3", "temperature=1"]
    for size, more in ((1, ["rollout.max_num_seqs=1"]), (2, ["parallel.tp=2"])):
        results = ranks(size).run(jobs.command, words=[*words, "--out", str(tmp_path / str(size)), *more])
        assert [code for code, _, _ in results] == [0] * size, results
    one, two = results_of(tmp_path / "1"), results_of(tmp_path / "2")
    assert one["gsm8k"] == two["gsm8k"]
    assert len({r["text"] for r in one["gsm8k"][0]["responses"]}) > 1
    for a, b in zip(one["mmlu"], two["mmlu"], strict=True):
        assert numbers(a) == pytest.approx(numbers(b), abs=2e-4)


def numbers(line: dict[str, Any]) -> list[float]:
    """The four log-probs in the reason of a chosen answer."""
    reason = line["responses"][0]["verdicts"][0]["reason"]
    return [float(word.split()[1]) for word in reason.removeprefix("log-probabilities ").split(", ")]


def test_choices_are_compared_by_log_probs(model: Path, data: dict[str, str], tmp_path: Path) -> None:
    """Against transformers: " A" to " D" after the golden prompt."""
    assert engine("eval", model, "--suite", "mmlu", "--data", f"mmlu={data['mmlu']}", "--no-chat", "--out", tmp_path / "o")[0] == 0
    lines = results_of(tmp_path / "o")["mmlu"]
    assert len(lines) == 3
    network = LlamaForCausalLM.from_pretrained(model)
    for line in lines:
        expected = []
        for letter in "ABCD":
            tokens = torch.tensor([list((line["prompt"] + " " + letter).encode())])
            with torch.no_grad():
                logprobs = network(tokens).logits[0, :-1].log_softmax(-1)  # type: ignore[operator]
            expected.append(logprobs[-2:].gather(1, tokens[0, -2:, None]).sum().item())
        assert numbers(line) == pytest.approx(expected, abs=2e-4)
        assert line["responses"][0]["text"] == "ABCD"[int(np.argmax(expected))]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--suite", "gsm9k"], "suite='gsm9k' is unknown; use one of gsm8k, math, ifeval"),
        (["--suite", "gsm8k", "--data", "gsm8k=no.jsonl"], "path='no.jsonl' does not exist"),
        (["--suite", "gsm8k", "--data", "no.jsonl"], "--data no.jsonl must be SUITE=PATH"),
        (["--suite", "gsm8k", "--data", "math=x.jsonl"], "--data math: not in --suite gsm8k"),
        (["--suite", "gsm8k", "--limit", -1], "--limit -1 must not be negative"),
        (["--suite", "gsm8k", "samples=0"], "samples=0"),
        (["--suite", "gsm8k", "max_tokens=6000"], "over the model's context of 6144; shorten it or lower max_tokens"),
        (["--suite", "gsm8k", "parallel.tp=3"], "parallel.tp=3 must divide"),
        (["--suite", "gsm8k", "smaples=3"], "unknown setting 'smaples'; nearest: samples"),
    ],
)
def test_bad_arguments_are_reported_in_one_line(words: list[object], expected: str, model: Path, data: dict[str, str]) -> None:
    given = [] if "--data" in words else ["--data", f"gsm8k={data['gsm8k']}"]
    assert expected in complaint("eval", model, *words, *given)


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("gsm8k", {"problem": "?"}, "rows.jsonl:1 is not a row of suite gsm8k: it has no 'question'; it has problem"),
        ("gsm8k", {"question": "?", "answer": "none"}, "truth='none' must be a string with a number"),
        ("nq_open", {"question": "?", "answer": [""]}, "must be a list of answers, none of them blank"),
        ("ifeval", {"prompt": "?", "instruction_id_list": ["no:such"], "kwargs": [{}]}, "'no:such' is unknown"),
        ("humaneval", {"prompt": 1, "test": "", "entry_point": ""}, "has no tests for verifier=code"),
    ],
)
def test_bad_rows_are_named(name: str, row: dict[str, Any], expected: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    line = complaint("eval", model, "--suite", name, "--data", f"{name}={tmp_path / 'rows.jsonl'}")
    assert expected in line


def test_results_are_not_overwritten(model: Path, data: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{}")
    words = ["--suite", "gsm8k", "--data", f"gsm8k={data['gsm8k']}", "--out", tmp_path]
    assert "results.json already exists" in complaint("eval", model, *words)


def test_an_invalid_model_is_refused(data: dict[str, str], tmp_path: Path) -> None:
    words = ["--suite", "gsm8k", "--data", f"gsm8k={data['gsm8k']}"]
    assert "has no config.json" in complaint("eval", tmp_path, *words)


def test_mmlu_as_a_dataset_equals_its_tables(model: Path, data: dict[str, str], tmp_path: Path) -> None:
    """With mixed subjects: the examples are those of the question's subject."""

    def row(subject: str, n: int) -> dict[str, Any]:
        return {"subject": subject, "question": f"{n} + 1, is?", "choices": [str(n + i) for i in range(4)], "answer": 1}

    dev = [row(subject, n) for n in range(5) for subject in ("plain_sums", "other")]
    parts = {"dev": dev, "test": [row("plain_sums", 0), row("other", 7)]}
    datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in parts.items()}).save_to_disk(tmp_path / "mmlu")
    asked = exam("mmlu", model, {"mmlu": str(tmp_path / "mmlu")})
    golden = (GOLDEN / "eval_mmlu.txt").read_text()
    assert asked.prompt_text(0) == golden
    assert asked.prompt_text(1) == golden.replace("plain sums", "other").removesuffix("0 + 1, is?\nA. 0\nB. 1\nC. 2\nD. 3\nAnswer:") + (
        "7 + 1, is?\nA. 7\nB. 8\nC. 9\nD. 10\nAnswer:"
    )


def test_an_invalid_table_of_choices_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "x_dev.csv").write_text("a question,1,2,3,4,E\n")
    assert "x_dev.csv:1: a row must be a question, four choices and a letter from A to D" in complaint(
        "eval", model, "--suite", "mmlu", "--data", f"mmlu={tmp_path}"
    )


def test_all_suites_load() -> None:
    assert [suite(name).name for name in SUITES] == list(SUITES)
