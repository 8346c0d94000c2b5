#include "differencing.h"

#include <algorithm>
#include <numeric>
#include <queue>
#include <tuple>
#include <utility>

namespace trivet {
namespace {

// A linked list of weights, by index.
struct Part {
    int64_t sum;
    int32_t first, last;
};

bool heavier(const Part& a, const Part& b) { return a.sum > b.sum; }

struct State {
    std::vector<Part> parts;  // heaviest first; those that are missing are empty
    int32_t number;
};

// Numbers weights in ascending order. Equal ones keep the order in which they are taken.
Ids numbers_of(const Amounts& weights) {
    const int32_t count = static_cast<int32_t>(weights.size());
    Ids numbers(count);
    for (int32_t begin = 0, end = 0; begin < count; begin = end) {
        while (end < count && weights[end] == weights[begin]) ++end;
        std::iota(numbers.begin() + begin, numbers.begin() + end, count - end);
    }
    return numbers;
}

class Differencing {
  public:
    Differencing(const Amounts& weights, int32_t parts)
        : weights_(weights), parts_(parts), next_(weights.size(), -1), numbers_(numbers_of(weights)) {}

    std::vector<Part> run() {
        while (true) {
            State heavy = take();
            if (single_is_next()) {
                add_single(heavy.parts);
            } else if (!queue_.empty()) {
                merge(heavy.parts, take().parts);
            } else {
                return heavy.parts;
            }
            put(std::move(heavy));
        }
    }

    Ids part_of(const std::vector<Part>& parts) const {
        Ids part_of(weights_.size());
        for (size_t part = 0; part < parts.size(); ++part) {
            for (int32_t i = parts[part].first; i >= 0; i = next_[i]) part_of[i] = static_cast<int32_t>(part);
        }
        return part_of;
    }

  private:
    using Key = std::tuple<int64_t, int32_t, size_t>;  // (spread, -number, index into states_): ties go to the lower number

    // Weights that were not taken yet are states of one part. They descend, so they need no queue.
    bool single_is_next() const {
        if (single_ == static_cast<int32_t>(weights_.size())) return false;
        return queue_.empty() || queue_.top() < Key{weights_[single_], -numbers_[single_], 0};
    }

    Part take_single() {
        const int32_t i = single_++;
        return {weights_[i], i, i};
    }

    State take() {
        if (single_is_next()) {
            const int32_t number = numbers_[single_];
            return {{take_single()}, number};
        }
        State state = std::move(states_[std::get<2>(queue_.top())]);
        queue_.pop();
        return state;
    }

    // A state keeps the number of the one of larger spread that it was merged from.
    void put(State&& state) {
        const bool full = static_cast<int32_t>(state.parts.size()) == parts_;
        const int64_t lightest = full ? state.parts.back().sum : 0;
        queue_.emplace(state.parts.front().sum - lightest, -state.number, states_.size());
        states_.push_back(std::move(state));
    }

    void join(Part& part, const Part& other) {
        part.sum += other.sum;
        next_[part.last] = other.first;
        part.last = other.last;
    }

    // The same as merge, for a state of one part: only the lightest part changes.
    void add_single(std::vector<Part>& parts) {
        Part part = take_single();
        if (static_cast<int32_t>(parts.size()) == parts_) {
            std::swap(part, parts.back());
            join(part, parts.back());
            parts.pop_back();
        }
        parts.insert(std::upper_bound(parts.begin(), parts.end(), part, heavier), part);
    }

    void merge(std::vector<Part>& heavy, const std::vector<Part>& light) {
        const int64_t filled = static_cast<int64_t>(heavy.size());
        int64_t place = parts_;
        for (const Part& part : light) {
            if (--place < filled) {
                join(heavy[place], part);
            } else {
                heavy.push_back(part);
            }
        }
        std::stable_sort(heavy.begin(), heavy.end(), heavier);
    }

    const Amounts& weights_;
    int32_t parts_, single_ = 0;
    Ids next_, numbers_;
    std::vector<State> states_;
    std::priority_queue<Key> queue_;
};

}  // namespace

Ids largest_differencing(const Amounts& weights, int32_t parts) {
    if (weights.empty()) return {};
    Differencing differencing(weights, parts);
    return differencing.part_of(differencing.run());
}

}  // namespace trivet
