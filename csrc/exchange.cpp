#include "exchange.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <iterator>
#include <set>
#include <utility>

#include "differencing.h"

namespace trivet {
namespace {

// The limit on work, in units of bins that are visited: half a millisecond. A partition costs about 64 times as much per unit as a visit.
constexpr int64_t VISITS_PER_UNIT = 32, MOST_VISITS = 1 << 18, VISITS_PER_PARTITIONED = 64;

struct Heavier {
    const Amounts& weight;
    bool operator()(int32_t a, int32_t b) const { return weight[a] > weight[b]; }
};

struct Holding {
    Ids units;  // heaviest first
    int64_t weight = 0, tokens = 0;
};

// Positions in the units of two bins; to == the number of units: none is moved back.
struct Swap {
    int64_t shift = 0;  // weight that the heavy bin loses; 0: no swap improves
    size_t from = 0, to = 0;
};

class Exchange {
  public:
    Exchange(const Sorted& units, const Amounts& weight, int64_t capacity, int32_t first, Packing& packing)
        : units_(units), weight_(weight), capacity_(capacity), bin_of_(packing.bin_of), bins_(packing.bins.size()) {
        for (int32_t unit = 0; unit < units.size(); ++unit) add(bins_[bin_of_[unit]], unit);
        for (int32_t bin = first; bin < static_cast<int32_t>(bins_.size()); ++bin) {
            std::stable_sort(bins_[bin].units.begin(), bins_[bin].units.end(), Heavier{weight});
            order_.emplace(bins_[bin].weight, bin);
        }
    }

    void run(int64_t target) {
        visits_ = std::min(VISITS_PER_UNIT * units_.size(), MOST_VISITS);
        while (!order_.empty() && order_.rbegin()->first > target) {
            const int32_t heaviest = order_.rbegin()->second;
            if (!improve(heaviest, &Exchange::swap_one) && !improve(heaviest, &Exchange::partition)) return;
        }
    }

  private:
    // Finds the lightest bin with which `change` makes the heaviest lighter.
    bool improve(int32_t heavy, bool (Exchange::*change)(int32_t, int32_t)) {
        for (auto place = order_.begin(); place->first < bins_[heavy].weight - 1 && visits_ > 0; ++place) {
            if ((this->*change)(heavy, place->second)) return true;
        }
        return false;
    }

    bool swap_one(int32_t heavy, int32_t light) {
        const Swap swap = best_swap(bins_[heavy], bins_[light]);
        if (swap.shift > 0) apply(swap, heavy, light);
        return swap.shift > 0;
    }

    // Partitions the units of both bins anew, by largest differencing.
    bool partition(int32_t heavy, int32_t light) {
        const Holding &a = bins_[heavy], &b = bins_[light];
        visits_ -= VISITS_PER_PARTITIONED * static_cast<int64_t>(a.units.size() + b.units.size());
        Ids both;
        std::merge(a.units.begin(), a.units.end(), b.units.begin(), b.units.end(), std::back_inserter(both), Heavier{weight_});
        Amounts weights(both.size());
        std::transform(both.begin(), both.end(), weights.begin(), [&](int32_t unit) { return weight_[unit]; });
        const Ids part_of = largest_differencing(weights, 2);
        std::array<Holding, 2> parts;
        for (size_t i = 0; i < both.size(); ++i) add(parts[part_of[i]], both[i]);
        if (std::max(parts[0].weight, parts[1].weight) >= a.weight || std::max(parts[0].tokens, parts[1].tokens) > capacity_) return false;
        replace(heavy, std::move(parts[0]));
        replace(light, std::move(parts[1]));
        return true;
    }

    void add(Holding& bin, int32_t unit) const {
        bin.units.push_back(unit);
        bin.weight += weight_[unit];
        bin.tokens += units_.tokens[unit];
    }

    void replace(int32_t bin, Holding&& holding) {
        order_.erase({bins_[bin].weight, bin});
        bins_[bin] = std::move(holding);
        for (const int32_t unit : bins_[bin].units) bin_of_[unit] = bin;
        order_.emplace(bins_[bin].weight, bin);
    }

    // The swap that makes both bins most equal.
    Swap best_swap(const Holding& heavy, const Holding& light) {
        visits_ -= static_cast<int64_t>(heavy.units.size() + light.units.size());
        const int64_t gap = heavy.weight - light.weight;
        Swap best;
        int64_t least = gap;
        const auto consider = [&](size_t from, size_t to) {
            const int64_t shift = weight_[heavy.units[from]] - weight_at(light, to);
            if (shift <= 0 || shift >= gap) return;
            const int64_t distance = std::abs(gap - shift - shift);
            if (distance >= least || !fits(heavy, light, from, to)) return;
            least = distance;
            best = {shift, from, to};
        };
        size_t to = 0;
        for (size_t from = 0; from < heavy.units.size(); ++from) {
            const int64_t weight = weight_[heavy.units[from]];
            while (to < light.units.size() && weight - weight_at(light, to) < gap - (weight - weight_at(light, to))) ++to;
            if (to > 0) consider(from, to - 1);
            consider(from, to);
        }
        return best;
    }

    int64_t weight_at(const Holding& bin, size_t place) const { return place < bin.units.size() ? weight_[bin.units[place]] : 0; }

    bool fits(const Holding& heavy, const Holding& light, size_t from, size_t to) const {
        const int64_t tokens = units_.tokens[heavy.units[from]] - (to < light.units.size() ? units_.tokens[light.units[to]] : 0);
        return heavy.tokens - tokens <= capacity_ && light.tokens + tokens <= capacity_;
    }

    void apply(const Swap& swap, int32_t heavy, int32_t light) {
        order_.erase({bins_[heavy].weight, heavy});
        order_.erase({bins_[light].weight, light});
        const int32_t given = bins_[heavy].units[swap.from];
        if (swap.to < bins_[light].units.size()) move(bins_[light].units[swap.to], light, heavy);
        move(given, heavy, light);
        order_.emplace(bins_[heavy].weight, heavy);
        order_.emplace(bins_[light].weight, light);
    }

    void move(int32_t unit, int32_t from, int32_t to) {
        Holding &source = bins_[from], &sink = bins_[to];
        source.units.erase(std::find(source.units.begin(), source.units.end(), unit));
        source.weight -= weight_[unit];
        source.tokens -= units_.tokens[unit];
        const auto heavier = [&](int32_t a, int32_t b) { return weight_[a] > weight_[b]; };
        sink.units.insert(std::upper_bound(sink.units.begin(), sink.units.end(), unit, heavier), unit);
        sink.weight += weight_[unit];
        sink.tokens += units_.tokens[unit];
        bin_of_[unit] = to;
    }

    const Sorted& units_;
    const Amounts& weight_;
    int64_t capacity_, visits_ = 0;
    Ids& bin_of_;
    std::vector<Holding> bins_;
    std::set<std::pair<int64_t, int32_t>> order_;  // (weight, bin)
};

}  // namespace

void exchange(const Sorted& units, const Amounts& weight, int64_t target, int64_t capacity, int32_t first, Packing& packing) {
    Exchange(units, weight, capacity, first, packing).run(target);
}

}  // namespace trivet
