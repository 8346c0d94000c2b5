#include "balance.h"

#include <algorithm>
#include <array>
#include <limits>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <utility>

namespace trivet {
namespace {

// The indices of `weights` [first, last) from the heaviest on; equal weights keep the order of their indices.
Ids heaviest_first(const Amounts& weights, int32_t first, int32_t last) {
    std::vector<std::pair<int64_t, int32_t>> keys(last - first);  // (-weight, index): pairs side by side sort faster than indices
    for (int32_t i = first; i < last; ++i) keys[i - first] = {-weights[i], i};
    std::sort(keys.begin(), keys.end());
    Ids order(keys.size());
    std::transform(keys.begin(), keys.end(), order.begin(), [](const auto& key) { return key.second; });
    return order;
}

// Rounds of `ranks` bins from the costliest on, so that those a rank waits for cost about as much as its own; within a round the costliest
// goes to the rank that has had least.
Ids deal(const Amounts& cost, const Room& room) {
    const Ids costliest = heaviest_first(cost, 0, room.bins());
    const int32_t ranks = static_cast<int32_t>(room.ranks), rounds = static_cast<int32_t>(room.microbatches);
    Ids slot_of_bin(cost.size());
    Amounts lack(ranks);
    for (int32_t round = 0; round < rounds; ++round) {
        const Ids lightest = heaviest_first(lack, 0, ranks);
        for (int32_t i = 0; i < ranks; ++i) {
            const int32_t bin = costliest[round * ranks + i];
            slot_of_bin[bin] = lightest[i] * rounds + round;
            lack[lightest[i]] -= cost[bin];
        }
    }
    return slot_of_bin;
}

// Bins stay on their rank, the costliest first.
Ids line_up(const Amounts& cost, const Room& room) {
    const int32_t rounds = static_cast<int32_t>(room.microbatches);
    Ids slot_of_bin(cost.size());
    for (int32_t first = 0; first < room.bins(); first += rounds) {
        const Ids costliest = heaviest_first(cost, first, first + rounds);
        for (int32_t round = 0; round < rounds; ++round) slot_of_bin[costliest[round]] = first + round;
    }
    return slot_of_bin;
}

void weigh(const Amounts& cost, const Ids& slot_of_bin, const Room& room, Balanced& found) {
    Amounts by_slot(cost.size());
    for (size_t bin = 0; bin < cost.size(); ++bin) by_slot[slot_of_bin[bin]] = cost[bin];
    Amounts costliest(room.microbatches);
    for (auto own = by_slot.begin(); own != by_slot.end(); own += room.microbatches) {
        const auto end = own + room.microbatches;
        std::transform(own, end, costliest.begin(), costliest.begin(), [](int64_t a, int64_t b) { return std::max(a, b); });
        found.slowest = std::max(found.slowest, std::accumulate(own, end, int64_t{0}));
    }
    found.lockstep = std::accumulate(costliest.begin(), costliest.end(), int64_t{0});
    found.total = std::accumulate(cost.begin(), cost.end(), int64_t{0});
}

Balanced assign(const Packing& packing, Algorithm algorithm, const Room& room, int64_t cost_of_microbatch) {
    Amounts cost(packing.bins.size());
    std::transform(packing.bins.begin(), packing.bins.end(), cost.begin(), [&](const Bin& bin) { return bin.cost + cost_of_microbatch; });
    const Ids slot_of_bin = packing.by_rank ? line_up(cost, room) : deal(cost, room);
    Balanced found{algorithm, room.microbatches, Ids(packing.bin_of.size())};
    weigh(cost, slot_of_bin, room, found);
    std::transform(packing.bin_of.begin(), packing.bin_of.end(), found.slot_of.begin(), [&](int32_t bin) { return slot_of_bin[bin]; });
    return found;
}

// What is minimised: how long the step takes, then how long it would take with the other way to wait.
std::pair<int64_t, int64_t> objective(const Balanced& found, Sync sync) {
    return sync == Sync::microbatch ? std::pair(found.lockstep, found.slowest) : std::pair(found.slowest, found.lockstep);
}

int64_t ideal(const Sorted& units, const Room& room, const Limits& limits) {
    return limits.cost.microbatch * room.microbatches + (units.total_cost + room.ranks - 1) / room.ranks;
}

int64_t tokens_to_place(const Sorted& units, int64_t capacity) {
    int64_t tokens = 0;
    for (const int64_t unit_tokens : units.tokens) tokens += std::min(unit_tokens, capacity);
    return tokens;
}

using Way = std::pair<Algorithm, Packing (*)(const Sorted&, const Room&)>;

// Where less than one token in 500 is to spare, levelling costs will hardly succeed, so the tight way is tried first.
std::array<Way, 4> ways(const Sorted& units, const Room& room) {
    std::array<Way, 4> ways{{{Algorithm::level, pack_level},
                             {Algorithm::skewed, pack_skewed},
                             {Algorithm::by_rank, pack_by_rank},
                             {Algorithm::tight, pack_tight}}};
    const int64_t space = room.capacity * room.bins();
    if (space - tokens_to_place(units, room.capacity) < space / 500) std::rotate(ways.begin(), ways.end() - 1, ways.end());
    return ways;
}

// The best of the four ways, or nothing and in `needed` how many bins would do for certain.
std::optional<Balanced> best_of(const Sorted& units, const Room& room, const Limits& limits, int64_t& needed) {
    const int64_t enough = ideal(units, room, limits) + ideal(units, room, limits) / 256;
    std::optional<Balanced> best;
    for (const auto& [algorithm, pack] : ways(units, room)) {
        const Packing packing = pack(units, room);
        if (!packing.ok) {
            needed = std::max(needed, static_cast<int64_t>(packing.bins.size()));
            continue;
        }
        Balanced found = assign(packing, algorithm, room, limits.cost.microbatch);
        if (!best || objective(found, limits.sync) < objective(*best, limits.sync)) best = std::move(found);
        if (objective(*best, limits.sync).first <= enough) break;
    }
    return best;
}

// Bins that are needed at least: no two units of more than half a bin share one, and none holds more than the capacity.
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
        if (microbatches > std::numeric_limits<int32_t>::max() / limits.ranks) throw std::length_error("more than 2**31 - 1 microbatches");
        return Room{limits.capacity(), limits.ranks, microbatches, limits.cost.token + limits.cost.square * units.tokens[0]};
    };
    Room room = room_for(least_bins(units, limits.capacity()));
    std::optional<Balanced> best;
    for (int64_t needed = 0;; room = room_for(std::max<int64_t>(needed, room.bins() + 1))) {
        if (best && objective(*best, limits.sync).first <= ideal(units, room, limits)) return *best;
        std::optional<Balanced> found = best_of(units, room, limits, needed);
        if (best && (!found || objective(*found, limits.sync) >= objective(*best, limits.sync))) return *best;
        if (found) best = std::move(found);
        if (best && limits.cost.microbatch == 0) return *best;
    }
}

}  // namespace trivet
