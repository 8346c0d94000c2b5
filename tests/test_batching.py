"""Batching against slow Python: every sequence once, within the budget, equally many microbatches, tensors equal token for token."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import _C
from engine.batching import OPTIONAL_FIELDS, Plan, batch, build, plan, scatter
from engine.types import Packed, Sample


@dataclasses.dataclass(frozen=True)
class Case:
    """Arguments of plan() that it must accept."""

    lengths: list[int]
    group_ids: list[int]
    ranks: int
    token_budget: int
    total_multiple: int
    microbatch_multiple: int

    def plan(self) -> Plan:
        return plan(
            self.lengths,
            self.ranks,
            self.token_budget,
            total_multiple=self.total_multiple,
            microbatch_multiple=self.microbatch_multiple,
            group_ids=self.group_ids,
        )

    @property
    def capacity(self) -> int:
        return self.token_budget // self.total_multiple * self.total_multiple

    def units(self) -> list[list[int]]:
        """What must stay together: the sequences of a group, or one on its own."""
        units: dict[tuple[str, int], list[int]] = {}
        for i, group in enumerate(self.group_ids):
            units.setdefault(("group", group) if group >= 0 else ("alone", i), []).append(i)
        return list(units.values())

    def tokens(self, ids: Sequence[int]) -> int:
        return sum(self.lengths[i] for i in ids)


@st.composite
def cases(draw: st.DrawFn, max_size: int = 40) -> Case:
    total_multiple = draw(st.integers(1, 9))
    token_budget = draw(st.integers(total_multiple, 80))
    capacity = token_budget // total_multiple * total_multiple
    lengths = draw(st.lists(st.integers(0, capacity) | st.just(capacity), max_size=max_size))
    groups = draw(st.lists(st.integers(-1, 6), min_size=len(lengths), max_size=len(lengths)))
    held = dict.fromkeys(groups, 0)
    for i, group in enumerate(groups):  # a sequence that its group has no room for goes alone
        if held[group] + lengths[i] > capacity:
            groups[i] = -1
        else:
            held[group] += lengths[i]
    return Case(lengths, groups, draw(st.integers(1, 6)), token_budget, total_multiple, draw(st.integers(1, 4)))


def first_fit_decreasing(case: Case) -> list[int]:
    """Tokens of each bin, by looking at every bin for every unit."""
    bins: list[int] = []
    for tokens in sorted((case.tokens(unit) for unit in case.units()), reverse=True):
        fitting = next((b for b, held in enumerate(bins) if held + tokens <= case.capacity), None)
        if fitting is None:
            bins.append(tokens)
        else:
            bins[fitting] += tokens
    return bins


def round_up(value: int, multiple: int) -> int:
    return (value + multiple - 1) // multiple * multiple


def microbatches_of(planned: Plan) -> list[list[list[int]]]:
    """Sequence ids by rank and microbatch, read from order and offsets as their contract states it."""
    m = planned.microbatches
    bounds = planned.offsets.tolist()
    order = planned.order.tolist()
    return [[order[bounds[r * m + j] : bounds[r * m + j + 1]] for j in range(m)] for r in range(planned.ranks)]


@given(cases())
@settings(deadline=None)
def test_a_plan_tiles_the_sequences_within_its_limits(case: Case) -> None:
    planned = case.plan()
    ranks = microbatches_of(planned)
    slots = [ids for rank in ranks for ids in rank]
    assert sorted(planned.order.tolist()) == list(range(len(case.lengths)))
    assert len(planned.offsets) == case.ranks * planned.microbatches + 1
    assert (planned.offsets[0], planned.offsets[-1]) == (0, len(case.lengths))
    assert all(case.tokens(ids) <= case.capacity for ids in slots)
    for unit in case.units():
        assert sum(set(unit) <= set(ids) for ids in slots) == 1


@given(cases())
@settings(deadline=None)
def test_first_fit_decreasing_fixes_the_number_of_microbatches(case: Case) -> None:
    planned = case.plan()
    bins = len(first_fit_decreasing(case))
    slots = round_up(bins, case.ranks * case.microbatch_multiple)
    filled = sum(bool(ids) for rank in microbatches_of(planned) for ids in rank)
    assert planned.microbatches * case.ranks == slots
    assert filled == min(slots, len(case.units()))  # none is empty while another could be split


@given(cases())
@settings(deadline=None)
def test_ranks_are_balanced_and_start_with_their_heaviest(case: Case) -> None:
    planned = case.plan()
    tokens = [[case.tokens(ids) for ids in rank] for rank in microbatches_of(planned)]
    per_rank = [sum(rank) for rank in tokens]
    assert all(rank == sorted(rank, reverse=True) for rank in tokens)
    # Dealt in rounds from the heaviest on, two ranks never differ by more than two microbatches of one round.
    assert max(per_rank) - min(per_rank) <= max((max(r) - min(r) for r in zip(*tokens, strict=True)), default=0)
    total, room = sum(per_rank), case.ranks * planned.microbatches * case.token_budget
    assert planned.stats.fill == (pytest.approx(total / room) if total else 0.0)
    assert planned.stats.imbalance == (pytest.approx(max(per_rank) / (total / case.ranks)) if total else 1.0)


@given(cases())
@settings(deadline=None)
def test_a_plan_is_a_function_of_its_arguments(case: Case) -> None:
    first, again = case.plan(), case.plan()
    as_arrays = plan(
        np.array(case.lengths, np.int32),
        case.ranks,
        case.token_budget,
        total_multiple=case.total_multiple,
        microbatch_multiple=case.microbatch_multiple,
        group_ids=np.array(case.group_ids, np.int16),
    )
    for other in (again, as_arrays):
        np.testing.assert_array_equal(first.order, other.order)
        np.testing.assert_array_equal(first.offsets, other.offsets)
        assert (first.microbatches, first.stats) == (other.microbatches, other.stats)


def test_ties_go_to_the_lower_index() -> None:
    planned = plan([4, 4, 4, 4, 4], ranks=2, token_budget=8)
    # Filled: [0, 1] [2, 3] [4]. Halved: [0] [2, 3] [4] [1]. Dealt from the heaviest on: [2, 3] [0], then [4] to the lighter rank 1.
    assert microbatches_of(planned) == [[[2, 3], [1]], [[0], [4]]]


def test_the_heaviest_microbatch_is_halved() -> None:
    planned = plan([6, 5, 5, 2], ranks=3, token_budget=10)  # filled: [6, 2] [5, 5]
    assert microbatches_of(planned) == [[[0, 3]], [[1]], [[2]]]


def test_a_plan_does_not_change_with_the_lengths_it_was_made_from() -> None:
    lengths = np.array([3, 2])
    planned = plan(lengths, 1, 8)
    lengths[:] = 0
    assert planned.lengths.tolist() == [3, 2]


@pytest.mark.parametrize("microbatch_multiple", [1, 4])
@pytest.mark.parametrize(
    ("lengths", "ranks", "microbatches"),
    [
        ([], 3, 0),
        ([5], 1, 1),
        ([5], 3, 1),  # fewer than ranks
        ([8, 8, 8], 1, 3),  # each as long as the budget
        ([4] * 12, 3, 2),  # all equal
        ([0, 0, 0], 2, 1),
        ([8, 0], 1, 1),  # a sequence without tokens needs no room
    ],
)
def test_edges(lengths: list[int], ranks: int, microbatches: int, microbatch_multiple: int) -> None:
    planned = plan(lengths, ranks, token_budget=8, microbatch_multiple=microbatch_multiple)
    assert planned.microbatches == round_up(microbatches, microbatch_multiple)
    assert sorted(planned.order.tolist()) == list(range(len(lengths)))
    assert sum(bool(ids) for rank in microbatches_of(planned) for ids in rank) == min(ranks * planned.microbatches, len(lengths))


def test_a_large_plan_balances_the_ranks() -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(6.72, 0.9, 20_000), 32, 8192).astype(np.int64)
    planned = plan(lengths, 32, 16384, total_multiple=128, microbatch_multiple=2)
    assert sorted(planned.order.tolist()) == list(range(len(lengths)))
    assert planned.microbatches == round_up(-(-int(lengths.sum()) // (32 * 16384)), 2)
    assert planned.stats.imbalance < 1.01
    assert planned.stats.fill > 0.95


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lengths": [3, 9]}, "sequence 1 has 9 tokens, more than token_budget=8; raise tokens_per_microbatch or shorten/truncate it"),
        ({"lengths": [3, 8], "total_multiple": 3}, "sequence 1 has 8 tokens, more than token_budget=8 (6 in multiples of 3); raise"),
        ({"lengths": [1, 5, 5], "group_ids": [0, 7, 7]}, "group 7 (2 sequences, the first is 1) has 10 tokens, more than token_budget=8"),
        ({"lengths": [2**62, 2**62], "group_ids": [0, 0]}, "sequence 0 has 4611686018427387904 tokens"),
        ({"lengths": [3, -1]}, "sequence 1 has length -1; a length is at least 0"),
        ({"lengths": [1.5]}, "lengths is float64 of shape (1,); pass"),
        ({"lengths": [[1]]}, "lengths is int64 of shape (1, 1); pass"),
        ({"group_ids": [0]}, "group_ids has 1 entries for 2 lengths"),
        ({"ranks": 0}, "ranks=0 must be at least 1"),
        ({"token_budget": 0}, "token_budget=0 must be at least 1"),
        ({"token_budget": 2**31}, "token_budget=2147483648 exceeds"),
        ({"total_multiple": 0}, "total_multiple=0 must be at least 1"),
        ({"total_multiple": 16}, "token_budget=8 is below total_multiple=16; raise tokens_per_microbatch to 16"),
        ({"microbatch_multiple": -1}, "microbatch_multiple=-1 must be at least 1"),
    ],
)
def test_plan_names_what_is_wrong(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError) as error:
        plan(**{"lengths": [3, 4], "ranks": 1, "token_budget": 8, **arguments})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def make_samples(case: Case, fields: Sequence[str] = OPTIONAL_FIELDS) -> list[Sample]:
    """One sample for each length, with token ids, masks and values that are all different."""
    rng = np.random.default_rng(len(case.lengths))
    samples = []
    for n, group in zip(case.lengths, case.group_ids, strict=True):
        tokens, mask = rng.integers(1, 2**31, n + 1).astype(np.int32), rng.integers(0, 2, n).astype(np.uint8)
        values: dict[str, Any] = {name: rng.standard_normal(n).astype(np.float32) for name in fields}
        samples.append(Sample(tokens, mask, group, **values))
    return samples


def naive_pack(ids: list[int], samples: Sequence[Sample], total_multiple: int) -> dict:
    """One microbatch by list appends, as a dict of the fields of Packed."""
    packed: dict[str, list] = {name: [] for name in ("tokens", "targets", "positions", "mask", *OPTIONAL_FIELDS)}
    cu_seqlens = [0]
    for i in ids:
        packed["tokens"] += samples[i].tokens[:-1].tolist()
        packed["targets"] += samples[i].tokens[1:].tolist()
        packed["positions"] += list(range(samples[i].length))
        packed["mask"] += [bool(m) for m in samples[i].mask]
        for name in OPTIONAL_FIELDS:
            packed[name] += getattr(samples[i], name).tolist()
        cu_seqlens.append(len(packed["tokens"]))
    padding = max(round_up(cu_seqlens[-1], total_multiple), total_multiple) - cu_seqlens[-1]
    for name, values in packed.items():
        values += range(padding) if name == "positions" else [0] * padding
    cu_seqlens += [cu_seqlens[-1] + padding] if padding else []
    index_S = (*ids, -1) if padding else tuple(ids)
    return {**{f"{name}_T": values for name, values in packed.items()}, "cu_seqlens": cu_seqlens, "index_S": index_S}


def as_lists(packed: Packed) -> dict:
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in vars(packed).items()}


@given(cases(max_size=15))
@settings(deadline=None, max_examples=50)
def test_build_equals_a_naive_build_token_for_token(case: Case) -> None:
    samples, planned = make_samples(case), case.plan()
    for rank, microbatches in enumerate(microbatches_of(planned)):
        step = build(planned, rank, samples)
        assert [as_lists(packed) for packed in step] == [naive_pack(ids, samples, case.total_multiple) for ids in microbatches]
        assert [len(packed.tokens_T) for packed in step] == [planned.total(rank, j) for j in range(planned.microbatches)]
        assert all(len(packed.tokens_T) <= case.token_budget for packed in step)


def test_types_of_the_tensors() -> None:
    (packed,) = batch(make_samples(Case([3, 2], [-1, -1], 1, 8, 1, 1)), 8)
    names = ("tokens_T", "mask_T", "cu_seqlens", "advantage_T")
    assert [getattr(packed, name).dtype for name in names] == [torch.int64, torch.bool, torch.int32, torch.float32]


def test_an_empty_microbatch_is_padding_only() -> None:
    case = Case([3], [-1], 2, 9, 4, 1)
    (packed,) = build(case.plan(), 1, make_samples(case))
    expected = naive_pack([], [], total_multiple=4)
    assert as_lists(packed) == expected
    assert (expected["cu_seqlens"], expected["index_S"], expected["positions_T"]) == ([0, 4], (-1,), [0, 1, 2, 3])


def test_no_samples_make_an_empty_step() -> None:
    assert batch([], 8, ranks=2, rank=1) == []


def test_a_sequence_without_tokens_keeps_its_place() -> None:
    (packed,) = batch(make_samples(Case([2, 0], [-1, -1], 1, 8, 1, 1)), 8)
    assert packed.index_S == (0, 1)
    assert packed.cu_seqlens.tolist() == [0, 2, 2]


def test_an_optional_field_needs_every_sample_of_the_rank() -> None:
    samples = make_samples(Case([3, 2], [-1, -1], 1, 8, 1, 1), fields=("advantage", "value"))
    (packed,) = batch([samples[0], dataclasses.replace(samples[1], value=None)], 8)
    assert packed.advantage_T is not None
    assert packed.value_T is None
    assert packed.old_logprob_T is None


class OwnSamples(Sequence[Sample]):
    """A sequence that refuses to hand out the samples of other ranks."""

    def __init__(self, samples: list[Sample], allowed: set[int]) -> None:
        self.samples, self.allowed = samples, allowed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index):
        assert index in self.allowed
        return self.samples[index]


def test_build_reads_only_the_samples_of_its_rank() -> None:
    case = Case([5, 4, 3, 2, 1], [-1] * 5, 2, 8, 1, 1)
    planned = case.plan()
    for rank, microbatches in enumerate(microbatches_of(planned)):
        own = {i for ids in microbatches for i in ids}
        assert own != set(range(5))
        build(planned, rank, OwnSamples(make_samples(case), own))


def test_views_and_wider_types_are_read_right() -> None:
    strided = Sample(tokens=np.arange(10, dtype=np.int32)[::2], mask=np.array([True, False, True, True]))
    wide = Sample(tokens=np.array([7, 8, 9]), mask=np.array([2, 0], np.uint8), advantage=np.array([0.5, 1.5]))
    unaligned = np.frombuffer(b"\0" + np.array([5, 6], np.int32).tobytes(), np.uint8)[1:].view(np.int32)
    (packed,) = batch([strided, wide, Sample(tokens=unaligned, mask=np.array([1], np.uint8))], 8)
    assert packed.tokens_T.tolist() == [0, 2, 4, 6, 7, 8, 5]
    assert packed.targets_T.tolist() == [2, 4, 6, 8, 8, 9, 6]
    assert packed.mask_T.view(torch.uint8).tolist() == [1, 0, 1, 1, 1, 0, 1]  # 2 became 1, as a bool must be


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: dataclasses.replace(s, mask=s.mask[1:]), "sample 1: mask has shape (2,), but by its planned length it must be (3,)"),
        (lambda s: dataclasses.replace(s, value=np.zeros(4, np.float32)), "sample 1: value has shape (4,)"),
        (lambda s: dataclasses.replace(s, tokens=s.tokens.astype(np.float32)), "sample 1: tokens is float32; convert it to int32"),
        (lambda s: dataclasses.replace(s, tokens=s.tokens[:0], mask=s.mask[:0]), "sequence 1 has length -1"),
    ],
)
def test_batch_names_the_sample_and_the_field(change: Callable[[Sample], Sample], message: str) -> None:
    samples = make_samples(Case([2, 3], [-1, -1], 1, 8, 1, 1))
    with pytest.raises(ValueError) as error:
        batch([samples[0], change(samples[1])], 8)
    assert message in str(error.value)


def test_build_refuses_what_was_not_planned() -> None:
    case = Case([2, 3], [-1, -1], 2, 8, 1, 1)
    planned, samples = case.plan(), make_samples(case)
    with pytest.raises(ValueError, match=r"rank=2 is not in a plan for 2 ranks; use 0 to 1"):
        build(planned, 2, samples)
    with pytest.raises(ValueError, match=r"samples has 1 entries, the plan 2"):
        build(planned, 0, samples[:1])
    with pytest.raises(ValueError, match=r"sample 0: tokens has shape \(4,\)"):
        build(planned, 0 if 0 in microbatches_of(planned)[0][0] else 1, samples[::-1])


@given(cases(max_size=15))
@settings(deadline=None, max_examples=50)
def test_scatter_undoes_the_packing(case: Case) -> None:
    samples, planned = make_samples(case), case.plan()
    seen: list[int] = []
    for rank in range(case.ranks):
        step = build(planned, rank, samples)
        targets = scatter([packed.targets_T for packed in step], step, len(samples))
        assert len(targets) == len(samples)
        for i, target_L in enumerate(targets):
            if target_L is not None:
                assert target_L.tolist() == samples[i].tokens[1:].tolist()
                seen.append(i)
    assert sorted(seen) == list(range(len(samples)))


def test_scatter_refuses_values_of_another_step() -> None:
    step = batch(make_samples(Case([3, 2], [-1, -1], 1, 8, 1, 1)), 8)
    with pytest.raises(ValueError, match=r"has 0 entries for 1 microbatches"):
        scatter([], step, 2)
    with pytest.raises(ValueError, match=r"values_per_microbatch\[0\] has shape \(6,\); its microbatch wants \(5,\)"):
        scatter([torch.zeros(6)], step, 2)


def test_batch_keeps_a_pair_together() -> None:
    samples = make_samples(Case([5, 1, 3, 7], [0, 1, 0, 1], 2, 8, 1, 1))
    assert sorted(packed.index_S for rank in range(2) for packed in batch(samples, 8, rank=rank, ranks=2)) == [(0, 2), (1, 3)]


def test_the_extension_refuses_what_would_overrun_memory() -> None:
    tokens, mask = np.zeros(4, np.int32), np.zeros(3, np.uint8)
    with pytest.raises(ValueError, match=r"tokens\[0\] must be one longer"):
        _C.collate([tokens], [mask[:2]], 8)
    with pytest.raises(ValueError, match=r"total=2 must be from 3"):
        _C.collate([tokens], [mask], 2)
    with pytest.raises(ValueError, match=r"total=0 must be from 1"):
        _C.collate_values([np.zeros(1, np.float32)], 0)
