// Inputs of planning: limits, and units (a sequence or a group that must share a microbatch), checked and sorted longest first.
#pragma once

#include <cstdint>
#include <vector>

namespace trivet {

// Sequences, units and bins are counted in int32, tokens and costs in int64.
using Ids = std::vector<int32_t>;
using Amounts = std::vector<int64_t>;

// Microbatches of all ranks together; above it, the arrays of a plan would take gigabytes.
constexpr int64_t MOST_SLOTS = 1 << 24;

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Cost of a microbatch: `microbatch` + the sum over its sequences of token * L + square * L^2.
struct Cost {
    int64_t microbatch, token, square;
};

enum class Sync { microbatch, step };          // how often ranks synchronize
enum class Oversize { error, alone, drop };    // what to do with a sequence or group that fits in no microbatch

// All values except costs are at least 1, and total_multiple is at most token_budget.
struct Limits {
    int64_t ranks;
    int64_t token_budget;  // maximum tokens of a microbatch, with padding
    Cost cost;
    int64_t seq_multiple;         // a sequence is padded to a multiple of this
    int64_t total_multiple;       // a microbatch is padded to a multiple of this
    int64_t microbatch_multiple;  // in each step, a rank's number of microbatches is a multiple of this
    Sync sync;
    Oversize on_oversize;

    int64_t capacity() const { return token_budget / total_multiple * total_multiple; }
    int64_t padded(int64_t length) const { return seq_multiple == 1 ? length : round_up(length, seq_multiple); }
};

// The caller's arrays, [count] each; all but `lengths` may be null.
struct Sequences {
    const int64_t* lengths;
    const int64_t* groups;   // equal ids >= 0 share a microbatch; null: no groups
    const int64_t* steps;    // optimizer step of each sequence; null: one step
    const int64_t* trained;  // number of tokens in the loss; null: all
    int64_t count;
};

// A unit is a sequence without a group, or all sequences of a group. Units are numbered in order of their first sequence.
struct Units {
    Amounts tokens;  // [U] with each sequence's padding
    Amounts cost;    // [U]
    Ids first;       // [U + 1], offsets into members
    Ids members;     // sequence ids by unit, ascending within each
    Ids dropped;     // units that are not planned
    Ids oversize;    // sequence ids of units that fit in no microbatch, ascending
    int32_t size() const { return static_cast<int32_t>(tokens.size()); }
};

// The units of one optimizer step, longest first; ties by unit number.
struct Sorted {
    Ids unit;
    Amounts tokens, cost;
    int64_t total_cost = 0;
    int32_t size() const { return static_cast<int32_t>(unit.size()); }
};

// Throws std::invalid_argument for a limit out of range, a negative length, for one beyond int32, for costs whose sum overflows int64, for a group that spans
// steps, and, with Oversize::error, for units that exceed the capacity.
Units gather_units(const Sequences& sequences, const Limits& limits);

// One Sorted per distinct step id, in ascending order; writes the ids to `step_ids`. O(N): radix sort.
std::vector<Sorted> sort_units(const Units& units, const Sequences& sequences, Amounts& step_ids);

}  // namespace trivet
