"""build() from flat buffers, lists and samples equals a naive implementation, token for token."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import _C
from engine.batching.build import batch, build, scatter
from engine.batching.plan import plan
from engine.batching.ragged import OPTIONAL_FIELDS, Arena, Ragged
from engine.types import Packed, Sample, Step
from tests.support.cases import Case, cases, make_samples, microbatches_of, round_up


def naive_pack(ids: list[int], samples: Sequence[Sample], case: Case) -> dict:
    """One microbatch built with list appends, as a dict of the fields of Packed."""
    packed: dict[str, list] = {name: [] for name in ("tokens", "targets", "positions", "mask", *OPTIONAL_FIELDS)}
    cu_seqlens, index = [0], []

    def pad(count: int) -> None:
        if count:
            for name, values in packed.items():
                values += range(count) if name == "positions" else [0] * count
            cu_seqlens.append(len(packed["tokens"]))
            index.append(-1)

    for i in ids:
        packed["tokens"] += samples[i].tokens[:-1].tolist()
        packed["targets"] += samples[i].tokens[1:].tolist()
        packed["positions"] += list(range(samples[i].length))
        packed["mask"] += [bool(m) for m in samples[i].mask]
        for name in OPTIONAL_FIELDS:
            packed[name] += getattr(samples[i], name).tolist()
        cu_seqlens.append(len(packed["tokens"]))
        index.append(i)
        if i != ids[-1]:
            pad(case.padded(i) - case.lengths[i])
    pad(round_up(max(case.tokens(ids), 1), case.total_multiple) - len(packed["tokens"]))
    token_fields = {f"{name}_T": values for name, values in packed.items()}
    return {**token_fields, "cu_seqlens": cu_seqlens, "index_S": tuple(index), "counted_S": None}


def as_lists(packed: Packed) -> dict:
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in vars(packed).items()}


def flat(samples: Sequence[Sample]) -> Ragged:
    per_token = {name: [getattr(s, name) for s in samples] for name in OPTIONAL_FIELDS}
    return Ragged.of([s.tokens for s in samples], [s.mask for s in samples], per_token)


def equal(first: Step, other: Step) -> bool:
    return [as_lists(packed) for packed in first] == [as_lists(packed) for packed in other]


@given(cases(max_size=15), st.integers(0, 4))
@settings(deadline=None)
def test_build_equals_a_naive_build_token_for_token(case: Case, threads: int) -> None:
    samples, planned, arena = make_samples(case), case.plan(), Arena()
    for rank, microbatches in enumerate(microbatches_of(planned)):
        expected = [naive_pack(ids, samples, case) for ids in microbatches]
        step = build(planned, rank, flat(samples), arena, threads)
        assert [as_lists(packed) for packed in step] == expected
        assert [as_lists(packed) for packed in build(planned, rank, samples)] == expected
        assert [len(packed.tokens_T) for packed in step] == [planned.total(rank, j) for j in range(planned.microbatches)]


def test_the_number_of_threads_does_not_change_the_result() -> None:
    lengths = np.random.default_rng(0).integers(0, 300, 400).tolist()
    case = Case(lengths, [-1] * 400, 2, 512, 8)
    samples, planned = make_samples(case), case.plan()
    one = build(planned, 0, flat(samples), threads=1)
    assert all(equal(one, build(planned, 0, flat(samples), threads=threads)) for threads in (2, 3, 16, 1000))


def test_types_of_the_tensors() -> None:
    (packed,) = batch(make_samples(Case([3, 2], [-1, -1], 1, 8)), 8)
    names = ("tokens_T", "targets_T", "positions_T", "mask_T", "cu_seqlens", "advantage_T")
    kinds = [torch.int32] * 3 + [torch.bool, torch.int32, torch.float32]
    assert [getattr(packed, name).dtype for name in names] == kinds
    moved = packed.to(torch.device("cpu"))
    assert [getattr(moved, name).dtype for name in names] == [torch.int64] * 3 + kinds[3:]
    assert moved.targets_T.tolist() == packed.targets_T.tolist()


def test_an_empty_microbatch_is_padding_only() -> None:
    case = Case([3], [-1], 2, 9, 4)
    (packed,) = build(case.plan(), 1, make_samples(case))
    expected = naive_pack([], [], case)
    assert as_lists(packed) == expected
    assert (expected["cu_seqlens"], expected["index_S"], expected["positions_T"]) == ([0, 4], (-1,), [0, 1, 2, 3])


def test_padding_lies_behind_each_sequence() -> None:
    case = Case([3, 2, 4], [-1] * 3, 1, 16, 16, seq_multiple=4)
    (packed,) = build(case.plan(), 0, flat(make_samples(case)))
    assert packed.cu_seqlens.tolist() == [0, 3, 4, 6, 8, 12, 16]
    assert packed.index_S == (0, -1, 1, -1, 2, -1)
    assert packed.positions_T.tolist() == [0, 1, 2, 0, 0, 1, 0, 1, 0, 1, 2, 3, 0, 1, 2, 3]


def test_no_samples_make_an_empty_step() -> None:
    assert batch([], 8, ranks=2, rank=1) == []
    assert build(plan([], 1, 8), 0, Ragged.of([], [])) == []


def test_an_empty_sequence_keeps_its_position() -> None:
    (packed,) = batch(make_samples(Case([2, 0], [-1, -1], 1, 8)), 8)
    assert packed.index_S == (0, 1)
    assert packed.cu_seqlens.tolist() == [0, 2, 2]


def test_an_optional_field_must_be_set_in_all_samples_of_the_rank() -> None:
    samples = make_samples(Case([3, 2], [-1, -1], 1, 8), fields=("advantage", "value"))
    (packed,) = batch([samples[0], dataclasses.replace(samples[1], value=None)], 8)
    assert packed.advantage_T is not None
    assert packed.value_T is None
    assert packed.old_logprob_T is None


def test_sequence_values_are_repeated_for_tokens_and_nan_keeps_its_bits() -> None:
    odd = np.array([0x7FC12345, 0xFF812345], np.uint32).view(np.float32)
    ragged = Ragged.of([[1, 2, 3], [4, 5]], [[1, 0], [1]], {"old_logprob": [odd, odd[:1]]}, {"advantage": [0.5, -2.0]})
    (packed,) = build(plan(ragged.lengths, 1, 8, total_multiple=4), 0, ragged)
    assert packed.advantage_T is not None
    assert packed.old_logprob_T is not None
    assert packed.advantage_T.tolist() == [0.5, 0.5, -2.0, 0.0]
    assert packed.old_logprob_T.view(torch.int32).tolist() == [*odd.view(np.int32).tolist(), odd.view(np.int32)[0], 0]


class OwnSamples(Sequence[Sample]):
    """A sequence that raises an error if samples of other ranks are read."""

    def __init__(self, samples: list[Sample], allowed: set[int]) -> None:
        self.samples, self.allowed = samples, allowed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index):
        assert index in self.allowed
        return self.samples[index]


def test_build_reads_only_the_samples_of_its_rank() -> None:
    case = Case([5, 4, 3, 2, 1], [-1] * 5, 2, 8)
    planned = case.plan()
    for rank, microbatches in enumerate(microbatches_of(planned)):
        own = {i for ids in microbatches for i in ids}
        assert own != set(range(5))
        build(planned, rank, OwnSamples(make_samples(case), own))


def test_views_and_wider_dtypes_are_read_correctly() -> None:
    strided = Sample(tokens=np.arange(10, dtype=np.int32)[::2], mask=np.array([True, False, True, True]))
    wide = Sample(tokens=np.array([7, 8, 9]), mask=np.array([2, 0], np.uint8), advantage=np.array([0.5, 1.5]))
    unaligned = np.frombuffer(b"\0" + np.array([5, 6], np.int32).tobytes(), np.uint8)[1:].view(np.int32)
    (packed,) = batch([strided, wide, Sample(tokens=unaligned, mask=np.array([1], np.uint8))], 8)
    assert packed.tokens_T.tolist() == [0, 2, 4, 6, 7, 8, 5]
    assert packed.targets_T.tolist() == [2, 4, 6, 8, 8, 9, 6]
    assert packed.mask_T.view(torch.uint8).tolist() == [1, 0, 1, 1, 1, 0, 1]  # 2 became 1, as a bool must be


def test_lists_arrays_and_tensors_give_the_same_result() -> None:
    rows, masks, values = [[1, 2, 3], [4], [5, 6]], [[True, False], [], [2]], [[0.5, 1], [], [-3]]
    lists = Ragged.of(rows, masks, {"value": values}, {"advantage": [1, 2, 3]})
    arrays = Ragged.of([np.array(row) for row in rows], [np.array(row, np.uint8) for row in masks], {"value": values})
    tensors = Ragged.of([torch.tensor(row) for row in rows], masks, {"value": [torch.tensor(row) for row in values]})  # pyright: ignore[reportArgumentType]
    assert lists.tokens.tolist() == arrays.tokens.tolist() == tensors.tokens.tolist() == [1, 2, 3, 4, 5, 6]
    assert lists.offsets.tolist() == arrays.offsets.tolist() == tensors.offsets.tolist() == [0, 3, 4, 6]
    assert (lists.mask.tolist(), lists.lengths.tolist(), lists.starts.tolist()) == ([1, 0, 1], [2, 0, 1], [0, 2, 2])
    assert lists.per_token["value"].tolist() == tensors.per_token["value"].tolist() == [0.5, 1.0, -3.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[1, 2], [3]], [[1], [1]]), "sequence 1: mask has 1 entries for 0 predicted tokens"),
        (([[1, 2], [3]], [[1]]), "mask has 1 rows for 2 sequences; give one for each"),
        (([[1, 2**31]], [[1]]), "tokens: a token id is outside int32; give a list of numbers for each sequence"),
        (([[1, "a"]], [[1]]), "tokens: 'str' object cannot be interpreted as an integer; give"),
        (([[1, 2]], [[1]], {"value": [[None]]}), "value: must be real number, not NoneType; give"),
        (([[1, 2]], [[1]], {"value": [[0.5, 1.0]]}), "sequence 0: value has 2 entries for 1 predicted tokens"),
        (([[1, 2]], [[1]], {"reward": [[0.5]]}), "field 'reward' is unknown or given twice; use each of advantage, "),
        (([[1, 2]], [[1]], {"value": [[0.5]]}, {"value": [0.5]}), "field 'value' is unknown or given twice"),
        (([[1, 2]], [[1]], None, {"value": [0.5, 0.5]}), "value is float32 of shape (2,); pass contiguous float32 of 1 entries"),
        (([np.array([0.5, 1])], [[1]]), "sequence 0: tokens is float64 of shape (2,); give one dimension of int32"),
    ],
)
def test_ragged_names_the_sequence_and_the_field(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        Ragged.of(*arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_ragged_refuses_buffers_that_do_not_fit() -> None:
    tokens, offsets, mask = np.arange(5, dtype=np.int32), np.array([0, 3, 5]), np.ones(3, np.uint8)
    Ragged(tokens, offsets, mask)
    for wrong in (
        (tokens, offsets[:-1], mask),
        (tokens[:4], offsets, mask),
        (tokens, offsets, mask[:2]),
        (tokens.astype(np.int64), offsets, mask),
    ):
        with pytest.raises(ValueError, match=r"offsets=.* must be|pass contiguous"):
            Ragged(*wrong)
    with pytest.raises(ValueError, match=r"sequence 0 has length -1"):
        plan(Ragged(tokens, np.array([0, 0, 5]), mask).lengths, 1, 8)
    with pytest.raises(ValueError, match=r"ragged has other lengths than the plan"):
        build(plan([3, 0], 1, 8), 0, Ragged(tokens, offsets, mask))


def test_an_arena_reuses_its_memory() -> None:
    case, small = Case([5, 4, 3], [-1] * 3, 1, 8), Case([2], [-1], 1, 8)
    arena = Arena()
    first = build(case.plan(), 0, make_samples(case), arena)
    kept = as_lists(build(case.plan(), 0, make_samples(case))[0])
    assert as_lists(first[0]) == kept
    again = build(small.plan(), 0, make_samples(small), arena)
    assert again[0].tokens_T.data_ptr() == first[0].tokens_T.data_ptr()
    assert as_lists(first[0]) != kept


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: dataclasses.replace(s, mask=s.mask[1:]), "sample 1: mask has shape (2,); its planned length requires (3,)"),
        (lambda s: dataclasses.replace(s, value=np.zeros(4, np.float32)), "sample 1: value has shape (4,)"),
        (lambda s: dataclasses.replace(s, tokens=s.tokens.astype(np.float32)), "sample 1: tokens is float32; convert it to int32"),
        (lambda s: dataclasses.replace(s, tokens=s.tokens[:0], mask=s.mask[:0]), "sequence 1 has length -1"),
    ],
)
def test_batch_names_the_sample_and_the_field(change: Callable[[Sample], Sample], message: str) -> None:
    samples = make_samples(Case([2, 3], [-1, -1], 1, 8))
    with pytest.raises(ValueError) as error:
        batch([samples[0], change(samples[1])], 8)
    assert message in str(error.value)


def test_build_refuses_samples_that_do_not_match_the_plan() -> None:
    case = Case([2, 3], [-1, -1], 2, 8)
    planned, samples = case.plan(), make_samples(case)
    with pytest.raises(ValueError, match=r"rank=2 is not in a plan for 2 ranks; use 0 to 1"):
        build(planned, 2, samples)
    with pytest.raises(ValueError, match=r"samples has 1 entries, the plan 2"):
        build(planned, 0, samples[:1])
    with pytest.raises(ValueError, match=r"sample 0: tokens has shape \(4,\)"):
        build(planned, 0 if 0 in microbatches_of(planned)[0][0] else 1, samples[::-1])


@given(cases(max_size=15))
@settings(deadline=None, max_examples=50)
def test_scatter_inverts_packing(case: Case) -> None:
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
    assert sorted(seen) == sorted(planned.order.tolist())


def test_scatter_refuses_values_of_another_step() -> None:
    step = batch(make_samples(Case([3, 2], [-1, -1], 1, 8)), 8)
    with pytest.raises(ValueError, match=r"has 0 entries for 1 microbatches"):
        scatter([], step, 2)
    with pytest.raises(ValueError, match=r"values_per_microbatch\[0\] has shape \(6,\); its microbatch has shape \(5,\)"):
        scatter([torch.zeros(6)], step, 2)


def test_batch_keeps_a_pair_together() -> None:
    samples = make_samples(Case([5, 1, 3, 7], [0, 1, 0, 1], 2, 8))
    assert sorted(packed.index_S for rank in range(2) for packed in batch(samples, 8, rank=rank, ranks=2)) == [(0, 2), (1, 3)]


def test_the_extension_refuses_out_of_bounds_access() -> None:
    def collate(**changes: Any) -> Any:
        ids = {name: np.zeros(4, np.int32) for name in ("tokens_out", "targets_out", "positions_out")}
        share = {"order": np.array([0], np.int32), "offsets": np.array([0, 1]), "lengths": np.array([3]), "totals": np.array([4])}
        rows = {"starts": np.array([0]), "tokens": np.zeros(4, np.int32), "mask": np.zeros(3, np.uint8), "fields": []}
        return _C.collate(**{**share, **rows, **ids, "seq_multiple": 1, "mask_out": np.zeros(4, np.uint8), "threads": 1, **changes})

    assert [part.tolist() for part in collate()] == [[0, 3, 4], [0, -1], [2]]
    zeros = np.zeros(4, np.float32)
    for wrong, message in [
        ({"tokens": np.zeros(3, np.int32)}, "tokens has 3 entries"),
        ({"mask": [np.zeros(2, np.uint8)]}, "mask has 2 entries"),
        ({"mask": []}, "mask must have an array for each sequence"),
        ({"starts": None}, "tokens must have an array for each sequence of the share, or be flat with starts"),
        ({"starts": np.array([-1])}, "tokens has 4 entries"),
        ({"totals": np.array([2])}, "totals has 2 for a microbatch of 3 tokens"),
        ({"order": np.array([1], np.int32)}, "order has an unknown sequence id"),
        ({"lengths": np.array([-1])}, "order has an unknown sequence id"),
        ({"offsets": np.array([0, 2])}, "order, offsets and totals have inconsistent sizes"),
        ({"tokens_out": np.zeros(3, np.int32)}, "tokens_out must have 4 entries"),
        ({"fields": [(zeros[:2], True, zeros)]}, "a field has 2 entries"),
        ({"fields": [(zeros[:0], False, zeros)]}, "a field has too few entries"),
    ]:
        with pytest.raises(ValueError, match=message):
            collate(**wrong)
