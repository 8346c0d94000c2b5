#include "collate.h"

#include <algorithm>
#include <numeric>

namespace trivet {
namespace {

void write_sequence(const Sequence& sequence, int64_t start, const Microbatch& out) {
    const int32_t* tokens = sequence.tokens;
    const int64_t length = sequence.length;
    std::copy_n(tokens, length, out.tokens_T + start);
    std::copy_n(tokens + 1, length, out.targets_T + start);
    std::iota(out.positions_T + start, out.positions_T + start + length, 0);
    // A torch bool other than 0 or 1 is undefined, and a caller's mask may hold any byte.
    std::transform(sequence.mask, sequence.mask + length, out.mask_T + start, [](uint8_t counts) { return counts != 0; });
}

void write_padding(int64_t start, int64_t total, const Microbatch& out) {
    std::fill(out.tokens_T + start, out.tokens_T + total, 0);
    std::fill(out.targets_T + start, out.targets_T + total, 0);
    std::iota(out.positions_T + start, out.positions_T + total, 0);
    std::fill(out.mask_T + start, out.mask_T + total, 0);
}

}  // namespace

void collate(const std::vector<Sequence>& sequences, int64_t total, const Microbatch& out) {
    int64_t end = 0;
    int32_t* boundary = out.cu_seqlens;
    *boundary++ = 0;
    for (const Sequence& sequence : sequences) {
        write_sequence(sequence, end, out);
        end += sequence.length;
        *boundary++ = static_cast<int32_t>(end);
    }
    if (end == total) return;
    write_padding(end, total, out);
    *boundary = static_cast<int32_t>(total);
}

void collate_values(const std::vector<Values>& values, int64_t total, float* out_T) {
    float* const stop = out_T + total;
    for (const Values& value : values) out_T = std::copy_n(value.data, value.length, out_T);
    std::fill(out_T, stop, 0.0f);
}

}  // namespace trivet
