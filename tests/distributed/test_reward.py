"""The reward model: its loss against the definition, invariance to the layout, and equal scores in transformers."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.data import preferences
from engine.batching.build import batch
from engine.config import Model, Parallel
from engine.data.pairs import grouped, prepare_pairs
from engine.data.rows import Source
from engine.data.template import ChatTemplate
from engine.data.tokenizer import load_tokenizer
from engine.data.wordproblems import pairs, problems, write
from engine.losses import reward_bt
from engine.models.families import from_hf, to_hf
from tests.distributed.test_weights import make_folder, read
from tests.e2e.test_cli import complaint, engine
from tests.support import jobs
from tests.support.pool import ranks

MODEL = Model(init=jobs.TINY, head="scalar")
LAYOUTS = [(2, Parallel()), (2, Parallel(tp=2)), (2, Parallel(pp=2)), (2, Parallel(pp=2, vpp=2)), (4, Parallel(tp=2, pp=2))]


def test_loss_and_gradient_are_those_of_the_definition() -> None:
    """In float64, one pair at a time, with trailing padding that belongs to no sequence."""
    (packed,) = batch(grouped(jobs.pairs_with_reference(0)), 1000, total_multiple=64)
    assert packed.index_S[-1] == -1
    draw = torch.Generator().manual_seed(0)
    value_T = (3 * torch.randn(len(packed.tokens_T), generator=draw)).requires_grad_()
    loss = reward_bt(value_T, packed)
    loss.total.backward()

    ends = dict(zip(packed.index_S, (packed.cu_seqlens[1:] - 1).tolist(), strict=True))
    values, total, gradient = value_T.detach().double(), 0.0, torch.zeros(len(value_T), dtype=torch.float64)
    margins = []
    for pair in range(8):
        chosen, rejected = ends[2 * pair], ends[2 * pair + 1]
        margins.append(float(values[chosen] - values[rejected]))
        total += math.log1p(math.exp(-margins[-1]))
        slope = 1 / (1 + math.exp(margins[-1]))
        gradient[chosen] -= slope
        gradient[rejected] += slope
    assert loss.count == 8
    assert loss.total.item() == pytest.approx(total, rel=1e-6)
    assert value_T.grad is not None
    torch.testing.assert_close(value_T.grad.double(), gradient, rtol=1e-6, atol=1e-7)
    means = {name: float(parts[0]) / parts[1] for name, parts in loss.metrics.items() if len(parts) == 2}
    assert means["loss"] == pytest.approx(total / 8, rel=1e-6)
    assert means["reward/margin"] == pytest.approx(np.mean(margins), rel=1e-6)
    assert means["reward/margin"] == pytest.approx(means["reward/chosen"] - means["reward/rejected"], rel=1e-6)
    assert means["reward/accuracy"] == np.mean([margin > 0 for margin in margins])
    assert means["length/chosen"] == np.mean([sample.mask.sum() for sample in grouped(jobs.pairs_with_reference(0))[::2]])
    assert means["length/rejected"] == np.mean([sample.mask.sum() for sample in grouped(jobs.pairs_with_reference(0))[1::2]])


def test_far_margins_and_no_pairs() -> None:
    (packed,) = batch(grouped(jobs.pairs_with_reference(0, count=1)), 1000)
    value_T = torch.zeros(len(packed.tokens_T))
    value_T[packed.cu_seqlens[packed.index_S.index(1) + 1] - 1] = 200.0
    value_T.requires_grad_()
    loss = reward_bt(value_T, packed)
    loss.total.backward()
    assert loss.total.item() == 200.0
    assert value_T.grad is not None
    assert (value_T.grad.min().item(), value_T.grad.max().item()) == (-1.0, 1.0)
    padding = replace(packed, index_S=(-1,) * len(packed.index_S))
    value_T.grad.zero_()
    nothing = reward_bt(value_T, padding)
    nothing.total.backward()
    assert (nothing.total.item(), nothing.count) == (0.0, 0)
    assert not value_T.grad.any()


@lru_cache
def one_rank(job: Any) -> Any:
    return ranks(1).run(job, parallel=Parallel(), model=MODEL)[0]


def check_same(size: int, parallel: Parallel, job: Any = jobs.reward_steps, **cut: Any) -> None:
    for results in ranks(size).run(job, parallel=parallel, model=MODEL, **cut):
        for actual, expected in zip(results, one_rank(job), strict=True):
            assert actual == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(("size", "parallel"), [*LAYOUTS, (8, Parallel(tp=2, pp=2))], ids=str)
def test_the_same_on_any_grid(size: int, parallel: Parallel) -> None:
    check_same(size, parallel)


@pytest.mark.parametrize("budget", [48, 1000])
@pytest.mark.parametrize("parallel", [Parallel(), Parallel(tp=2), Parallel(pp=2)], ids=str)
def test_the_same_in_any_microbatches(parallel: Parallel, budget: int) -> None:
    check_same(2, parallel, budget=budget)


@pytest.mark.parametrize("parallel", [Parallel(), Parallel(tp=2, recompute="full")], ids=str)
def test_the_same_in_any_order_of_pairs(parallel: Parallel) -> None:
    check_same(2, parallel, order=5)


@pytest.mark.parametrize("parallel", [Parallel(), Parallel(tp=2), Parallel(pp=2)], ids=str)
def test_a_critic_learns_by_the_same_contract(parallel: Parallel) -> None:
    """With a loss over the values of all tokens with mask 1, as in RLVR's critic."""
    check_same(2, parallel, jobs.critic_steps)


def train(size: int, parallel: Parallel, out: Path, model: Model = MODEL, **steps: Any) -> list[dict[str, float]]:
    out.mkdir(exist_ok=True)
    return ranks(size).run(jobs.train_and_save, parallel=parallel, model=model, out=out, **steps)[0]


@pytest.mark.parametrize(("size", "parallel"), [(1, Parallel()), *LAYOUTS[1:2], *LAYOUTS[3:]], ids=str)
def test_resumed_is_bitwise_uninterrupted(size: int, parallel: Parallel, tmp_path: Path) -> None:
    full = train(size, parallel, tmp_path / "run", first=0, last=4, save_at=2)
    assert train(size, parallel, tmp_path / "run", first=2, last=4) == full[2:]


def test_resumed_on_another_grid_but_not_under_another_head(tmp_path: Path) -> None:
    full = train(2, Parallel(tp=2), tmp_path / "run", first=0, last=3, save_at=2)
    (rest,) = train(2, Parallel(pp=2), tmp_path / "run", first=2, last=3)
    assert rest == pytest.approx(full[2], rel=1e-5)
    with pytest.raises(RuntimeError, match="another model \\(architectures="):
        train(1, Parallel(), tmp_path / "run", Model(init=jobs.TINY), first=2, last=3)


def test_the_head_starts_the_same_everywhere(tmp_path: Path) -> None:
    heads = []
    for number, (size, parallel) in enumerate([(1, Parallel()), (2, Parallel(tp=2)), (4, Parallel(tp=2, pp=2))]):
        (tmp_path / str(number)).mkdir()
        ranks(size).run(jobs.export, parallel=parallel, model=MODEL, folder=tmp_path / str(number))
        results = read(tmp_path / str(number))
        assert "lm_head.weight" not in results
        heads.append(results["score.weight"])
    assert heads[0].shape == (1, 64)
    assert all(torch.equal(head, heads[0]) for head in heads)
    assert 0.7 < heads[0].std().item() * math.sqrt(65) < 1.3


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model saved by transformers."""
    return make_folder(tmp_path_factory.mktemp("base") / "model", replace(jobs.TINY, tied=request.param, max_length=64))


@pytest.mark.parametrize(("size", "parallel"), [(1, Parallel()), (2, Parallel(tp=2)), (4, Parallel(tp=2, pp=2))], ids=str)
def test_from_a_language_model_to_transformers_and_back(base: Path, size: int, parallel: Parallel, tmp_path: Path) -> None:
    """After two steps from the language model, the export has transformers' values at every token and is imported bit for bit."""
    first, second = tmp_path / "first", tmp_path / "second"
    shape = from_hf(json.loads((base / "config.json").read_text())).with_scalar_head()
    for folder in (first, second):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(to_hf(shape)))
    ranks(size).run(jobs.export, parallel=parallel, model=Model(str(base), head="scalar"), folder=first, steps=2)
    ranks(size).run(jobs.export, parallel=parallel, model=Model(str(first)), folder=second)
    written, again, original = read(first), read(second), read(base)
    assert written.keys() == again.keys() == (original.keys() - {"lm_head.weight"}) | {"score.weight"}
    assert all(torch.equal(written[name], again[name]) for name in written)
    assert not torch.equal(written["model.norm.weight"], original["model.norm.weight"])
    model: Any = AutoModelForSequenceClassification.from_pretrained(first, dtype=torch.float32)
    assert model.num_labels == 1
    results: dict[int, list[float]] = {}
    for part in ranks(size).run(jobs.logprobs, parallel=parallel, model=Model(str(first))):
        results |= part
    for i, sample in enumerate(jobs.samples(7)):
        with torch.no_grad():
            hidden = model.model(torch.from_numpy(sample.tokens[:-1]).long()[None]).last_hidden_state
            assert results[i] == pytest.approx(model.score(hidden)[0, :, 0].tolist(), abs=1e-4)


SHAPE = "ModelShape(layers=2, hidden=64, ffn=128, heads=8, kv_heads=4, vocab=260, max_length=512)"
RANDOM = f"Model(init={SHAPE}, head='scalar', tokenizer='bytes')"


def make_recipe(folder: Path, model: str) -> Path:
    """A recipe of three steps on generated pairs, into folder/out."""
    write(folder / "data.jsonl", pairs(40, 0))
    write(folder / "held_out.jsonl", pairs(4, 1, held_out=True))
    path = folder / "recipe.py"
    path.write_text(f"""
from engine.algorithms.reward import Reward
from engine.config import ModelShape, Logging, Model, Optim, Run
from engine.data.rows import Source

run = Run(
    model={model},
    algorithm=Reward(sources=(Source({str(folder / "data.jsonl")!r}),), held_out=(Source({str(folder / "held_out.jsonl")!r}),),
                     batch_size=8, max_length=256),
    optim=Optim(lr=1e-3), tokens_per_microbatch=1024, steps=3, out={str(folder / "out")!r}, logging=Logging(tensorboard=False),
)
""")
    return path


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return make_recipe(tmp_path, RANDOM)


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_train_export_and_score(recipe: Path, tmp_path: Path) -> None:
    """Rows of three kinds are scored in order, on two other layouts, as transformers scores them in one padded batch."""
    code, stdout, stderr = engine("run", recipe)
    assert code == 0, stderr
    assert "held-out reward/accuracy" in stdout
    assert engine("export", tmp_path / "out", tmp_path / "model")[0] == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    (problem,) = problems(1, 5)
    texts = [(row["prompt"], row["chosen"]) for row in pairs(3, 6)]
    rows = [{"prompt": prompt, "response": answer} for prompt, answer in texts]
    rows = [*rows, problem, {"tokens": tokenizer("cut short").input_ids}, {"tokens": [7]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for size, layout in ((1, "tp=1"), (2, "tp=2"), (2, "pp=2")):
        out = tmp_path / f"{layout}.jsonl"
        words = ["score", str(tmp_path / "model"), "--reward", "--data", str(tmp_path / "rows.jsonl"), "--out", str(out)]
        assert all(results[0] == 0 for results in ranks(size).run(jobs.command, words=[*words, f"parallel.{layout}"]))
    scores = {layout: lines(tmp_path / f"{layout}.jsonl") for layout in ("tp=1", "tp=2", "pp=2")}
    messages = [[{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}] for prompt, answer in texts]
    full = [tokenizer.apply_chat_template(turns, return_dict=False) for turns in [*messages, problem["messages"]]]
    assert [score["tokens"] for score in scores["tp=1"]] == [*full, *(row["tokens"] for row in rows[4:])]
    assert full[0][-1] == tokenizer.eos_token_id != tokenizer.pad_token_id
    padded = tokenizer.pad({"input_ids": [score["tokens"] for score in scores["tp=1"]]}, return_tensors="pt")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", dtype=torch.float32)
    with torch.no_grad():
        expected = model(**padded).logits[:, 0].tolist()
    for results in scores.values():
        assert [score["reward"] for score in results] == pytest.approx(expected, abs=1e-4)


def test_a_language_model_is_not_a_reward_model_nor_the_reverse(recipe: Path, base: Path, tmp_path: Path) -> None:
    needed = "is a language model, but a reward model is needed; to train one from it, use model.head=scalar"
    assert f"model init {needed}" in complaint("run", recipe, "model.head=auto")
    (tmp_path / "rows.jsonl").write_text('{"tokens": [1, 2]}\n')
    words = ["score", "--data", tmp_path / "rows.jsonl", "--out", tmp_path / "o.jsonl"]
    assert f"model {base} {needed}" in complaint(*words, base, "--reward")
    assert engine("run", recipe, "steps=1")[0] == 0
    assert engine("export", tmp_path / "out", tmp_path / "model")[0] == 0
    assert f"model {tmp_path / 'model'} is a reward model, but a language model is needed" in complaint(*words, tmp_path / "model")
    assert not (tmp_path / "o.jsonl").exists()


def test_a_new_head_is_reported_in_one_line(tmp_path: Path) -> None:
    """And config.json has one label and a padding token that ends no sequence, which transformers needs."""
    base = make_folder(tmp_path / "base", replace(jobs.TINY, vocab=260, max_length=512))
    code, stdout, stderr = engine("run", make_recipe(tmp_path, f"Model({str(base)!r}, head='scalar', tokenizer='bytes')"), "steps=1")
    assert code == 0, stderr
    expected_line = f"{base} is a language model: its scalar head is initialized from N(0, 1 / sqrt(65))"
    assert [line for line in stdout.splitlines() if "scalar head" in line] == [expected_line]
    config = json.loads((tmp_path / "out" / "model" / "config.json").read_text())
    assert (config["pad_token_id"], len(config["id2label"]), config["tie_word_embeddings"]) == (256, 1, False)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "2 labels \\(id2label\\) are not supported; this engine needs one"),
        ({"id2label": {"0": "a", "1": "b", "2": "c"}}, "3 labels"),
    ],
)
def test_a_classifier_of_several_labels_is_refused(change: dict[str, Any], expected: str) -> None:
    config = {name: value for name, value in to_hf(jobs.TINY.with_scalar_head()).items() if name != "id2label"}
    with pytest.raises(ValueError, match=expected):
        from_hf(config | change)


def test_a_scalar_head_ties_nothing() -> None:
    assert not replace(jobs.TINY, tied=True).with_scalar_head().tied
    with pytest.raises(ValueError, match=r"model\.tied=True .* set tied=False"):
        replace(jobs.TINY, tied=True, head="scalar")
    assert replace(jobs.TINY, tied=True).with_scalar_head().parameters == replace(jobs.TINY, tied=True).parameters + 64


def test_generated_pairs() -> None:
    """Right and wrong answers to the same problem with equally many steps, the same rows each time, and other held-out problems."""
    rows, held_out = pairs(300, 0), pairs(100, 1, held_out=True)
    assert rows == pairs(300, 0)
    answers = {row["messages"][0]["content"]: row["messages"][1]["content"] for row in problems(300, 0)}
    for row in [*rows, *held_out]:
        right, wrong = (row[half].rsplit(" ", 1)[1] for half in ("chosen", "rejected"))
        assert right != wrong
        assert row["chosen"].count("=") == row["rejected"].count("=")
        assert eval(row["chosen"].split(" =")[0]) == int(row["chosen"].split("= ")[1].split(".")[0])
        assert answers.get(row["prompt"], row["chosen"]) == row["chosen"]
    sums = [{row["chosen"] for row in part} for part in (rows, held_out)]
    assert not sums[0] & sums[1]


@pytest.mark.parametrize("max_length", [200, 40])
def test_the_last_token_is_read_also_of_an_answer_cut_short(max_length: int, tmp_path: Path) -> None:
    write(tmp_path / "data.jsonl", [{"prompt": "Which?", "chosen": "right " * 8, "rejected": "wrong " * 9}])
    chat = ChatTemplate(load_tokenizer("bytes"))
    source = Source(str(tmp_path / "data.jsonl"))
    results = prepare_pairs(source, chat, max_length=max_length, too_long="truncate", whole=True, cache=tmp_path / "cache")
    predicting = prepare_pairs(source, chat, max_length=200, cache=tmp_path / "cache")
    for judged, full in zip(results[0], predicting[0], strict=True):
        assert np.array_equal(judged.tokens[:-1], full.tokens[:max_length])
        assert judged.mask.sum() == full.mask[:max_length].sum()


def test_real_pairs_share_no_problem_with_those_held_out() -> None:
    graded = [(True, "2<<1+1=2>> A: 2"), (False, "3 A: 3"), (False, "4 A: 4"), (True, "A: 2")]
    rows = [{"question": f"{n}?"} | {f"model {i}": {"is_correct": c, "solution": s} for i, (c, s) in enumerate(graded)} for n in range(50)]
    made = list(preferences.pairs(rows))
    assert len(made) == 100
    assert {row["chosen"] for row in made} == {"2 A: 2", "A: 2"}
    assert {row["rejected"] for row in made} == {"3 A: 3", "4 A: 4"}
    trained, held_out = ({row["prompt"] for row in made if preferences.is_held_out(row) is side} for side in (False, True))
    assert len(trained) + len(held_out) == 50
    assert held_out
    assert list(preferences.pairs([rows[0] | {f"model {i}": {"is_correct": True, "solution": ""} for i in range(4)}])) == []
