// The whole plan: every optimizer step balanced on its own, laid out rank after rank.
#pragma once

#include "balance.h"
#include "units.h"

namespace trivet {

// What the loss of a step is divided by, summed over all ranks.
struct Denominators {
    Amounts tokens;     // [steps] trained tokens
    Amounts sequences;  // [steps] sequences with a trained token
    Amounts groups;     // [steps] groups with a trained token; a sequence on its own is one
};

// A slot is a microbatch of a rank: rank * microbatches + microbatch.
struct Plan {
    int64_t microbatches = 0;   // M of each rank, over all steps
    Ids order;                  // sequence ids; slot s holds order[offsets[s] : offsets[s + 1]]
    Amounts offsets;            // [ranks * M + 1]
    Ids inverse;                // [N] place of each sequence in `order`, -1 where it was dropped
    Ids cu_seqlens;             // slot after slot, S + 1 each: slot s begins at offsets[s] + s. Real tokens
    Ids cu_seqlens_padded;      // the same with each sequence's padding
    Amounts totals;             // [ranks * M] T: tokens with all padding, at least one multiple
    Amounts step_ids;           // [steps] ascending
    Amounts step_offsets;       // [steps + 1] into the microbatches of each rank
    std::vector<Algorithm> algorithms;  // [steps]
    Denominators denominators;
    Ids oversize;               // sequence ids that no microbatch can hold, ascending
    double fill = 0, imbalance = 1, lockstep = 1;
};

// A pure function of its arguments: integers, and ties go to the lower index. Throws std::invalid_argument; see gather_units.
Plan plan(const Sequences& sequences, const Limits& limits);

}  // namespace trivet
