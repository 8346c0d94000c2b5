// The whole plan: every optimizer step is balanced separately; microbatches are ordered by rank.
#pragma once

#include "balance.h"
#include "units.h"

namespace trivet {

// Denominators of each step's loss, summed over all ranks.
struct Denominators {
    Amounts tokens;     // [steps] trained tokens
    Amounts sequences;  // [steps] sequences with a trained token
    Amounts groups;     // [steps] groups with a trained token; a sequence without a group counts as one
};

// A slot is a microbatch of a rank: rank * microbatches + microbatch.
struct Plan {
    int64_t microbatches = 0;   // M per rank, over all steps
    Ids order;                  // sequence ids; slot s holds order[offsets[s] : offsets[s + 1]]
    Amounts offsets;            // [ranks * M + 1]
    Ids inverse;                // [N] position of each sequence in `order`, -1 if it was dropped
    Ids cu_seqlens;             // concatenated over slots, S + 1 entries each: slot s starts at offsets[s] + s. Without padding
    Ids cu_seqlens_padded;      // the same with each sequence's padding
    Amounts totals;             // [ranks * M] T: tokens with all padding, at least total_multiple
    Amounts step_ids;           // [steps] ascending
    Amounts step_offsets;       // [steps + 1] into the microbatches of each rank
    std::vector<Algorithm> algorithms;  // [steps]
    Denominators denominators;
    Ids oversize;               // ids of sequences that fit in no microbatch, ascending
    double fill = 0, imbalance = 1, lockstep = 1;
};

// A pure function of its arguments: integer arithmetic, and ties go to the lower index. Throws std::invalid_argument; see gather_units.
Plan plan(const Sequences& sequences, const Limits& limits);

}  // namespace trivet
