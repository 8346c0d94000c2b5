// Which sequence goes into which microbatch of which data-parallel rank: first-fit decreasing, cut into equally many microbatches a rank.
#pragma once

#include <cstdint>
#include <vector>

namespace trivet {

// What a plan must respect; each is at least 1, and total_multiple is at most token_budget.
struct Limits {
    int64_t ranks;
    int64_t token_budget;         // the most tokens of a microbatch, its padding included
    int64_t total_multiple;       // a microbatch is padded to a multiple of this
    int64_t microbatch_multiple;  // every rank has a multiple of this many microbatches

    int64_t capacity() const { return token_budget / total_multiple * total_multiple; }
};

struct Plan {
    std::vector<int64_t> order;    // sequence ids; microbatch j of rank r is order[offsets[r * M + j] : offsets[r * M + j + 1]]
    std::vector<int64_t> offsets;  // [ranks * M + 1]
    int64_t microbatches;          // M
};

// Plans `count` sequences. Sequences with one non-negative group id share a microbatch; `groups` may be null: every sequence is alone.
// O(N log N), and a pure function of its arguments: ties go to the lower index. Throws std::invalid_argument for a negative length
// and for a sequence or a group longer than the capacity.
Plan pack(const int64_t* lengths, const int64_t* groups, int64_t count, const Limits& limits);

}  // namespace trivet
