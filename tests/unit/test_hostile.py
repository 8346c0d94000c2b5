"""Hostile arguments of the extension and of an edited Plan: ValueError, TypeError or the right result, never the end of the process."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from engine import _C
from engine.batching.build import build
from engine.batching.plan import Plan, plan
from engine.batching.ragged import Ragged

NUMBERS = [0, -1, 1, 2, 7, 2**31 - 1, 2**31, 2**62, 2**63 - 1, -(2**63), 2**63, 1.5, float("nan"), None, "8", True]
REFUSALS = (ValueError, TypeError)
REPETITIONS = range(300)


def hostile_arrays(right: np.ndarray, rng: np.random.Generator) -> list[Any]:
    """What is not `right`, but may look like it."""
    edges = [value for value in NUMBERS if type(value) is int and np.iinfo(right.dtype).min <= value <= np.iinfo(right.dtype).max]
    changed = right.copy()
    if len(changed):
        changed[rng.integers(len(changed))] = rng.choice(np.array(edges, right.dtype))
    wide = np.zeros(2 * len(right), right.dtype)
    wide[::2] = right
    read_only = right.copy()
    read_only.flags.writeable = False
    unaligned = np.frombuffer(b"\0" + right.tobytes(), np.uint8)[1:].view(right.dtype)
    other = [np.full(len(right), np.nan), right.astype(np.float32), right.astype(np.int16), right.astype(">i8"), right.astype(object)]
    return [
        changed,
        right[:0],
        right[:-1],
        np.append(right, right[:1]),
        wide[::2],
        read_only,
        unaligned,
        *other,
        right.tolist(),
        None,
        3,
        [],
        "a",
        right[None],
    ]


def plan_arguments() -> dict[str, Any]:
    lengths, zeros = np.array([3, 8, 1, 5, 0]), np.zeros(5, np.int64)
    columns = {"lengths": lengths, "group_ids": np.array([-1, -1, 2, -1, 2]), "step_ids": zeros, "trained": zeros}
    multiples = {"seq_multiple": 1, "total_multiple": 1, "microbatch_multiple": 1}
    return {**columns, "ranks": 2, "token_budget": 8, "cost": (1, 2, 3), **multiples, "sync": "step", "on_oversize": "alone"}


@pytest.mark.parametrize("seed", REPETITIONS)
def test_plan_refuses_or_is_right(seed: int) -> None:
    rng, arguments = np.random.default_rng(seed), plan_arguments()
    for name in rng.choice(list(arguments), rng.integers(1, 4), replace=False).tolist():
        if isinstance(arguments[name], np.ndarray):
            choices = hostile_arrays(arguments[name], rng)
        elif name == "cost":
            choices = [tuple(NUMBERS[i] for i in rng.integers(len(NUMBERS), size=3)), (0, 1), None, 7, (0, 2**62 - 1, 0)]
        else:
            choices = [*NUMBERS, "drop", "error", "microbatch", ""]
        arguments[name] = choices[rng.integers(len(choices))]
    try:
        planned = _C.plan(**arguments)
    except REFUSALS:
        return
    lengths, slots = arguments["lengths"], arguments["ranks"] * planned["microbatches"]
    assert len(planned["offsets"]) == slots + 1
    assert len(set(planned["order"].tolist())) == len(planned["order"])
    assert set(planned["order"].tolist()) | set(planned["oversize"].tolist()) == set(range(len(lengths)))
    for start, end in zip(planned["offsets"][:-1], planned["offsets"][1:], strict=True):
        ids = planned["order"][start:end].tolist()
        assert sum(int(lengths[i]) for i in ids) <= arguments["token_budget"] or set(ids) <= set(planned["oversize"].tolist())


def collate_arguments() -> dict[str, Any]:
    share = {"order": np.array([0, 1], np.int32), "offsets": np.array([0, 1, 2]), "lengths": np.array([3, 1]), "totals": np.array([4, 2])}
    rows = {"starts": np.array([0, 3]), "tokens": np.arange(6, dtype=np.int32), "mask": np.ones(4, np.uint8)}
    ids = {name: np.zeros(6, np.int32) for name in ("tokens_out", "targets_out", "positions_out")}
    fields = [(np.arange(4, dtype=np.float32), True, np.zeros(6, np.float32))]
    return {**share, **rows, **ids, "seq_multiple": 1, "fields": fields, "mask_out": np.zeros(6, np.uint8), "threads": 1}


def hostile_fields(arguments: dict[str, Any]) -> list[Any]:
    ((values, _, out),) = arguments["fields"]
    pairs = [
        (values, out[:-1]),
        (values[:1], out),
        (values, out[::2]),
        (values.tolist(), out),
        (out[:4], out),
        (np.full(4, np.nan), out),
        (None, out),
    ]
    changed: list[Any] = [[(of, per_token, to)] for of, to in pairs for per_token in (True, False)]
    return [*changed, [(values, True, out)] * 2, [(values, 3, out)], None, [()], [3], []]


@pytest.mark.parametrize("seed", REPETITIONS)
def test_collate_refuses_or_is_right(seed: int) -> None:
    rng, arguments = np.random.default_rng(seed), collate_arguments()
    for name in rng.choice(list(arguments), rng.integers(1, 4), replace=False).tolist():
        if isinstance(arguments[name], np.ndarray):
            shared = [arguments[other] for other in ("tokens_out", "lengths", "mask_out")]
            choices = [*hostile_arrays(arguments[name], rng), *shared, [arguments[name]] * 2]
        elif name == "fields":
            choices = hostile_fields(arguments)
        else:
            choices = NUMBERS
        arguments[name] = choices[rng.integers(len(choices))]
    try:
        cu_seqlens, index, count = _C.collate(**arguments)
    except REFUSALS:
        return
    assert len(cu_seqlens) == len(index) + len(count)
    assert arguments["positions_out"].tolist()[: arguments["lengths"][arguments["order"][0]]] == list(
        range(arguments["lengths"][arguments["order"][0]])
    )


@pytest.mark.parametrize(
    "rows", [None, 3, [3], [None], "ab", [[None]], [["a"]], [[2**31]], [[2**63]], [[float("nan")]], [(1,)], [np.ones(2)], [[[]]], [[], [1]]]
)
@pytest.mark.parametrize("flatten", [_C.flatten_ints, _C.flatten_flags, _C.flatten_floats])
def test_flatten_refuses_or_is_right(rows: Any, flatten: Any) -> None:
    try:
        values, offsets = flatten(rows)
    except REFUSALS:
        return
    assert offsets.tolist() == np.cumsum([0, *map(len, rows)]).tolist()
    assert len(values) == offsets[-1]


def ragged_of(lengths: list[int]) -> Ragged:
    return Ragged.of([[1] * (length + 1) for length in lengths], [[1] * length for length in lengths])


@pytest.mark.parametrize("seed", REPETITIONS)
@pytest.mark.parametrize("unchecked", [False, True])
def test_an_edited_plan_is_refused_or_built(seed: int, unchecked: bool) -> None:
    rng, lengths = np.random.default_rng(seed), [3, 8, 1, 5]
    planned = plan(lengths, 2, 8, seq_multiple=2, total_multiple=2)
    name = rng.choice([f.name for f in dataclasses.fields(Plan)])
    right = getattr(planned, name)
    choices = hostile_arrays(right, rng) if isinstance(right, np.ndarray) else NUMBERS
    value = choices[rng.integers(len(choices))]
    try:
        if unchecked:
            object.__setattr__(planned, name, value)
        else:
            planned = dataclasses.replace(planned, **{name: value})
        for rank in range(2):
            assert len(build(planned, rank, ragged_of(lengths))) == planned.microbatches
    except REFUSALS:
        return


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranks": 0}, "ranks=0 must be at least 1"),
        ({"seq_multiple": 0}, "seq_multiple=0 must be at least 1"),
        ({"total_multiple": -1}, "total_multiple=-1 must be at least 1"),
        ({"microbatch_multiple": 0}, "microbatch_multiple=0 must be at least 1"),
        ({"token_budget": 2**62}, "token_budget=4611686018427387904 exceeds"),
        ({"ranks": 2**62}, "ranks=4611686018427387904 times microbatch_multiple=1 is over"),
        ({"cost": (0, -1, 0)}, "cost has -1"),
        ({"cost": (0, 2**62, 0)}, "cost has 4611686018427387904"),
        ({"sync": "never"}, "sync='never' is unknown"),
        ({"on_oversize": "cut"}, "on_oversize='cut' is unknown"),
        ({"trained": np.array([0, 0, -1, 0, 0])}, r"trained\[2\]=-1 must be from 0"),
        ({"lengths": [3, 8, 1, 5, 0]}, "lengths is list; pass a contiguous, one-dimensional numpy array of int64"),
        ({"lengths": np.zeros((5, 1), np.int64)}, r"lengths is int64 of shape \(5, 1\)"),
        ({"group_ids": np.zeros(4, np.int64)}, "group_ids has 4 entries for 5 lengths"),
    ],
)
def test_plan_names_the_argument_and_its_value(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _C.plan(**{**plan_arguments(), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_multiple": 0}, "seq_multiple=0 must be from 1"),
        ({"threads": 2**62}, "threads=4611686018427387904 must be from 1 to 4096"),
        ({"offsets": np.array([0, 2**62, 2])}, r"offsets\[1\]=4611686018427387904 must be from 0 to 2"),
        ({"starts": np.array([0, 2**63 - 1])}, "tokens has 6 entries; sequence 1 requires 2"),
        ({"lengths": np.array([3, 2**62])}, "order has an unknown sequence id, 1"),
        ({"tokens_out": [0] * 6}, "tokens_out is list; pass a contiguous"),
        ({"tokens_out": np.zeros(12, np.int32)[::2]}, r"tokens_out is int32 of shape \(6,\); pass a contiguous"),
        ({"mask_out": np.frombuffer(bytes(6), np.uint8)}, "mask_out is read-only"),
    ],
)
def test_collate_names_the_argument_and_its_value(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _C.collate(**{**collate_arguments(), **changes})


def test_outputs_that_share_memory_are_refused() -> None:
    arguments = collate_arguments()
    with pytest.raises(ValueError, match="targets_out shares memory with tokens_out"):
        _C.collate(**{**arguments, "targets_out": arguments["tokens_out"]})
    with pytest.raises(ValueError, match="tokens_out shares memory with tokens"):
        _C.collate(**{**arguments, "tokens_out": arguments["tokens"]})


def test_a_plan_names_the_field_and_its_value() -> None:
    planned = plan([3, 8], 2, 8)
    with pytest.raises(ValueError, match=r"plan.seq_multiple=0 must be an integer from 1"):
        dataclasses.replace(planned, seq_multiple=0)
    object.__setattr__(planned, "seq_multiple", 0)
    with pytest.raises(ValueError, match=r"plan.seq_multiple=0 must be an integer from 1"):
        build(planned, 0, ragged_of([3, 8]))
    planned = plan([3, 8], 2, 8)
    with pytest.raises(ValueError, match=r"plan.totals has 1 entries; the other fields of the plan require 2"):
        dataclasses.replace(planned, totals=planned.totals[:1])
