// Partitions weights into parts of nearly equal sums: the largest differencing method of Karmarkar and Karp (1982).
#pragma once

#include "units.h"

namespace trivet {

// The part of each weight, [n], from 0 to parts - 1. `weights` are at least 0 and descend. No part is empty if n >= parts.
//
// Two partial partitions of largest spread (heaviest minus lightest part) are merged, heavy parts on light ones, until one is left. A state
// holds only its non-empty parts, so n / parts states become full, and all merges of full states take O(n log parts) together. A single
// weight is added to a full state by shifting at most `parts` entries.
Ids largest_differencing(const Amounts& weights, int32_t parts);

}  // namespace trivet
