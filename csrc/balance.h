// Bins onto ranks, and the choice among the ways to fill them.
#pragma once

#include "pack.h"
#include "units.h"

namespace trivet {

enum class Algorithm : int8_t { none, level, skewed, by_rank, tight };

// One optimizer step. A slot is rank * microbatches + microbatch; the costliest microbatch of each rank is its first.
struct Balanced {
    Algorithm algorithm = Algorithm::none;
    int64_t microbatches = 0;
    Ids slot_of;            // [U] by place in the sorted order
    int64_t lockstep = 0;   // cost when ranks wait for each other after every microbatch: the sum over them of the costliest rank
    int64_t slowest = 0;    // cost when they wait once: that of the costliest rank
    int64_t total = 0;      // of all ranks
};

// The fewest microbatches that hold the units, or more where that costs less (which only cost.microbatch > 0 can tell), each rank as many.
// The ways of pack.h are tried in turn until one is within 1/256 of the ideal, total / ranks; the best is taken.
Balanced balance(const Sorted& units, const Limits& limits);

}  // namespace trivet
