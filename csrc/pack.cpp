#include "pack.h"

#include <algorithm>
#include <numeric>
#include <queue>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>

namespace trivet {
namespace {

using Indices = std::vector<int64_t>;

// A unit is what a microbatch must hold whole: a sequence on its own, or all sequences of a group.
struct Units {
    Indices tokens;   // [U]
    Indices first;    // [U + 1], into members
    Indices members;  // [N] sequence ids, unit after unit

    int64_t size() const { return static_cast<int64_t>(tokens.size()); }
};

struct Bin {
    int64_t tokens = 0;
    Indices units;  // heaviest first

    void add(int64_t unit, int64_t unit_tokens) {
        units.push_back(unit);
        tokens += unit_tokens;
    }
};

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// The indices of `weights` from the heaviest on; equal weights keep the order of their indices.
Indices heaviest_first(const Indices& weights) {
    Indices order(weights.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return weights[a] > weights[b]; });
    return order;
}

[[noreturn]] void throw_too_long(const std::string& what, int64_t tokens, const Limits& limits) {
    std::string room = "token_budget=" + std::to_string(limits.token_budget);
    if (limits.capacity() < limits.token_budget) {
        room += " (" + std::to_string(limits.capacity()) + " in multiples of " + std::to_string(limits.total_multiple) + ")";
    }
    throw std::invalid_argument(what + " has " + std::to_string(tokens) + " tokens, more than " + room +
                                "; raise tokens_per_microbatch or shorten/truncate it");
}

void check_lengths(const int64_t* lengths, int64_t count, const Limits& limits) {
    for (int64_t i = 0; i < count; ++i) {
        if (lengths[i] < 0) {
            throw std::invalid_argument("sequence " + std::to_string(i) + " has length " + std::to_string(lengths[i]) +
                                        "; a length is at least 0, for a sample of length + 1 token ids");
        }
        if (lengths[i] > limits.capacity()) throw_too_long("sequence " + std::to_string(i), lengths[i], limits);
    }
}

// The unit of each sequence, numbered by first appearance.
Indices number_units(const int64_t* groups, int64_t count) {
    Indices unit_of(count);
    std::unordered_map<int64_t, int64_t> unit_of_group;
    int64_t units = 0;
    for (int64_t i = 0; i < count; ++i) {
        const bool alone = groups == nullptr || groups[i] < 0;
        const int64_t unit = alone ? units : unit_of_group.try_emplace(groups[i], units).first->second;
        unit_of[i] = unit;
        units = std::max(units, unit + 1);
    }
    return unit_of;
}

Units gather_units(const int64_t* lengths, const int64_t* groups, int64_t count) {
    const Indices unit_of = number_units(groups, count);
    const int64_t size = count == 0 ? 0 : *std::max_element(unit_of.begin(), unit_of.end()) + 1;
    Units units{Indices(size), Indices(size + 1), Indices(count)};
    for (int64_t i = 0; i < count; ++i) {
        units.tokens[unit_of[i]] += lengths[i];
        ++units.first[unit_of[i] + 1];
    }
    std::partial_sum(units.first.begin(), units.first.end(), units.first.begin());
    Indices next(units.first.begin(), units.first.end() - 1);
    for (int64_t i = 0; i < count; ++i) units.members[next[unit_of[i]]++] = i;
    return units;
}

void check_groups(const Units& units, const int64_t* groups, const Limits& limits) {
    for (int64_t u = 0; u < units.size(); ++u) {
        if (units.tokens[u] <= limits.capacity()) continue;
        const int64_t first = units.members[units.first[u]];
        const int64_t size = units.first[u + 1] - units.first[u];
        const std::string who = " (" + std::to_string(size) + " sequences, the first is " + std::to_string(first) + ")";
        throw_too_long("group " + std::to_string(groups[first]) + who, units.tokens[u], limits);
    }
}

// Finds the first bin with enough room in O(log bins): a tree whose nodes hold the largest room among their leaves.
class FirstFit {
  public:
    FirstFit(int64_t bins, int64_t capacity) {
        while (leaves_ < bins) leaves_ *= 2;
        room_.assign(2 * leaves_, capacity);
    }

    // Takes `tokens` from the first bin that has them. There is one: no unit exceeds the capacity, and there are as many bins as units.
    int64_t place(int64_t tokens) {
        int64_t node = 1;
        while (node < leaves_) node = 2 * node + (room_[2 * node] < tokens);
        const int64_t bin = node - leaves_;
        room_[node] -= tokens;
        while (node /= 2) room_[node] = std::max(room_[2 * node], room_[2 * node + 1]);
        return bin;
    }

  private:
    int64_t leaves_ = 1;
    Indices room_;
};

std::vector<Bin> first_fit_decreasing(const Units& units, int64_t capacity) {
    std::vector<Bin> bins;
    FirstFit fit(units.size(), capacity);
    for (const int64_t unit : heaviest_first(units.tokens)) {
        const int64_t bin = fit.place(units.tokens[unit]);
        if (bin == static_cast<int64_t>(bins.size())) bins.emplace_back();
        bins[bin].add(unit, units.tokens[unit]);
    }
    return bins;
}

// Cuts a bin of two units or more into two that are not empty: heaviest unit first, to the lighter side.
std::pair<Bin, Bin> halve(const Bin& bin, const Units& units) {
    Bin left, right;
    for (const int64_t unit : bin.units) {
        const bool to_left = std::pair(left.tokens, left.units.size()) <= std::pair(right.tokens, right.units.size());
        (to_left ? left : right).add(unit, units.tokens[unit]);
    }
    return {std::move(left), std::move(right)};
}

// Brings the bins to `wanted`: the heaviest is halved again and again; once every unit has a bin of its own, the rest are empty.
void spread(std::vector<Bin>& bins, int64_t wanted, const Units& units) {
    using Candidate = std::pair<int64_t, int64_t>;  // tokens, -index: the top is the heaviest, then the lowest index
    std::priority_queue<Candidate> divisible;
    const auto offer = [&](int64_t bin) {
        if (bins[bin].units.size() > 1) divisible.emplace(bins[bin].tokens, -bin);
    };
    for (int64_t bin = 0; bin < static_cast<int64_t>(bins.size()); ++bin) offer(bin);
    while (static_cast<int64_t>(bins.size()) < wanted && !divisible.empty()) {
        const int64_t heaviest = -divisible.top().second;
        divisible.pop();
        auto [left, right] = halve(bins[heaviest], units);
        bins[heaviest] = std::move(left);
        bins.push_back(std::move(right));
        offer(heaviest);
        offer(static_cast<int64_t>(bins.size()) - 1);
    }
    bins.resize(wanted);
}

// Deals the bins out, `ranks` at a time from the heaviest on; within a round the heaviest goes to the rank with the fewest tokens.
// So every rank has equally many, its own come heaviest first, and two ranks never differ by more than the bins of one round do.
Indices deal(const std::vector<Bin>& bins, int64_t ranks) {
    const int64_t rounds = static_cast<int64_t>(bins.size()) / ranks;
    Indices weights(bins.size()), shortfall(ranks), bin_of_slot(bins.size());
    std::transform(bins.begin(), bins.end(), weights.begin(), [](const Bin& bin) { return bin.tokens; });
    auto bin = heaviest_first(weights);
    for (int64_t round = 0; round < rounds; ++round) {
        const Indices lightest_first = heaviest_first(shortfall);
        for (int64_t i = 0; i < ranks; ++i) {
            const int64_t rank = lightest_first[i], dealt = bin[round * ranks + i];
            bin_of_slot[rank * rounds + round] = dealt;
            shortfall[rank] -= weights[dealt];
        }
    }
    return bin_of_slot;
}

Plan lay_out(const std::vector<Bin>& bins, const Indices& bin_of_slot, const Units& units, int64_t microbatches) {
    Plan plan{{}, {0}, microbatches};
    plan.order.reserve(units.members.size());
    plan.offsets.reserve(bins.size() + 1);
    for (const int64_t bin : bin_of_slot) {
        for (const int64_t unit : bins[bin].units) {
            const auto members = units.members.begin();
            plan.order.insert(plan.order.end(), members + units.first[unit], members + units.first[unit + 1]);
        }
        plan.offsets.push_back(static_cast<int64_t>(plan.order.size()));
    }
    return plan;
}

}  // namespace

Plan pack(const int64_t* lengths, const int64_t* groups, int64_t count, const Limits& limits) {
    check_lengths(lengths, count, limits);
    const Units units = gather_units(lengths, groups, count);
    check_groups(units, groups, limits);
    std::vector<Bin> bins = first_fit_decreasing(units, limits.capacity());
    const int64_t wanted = round_up(static_cast<int64_t>(bins.size()), limits.ranks * limits.microbatch_multiple);
    spread(bins, wanted, units);
    return lay_out(bins, deal(bins, limits.ranks), units, wanted / limits.ranks);
}

}  // namespace trivet
