// Builds the tensors of one rank's microbatches, in one pass over its sequences.
#pragma once

#include <cstdint>
#include <vector>

namespace trivet {

// The sequences of one rank: microbatch j has order[offsets[j] : offsets[j + 1]].
struct Share {
    const int32_t* order;    // sequence ids
    const int64_t* offsets;  // [microbatches + 1], the first is 0
    const int64_t* lengths;  // by sequence id
    const int64_t* totals;   // [microbatches] T, with all padding
    int64_t microbatches;
    int64_t seq_multiple;

    int64_t sequences() const { return offsets[microbatches]; }
};

// A float field: one value per token, or one per sequence that is repeated for all its tokens.
struct Values {
    std::vector<const float*> of;  // by position in Share::order
    bool per_token;
    float* out;
};

// Pointers to the outputs (all microbatches concatenated) and to the inputs (by position in Share::order).
struct Batch {
    std::vector<const int32_t*> tokens;  // L + 1 ids each
    std::vector<const uint8_t*> mask;    // L each
    std::vector<Values> values;
    int32_t *tokens_out, *targets_out, *positions_out;
    uint8_t* mask_out;  // 0 or 1
};

// Segments for attention: the sequences of a microbatch, with each run of padding as a sequence of its own.
struct Segments {
    std::vector<int32_t> cu_seqlens;  // concatenated over microbatches; one more entry than segments for each
    std::vector<int32_t> index;       // sequence id, -1 for padding
    std::vector<int64_t> count;       // segments of each microbatch
};

// Writes all tensors. Padding has token 0, target 0, positions from 0, mask 0 and value 0. Uses at most `threads` threads, each of which
// writes whole microbatches, so the result does not depend on their number.
void collate(const Share& share, const Batch& batch, int64_t threads);

Segments segments(const Share& share);

}  // namespace trivet
