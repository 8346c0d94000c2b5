#include "collate.h"

#include <algorithm>
#include <cstring>
#include <future>
#include <numeric>

#include "units.h"

namespace trivet {
namespace {

// Positions are copied from this table. Copying is faster than counting, because the table stays in cache.
std::vector<int32_t> count_from_0(int64_t count) {
    std::vector<int32_t> numbers(count);
    std::iota(numbers.begin(), numbers.end(), 0);
    return numbers;
}

// Calls visit(place, start, length) for each sequence of a microbatch and visit(-1, start, length) for each run of padding.
template <typename Visit>
void walk(const Share& share, int64_t microbatch, Visit visit) {
    int64_t start = 0;
    const auto pad_to = [&](int64_t end) {
        if (end > start) visit(int64_t{-1}, start, end - start);
        start = end;
    };
    for (int64_t place = share.offsets[microbatch]; place < share.offsets[microbatch + 1]; ++place) {
        const int64_t length = share.lengths[share.order[place]], padded = start + round_up(length, share.seq_multiple);
        visit(place, start, length);
        start += length;
        // The padding of the last sequence and of the microbatch is one run.
        if (place + 1 < share.offsets[microbatch + 1]) pad_to(padded);
    }
    pad_to(share.totals[microbatch]);
}

// Prefetches the start of a row. Sequences are scattered in memory; the hardware prefetcher covers the rest of a row, not its start.
void prefetch(const void* row, int64_t bytes) {
    constexpr int64_t LINE = 64, HEAD = 16 * LINE;
    for (int64_t at = 0; at < std::min(bytes, HEAD); at += LINE) __builtin_prefetch(static_cast<const char*>(row) + at);
}

void prefetch_sequence(const Batch& batch, int64_t place, int64_t length) {
    prefetch(batch.tokens[place], length * static_cast<int64_t>(sizeof(int32_t)));
    prefetch(batch.mask[place], length);
    for (const Values& values : batch.values) prefetch(values.of[place], values.per_token ? length * static_cast<int64_t>(sizeof(float)) : 1);
}

void write_sequence(const Batch& batch, const std::vector<int32_t>& numbers, int64_t place, int64_t start, int64_t length) {
    const size_t bytes = length * sizeof(int32_t);
    std::memcpy(batch.tokens_out + start, batch.tokens[place], bytes);
    std::memcpy(batch.targets_out + start, batch.tokens[place] + 1, bytes);
    std::memcpy(batch.positions_out + start, numbers.data(), bytes);
    // A torch bool must be 0 or 1, but a caller's mask may hold any byte.
    std::transform(batch.mask[place], batch.mask[place] + length, batch.mask_out + start, [](uint8_t flag) { return flag != 0; });
    for (const Values& values : batch.values) {
        if (values.per_token) {
            std::memcpy(values.out + start, values.of[place], bytes);
        } else {
            std::fill_n(values.out + start, length, *values.of[place]);
        }
    }
}

void write_padding(const Batch& batch, const std::vector<int32_t>& numbers, int64_t start, int64_t length) {
    std::fill_n(batch.tokens_out + start, length, 0);
    std::fill_n(batch.targets_out + start, length, 0);
    std::copy_n(numbers.data(), length, batch.positions_out + start);
    std::fill_n(batch.mask_out + start, length, uint8_t{0});
    for (const Values& values : batch.values) std::fill_n(values.out + start, length, 0.0f);
}

// Splits the microbatches, which start at `starts`, into `parts` ranges with about equally many tokens.
std::vector<int64_t> split_evenly(const std::vector<int64_t>& starts, int64_t parts) {
    std::vector<int64_t> bounds;
    for (int64_t part = 0; part <= parts; ++part) {
        const auto bound = std::lower_bound(starts.begin(), starts.end(), starts.back() / parts * part + starts.back() % parts * part / parts);
        bounds.push_back(bound - starts.begin());
    }
    return bounds;
}

}  // namespace

void collate(const Share& share, const Batch& batch, int64_t threads) {
    std::vector<int64_t> starts(share.microbatches + 1);
    std::partial_sum(share.totals, share.totals + share.microbatches, starts.begin() + 1);
    const int64_t longest = share.microbatches == 0 ? 0 : *std::max_element(share.totals, share.totals + share.microbatches);
    const std::vector<int32_t> numbers = count_from_0(longest);
    const auto write = [&](int64_t first, int64_t last) {
        for (int64_t microbatch = first; microbatch < last; ++microbatch) {
            walk(share, microbatch, [&](int64_t place, int64_t start, int64_t length) {
                if (place < 0) return write_padding(batch, numbers, starts[microbatch] + start, length);
                if (place + 1 < share.sequences()) prefetch_sequence(batch, place + 1, share.lengths[share.order[place + 1]]);
                write_sequence(batch, numbers, place, starts[microbatch] + start, length);
            });
        }
    };
    const std::vector<int64_t> bounds = split_evenly(starts, std::clamp<int64_t>(threads, 1, std::max<int64_t>(share.microbatches, 1)));
    std::vector<std::future<void>> others;
    for (size_t part = 1; part + 1 < bounds.size(); ++part) {
        others.push_back(std::async(std::launch::async, write, bounds[part], bounds[part + 1]));
    }
    write(bounds[0], bounds[1]);
    for (std::future<void>& other : others) other.get();
}

Segments segments(const Share& share) {
    Segments result;
    result.cu_seqlens.reserve(share.sequences() + 2 * share.microbatches);
    for (int64_t microbatch = 0; microbatch < share.microbatches; ++microbatch) {
        const size_t before = result.index.size();
        result.cu_seqlens.push_back(0);
        walk(share, microbatch, [&](int64_t place, int64_t start, int64_t length) {
            result.cu_seqlens.push_back(static_cast<int32_t>(start + length));
            result.index.push_back(place < 0 ? -1 : share.order[place]);
        });
        result.count.push_back(static_cast<int64_t>(result.index.size() - before));
    }
    return result;
}

}  // namespace trivet
