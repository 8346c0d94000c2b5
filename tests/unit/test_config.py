"""Run configs: overrides, schedules, model shapes, and errors."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, get_scheduler

from engine.algorithms.sft import SFT
from engine.config import Model, ModelShape, Optim, Parallel, RopeScaling, Run, even_split, override, padded_vocab, to_dict
from engine.data.rows import Source
from engine.models.families import from_hf, to_hf
from tests.support.tulu3_definition import learning_rates

SHAPE = ModelShape(layers=30, hidden=576, ffn=1536, heads=9, kv_heads=3, vocab=49152, tied=True)
RUN = Run(Model(init=SHAPE), None, Optim(1e-3))


@pytest.mark.parametrize(
    ("assignment", "path", "value"),
    [
        ("optim.lr=2e-6", "optim.lr", 2e-6),
        ("optim.betas=[0.9, 0.95]", "optim.betas", (0.9, 0.95)),
        ("optim.schedule=cosine", "optim.schedule", "cosine"),
        ("parallel.tp=8", "parallel.tp", 8),
        ("parallel.stages=[18,12]", "parallel.stages", (18, 12)),
        ("parallel.distributed_optimizer=no", "parallel.distributed_optimizer", False),
        ("model.init.tied=true", "model.init.tied", True),
        ("out=runs/a=b", "out", "runs/a=b"),
    ],
)
def test_override(assignment: str, path: str, value: Any) -> None:
    results: Any = override(RUN, [assignment])
    for name in path.split("."):
        results = getattr(results, name)
    assert results == value
    assert type(results) is type(value)


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        (
            "optim.learningrate=1",
            "unknown setting 'optim.learningrate'; nearest: optim.weight_decay, optim.warmup_ratio; the settings are lr, schedule",
        ),
        ("seeed=1", "unknown setting 'seeed'; nearest: seed"),
        ("parallel.recompute=all", "parallel.recompute=all cannot be parsed; use one of none, swiglu, selective, full"),
        ("parallel.distributed_optimizer=maybe", "use true or false"),
        ("seed", "override 'seed' must be name=value"),
        ("seed.x=1", "has no field 'x'"),
        ("parallel.tp=0", "parallel.tp=0 must be at least 1"),
        ("parallel.vpp=2", "parallel.vpp=2 needs parallel.pp of at least 2"),
        ("optim.warmup_ratio=1.5", "warmup_ratio=1.5 must be at least 0 and below 1"),
        ("tokens_per_microbatch=0", "tokens_per_microbatch=0 must be at least 1"),
        ("model.init.kv_heads=2", "model.heads=9 must be a multiple of model.kv_heads=2"),
        ("parallel=1", "parallel cannot be set from the command line; set it in the recipe"),
    ],
)
def test_override_refuses(assignment: str, expected: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        override(RUN, [assignment])
    assert expected in str(caught.value)


SOURCES = replace(RUN, algorithm=SFT((Source("a.jsonl"),)))
LISTS = "algorithm.sources", "parallel.stages", "optim.betas"
BAD_OVERRIDES = [
    *(
        (f"{name}={value}", f"{name}={value} cannot be parsed")
        for name in LISTS
        for value in ("", "x", "[", "{}", "[null]", "[[1]]", "[NaN]")
    ),
    *((f"{name}={'[' * 100_000}", "nested too deep") for name in LISTS),
    *(
        (f"algorithm.sources=[{value}]", expected)
        for value, expected in (
            ('{"path": 1}', "str, not 1"),
            ('{"path": "x", "weight": "1"}', "a finite number, not '1'"),
            ('{"path": "x", "weight": 1e999}', "a finite number, not inf"),
            ('{"path": "x", "limit": 1.5}', "int, not 1.5"),
            ('{"path": "x", "limit": true}', "int, not True"),
            ('{"path": "x", "nope": 1}', "has no field 'nope'; it has path, weight"),
            ('{"path": "x", "path": "y"}', "duplicate key 'path'"),
            ("{}", "Source needs path"),
            ("5", "str, not 5"),
        )
    ),
    *((f"steps={value}", "steps=") for value in ("1e20", "1.0", "nan", "inf", "true", "", "9" * 20, "-" + "9" * 20, "9" * 5000, "0x10")),
    *(
        (f"optim.{name}={value}", f"optim.{name}=")
        for name in ("lr", "eps", "weight_decay", "max_grad_norm")
        for value in ("nan", "inf", "1e999", "-1", "x")
    ),
    ("optim.betas=[0.9]", "2 values, not 1"),
    ("optim.betas=[0.9, 1.0]", "optim.betas=[0.9, 1.0] must be two numbers from 0 to below 1"),
    ("optim.betas=[-0.1, 0.9]", "from 0 to below 1"),
    ("optim.eps=0", "must be above 0"),
    ("parallel.stages=[1.5]", "int, not 1.5"),
    ("parallel.pp=1000000000000", "must be at most 65536"),
    ("logging.every=-1", "logging.every=-1.0 must not be negative"),
    ("model.init=x", "model.init cannot be set from the command line"),
    ("model.init.rope_scaling=x", "model.init.rope_scaling cannot be set from the command line"),
    ("model.init.hidden=1000000000000", "model.hidden=1000000000000 must be a whole number from 1 to 1048576"),
    ("model.init.rope_theta=0", "model.rope_theta=0.0 must be a number from 1"),
    ("model.init.norm_eps=-1e-5", "model.norm_eps=-1e-05 must be a number"),
    ("model.init.head_dim=-16", "model.head_dim=-16 must be a whole number"),
    ("algorithm=x", "algorithm cannot be set from the command line"),
    ("out=", "out='' is not the name of a folder"),
    ("=1", "unknown setting ''"),
    ("optim..lr=1", "unknown setting 'optim..lr'"),
    ("a." * 5000 + "b=1", "unknown setting 'a.a."),
]


@pytest.mark.parametrize(("assignment", "expected"), BAD_OVERRIDES, ids=[assignment[:60] for assignment, _ in BAD_OVERRIDES])
def test_an_override_of_the_wrong_type_is_one_line(assignment: str, expected: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        override(SOURCES, [assignment])
    assert type(caught.value) is ValueError
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pair", [["optim.lr=1", "optim.lr.x=1"], ["optim.lr.x=1", "optim.lr=1"]])
def test_a_setting_and_its_field_exclude_each_other_in_any_order(pair: list[str]) -> None:
    with pytest.raises(ValueError, match="set only one of the two"):
        override(RUN, pair)


def test_none_sets_an_optional_field() -> None:
    scaled = replace(RUN, model=Model(init=replace(SHAPE, rope_scaling=RopeScaling())))
    assert override(scaled, ["model.init.rope_scaling=none"]).model.init == SHAPE
    assert override(scaled, ["model.init.rope_scaling.factor=4"]).model.init.rope_scaling.factor == 4.0


def test_overrides_are_taken_together_and_make_what_lies_in_tuples() -> None:
    """Neither of two settings that need each other has to come first; a source is a path, or an object of its fields."""
    assert override(RUN, ["parallel.vpp=2", "parallel.pp=3"]).parallel == Parallel(pp=3, vpp=2)
    run = replace(RUN, algorithm=SFT((Source("a.jsonl"),)))
    (named,) = override(run, ['algorithm.sources=["b.jsonl"]']).algorithm.sources
    assert named == Source("b.jsonl")
    mixed = override(run, ['algorithm.sources=["b.jsonl", {"path": "c", "weight": 2.0}]']).algorithm.sources
    assert mixed == (Source("b.jsonl"), Source("c", weight=2.0))
    for wrong in ('[{"where": "c"}]', '[{"path": "c", "weight": -1}]', "[3"):
        with pytest.raises(ValueError, match=r"algorithm.sources=.* cannot be parsed"):
            override(run, [f"algorithm.sources={wrong}"])
    with pytest.raises(ValueError, match="parallel is also set to '1'"):
        override(RUN, ["parallel=1", "parallel.tp=2"])


def test_layers_are_distributed_over_stages() -> None:
    assert Parallel(pp=2, vpp=2, count_embedding=True, count_loss=True).layers_per_stage(SHAPE) == [7, 8, 8, 7]
    assert Parallel(pp=3).layers_per_stage(SHAPE) == [10, 10, 10]
    assert Parallel(pp=2, stages=(18, 12)).layers_per_stage(SHAPE) == [18, 12]
    assert [sum(even_split(layers, 4)) for layers in range(9)] == list(range(9))
    assert even_split(10, 4) == [2, 3, 3, 2]


def test_schedules() -> None:
    linear = Optim(lr=1.0, warmup_ratio=0.1)
    assert [linear.lr_at(s, 20) for s in (0, 1, 2, 11, 19)] == pytest.approx([0.5, 1.0, 1.0, 0.5, 1 / 18])
    cosine = replace(linear, schedule="cosine")
    assert [cosine.lr_at(s, 20) for s in (0, 2, 11)] == pytest.approx([0.5, 1.0, 0.5])
    constant = replace(linear, schedule="constant")
    assert [constant.lr_at(s, 20) for s in (0, 2, 19)] == pytest.approx([0.5, 1.0, 1.0])


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(("warmup", "steps", "updates"), [(0.0, 7, 1), (0.1, 30, 1), (0.29, 25, 4), (0.03, 10, 2)])
def test_hugging_faces_schedule(schedule: Any, warmup: float, steps: int, updates: int) -> None:
    """The rates of transformers' schedulers, one step after each update; and, for the linear one, of Tülu 3's description."""
    optim, count = Optim(lr=0.5, schedule=schedule, warmup_ratio=warmup, hf_schedule=True), steps * updates
    rates = [optim.lr_at(step, steps, update, updates) for step in range(steps) for update in range(updates)]
    theirs = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    scheduler = get_scheduler(name, theirs, num_warmup_steps=int(count * warmup), num_training_steps=count)
    expected = []
    for _ in range(count):
        expected.append(scheduler.get_last_lr()[0])
        theirs.step()
        scheduler.step()
    assert rates == pytest.approx(expected, rel=1e-12)
    if schedule == "linear":
        assert rates == pytest.approx(learning_rates(0.5, warmup, count), rel=1e-12)
    ours = replace(optim, hf_schedule=False)
    assert {ours.lr_at(0, steps, update, updates) for update in range(updates)} == {ours.lr_at(0, steps)}


@pytest.mark.parametrize("shape", [SHAPE, replace(SHAPE, tied=False, rope_scaling=RopeScaling(), head_dim=32, rope_theta=5e5)])
def test_a_shape_round_trips_through_a_hugging_face_config(shape: ModelShape) -> None:
    assert from_hf(to_hf(shape)) == shape
    assert from_hf(LlamaConfig(**to_hf(shape)).to_dict()) == shape


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model_type": "qwen2"}, "model_type='qwen2' is not supported"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5 is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope scaling 'yarn' is not supported"),
    ],
)
def test_shapes_that_cannot_be_represented_are_refused(change: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        from_hf(to_hf(SHAPE) | change)


def test_number_of_parameters_of_known_models() -> None:
    assert SHAPE.parameters == 134_515_008
    assert ModelShape(32, 4096, 14336, 32, 8, 128256).parameters == 8_030_261_248
    assert ModelShape(126, 16384, 53248, 128, 8, 128256).parameters == 405_853_388_800


@pytest.mark.parametrize(
    ("vocab", "tp", "padded"), [(128256, 8, 128256), (49152, 3, 49152), (128264, 1, 128320), (128264, 8, 128320), (250, 3, 384)]
)
def test_padded_vocab(vocab: int, tp: int, padded: int) -> None:
    assert padded_vocab(vocab, tp) == padded
    assert padded % (8 * tp) == 0


@pytest.mark.parametrize(
    ("parallel", "world", "expected"),
    [
        (Parallel(tp=2), 2, "parallel.tp=2 must divide model.heads=9, model.kv_heads=3 and model.ffn=1536; use parallel.tp=1"),
        (
            Parallel(tp=3, pp=2),
            4,
            "parallel.tp=3 x parallel.pp=2 = 6 must divide the world size of 4; use parallel.tp=1, or 6 ranks",
        ),
        (
            Parallel(pp=4),
            4,
            "pp=4 x parallel.vpp=1 must divide model.layers=30; use parallel.pp=1 or 2, or parallel.count_embedding=true "
            "with count_loss=true, or parallel.stages=[7, 8, 8, 7]",
        ),
        (
            Parallel(pp=3, count_loss=True),
            3,
            "model.layers=30 (31 slots with loss counted); use parallel.pp=1, or parallel.stages=[10, 10, 10]",
        ),
        (
            Parallel(pp=2, stages=(18, 13)),
            2,
            "stages=[18, 13] must have pp x vpp = 2 entries that add up to model.layers=30; use parallel.stages=[15, 15]",
        ),
    ],
)
def test_a_grid_that_does_not_fit_names_one_that_does(parallel: Parallel, world: int, expected: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        parallel.check(SHAPE, world)
    assert expected in str(caught.value)


def test_identity_does_not_depend_on_the_layout() -> None:
    assert override(RUN, ["parallel.pp=2", "tokens_per_microbatch=9", "out=elsewhere", "save_every=3"]).identity() == RUN.identity()
    for change in ("optim.lr=1", "seed=3", "steps=7", "model.init.layers=6"):
        assert override(RUN, [change]).identity() != RUN.identity()
    assert json.loads(json.dumps(to_dict(RUN)))["optim"]["is"] == "Optim"
