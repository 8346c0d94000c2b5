// Two bucket queues that make packing linear in practice: the cheapest bin, and the bin with the least room.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "units.h"

namespace trivet {

struct Bin {
    int64_t cost = 0;
    int64_t room = 0;   // tokens that still fit; -1: nothing fits, not even an empty sequence
    int32_t next = -1;  // next bin on the same shelf
};

// A set of integers below 64^3. Finds the lowest member that is at least i by reading at most three words.
class BitTree {
  public:
    static constexpr int64_t SIZE = 64 * 64 * 64;

    explicit BitTree(int64_t size) : leaves_((size + 63) / 64), twigs_((size + 4095) / 4096) {}

    void insert(int64_t i) {
        leaves_[i >> 6] |= bit(i);
        twigs_[i >> 12] |= bit(i >> 6);
        root_ |= bit(i >> 12);
    }

    void erase(int64_t i) {
        if (leaves_[i >> 6] &= ~bit(i)) return;
        if (twigs_[i >> 12] &= ~bit(i >> 6)) return;
        root_ &= ~bit(i >> 12);
    }

    // The lowest member that is at least `i`; -1 if there is none.
    int64_t lowest_from(int64_t i) const {
        if (i >= static_cast<int64_t>(leaves_.size()) * 64) return -1;
        if (const uint64_t members = leaves_[i >> 6] & from(i)) return (i & ~63) + __builtin_ctzll(members);
        const int64_t leaf = (i >> 6) + 1;
        if (leaf >= static_cast<int64_t>(leaves_.size())) return -1;
        if (const uint64_t members = twigs_[leaf >> 6] & from(leaf)) return lowest_in_leaf((leaf & ~63) + __builtin_ctzll(members));
        const int64_t twig = (leaf >> 6) + 1;
        if (twig >= static_cast<int64_t>(twigs_.size()) || (root_ & from(twig)) == 0) return -1;
        const int64_t lowest_twig = __builtin_ctzll(root_ & from(twig));
        return lowest_in_leaf(lowest_twig * 64 + __builtin_ctzll(twigs_[lowest_twig]));
    }

  private:
    static uint64_t bit(int64_t i) { return uint64_t{1} << (i & 63); }
    static uint64_t from(int64_t i) { return ~uint64_t{0} << (i & 63); }
    int64_t lowest_in_leaf(int64_t leaf) const { return leaf * 64 + __builtin_ctzll(leaves_[leaf]); }

    std::vector<uint64_t> leaves_, twigs_;
    uint64_t root_ = 0;
};

// Bins in `size` linked lists (shelves). The lowest non-empty shelf is found first; within a shelf, last in, first out.
class Shelves {
  public:
    Shelves(Bin* bins, int64_t size) : bins_(bins), top_(size, -1), taken_(size) {}

    void put(int64_t shelf, int32_t bin) {
        bins_[bin].next = top_[shelf];
        top_[shelf] = bin;
        taken_.insert(shelf);
    }

    // Removes a bin from the lowest non-empty shelf that is at least `shelf`; -1 if all are empty.
    int32_t take_from(int64_t shelf) {
        const int64_t lowest = taken_.lowest_from(shelf);
        if (lowest < 0) return -1;
        const int32_t bin = top_[lowest];
        if ((top_[lowest] = bins_[bin].next) < 0) taken_.erase(lowest);
        return bin;
    }

  private:
    Bin* bins_;
    Ids top_;
    BitTree taken_;
};

inline int shift_below(int64_t value, int64_t limit) {
    int shift = 0;
    while ((value >> shift) >= limit) ++shift;
    return shift;
}

// Bins ordered by cost, to within 1/1024 of their expected cost.
class Cheapest {
  public:
    Cheapest(Bin* bins, int64_t expected_cost) : bins_(bins), shift_(shift_below(expected_cost, SIZE)), shelves_(bins, SIZE) {}

    void put(int32_t bin) { shelves_.put(std::min(bins_[bin].cost >> shift_, SIZE - 1), bin); }
    int32_t take() { return shelves_.take_from(0); }

  private:
    static constexpr int64_t SIZE = 4096;
    Bin* bins_;
    int shift_;
    Shelves shelves_;
};

// Bins ordered by room: exactly if the capacity is below 2^18, else to within 2^-17 of it.
class Tightest {
  public:
    Tightest(Bin* bins, int64_t capacity) : bins_(bins), shift_(shift_below(capacity, BitTree::SIZE)), shelves_(bins, (capacity >> shift_) + 1) {}

    void put(int32_t bin) {
        if (bins_[bin].room >= 0) shelves_.put(bins_[bin].room >> shift_, bin);
    }

    // Removes the bin with the least room of at least `tokens`; -1 if there is none.
    int32_t take(int64_t tokens) { return shelves_.take_from((tokens + (int64_t{1} << shift_) - 1) >> shift_); }

  private:
    Bin* bins_;
    int shift_;
    Shelves shelves_;
};

}  // namespace trivet
