// Improves a packing by exchanging units between its heaviest bin and lighter ones.
#pragma once

#include "pack.h"

namespace trivet {

// Until no bin weighs more than `target`: moves a unit of the heaviest bin to a lighter one, or exchanges two units, or partitions the units
// of both anew. Every change leaves both lighter than the heaviest was, with at most `capacity` tokens each. Stops if none does, or after
// bounded work. Changes packing.bin_of of the units in bins from `first` on, and nothing else.
void exchange(const Sorted& units, const Amounts& weight, int64_t target, int64_t capacity, int32_t first, Packing& packing);

}  // namespace trivet
