// Packs units into bins, one bin per microbatch, with one of six algorithms.
#pragma once

#include "queues.h"
#include "units.h"

namespace trivet {

// The bin of each unit, indexed by position in the sorted order.
struct Packing {
    Ids bin_of;              // [U]
    std::vector<Bin> bins;   // [ranks * M]
    bool by_rank = false;    // bins r * M ... r * M + M - 1 belong to rank r; otherwise bins may be assigned to any rank
    bool ok = true;          // false: the units did not fit, and the other fields are undefined
};

// `ranks` * `microbatches` bins of `capacity` tokens each.
struct Room {
    int64_t capacity;
    int64_t ranks, microbatches;
    int64_t cost_per_token;  // the highest cost per token of any unit
    int32_t bins() const { return static_cast<int32_t>(ranks * microbatches); }
};

// Longest processing time first (Graham 1969) with a capacity: each unit goes to the cheapest bin with room, to within 1/1024.
Packing pack_level(const Sorted& units, const Room& room);

// For units that cost more than the mean bin. The longest units seed the bins of the first microbatches, which are then filled, best fit, up
// to the cost of their heaviest; pack_level distributes the rest over the other microbatches. `ok` is false if no unit is that costly.
Packing pack_skewed(const Sorted& units, const Room& room);

// pack_level over ranks, then over the microbatches of each rank.
Packing pack_by_rank(const Sorted& units, const Room& room);

// Best fit decreasing, then splits the costliest bin in two until there are enough bins. If best fit needs too many bins, `ok` is false and
// `bins` has as many as it needed.
Packing pack_tight(const Sorted& units, const Room& room);

// Largest differencing (differencing.h) of the costs. `ok` is false if units * bins is above 2^26, where it would be slow.
Packing pack_differencing(const Sorted& units, const Room& room);

// pack_level by tokens and beyond the capacity, then exchanges until no bin is over it. Costs are not balanced: for bins that are all but
// full, which the other algorithms fail to fill.
Packing pack_even(const Sorted& units, const Room& room);

// Balances the costs of a packing further, by exchanges between its bins (exchange.h). Makes no bin costlier than the costliest.
void exchange_costs(const Sorted& units, const Room& room, Packing& packing);

}  // namespace trivet
