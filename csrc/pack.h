// Units into bins: four ways to fill as many bins as there are microbatches.
#pragma once

#include "queues.h"
#include "units.h"

namespace trivet {

// Which bin each unit goes to, by its place in the sorted order.
struct Packing {
    Ids bin_of;              // [U]
    std::vector<Bin> bins;   // [ranks * M]
    bool by_rank = false;    // bins r * M ... r * M + M - 1 are of rank r; otherwise any bin may go to any rank
    bool ok = true;          // false: it did not fit, and nothing else here means anything
};

// `capacity` tokens fit a bin, `ranks` * `microbatches` bins are to be filled.
struct Room {
    int64_t capacity;
    int64_t ranks, microbatches;
    int64_t cost_per_token;  // no unit costs more than this a token
    int32_t bins() const { return static_cast<int32_t>(ranks * microbatches); }
};

// Longest processing time first (Graham 1969) with a cap: each unit to the cheapest bin, to within 1/1024, that has room.
Packing pack_level(const Sorted& units, const Room& room);

// For units that cost more than a bin should: the longest seed the bins of the first steps, which are then filled up to the cost of their
// heaviest, best fit first; the rest is levelled over the other steps. `ok` is false where no unit is that costly.
Packing pack_skewed(const Sorted& units, const Room& room);

// The units are levelled over ranks, then over the microbatches of each.
Packing pack_by_rank(const Sorted& units, const Room& room);

// Best fit decreasing into as few bins as it finds; then the costliest is cut in two until there are enough. When there are too many, `ok`
// is false and `bins` has as many as were needed.
Packing pack_tight(const Sorted& units, const Room& room);

}  // namespace trivet
