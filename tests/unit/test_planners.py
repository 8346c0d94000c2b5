"""The reference planners of the batching benchmark, and the statistics of a placement."""

import json
from itertools import chain

import pytest

from benchmarks.batching import batching_baselines, bench_batching, planners
from benchmarks.batching.bench_batching import KARMARKAR_KARP, PROBLEMS, Line, Problem
from benchmarks.batching.planners import PlacementStats, placement_stats

TINY = Problem(count=300, ranks=4, budget=16_384)


@pytest.mark.parametrize("contender", bench_batching.CONTENDERS, ids=lambda contender: contender.name)
def test_every_contender_places_every_sequence_once_within_the_budget(contender: bench_batching.Contender) -> None:
    lengths_N = bench_batching.lengths_of(TINY.count)
    lengths, costs = lengths_N.tolist(), (24576 * lengths_N + lengths_N**2).tolist()
    seconds, to_placement = contender.place(TINY, lengths_N, lengths, costs)
    placement = to_placement()
    assert seconds > 0
    assert len(placement) == TINY.ranks
    assert sorted(chain(*chain(*placement))) == list(range(TINY.count))
    if contender.name != KARMARKAR_KARP:  # it balances costs and has no budget
        assert placement_stats(placement, lengths, costs, TINY.budget).over == 0


def test_published_algorithms_on_textbook_cases() -> None:
    assert planners.next_fit([5, 5, 3, 4], [], 1, 9) == [[[0], [1, 2], [3]]]
    assert planners.first_fit_decreasing([5, 6, 3, 4], [], 1, 9) == [[[1, 2], [0, 3]]]
    # The textbook case: a greedy partition has sums 17 and 13.
    parts = planners.largest_differencing([8, 7, 6, 5, 4], 2)
    assert sorted(sum([8, 7, 6, 5, 4][i] for i in part) for part in parts) == [14, 16]
    equal = planners.largest_differencing([1, 2, 3, 4], 2, equal_size=True)
    assert sorted(sorted(part) for part in equal) == [[0, 3], [1, 2]]
    # The first bin gets a medium sequence; in the second none fits, so it gets two small ones.
    assert planners.modified_first_fit_decreasing([60, 40, 55, 20, 21], [], 1, 100) == [[[0, 1], [2, 3, 4]]]


def test_bins_are_split_until_the_ranks_get_equally_many() -> None:
    assert planners.distribute([[0, 1, 2], [3]], [3, 3, 3, 1], 3) == [[[0, 2]], [[3]], [[1]]]


def test_placement_stats_count_waiting_ranks() -> None:
    stats = placement_stats([[[0], [1]], [[2]]], [4, 1, 3], [40, 10, 30], 4)
    assert stats == PlacementStats(microbatches=2, fill=8 / 16, imbalance=50 / 40, lockstep=50 / 40, dropped=0.0, over=0)
    assert placement_stats([[[0]], [[1]]], [4, 2, 2], [4, 2, 2], 3).dropped == 0.25
    assert placement_stats([[[0]], [[1]]], [4, 2, 2], [4, 2, 2], 3).over == 1


def test_a_peer_that_is_not_installed_is_skipped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def missing(name: str) -> None:
        raise ImportError(f"no {name}")

    monkeypatch.setattr(batching_baselines, "import_module", missing)
    assert batching_baselines.importable() == []
    assert capsys.readouterr().err.count("skipped (no ") == 3


def test_lists_and_buffers_hold_the_same_rollouts() -> None:
    ragged = bench_batching.rollouts(20)
    tokens, mask, old_logprob, advantage = bench_batching.as_lists(ragged)
    again = bench_batching.Ragged.of(tokens, mask, {"old_logprob": old_logprob}, {"advantage": advantage})
    assert again.tokens.tolist() == ragged.tokens.tolist()
    assert again.mask.tolist() == ragged.mask.tolist()
    assert again.per_token["old_logprob"].tolist() == ragged.per_token["old_logprob"].tolist()


def test_the_page_reports_met_and_missed_targets() -> None:
    stats = PlacementStats(microbatches=2, fill=0.5, imbalance=1.0, lockstep=1.01, dropped=0.0, over=0)
    placed = {p: [Line("engine.batching.plan.plan", [2e-3] * 3, stats), Line(KARMARKAR_KARP, [0.3] * 2, stats)] for p in PROBLEMS}
    ours = (
        bench_batching.ALONE,
        bench_batching.TOGETHER,
        bench_batching.IN_TURN,
        bench_batching.SHARE,
        bench_batching.COLD_SHARE,
        bench_batching.LISTS,
    )
    names = [bench_batching.MEMCPY, *ours]
    built = {count: [Line(name, [1e-3] * 3) for name in names] for count in (4096, 65_536)}
    text = bench_batching.page(placed, built, {"commit": "abc"})
    assert "- plan 4,096, ms: 2, target <= 0.5: MISSED" in text
    assert "- plan 65,536, times as fast as plain Python: Karmarkar-Karp: 150, target >= 100: met" in text
    assert "| engine.batching.plan.plan | 2.000 (2.000..2.000) | 3 | 1.0 (1.0..1.0) | 2 | 0.5000 | 1.00000 | 1.01000 | 0.0% | 0 |" in text
    assert "- commit: abc" in text
    assert json.loads(json.dumps(bench_batching.as_json(placed, built, {})))["placed"][0]["lines"][1]["seconds"] == [0.3, 0.3]
