// Lays sequences end to end as one microbatch: token ids, targets, positions, mask and boundaries, each in one pass over memory.
#pragma once

#include <cstdint>
#include <vector>

namespace trivet {

// One sequence where its owner keeps it: length + 1 token ids, and a mask byte for each of the `length` predictions.
struct Sequence {
    const int32_t* tokens;
    const uint8_t* mask;
    int64_t length;
};

// One per-token value of a sequence.
struct Values {
    const float* data;
    int64_t length;
};

// Where a microbatch of T tokens is written; cu_seqlens has room for one more than the sequences, and the padding if there is any.
struct Microbatch {
    int64_t* tokens_T;
    int64_t* targets_T;
    int64_t* positions_T;
    uint8_t* mask_T;  // 0 or 1
    int32_t* cu_seqlens;
};

// Writes the sequences, then padding up to `total` as one more sequence: tokens and targets 0, positions from 0, masked.
// `total` is at least the sum of the lengths.
void collate(const std::vector<Sequence>& sequences, int64_t total, const Microbatch& out);

// Writes the values of the sequences end to end, then zeros up to `total`.
void collate_values(const std::vector<Values>& values, int64_t total, float* out_T);

}  // namespace trivet
