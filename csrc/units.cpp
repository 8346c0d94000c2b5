#include "units.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>

namespace trivet {
namespace {

constexpr int64_t LONGEST = std::numeric_limits<int32_t>::max();  // cu_seqlens is int32

std::string text(int64_t value) { return std::to_string(value); }

[[noreturn]] void throw_too_long(const std::string& what, int64_t tokens, const Limits& limits) {
    std::string room = "token_budget=" + text(limits.token_budget);
    if (limits.capacity() < limits.token_budget) {
        room += " (" + text(limits.capacity()) + " in multiples of " + text(limits.total_multiple) + ")";
    }
    throw std::invalid_argument(what + " has " + text(tokens) + " tokens, more than " + room +
                                "; raise tokens_per_microbatch or shorten/truncate it");
}

void check_limits(const Limits& limits) {
    const auto fail = [](const std::string& message) { throw std::invalid_argument(message); };
    for (const auto& [name, value] : {std::pair("ranks", limits.ranks), {"token_budget", limits.token_budget}, {"seq_multiple", limits.seq_multiple},
                                      {"total_multiple", limits.total_multiple}, {"microbatch_multiple", limits.microbatch_multiple}}) {
        if (value < 1) fail(std::string(name) + "=" + text(value) + " must be at least 1");
    }
    if (limits.token_budget > LONGEST) {
        fail("token_budget=" + text(limits.token_budget) + " exceeds int32 cu_seqlens; lower tokens_per_microbatch to at most " + text(LONGEST));
    }
    if (limits.ranks > MOST_SLOTS / limits.microbatch_multiple) {
        fail("ranks=" + text(limits.ranks) + " times microbatch_multiple=" + text(limits.microbatch_multiple) + " is over " + text(MOST_SLOTS) +
             "; lower one of them");
    }
    for (const auto& [name, multiple] : {std::pair("seq_multiple", limits.seq_multiple), {"total_multiple", limits.total_multiple}}) {
        if (limits.token_budget < multiple) {
            fail("token_budget=" + text(limits.token_budget) + " is below " + name + "=" + text(multiple) + "; raise tokens_per_microbatch to " +
                 text(multiple) + " or more");
        }
    }
    for (const int64_t cost : {limits.cost.microbatch, limits.cost.token, limits.cost.square}) {
        if (cost < 0 || cost >= int64_t{1} << 62) fail("cost has " + text(cost) + "; use three integers from 0 to 2**62 - 1");
    }
}

void check_trained(const Sequences& sequences) {
    for (int64_t i = 0; sequences.trained != nullptr && i < sequences.count; ++i) {
        if (sequences.trained[i] >= 0 && sequences.trained[i] <= LONGEST) continue;
        throw std::invalid_argument("trained[" + text(i) + "]=" + text(sequences.trained[i]) + " must be from 0 to " + text(LONGEST));
    }
}

void check_lengths(const Sequences& sequences) {
    if (sequences.count > LONGEST) throw std::invalid_argument(text(sequences.count) + " sequences are over 2**31 - 1; split the batch");
    const auto [shortest, longest] = std::minmax_element(sequences.lengths, sequences.lengths + sequences.count);
    if (sequences.count == 0 || (*shortest >= 0 && *longest <= LONGEST)) return;
    const int64_t* wrong = *shortest < 0 ? shortest : longest;
    const std::string limit = *wrong < 0 ? "at least 0, for a sample of length + 1 token ids" : "at most 2**31 - 1";
    throw std::invalid_argument("sequence " + text(wrong - sequences.lengths) + " has length " + text(*wrong) + "; a length is " + limit);
}

// If the sum of all costs is below 2^62, it and all values compared with it fit in int64. Computed with 128 bits.
void check_costs(const Sequences& sequences, const Limits& limits) {
    constexpr __int128 MOST = (static_cast<__int128>(1) << 62) - 1;
    __int128 tokens = 0, squares = 0;
    for (int64_t i = 0; i < sequences.count; ++i) {
        const int64_t padded = limits.padded(sequences.lengths[i]);
        tokens += padded;
        squares += static_cast<__int128>(padded) * padded;
    }
    const Cost& cost = limits.cost;
    const __int128 slots = static_cast<__int128>(sequences.count + 1) * (limits.ranks * limits.microbatch_multiple + 1);  // an upper bound for any plan
    // tokens < 2^62 and squares < 2^93, so only the products can overflow; quotients cannot.
    const bool fits = (cost.token == 0 || tokens <= MOST / cost.token) && (cost.square == 0 || squares <= MOST / cost.square) &&
                      (cost.microbatch == 0 || slots <= MOST / cost.microbatch) &&
                      tokens * cost.token + squares * cost.square + slots * cost.microbatch <= MOST;
    if (!fits) {
        throw std::invalid_argument("cost=(" + text(cost.microbatch) + ", " + text(cost.token) + ", " + text(cost.square) +
                                    ") makes these sequences cost more than 2**62; divide all three by a common factor");
    }
}

Ids count_up(int64_t count) {
    Ids numbers(count);
    std::iota(numbers.begin(), numbers.end(), 0);
    return numbers;
}

// The unit of each sequence, numbered by first appearance.
Ids number_units(const Sequences& sequences) {
    Ids unit_of(sequences.count);
    std::unordered_map<int64_t, int32_t> unit_of_group;
    int32_t units = 0;
    for (int64_t i = 0; i < sequences.count; ++i) {
        const bool alone = sequences.groups[i] < 0;
        const int32_t unit = alone ? units : unit_of_group.try_emplace(sequences.groups[i], units).first->second;
        unit_of[i] = unit;
        units = std::max(units, unit + 1);
    }
    return unit_of;
}

int64_t cost_of(int64_t padded, const Cost& cost) { return (cost.token + cost.square * padded) * padded; }

Units units_of_sequences(const Sequences& sequences, const Limits& limits) {
    Units units{Amounts(sequences.count), Amounts(sequences.count), count_up(sequences.count + 1), count_up(sequences.count), {}, {}};
    for (int64_t i = 0; i < sequences.count; ++i) {
        units.tokens[i] = limits.padded(sequences.lengths[i]);
        units.cost[i] = cost_of(units.tokens[i], limits.cost);
    }
    return units;
}

Units units_of_groups(const Sequences& sequences, const Limits& limits) {
    const Ids unit_of = number_units(sequences);
    const int32_t size = sequences.count == 0 ? 0 : *std::max_element(unit_of.begin(), unit_of.end()) + 1;
    Units units{Amounts(size), Amounts(size), Ids(size + 1), Ids(sequences.count), {}, {}};
    for (int64_t i = 0; i < sequences.count; ++i) {
        const int64_t padded = limits.padded(sequences.lengths[i]);
        units.tokens[unit_of[i]] += padded;
        units.cost[unit_of[i]] += cost_of(padded, limits.cost);
        ++units.first[unit_of[i] + 1];
    }
    std::partial_sum(units.first.begin(), units.first.end(), units.first.begin());
    Ids next(units.first.begin(), units.first.end() - 1);
    for (int64_t i = 0; i < sequences.count; ++i) units.members[next[unit_of[i]]++] = static_cast<int32_t>(i);
    return units;
}

void check_steps(const Units& units, const Sequences& sequences) {
    if (sequences.steps == nullptr) return;
    for (int32_t u = 0; u < units.size(); ++u) {
        const int32_t leader = units.members[units.first[u]];
        for (int32_t m = units.first[u]; m < units.first[u + 1]; ++m) {
            const int32_t member = units.members[m];
            if (sequences.steps[member] == sequences.steps[leader]) continue;
            throw std::invalid_argument("group " + text(sequences.groups[leader]) + " spans steps " + text(sequences.steps[leader]) + " (sequence " +
                                        text(leader) + ") and " + text(sequences.steps[member]) + " (sequence " + text(member) +
                                        "); give its sequences one step id");
        }
    }
}

std::string describe(const Units& units, int32_t unit, const Sequences& sequences) {
    const int32_t leader = units.members[units.first[unit]], size = units.first[unit + 1] - units.first[unit];
    if (size == 1) return "sequence " + text(leader);
    return "group " + text(sequences.groups[leader]) + " (" + text(size) + " sequences, the first is " + text(leader) + ")";
}

void handle_oversize(Units& units, const Sequences& sequences, const Limits& limits) {
    for (int32_t u = 0; u < units.size(); ++u) {
        if (units.tokens[u] <= limits.capacity()) continue;
        if (limits.on_oversize == Oversize::error) throw_too_long(describe(units, u, sequences), units.tokens[u], limits);
        if (limits.on_oversize == Oversize::drop) units.dropped.push_back(u);
        if (limits.on_oversize == Oversize::alone && round_up(units.tokens[u], limits.total_multiple) > LONGEST) {
            throw std::invalid_argument(describe(units, u, sequences) + " has " + text(units.tokens[u]) +
                                        " tokens, over 2**31 - 1 even in a microbatch of its own; use on_oversize=\"drop\" or shorten it");
        }
        units.oversize.insert(units.oversize.end(), units.members.begin() + units.first[u], units.members.begin() + units.first[u + 1]);
    }
    std::sort(units.oversize.begin(), units.oversize.end());
}

// Stable sort of `units` by tokens, descending from `longest`: radix sort, one pass if longest < 2^14.
void sort_longest_first(Ids& units, const Amounts& tokens, int64_t longest) {
    constexpr int BITS = 14;
    Ids other(units.size());
    for (int shift = 0; (longest >> shift) != 0; shift += BITS) {
        const auto digit = [&](int32_t unit) { return ((longest - tokens[unit]) >> shift) & ((1 << BITS) - 1); };
        Ids start(1 << BITS);
        for (const int32_t unit : units) ++start[digit(unit)];
        std::exclusive_scan(start.begin(), start.end(), start.begin(), 0);
        for (const int32_t unit : units) other[start[digit(unit)]++] = unit;
        units.swap(other);
    }
}

// All units that are not dropped, longest first.
Ids longest_first(const Units& units) {
    Ids kept = count_up(units.size());
    const auto is_dropped = [&](int32_t unit) { return std::binary_search(units.dropped.begin(), units.dropped.end(), unit); };
    if (!units.dropped.empty()) kept.erase(std::remove_if(kept.begin(), kept.end(), is_dropped), kept.end());
    int64_t longest = 0;
    for (const int32_t unit : kept) longest = std::max(longest, units.tokens[unit]);
    sort_longest_first(kept, units.tokens, longest);
    return kept;
}

// Splits `order` by the steps of its units; each step keeps the order.
std::vector<Sorted> by_step(Ids order, const Units& units, const Sequences& sequences, const Amounts& step_ids) {
    std::vector<Sorted> steps(step_ids.size());
    if (steps.size() == 1) {
        steps[0].unit = std::move(order);
        return steps;
    }
    for (const int32_t unit : order) {
        const int64_t id = sequences.steps[units.members[units.first[unit]]];
        steps[std::lower_bound(step_ids.begin(), step_ids.end(), id) - step_ids.begin()].unit.push_back(unit);
    }
    return steps;
}

}  // namespace

Units gather_units(const Sequences& sequences, const Limits& limits) {
    check_limits(limits);
    check_lengths(sequences);
    check_trained(sequences);
    check_costs(sequences, limits);
    Units units = sequences.groups == nullptr ? units_of_sequences(sequences, limits) : units_of_groups(sequences, limits);
    check_steps(units, sequences);
    handle_oversize(units, sequences, limits);
    return units;
}

std::vector<Sorted> sort_units(const Units& units, const Sequences& sequences, Amounts& step_ids) {
    if (sequences.steps == nullptr) {
        step_ids = {0};
    } else {
        step_ids.assign(sequences.steps, sequences.steps + sequences.count);
        std::sort(step_ids.begin(), step_ids.end());
        step_ids.erase(std::unique(step_ids.begin(), step_ids.end()), step_ids.end());
    }
    std::vector<Sorted> steps = by_step(longest_first(units), units, sequences, step_ids);
    for (Sorted& step : steps) {
        const auto look_up = [&](const Amounts& amounts) {
            Amounts values(step.unit.size());
            std::transform(step.unit.begin(), step.unit.end(), values.begin(), [&](int32_t unit) { return amounts[unit]; });
            return values;
        };
        step.tokens = look_up(units.tokens);
        step.cost = look_up(units.cost);
        step.total_cost = std::accumulate(step.cost.begin(), step.cost.end(), int64_t{0});
    }
    return steps;
}

}  // namespace trivet
