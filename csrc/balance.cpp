#include "balance.h"

#include <algorithm>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <utility>

namespace trivet {
namespace {

// The indices of `weights` [first, last), heaviest first; ties by index.
Ids heaviest_first(const Amounts& weights, int32_t first, int32_t last) {
    std::vector<std::pair<int64_t, int32_t>> keys(last - first);  // (-weight, index): sorting pairs is faster than sorting indices
    for (int32_t i = first; i < last; ++i) keys[i - first] = {-weights[i], i};
    std::sort(keys.begin(), keys.end());
    Ids order(keys.size());
    std::transform(keys.begin(), keys.end(), order.begin(), [](const auto& key) { return key.second; });
    return order;
}

// Assigns bins to ranks in rounds of `ranks` bins, costliest first, so that concurrent microbatches have similar costs. Within a round, the
// costliest bin goes to the rank with the lowest cost so far.
Ids assign_to_ranks(const Amounts& cost, const Room& room) {
    const Ids costliest = heaviest_first(cost, 0, room.bins());
    const int32_t ranks = static_cast<int32_t>(room.ranks), rounds = static_cast<int32_t>(room.microbatches);
    Ids slot_of_bin(cost.size());
    Amounts negative_cost(ranks);
    for (int32_t round = 0; round < rounds; ++round) {
        const Ids lightest = heaviest_first(negative_cost, 0, ranks);
        for (int32_t i = 0; i < ranks; ++i) {
            const int32_t bin = costliest[round * ranks + i];
            slot_of_bin[bin] = lightest[i] * rounds + round;
            negative_cost[lightest[i]] -= cost[bin];
        }
    }
    return slot_of_bin;
}

// Keeps bins on their rank and orders each rank's bins, costliest first.
Ids order_within_ranks(const Amounts& cost, const Room& room) {
    const int32_t rounds = static_cast<int32_t>(room.microbatches);
    Ids slot_of_bin(cost.size());
    for (int32_t first = 0; first < room.bins(); first += rounds) {
        const Ids costliest = heaviest_first(cost, first, first + rounds);
        for (int32_t round = 0; round < rounds; ++round) slot_of_bin[costliest[round]] = first + round;
    }
    return slot_of_bin;
}

void compute_costs(const Amounts& cost, const Ids& slot_of_bin, const Room& room, Balanced& balanced) {
    Amounts by_slot(cost.size());
    for (size_t bin = 0; bin < cost.size(); ++bin) by_slot[slot_of_bin[bin]] = cost[bin];
    Amounts costliest(room.microbatches);
    for (auto own = by_slot.begin(); own != by_slot.end(); own += room.microbatches) {
        const auto end = own + room.microbatches;
        std::transform(own, end, costliest.begin(), costliest.begin(), [](int64_t a, int64_t b) { return std::max(a, b); });
        balanced.slowest = std::max(balanced.slowest, std::accumulate(own, end, int64_t{0}));
    }
    balanced.lockstep = std::accumulate(costliest.begin(), costliest.end(), int64_t{0});
    balanced.total = std::accumulate(cost.begin(), cost.end(), int64_t{0});
}

Balanced assign(const Packing& packing, Algorithm algorithm, const Room& room, int64_t cost_of_microbatch) {
    Amounts cost(packing.bins.size());
    std::transform(packing.bins.begin(), packing.bins.end(), cost.begin(), [&](const Bin& bin) { return bin.cost + cost_of_microbatch; });
    const Ids slot_of_bin = packing.by_rank ? order_within_ranks(cost, room) : assign_to_ranks(cost, room);
    Balanced balanced{algorithm, room.microbatches, Ids(packing.bin_of.size())};
    compute_costs(cost, slot_of_bin, room, balanced);
    std::transform(packing.bin_of.begin(), packing.bin_of.end(), balanced.slot_of.begin(), [&](int32_t bin) { return slot_of_bin[bin]; });
    return balanced;
}

// With one microbatch per rank, imbalance does not average out over microbatches, so the packing is improved.
Balanced finish(Packing&& packing, Algorithm algorithm, const Sorted& units, const Room& room, const Limits& limits) {
    if (room.microbatches == 1) exchange_costs(units, room, packing);
    return assign(packing, algorithm, room, limits.cost.microbatch);
}

// The objective: the cost of the step with this synchronization, then that with the other one.
std::pair<int64_t, int64_t> objective(const Balanced& balanced, Sync sync) {
    return sync == Sync::microbatch ? std::pair(balanced.lockstep, balanced.slowest) : std::pair(balanced.slowest, balanced.lockstep);
}

// A lower bound on the cost of the step.
int64_t ideal(const Sorted& units, const Room& room, const Limits& limits) {
    const int64_t costliest = room.microbatches == 1 ? *std::max_element(units.cost.begin(), units.cost.end()) : 0;
    return limits.cost.microbatch * room.microbatches + std::max((units.total_cost + room.ranks - 1) / room.ranks, costliest);
}

int64_t tokens_to_place(const Sorted& units, int64_t capacity) {
    int64_t tokens = 0;
    for (const int64_t unit_tokens : units.tokens) tokens += std::min(unit_tokens, capacity);
    return tokens;
}

using Strategy = std::pair<Algorithm, Packing (*)(const Sorted&, const Room&)>;

// The packings in the order to try. If less than 1/500 of all tokens is free, balancing costs rarely succeeds, so pack_tight comes first.
std::vector<Strategy> strategies(const Sorted& units, const Room& room) {
    const Strategy level{Algorithm::level, pack_level}, tight{Algorithm::tight, pack_tight};
    if (room.microbatches == 1) return {level, {Algorithm::differencing, pack_differencing}, tight};
    const Strategy skewed{Algorithm::skewed, pack_skewed}, by_rank{Algorithm::by_rank, pack_by_rank};
    const int64_t space = room.capacity * room.bins();
    if (space - tokens_to_place(units, room.capacity) < space / 500) return {tight, level, skewed, by_rank};
    return {level, skewed, by_rank, tight};
}

// The best of the packings. If none fits, returns nothing and sets `needed` to a number of bins that is sufficient.
std::optional<Balanced> best_of(const Sorted& units, const Room& room, const Limits& limits, int64_t& needed) {
    const int64_t least = ideal(units, room, limits);
    std::optional<Balanced> best;
    for (const auto& [algorithm, pack] : strategies(units, room)) {
        Packing packing = pack(units, room);
        if (!packing.ok) {
            if (algorithm == Algorithm::tight) needed = std::max(needed, static_cast<int64_t>(packing.bins.size()));
            continue;
        }
        Balanced candidate = finish(std::move(packing), algorithm, units, room, limits);
        if (!best || objective(candidate, limits.sync) < objective(*best, limits.sync)) best = std::move(candidate);
        const bool exact = room.microbatches == 1 && algorithm == Algorithm::level;  // pack_differencing may be closer than 1/256
        if (objective(*best, limits.sync).first <= (exact ? least : least + least / 256)) break;
    }
    if (best) return best;
    Packing packing = pack_even(units, room);
    return packing.ok ? std::optional(finish(std::move(packing), Algorithm::even, units, room, limits)) : std::nullopt;
}

// A lower bound on the bins needed: no two units of more than half a bin share one, and no bin exceeds the capacity.
int64_t least_bins(const Sorted& units, int64_t capacity) {
    const int64_t filled = (tokens_to_place(units, capacity) + capacity - 1) / capacity;
    const int64_t alone = std::count_if(units.tokens.begin(), units.tokens.end(), [&](int64_t tokens) { return tokens > capacity / 2; });
    return std::max({filled, alone, int64_t{1}});
}

}  // namespace

Balanced balance(const Sorted& units, const Limits& limits) {
    if (units.size() == 0) return {};
    const int64_t multiple = limits.microbatch_multiple;
    const auto room_for = [&](int64_t bins) {
        const int64_t microbatches = round_up((bins + limits.ranks - 1) / limits.ranks, multiple);
        if (microbatches > MOST_SLOTS / limits.ranks) throw std::invalid_argument("more than 2**24 microbatches on all ranks; raise token_budget");
        return Room{limits.capacity(), limits.ranks, microbatches, limits.cost.token + limits.cost.square * units.tokens[0]};
    };
    Room room = room_for(least_bins(units, limits.capacity()));
    std::optional<Balanced> best;
    for (int64_t needed = 0;; room = room_for(std::max<int64_t>(needed, room.bins() + 1))) {
        if (best && objective(*best, limits.sync).first <= ideal(units, room, limits)) return *best;
        std::optional<Balanced> next = best_of(units, room, limits, needed);
        if (best && (!next || objective(*next, limits.sync) >= objective(*best, limits.sync))) return *best;
        if (next) best = std::move(next);
        if (best && limits.cost.microbatch == 0) return *best;
    }
}

}  // namespace trivet
