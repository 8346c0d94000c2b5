// The share of one rank as tensors: one pass from where sequences lie to where microbatches lie.
#pragma once

#include <cstdint>
#include <vector>

namespace trivet {

// Which sequences, by microbatch: those of microbatch j are order[offsets[j] : offsets[j + 1]].
struct Share {
    const int32_t* order;    // sequence ids
    const int64_t* offsets;  // [microbatches + 1], the first is 0
    const int64_t* lengths;  // by sequence id
    const int64_t* totals;   // [microbatches] T, with all padding
    int64_t microbatches;
    int64_t seq_multiple;

    int64_t sequences() const { return offsets[microbatches]; }
};

// A float of each token, or one of each sequence that all its tokens get.
struct Values {
    std::vector<const float*> of;  // by place in the share
    bool per_token;
    float* out;
};

// Where the tensors of all microbatches lie, end to end, and by place in the share where they come from.
struct Batch {
    std::vector<const int32_t*> tokens;  // L + 1 ids each
    std::vector<const uint8_t*> mask;    // L each
    std::vector<Values> values;
    int32_t *tokens_out, *targets_out, *positions_out;
    uint8_t* mask_out;  // 0 or 1
};

// How attention sees a microbatch: its sequences, and each stretch of padding as a sequence of its own.
struct Segments {
    std::vector<int32_t> cu_seqlens;  // microbatch after microbatch, one more than segments each
    std::vector<int32_t> index;       // the sequence's id, -1 for padding
    std::vector<int64_t> count;       // segments of each microbatch
};

// Writes every tensor; padding is token 0, target 0, positions from 0, mask 0, value 0. `threads` at most; each writes whole
// microbatches, so what is written does not depend on how many they are.
void collate(const Share& share, const Batch& batch, int64_t threads);

Segments segments(const Share& share);

}  // namespace trivet
