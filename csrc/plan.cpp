#include "plan.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

namespace trivet {
namespace {

// The slot of each unit in the whole plan, -1 if it was dropped.
Ids slots_of_units(const Units& units, const std::vector<Sorted>& steps, const std::vector<Balanced>& balanced, const Plan& plan) {
    Ids slot_of(units.size(), -1);
    for (size_t step = 0; step < steps.size(); ++step) {
        const int64_t own = balanced[step].microbatches;
        for (int32_t place = 0; place < steps[step].size(); ++place) {
            const int64_t slot = balanced[step].slot_of[place];
            const int64_t rank = slot / own, microbatch = plan.step_offsets[step] + slot % own;
            slot_of[steps[step].unit[place]] = static_cast<int32_t>(rank * plan.microbatches + microbatch);
        }
    }
    return slot_of;
}

void count_sequences(const Units& units, const Ids& slot_of, Amounts& offsets) {
    for (int32_t u = 0; u < units.size(); ++u) {
        if (slot_of[u] >= 0) offsets[slot_of[u] + 1] += units.first[u + 1] - units.first[u];
    }
    std::partial_sum(offsets.begin(), offsets.end(), offsets.begin());
}

// Within a microbatch sequences are ordered by id, but the sequences of a group stay adjacent.
void lay_out(const Units& units, const Ids& slot_of, const Sequences& sequences, const Limits& limits, Plan& plan) {
    const int64_t slots = limits.ranks * plan.microbatches;
    plan.offsets.assign(slots + 1, 0);
    count_sequences(units, slot_of, plan.offsets);
    plan.order.resize(plan.offsets.back());
    plan.inverse.assign(sequences.count, -1);
    plan.cu_seqlens.assign(plan.order.size() + slots, 0);
    plan.cu_seqlens_padded.assign(plan.order.size() + slots, 0);
    Amounts next(plan.offsets.begin(), plan.offsets.end() - 1);
    for (int32_t u = 0; u < units.size(); ++u) {
        const int64_t slot = slot_of[u];
        if (slot < 0) continue;
        for (int32_t m = units.first[u]; m < units.first[u + 1]; ++m) {
            const int32_t sequence = units.members[m];
            const int64_t place = next[slot]++, boundary = place + slot + 1, length = sequences.lengths[sequence];
            plan.order[place] = sequence;
            plan.inverse[sequence] = static_cast<int32_t>(place);
            plan.cu_seqlens[boundary] = static_cast<int32_t>(plan.cu_seqlens[boundary - 1] + length);
            plan.cu_seqlens_padded[boundary] = static_cast<int32_t>(plan.cu_seqlens_padded[boundary - 1] + limits.padded(length));
        }
    }
}

void compute_totals(const Limits& limits, Plan& plan) {
    const int64_t slots = limits.ranks * plan.microbatches;
    plan.totals.resize(slots);
    int64_t real = 0;
    for (int64_t slot = 0; slot < slots; ++slot) {
        const int64_t last = plan.offsets[slot + 1] + slot;
        real += plan.cu_seqlens[last];
        plan.totals[slot] = round_up(std::max(plan.cu_seqlens_padded[last], 1), limits.total_multiple);
    }
    if (slots > 0) plan.fill = static_cast<double>(real) / (static_cast<double>(slots) * static_cast<double>(limits.token_budget));
}

Denominators count_trained(const Units& units, const Ids& slot_of, const Sequences& sequences, const Plan& plan) {
    const size_t steps = plan.step_ids.size();
    Denominators counts{Amounts(steps), Amounts(steps), Amounts(steps)};
    size_t step = 0;
    for (int32_t u = 0; u < units.size(); ++u) {
        if (slot_of[u] < 0) continue;
        if (sequences.steps != nullptr) {
            const int64_t id = sequences.steps[units.members[units.first[u]]];
            step = std::lower_bound(plan.step_ids.begin(), plan.step_ids.end(), id) - plan.step_ids.begin();
        }
        int64_t tokens = 0;
        for (int32_t m = units.first[u]; m < units.first[u + 1]; ++m) {
            const int32_t sequence = units.members[m];
            const int64_t trained = sequences.trained == nullptr ? sequences.lengths[sequence] : sequences.trained[sequence];
            counts.sequences[step] += trained > 0;
            tokens += trained;
        }
        counts.tokens[step] += tokens;
        counts.groups[step] += tokens > 0;
    }
    return counts;
}

void compute_ratios(const std::vector<Balanced>& balanced, const Limits& limits, Plan& plan) {
    int64_t lockstep = 0, slowest = 0, total = 0;
    for (const Balanced& step : balanced) {
        lockstep += step.lockstep;
        slowest += step.slowest;
        total += step.total;
    }
    if (total == 0) return;
    const double mean = static_cast<double>(total) / static_cast<double>(limits.ranks);
    plan.lockstep = static_cast<double>(lockstep) / mean;
    plan.imbalance = static_cast<double>(slowest) / mean;
}

}  // namespace

Plan plan(const Sequences& sequences, const Limits& limits) {
    Units units = gather_units(sequences, limits);
    Plan plan;
    const std::vector<Sorted> steps = sort_units(units, sequences, plan.step_ids);
    std::vector<Balanced> balanced;
    plan.step_offsets = {0};
    for (const Sorted& step : steps) {
        balanced.push_back(balance(step, limits));
        plan.algorithms.push_back(balanced.back().algorithm);
        plan.step_offsets.push_back(plan.step_offsets.back() + balanced.back().microbatches);
        if (plan.step_offsets.back() > MOST_SLOTS / limits.ranks) {
            throw std::invalid_argument(std::to_string(steps.size()) + " steps make more than 2**24 microbatches on " + std::to_string(limits.ranks) +
                                        " ranks; plan fewer steps at a time");
        }
    }
    plan.microbatches = plan.step_offsets.back();
    const Ids slot_of = slots_of_units(units, steps, balanced, plan);
    lay_out(units, slot_of, sequences, limits, plan);
    compute_totals(limits, plan);
    plan.denominators = count_trained(units, slot_of, sequences, plan);
    compute_ratios(balanced, limits, plan);
    plan.oversize = std::move(units.oversize);
    return plan;
}

}  // namespace trivet
