// engine._C: takes and returns numpy arrays. The GIL is released during computation, but never while Python objects are accessed.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

#include "collate.h"
#include "plan.h"

namespace py = pybind11;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;
using Numbers = std::optional<Array<int64_t>>;  // one per sequence, or None

// A numpy array that owns the vector's memory; no copy.
template <typename T>
Array<T> to_numpy(std::vector<T>&& values) {
    auto owned = std::make_unique<std::vector<T>>(std::move(values));
    std::vector<T>* data = owned.get();
    const py::capsule owner(owned.release(), [](void* vector) { delete static_cast<std::vector<T>*>(vector); });
    return Array<T>(static_cast<py::ssize_t>(data->size()), data->data(), owner);
}

const int64_t* data_or_null(const Numbers& numbers, py::ssize_t count) {
    if (numbers && numbers->size() != count) throw std::invalid_argument("lengths, group_ids, step_ids and trained must have the same size");
    return numbers ? numbers->data() : nullptr;
}

trivet::Oversize oversize_of(const std::string& name) {
    return name == "error" ? trivet::Oversize::error : name == "alone" ? trivet::Oversize::alone : trivet::Oversize::drop;
}

py::list names_of(const std::vector<trivet::Algorithm>& algorithms) {
    constexpr const char* NAMES[] = {"none", "level", "skewed", "by_rank", "tight", "differencing", "even"};
    py::list names;
    for (const trivet::Algorithm algorithm : algorithms) names.append(NAMES[static_cast<int>(algorithm)]);
    return names;
}

py::dict plan(const Array<int64_t>& lengths, const Numbers& group_ids, const Numbers& step_ids, const Numbers& trained, int64_t ranks,
              int64_t token_budget, const std::tuple<int64_t, int64_t, int64_t>& cost, int64_t seq_multiple, int64_t total_multiple,
              int64_t microbatch_multiple, const std::string& sync, const std::string& on_oversize) {
    const py::ssize_t count = lengths.size();
    const trivet::Sequences sequences{lengths.data(), data_or_null(group_ids, count), data_or_null(step_ids, count), data_or_null(trained, count),
                                      count};
    const trivet::Limits limits{ranks,
                                token_budget,
                                {std::get<0>(cost), std::get<1>(cost), std::get<2>(cost)},
                                seq_multiple,
                                total_multiple,
                                microbatch_multiple,
                                sync == "step" ? trivet::Sync::step : trivet::Sync::microbatch,
                                oversize_of(on_oversize)};
    trivet::Plan planned;
    {
        py::gil_scoped_release release;
        planned = trivet::plan(sequences, limits);
    }
    py::dict result;
    result["microbatches"] = planned.microbatches;
    result["order"] = to_numpy(std::move(planned.order));
    result["offsets"] = to_numpy(std::move(planned.offsets));
    result["inverse"] = to_numpy(std::move(planned.inverse));
    result["cu_seqlens"] = to_numpy(std::move(planned.cu_seqlens));
    result["cu_seqlens_padded"] = to_numpy(std::move(planned.cu_seqlens_padded));
    result["totals"] = to_numpy(std::move(planned.totals));
    result["step_ids"] = to_numpy(std::move(planned.step_ids));
    result["step_offsets"] = to_numpy(std::move(planned.step_offsets));
    result["oversize"] = to_numpy(std::move(planned.oversize));
    result["trained_tokens"] = to_numpy(std::move(planned.denominators.tokens));
    result["trained_sequences"] = to_numpy(std::move(planned.denominators.sequences));
    result["trained_groups"] = to_numpy(std::move(planned.denominators.groups));
    result["algorithms"] = names_of(planned.algorithms);
    result["fill"] = planned.fill;
    result["imbalance"] = planned.imbalance;
    result["lockstep"] = planned.lockstep;
    return result;
}

// Rows of a field: one flat array, or one array per sequence of the share.
template <typename T>
using Rows = std::variant<Array<T>, std::vector<Array<T>>>;

// Pointers to the row of each sequence of the share, which has length(id) + extra entries. In a flat field, row i starts at
// starts[i] + i * extra.
template <typename T>
std::vector<const T*> row_pointers(const char* name, const Rows<T>& rows, const trivet::Share& share, const int64_t* starts, int64_t extra) {
    std::vector<const T*> pointers(share.sequences());
    const auto* arrays = std::get_if<std::vector<Array<T>>>(&rows);
    if (arrays == nullptr ? starts == nullptr : static_cast<int64_t>(arrays->size()) != share.sequences()) {
        throw std::invalid_argument(std::string(name) + " must have an array for each sequence of the share, or be flat with starts");
    }
    for (int64_t place = 0; place < share.sequences(); ++place) {
        const int64_t id = share.order[place], expected = share.lengths[id] + extra;
        const Array<T>& array = arrays != nullptr ? (*arrays)[place] : std::get<Array<T>>(rows);
        const int64_t start = arrays != nullptr ? 0 : starts[id] + id * extra;
        const bool fits = arrays != nullptr ? array.size() == expected : start >= 0 && start <= array.size() - expected;
        if (!fits) {
            throw std::invalid_argument(std::string(name) + " has " + std::to_string(array.size()) + " entries; sequence " + std::to_string(id) +
                                        " requires " + std::to_string(expected));
        }
        pointers[place] = array.data() + start;
    }
    return pointers;
}

template <typename T>
T* output(const char* name, Array<T>& array, int64_t size) {
    if (array.size() != size) throw std::invalid_argument(std::string(name) + " must have " + std::to_string(size) + " entries");
    return array.mutable_data();
}

// A float field: (input, whether it has one value per token rather than per sequence, output).
using Field = std::tuple<Rows<float>, bool, Array<float>>;

trivet::Values values_of(Field& field, const trivet::Share& share, const int64_t* starts, int64_t size) {
    auto& [rows, per_token, out] = field;
    trivet::Values values{{}, per_token, output("out", out, size)};
    if (per_token) {
        values.of = row_pointers("a field", rows, share, starts, 0);
        return values;
    }
    const auto& array = std::get<Array<float>>(rows);
    for (int64_t place = 0; place < share.sequences(); ++place) {
        if (share.order[place] >= array.size()) throw std::invalid_argument("a field has too few entries");
        values.of.push_back(array.data() + share.order[place]);
    }
    return values;
}

trivet::Share share_of(const Array<int32_t>& order, const Array<int64_t>& offsets, const Array<int64_t>& lengths, const Array<int64_t>& totals,
                       int64_t seq_multiple) {
    const trivet::Share share{order.data(), offsets.data(), lengths.data(), totals.data(), totals.size(), seq_multiple};
    if (offsets.size() != totals.size() + 1 || share.sequences() != order.size()) throw std::invalid_argument("order, offsets and totals have inconsistent sizes");
    for (int64_t j = 0; j < share.microbatches; ++j) {
        int64_t tokens = 0;
        if (offsets.at(j) > offsets.at(j + 1) || offsets.at(0) != 0) throw std::invalid_argument("offsets must ascend from 0");
        for (int64_t place = offsets.at(j); place < offsets.at(j + 1); ++place) {
            const int32_t id = order.at(place);
            if (id < 0 || id >= lengths.size() || lengths.at(id) < 0) throw std::invalid_argument("order has an unknown sequence id");
            tokens += trivet::round_up(lengths.at(id), seq_multiple);
        }
        if (tokens > totals.at(j)) {
            throw std::invalid_argument("totals has " + std::to_string(totals.at(j)) + " for a microbatch of " + std::to_string(tokens) + " tokens");
        }
    }
    return share;
}

py::tuple collate(const Array<int32_t>& order, const Array<int64_t>& offsets, const Array<int64_t>& lengths, const Array<int64_t>& totals,
                  int64_t seq_multiple, const Numbers& starts, const Rows<int32_t>& tokens, const Rows<uint8_t>& mask, std::vector<Field> fields,
                  Array<int32_t> tokens_out, Array<int32_t> targets_out, Array<int32_t> positions_out, Array<uint8_t> mask_out,
                  int64_t threads) {
    const trivet::Share share = share_of(order, offsets, lengths, totals, seq_multiple);
    int64_t size = 0;
    for (int64_t j = 0; j < share.microbatches; ++j) size += share.totals[j];
    const int64_t* starts_data = data_or_null(starts, lengths.size());
    trivet::Batch batch{row_pointers("tokens", tokens, share, starts_data, 1),
                        row_pointers("mask", mask, share, starts_data, 0),
                        {},
                        output("tokens_out", tokens_out, size),
                        output("targets_out", targets_out, size),
                        output("positions_out", positions_out, size),
                        output("mask_out", mask_out, size)};
    for (Field& field : fields) batch.values.push_back(values_of(field, share, starts_data, size));
    trivet::Segments segments;
    {
        py::gil_scoped_release release;
        trivet::collate(share, batch, threads);
        segments = trivet::segments(share);
    }
    return py::make_tuple(to_numpy(std::move(segments.cu_seqlens)), to_numpy(std::move(segments.index)), to_numpy(std::move(segments.count)));
}

struct ReadInt {
    using Number = int32_t;
    int32_t operator()(PyObject* item) const {
        int overflow = 0;
        const long value = PyLong_AsLongAndOverflow(item, &overflow);
        if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
        if (overflow != 0 || value < std::numeric_limits<int32_t>::min() || value > std::numeric_limits<int32_t>::max()) {
            throw std::invalid_argument("a token id is outside int32");
        }
        return static_cast<int32_t>(value);
    }
};

// Nearly all flags are one of four objects. They are compared without branches, which random flags would mispredict.
struct ReadFlag {
    using Number = uint8_t;
    py::int_ zero{0}, one{1};
    uint8_t operator()(PyObject* item) const {
        const unsigned yes = unsigned{item == one.ptr()} + unsigned{item == Py_True};
        const unsigned known = yes + unsigned{item == zero.ptr()} + unsigned{item == Py_False};
        if (known != 0) return static_cast<uint8_t>(yes);
        const int truth = PyObject_IsTrue(item);
        if (truth < 0) throw py::error_already_set();
        return static_cast<uint8_t>(truth);
    }
};

struct ReadFloat {
    using Number = float;
    float operator()(PyObject* item) const {
        if (PyFloat_CheckExact(item)) return static_cast<float>(PyFloat_AS_DOUBLE(item));
        const double value = PyFloat_AsDouble(item);
        if (value == -1.0 && PyErr_Occurred()) throw py::error_already_set();
        return static_cast<float>(value);
    }
};

// Returns (the concatenated lists, the offset of each list).
template <typename Read>
py::tuple flatten(const std::vector<py::list>& rows) {
    Array<int64_t> offsets(static_cast<py::ssize_t>(rows.size()) + 1);
    int64_t* bounds = offsets.mutable_data();
    bounds[0] = 0;
    for (size_t i = 0; i < rows.size(); ++i) bounds[i + 1] = bounds[i] + PyList_GET_SIZE(rows[i].ptr());
    Array<typename Read::Number> flat(bounds[rows.size()]);
    typename Read::Number* out = flat.mutable_data();
    const Read read;
    for (size_t i = 0; i < rows.size(); ++i) {
        PyObject* const row = rows[i].ptr();
        const Py_ssize_t size = bounds[i + 1] - bounds[i];
        // Converting an item may run Python code that shortens its list.
        for (Py_ssize_t k = 0; k < size && k < PyList_GET_SIZE(row); ++k) *out++ = read(PyList_GET_ITEM(row, k));
        if (PyList_GET_SIZE(row) < size) throw std::invalid_argument("a list became shorter while it was read");
    }
    return py::make_tuple(flat, offsets);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "Plans microbatches (plan.h) and builds their tensors (collate.h); use it through engine/batching/plan.py.";
    module.def("plan", &plan, py::arg("lengths"), py::arg("group_ids"), py::arg("step_ids"), py::arg("trained"), py::arg("ranks"),
               py::arg("token_budget"), py::arg("cost"), py::arg("seq_multiple"), py::arg("total_multiple"), py::arg("microbatch_multiple"),
               py::arg("sync"), py::arg("on_oversize"));
    module.def("collate", &collate, py::arg("order"), py::arg("offsets"), py::arg("lengths"), py::arg("totals"), py::arg("seq_multiple"),
               py::arg("starts"), py::arg("tokens"), py::arg("mask"), py::arg("fields"), py::arg("tokens_out"), py::arg("targets_out"),
               py::arg("positions_out"), py::arg("mask_out"), py::arg("threads"));
    module.def("flatten_ints", &flatten<ReadInt>, py::arg("rows"));
    module.def("flatten_flags", &flatten<ReadFlag>, py::arg("rows"));
    module.def("flatten_floats", &flatten<ReadFloat>, py::arg("rows"));
}
