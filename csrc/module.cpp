// engine._C: numpy arrays in, numpy arrays out. The GIL is released around the work, never around a Python object.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "collate.h"
#include "pack.h"

namespace py = pybind11;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

template <typename T>
Array<T> to_numpy(const std::vector<T>& values) {
    return Array<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

py::tuple pack(const Array<int64_t>& lengths, const std::optional<Array<int64_t>>& groups, int64_t ranks, int64_t token_budget,
               int64_t total_multiple, int64_t microbatch_multiple) {
    if (groups && groups->size() != lengths.size()) throw std::invalid_argument("groups and lengths must have one size");
    const trivet::Limits limits{ranks, token_budget, total_multiple, microbatch_multiple};
    const int64_t* lengths_data = lengths.data();
    const int64_t* groups_data = groups ? groups->data() : nullptr;
    const int64_t count = lengths.size();
    trivet::Plan plan;
    {
        py::gil_scoped_release release;
        plan = trivet::pack(lengths_data, groups_data, count, limits);
    }
    return py::make_tuple(to_numpy(plan.order), to_numpy(plan.offsets), plan.microbatches);
}

std::vector<trivet::Sequence> view_sequences(const std::vector<Array<int32_t>>& tokens, const std::vector<Array<uint8_t>>& masks) {
    if (tokens.size() != masks.size()) throw std::invalid_argument("tokens and masks must have one size");
    std::vector<trivet::Sequence> sequences;
    for (size_t i = 0; i < tokens.size(); ++i) {
        if (tokens[i].size() != masks[i].size() + 1) {
            throw std::invalid_argument("tokens[" + std::to_string(i) + "] must be one longer than its mask");
        }
        sequences.push_back({tokens[i].data(), masks[i].data(), masks[i].size()});
    }
    return sequences;
}

std::vector<trivet::Values> view_values(const std::vector<Array<float>>& arrays) {
    std::vector<trivet::Values> values;
    for (const Array<float>& array : arrays) values.push_back({array.data(), array.size()});
    return values;
}

// The tokens that `parts` fill, once it is certain that they fit `total` and that `total` fits cu_seqlens.
template <typename Part>
int64_t checked_sum(const std::vector<Part>& parts, int64_t total) {
    int64_t sum = 0;
    for (const Part& part : parts) sum += part.length;
    if (sum > total || total > std::numeric_limits<int32_t>::max()) {
        throw std::invalid_argument("total=" + std::to_string(total) + " must be from " + std::to_string(sum) + " to 2**31 - 1");
    }
    return sum;
}

py::tuple collate(const std::vector<Array<int32_t>>& tokens, const std::vector<Array<uint8_t>>& masks, int64_t total) {
    const std::vector<trivet::Sequence> sequences = view_sequences(tokens, masks);
    const bool padded = checked_sum(sequences, total) < total;
    Array<int64_t> tokens_T(total), targets_T(total), positions_T(total);
    Array<uint8_t> mask_T(total);
    Array<int32_t> cu_seqlens(static_cast<py::ssize_t>(sequences.size()) + 1 + padded);
    const trivet::Microbatch out{tokens_T.mutable_data(), targets_T.mutable_data(), positions_T.mutable_data(), mask_T.mutable_data(),
                                 cu_seqlens.mutable_data()};
    {
        py::gil_scoped_release release;
        trivet::collate(sequences, total, out);
    }
    return py::make_tuple(tokens_T, targets_T, positions_T, mask_T, cu_seqlens);
}

Array<float> collate_values(const std::vector<Array<float>>& arrays, int64_t total) {
    const std::vector<trivet::Values> values = view_values(arrays);
    checked_sum(values, total);
    Array<float> values_T(total);
    float* out_T = values_T.mutable_data();
    {
        py::gil_scoped_release release;
        trivet::collate_values(values, total, out_T);
    }
    return values_T;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "Packs sequences into microbatches (pack.h) and lays them out in memory (collate.h); engine/batching.py is the way in.";
    module.def("pack", &pack, py::arg("lengths"), py::arg("groups"), py::arg("ranks"), py::arg("token_budget"), py::arg("total_multiple"),
               py::arg("microbatch_multiple"));
    module.def("collate", &collate, py::arg("tokens"), py::arg("masks"), py::arg("total"));
    module.def("collate_values", &collate_values, py::arg("values"), py::arg("total"));
}
