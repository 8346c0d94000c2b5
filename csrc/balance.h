// Chooses the packing of one optimizer step, and assigns its bins to ranks.
#pragma once

#include "pack.h"
#include "units.h"

namespace trivet {

enum class Algorithm : int8_t { none, level, skewed, by_rank, tight, differencing, even };

// One optimizer step. A slot is rank * microbatches + microbatch; the costliest microbatch of each rank is its first.
struct Balanced {
    Algorithm algorithm = Algorithm::none;
    int64_t microbatches = 0;
    Ids slot_of;            // [U], indexed by position in the sorted order
    int64_t lockstep = 0;   // cost if ranks synchronize after every microbatch: the sum over microbatches of the costliest rank's
    int64_t slowest = 0;    // cost if they synchronize once: that of the costliest rank
    int64_t total = 0;      // of all ranks
};

// Uses the fewest microbatches that hold the units, or more if that costs less (only possible with cost.microbatch > 0); every rank has the
// same number. Tries the packings of pack.h until one is within 1/256 of the ideal, total / ranks, and takes the best.
// With one microbatch per rank, the costliest rank costs no more than by largest differencing, unless that exceeds the capacity.
Balanced balance(const Sorted& units, const Limits& limits);

}  // namespace trivet
