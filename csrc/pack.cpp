#include "pack.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <queue>

#include "differencing.h"
#include "exchange.h"

namespace trivet {
namespace {

Ids range(int32_t first, int32_t last) {
    Ids ids(last - first);
    std::iota(ids.begin(), ids.end(), first);
    return ids;
}

std::vector<Bin> empty_bins(int64_t count, int64_t capacity) { return std::vector<Bin>(count, Bin{0, capacity, -1}); }

// A unit that is longer than the capacity gets a bin of its own, with a room of -1.
void add(Bin& bin, const Sorted& units, int32_t unit) {
    bin.cost += units.cost[unit];
    bin.room = std::max<int64_t>(bin.room - units.tokens[unit], -1);
}

// Distributes `items` over the empty bins [first, last). Bins without room for an item are set aside until items are small enough: items come
// longest first, so a bin is set aside at most once per item that it takes.
bool level(const Sorted& units, const Ids& items, int32_t first, int32_t last, Packing& packing) {
    std::vector<Bin>& bins = packing.bins;
    const auto put = [&](int32_t unit, int32_t bin) {
        packing.bin_of[unit] = bin;
        add(bins[bin], units, unit);
    };
    const size_t seeds = std::min<size_t>(items.size(), last - first);
    for (size_t i = 0; i < seeds; ++i) put(items[i], first + static_cast<int32_t>(i));
    if (seeds == items.size()) return true;

    int64_t total = 0;
    for (const int32_t unit : items) total += units.cost[unit];
    Cheapest queue(bins.data(), total / (last - first) * 2);
    for (int32_t bin = last; bin-- > first;) queue.put(bin);
    std::priority_queue<std::pair<int64_t, int32_t>> waiting;  // (room, bin)
    for (size_t i = seeds; i < items.size(); ++i) {
        const int64_t tokens = units.tokens[items[i]];
        for (; !waiting.empty() && waiting.top().first >= tokens; waiting.pop()) queue.put(waiting.top().second);
        int32_t bin;
        while ((bin = queue.take()) >= 0 && bins[bin].room < tokens) waiting.emplace(bins[bin].room, bin);
        if (bin < 0) return false;
        put(items[i], bin);
        queue.put(bin);
    }
    return true;
}

// How many microbatches must cost more than the mean, because single units do.
int32_t heavy_steps(const Sorted& units, const Room& room) {
    int64_t rest = units.total_cost;
    int32_t steps = 0;
    for (; steps < room.microbatches - 1; ++steps) {
        const int64_t next = steps * room.ranks;
        if (next >= units.size() || rest <= 0) break;
        if (units.cost[next] <= rest / (room.ranks * (room.microbatches - steps))) break;
        rest -= room.ranks * units.cost[next];
    }
    return steps;
}

// Fills the seeded bins [0, seeds) from `units` in order, each up to the cost of the heaviest bin of its microbatch. Returns the remaining
// units. Here a bin's room is the smaller of its free tokens and of the tokens that its cost limit allows.
Ids fill_seeded(const Sorted& units, const Room& room, int32_t seeds, Packing& packing) {
    std::vector<Bin> bins(packing.bins.begin(), packing.bins.begin() + seeds);
    Tightest queue(bins.data(), room.capacity);
    const auto put = [&](int32_t bin) {
        const int64_t limit = units.cost[bin / room.ranks * room.ranks];
        const int64_t affordable = (limit - packing.bins[bin].cost) / std::max<int64_t>(room.cost_per_token, 1);
        bins[bin].room = std::min(packing.bins[bin].room, affordable);
        queue.put(bin);
    };
    for (int32_t bin = 0; bin < seeds; ++bin) put(bin);
    Ids rest;
    for (int32_t unit = seeds; unit < units.size(); ++unit) {
        const int32_t bin = queue.take(units.tokens[unit]);
        if (bin < 0) {
            rest.push_back(unit);
            continue;
        }
        packing.bin_of[unit] = bin;
        add(packing.bins[bin], units, unit);
        put(bin);
    }
    return rest;
}

// Best fit decreasing; adds bins as needed.
void fit_best(const Sorted& units, int64_t capacity, Packing& packing) {
    packing.bins.reserve(units.size());  // the queue keeps pointers to them
    Tightest queue(packing.bins.data(), capacity);
    for (int32_t unit = 0; unit < units.size(); ++unit) {
        int32_t bin = queue.take(units.tokens[unit]);
        if (bin < 0) {
            bin = static_cast<int32_t>(packing.bins.size());
            packing.bins.push_back({0, capacity, -1});
        }
        packing.bin_of[unit] = bin;
        add(packing.bins[bin], units, unit);
        queue.put(bin);
    }
}

// The units of each of `count` bins, longest first.
std::vector<Ids> contents(const Ids& bin_of, size_t count) {
    std::vector<Ids> held(count);
    for (size_t unit = 0; unit < bin_of.size(); ++unit) held[bin_of[unit]].push_back(static_cast<int32_t>(unit));
    return held;
}

// Splits the costliest bin with at least two units, until there are room.bins() bins or none can be split.
void split_costliest(const Sorted& units, const Room& room, Packing& packing) {
    std::vector<Bin>& bins = packing.bins;
    std::vector<Ids> held = contents(packing.bin_of, bins.size());
    std::priority_queue<std::pair<int64_t, int32_t>> costliest;  // (cost, -bin): ties go to the lower bin
    const auto offer = [&](int32_t bin) {
        if (held[bin].size() > 1) costliest.emplace(bins[bin].cost, -bin);
    };
    for (size_t bin = 0; bin < bins.size(); ++bin) offer(static_cast<int32_t>(bin));
    while (static_cast<int32_t>(bins.size()) < room.bins() && !costliest.empty()) {
        const int32_t left = -costliest.top().second, right = static_cast<int32_t>(bins.size());
        costliest.pop();
        const Ids whole = std::move(held[left]);
        held[left].clear();
        held.emplace_back();
        bins[left] = Bin{0, room.capacity, -1};
        bins.push_back(bins[left]);
        for (const int32_t unit : whole) {  // longest first, each to the cheaper half
            const bool to_left = held[left].empty() || (!held[right].empty() && bins[left].cost <= bins[right].cost);
            const int32_t bin = to_left ? left : right;
            held[bin].push_back(unit);
            packing.bin_of[unit] = bin;
            add(bins[bin], units, unit);
        }
        offer(left);
        offer(right);
    }
}

// The number of units that fit in no bin; they are the first. Each gets a bin of its own, from bin 0.
int32_t oversize_units(const Sorted& units, const Room& room) {
    const auto fits = [&](int64_t tokens) { return tokens <= room.capacity; };
    return static_cast<int32_t>(std::find_if(units.tokens.begin(), units.tokens.end(), fits) - units.tokens.begin());
}

// Sets the bins of a packing from bin_of; `ok` becomes false if one has more tokens than the capacity.
void fill_bins(const Sorted& units, const Room& room, Packing& packing) {
    packing.bins = empty_bins(room.bins(), room.capacity);
    for (int32_t unit = 0; unit < units.size(); ++unit) {
        Bin& bin = packing.bins[packing.bin_of[unit]];
        packing.ok &= bin.room >= std::min(units.tokens[unit], room.capacity);
        add(bin, units, unit);
    }
}

// Units [first, U), costliest first. They are longest first already, but of two groups the longer one may cost less.
Ids costliest_first(const Sorted& units, int32_t first) {
    Ids order = range(first, units.size());
    const auto costlier = [&](int32_t a, int32_t b) { return units.cost[a] > units.cost[b]; };
    if (!std::is_sorted(order.begin(), order.end(), costlier)) std::stable_sort(order.begin(), order.end(), costlier);
    return order;
}

}  // namespace

Packing pack_level(const Sorted& units, const Room& room) {
    Packing packing{Ids(units.size()), empty_bins(room.bins(), room.capacity)};
    packing.ok = level(units, range(0, units.size()), 0, room.bins(), packing);
    return packing;
}

Packing pack_skewed(const Sorted& units, const Room& room) {
    const int32_t seeds = static_cast<int32_t>(std::min<int64_t>(heavy_steps(units, room) * room.ranks, units.size()));
    Packing packing{Ids(units.size()), empty_bins(room.bins(), room.capacity)};
    packing.ok = seeds > 0;
    if (!packing.ok) return packing;
    for (int32_t unit = 0; unit < seeds; ++unit) {
        packing.bin_of[unit] = unit;
        add(packing.bins[unit], units, unit);
    }
    const Ids rest = fill_seeded(units, room, seeds, packing);
    packing.ok = level(units, rest, seeds, room.bins(), packing);
    return packing;
}

Packing pack_by_rank(const Sorted& units, const Room& room) {
    Packing ranks{Ids(units.size()), empty_bins(room.ranks, room.capacity * room.microbatches)};
    Packing packing{Ids(units.size()), empty_bins(room.bins(), room.capacity), true};
    packing.ok = level(units, range(0, units.size()), 0, static_cast<int32_t>(room.ranks), ranks);
    if (!packing.ok) return packing;
    const std::vector<Ids> share = contents(ranks.bin_of, room.ranks);
    for (int64_t rank = 0; rank < room.ranks && packing.ok; ++rank) {
        const int32_t first = static_cast<int32_t>(rank * room.microbatches);
        packing.ok = level(units, share[rank], first, first + static_cast<int32_t>(room.microbatches), packing);
    }
    return packing;
}

Packing pack_tight(const Sorted& units, const Room& room) {
    Packing packing{Ids(units.size()), {}};
    fit_best(units, room.capacity, packing);
    packing.ok = static_cast<int32_t>(packing.bins.size()) <= room.bins();
    if (!packing.ok) return packing;
    split_costliest(units, room, packing);
    packing.bins.resize(room.bins(), Bin{0, room.capacity, -1});
    return packing;
}

Packing pack_differencing(const Sorted& units, const Room& room) {
    constexpr int64_t MOST = int64_t{1} << 26;
    Packing packing{range(0, units.size()), {}};  // oversize units have the first bins
    const int32_t oversize = oversize_units(units, room), bins = room.bins() - oversize;
    packing.ok = bins > 0 && units.size() <= MOST / bins;
    if (!packing.ok) return packing;
    const Ids order = costliest_first(units, oversize);
    Amounts cost(order.size());
    std::transform(order.begin(), order.end(), cost.begin(), [&](int32_t unit) { return units.cost[unit]; });
    const Ids part_of = largest_differencing(cost, bins);
    for (size_t i = 0; i < order.size(); ++i) packing.bin_of[order[i]] = oversize + part_of[i];
    fill_bins(units, room, packing);
    return packing;
}

Packing pack_even(const Sorted& units, const Room& room) {
    constexpr int64_t UNLIMITED = std::numeric_limits<int64_t>::max();
    Packing packing{range(0, units.size()), empty_bins(room.bins(), UNLIMITED)};
    const int32_t oversize = oversize_units(units, room);
    packing.ok = oversize < room.bins();
    if (!packing.ok) return packing;
    const Sorted by_tokens{units.unit, units.tokens, units.tokens, 0};
    level(by_tokens, range(oversize, units.size()), oversize, room.bins(), packing);
    exchange(units, units.tokens, room.capacity, UNLIMITED, oversize, packing);
    fill_bins(units, room, packing);
    return packing;
}

void exchange_costs(const Sorted& units, const Room& room, Packing& packing) {
    const int32_t oversize = oversize_units(units, room), bins = room.bins() - oversize;
    if (bins == 0 || oversize == units.size()) return;
    const int64_t total = std::accumulate(units.cost.begin() + oversize, units.cost.end(), int64_t{0});
    const int64_t costliest = *std::max_element(units.cost.begin() + oversize, units.cost.end());
    exchange(units, units.cost, std::max(total / bins + (total % bins > 0), costliest), room.capacity, oversize, packing);
    fill_bins(units, room, packing);
}

}  // namespace trivet
