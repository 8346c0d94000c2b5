// engine._C: takes and returns numpy arrays. The GIL is released during computation, but never while Python objects are accessed.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <limits>
#include <memory>
#include <numeric>
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

constexpr int64_t LARGEST = std::numeric_limits<int32_t>::max(), MOST_THREADS = 4096;

std::string text(int64_t value) { return std::to_string(value); }

int64_t in_range(const std::string& name, int64_t value, int64_t least, int64_t most) {
    if (value >= least && value <= most) return value;
    throw std::invalid_argument(name + "=" + text(value) + " must be from " + text(least) + " to " + text(most));
}

std::string describe(py::handle value) {
    if (!py::isinstance<py::array>(value)) return py::str(py::type::of(value).attr("__name__"));
    return py::str("{} of shape {}").format(value.attr("dtype"), value.attr("shape"));
}

// No conversion: an output that was converted would be a copy, and a conversion of an input is better done once by the caller.
template <typename T>
Array<T> array_of(const std::string& name, py::handle value) {
    constexpr int ALIGNED = py::detail::npy_api::NPY_ARRAY_ALIGNED_;
    if (Array<T>::check_(value)) {
        auto array = py::reinterpret_borrow<Array<T>>(value);
        if (array.ndim() == 1 && (array.flags() & ALIGNED) != 0) return array;
    }
    const std::string dtype = py::str(py::dtype::of<T>());
    throw std::invalid_argument(name + " is " + describe(value) + "; pass a contiguous, one-dimensional numpy array of " + dtype);
}

Numbers numbers_of(const std::string& name, const py::object& value, py::ssize_t count) {
    if (value.is_none()) return std::nullopt;
    const Array<int64_t> array = array_of<int64_t>(name, value);
    if (array.size() != count) throw std::invalid_argument(name + " has " + text(array.size()) + " entries for " + text(count) + " lengths");
    return array;
}

// A numpy array that owns the vector's memory; no copy.
template <typename T>
Array<T> to_numpy(std::vector<T>&& values) {
    auto owned = std::make_unique<std::vector<T>>(std::move(values));
    std::vector<T>* data = owned.get();
    const py::capsule owner(owned.release(), [](void* vector) { delete static_cast<std::vector<T>*>(vector); });
    return Array<T>(static_cast<py::ssize_t>(data->size()), data->data(), owner);
}

const int64_t* data_or_null(const Numbers& numbers) { return numbers ? numbers->data() : nullptr; }

trivet::Sync sync_of(const std::string& name) {
    if (name != "microbatch" && name != "step") throw std::invalid_argument("sync='" + name + "' is unknown; use 'microbatch' or 'step'");
    return name == "step" ? trivet::Sync::step : trivet::Sync::microbatch;
}

trivet::Oversize oversize_of(const std::string& name) {
    if (name == "error") return trivet::Oversize::error;
    if (name == "alone") return trivet::Oversize::alone;
    if (name == "drop") return trivet::Oversize::drop;
    throw std::invalid_argument("on_oversize='" + name + "' is unknown; use 'error' or 'alone' or 'drop'");
}

py::list names_of(const std::vector<trivet::Algorithm>& algorithms) {
    constexpr const char* NAMES[] = {"none", "level", "skewed", "by_rank", "tight", "differencing", "even"};
    py::list names;
    for (const trivet::Algorithm algorithm : algorithms) names.append(NAMES[static_cast<int>(algorithm)]);
    return names;
}

py::dict plan(const py::object& lengths, const py::object& group_ids, const py::object& step_ids, const py::object& trained, int64_t ranks,
              int64_t token_budget, const std::tuple<int64_t, int64_t, int64_t>& cost, int64_t seq_multiple, int64_t total_multiple,
              int64_t microbatch_multiple, const std::string& sync, const std::string& on_oversize) {
    const Array<int64_t> lengths_N = array_of<int64_t>("lengths", lengths);
    const py::ssize_t count = lengths_N.size();
    const Numbers groups = numbers_of("group_ids", group_ids, count), steps = numbers_of("step_ids", step_ids, count),
                  loss = numbers_of("trained", trained, count);
    const trivet::Sequences sequences{lengths_N.data(), data_or_null(groups), data_or_null(steps), data_or_null(loss), count};
    const trivet::Limits limits{ranks,
                                token_budget,
                                {std::get<0>(cost), std::get<1>(cost), std::get<2>(cost)},
                                seq_multiple,
                                total_multiple,
                                microbatch_multiple,
                                sync_of(sync),
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

template <typename T>
Rows<T> rows_of(const std::string& name, const py::object& value) {
    if (!py::isinstance<py::list>(value) && !py::isinstance<py::tuple>(value)) return array_of<T>(name, value);
    std::vector<Array<T>> arrays;
    for (const py::handle row : value) arrays.push_back(array_of<T>(name + "[" + text(static_cast<int64_t>(arrays.size())) + "]", row));
    return arrays;
}

// Memory that is read or written.
struct Span {
    std::string name;
    const char *begin, *end;
};

template <typename T>
Span span_of(const std::string& name, const Array<T>& array) {
    const char* begin = reinterpret_cast<const char*>(array.data());
    return {name, begin, begin + array.nbytes()};
}

template <typename T>
void add_spans(const std::string& name, const Rows<T>& rows, std::vector<Span>& spans) {
    if (const auto* flat = std::get_if<Array<T>>(&rows)) return spans.push_back(span_of(name, *flat));
    for (const Array<T>& array : std::get<std::vector<Array<T>>>(rows)) spans.push_back(span_of(name, array));
}

// Throws if an output shares memory with an input or with another output.
void check_overlap(const std::vector<Span>& outputs, const std::vector<Span>& inputs) {
    const auto check = [](const Span& a, const Span& b) {
        if (a.begin < b.end && b.begin < a.end) throw std::invalid_argument(a.name + " shares memory with " + b.name + "; pass separate arrays");
    };
    for (size_t i = 0; i < outputs.size(); ++i) {
        for (size_t k = 0; k < i; ++k) check(outputs[i], outputs[k]);
        for (const Span& input : inputs) check(outputs[i], input);
    }
}

// Pointers to the row of each sequence of the share, which has length(id) + extra entries. In a flat field, row i starts at
// starts[i] + i * extra.
template <typename T>
std::vector<const T*> row_pointers(const std::string& name, const Rows<T>& rows, const trivet::Share& share, const int64_t* starts, int64_t extra) {
    std::vector<const T*> pointers(share.sequences());
    const auto* arrays = std::get_if<std::vector<Array<T>>>(&rows);
    if (arrays == nullptr ? starts == nullptr : static_cast<int64_t>(arrays->size()) != share.sequences()) {
        throw std::invalid_argument(name + " must have an array for each sequence of the share, or be flat with starts");
    }
    for (int64_t place = 0; place < share.sequences(); ++place) {
        const int64_t id = share.order[place], expected = share.lengths[id] + extra;
        const Array<T>& array = arrays != nullptr ? (*arrays)[place] : std::get<Array<T>>(rows);
        // No row starts beyond the end of the array; a larger number is not added to, which could overflow.
        const int64_t start = arrays != nullptr ? 0 : starts[id] > array.size() ? starts[id] : starts[id] + id * extra;
        const bool fits = arrays != nullptr ? array.size() == expected : start >= 0 && start <= array.size() - expected;
        if (!fits) {
            throw std::invalid_argument(name + " has " + std::to_string(array.size()) + " entries; sequence " + std::to_string(id) +
                                        " requires " + std::to_string(expected));
        }
        pointers[place] = array.data() + start;
    }
    return pointers;
}

template <typename T>
Array<T> output(const std::string& name, const py::object& value, int64_t size) {
    Array<T> array = array_of<T>(name, value);
    if (array.size() != size) throw std::invalid_argument(name + " must have " + text(size) + " entries; it has " + text(array.size()));
    if (!array.writeable()) throw std::invalid_argument(name + " is read-only; pass an array that can be written");
    return array;
}

// (input, whether it has one value per token rather than per sequence, output)
using Field = std::tuple<py::object, bool, py::object>;

struct Fields {
    std::vector<Rows<float>> inputs;
    std::vector<Array<float>> outputs;
    std::vector<trivet::Values> values;
};

void add_field(const Field& field, const trivet::Share& share, const int64_t* starts, int64_t size, Fields& fields) {
    const auto& [value, per_token, out] = field;
    const std::string name = "fields[" + text(static_cast<int64_t>(fields.values.size())) + "]";
    const Rows<float> rows = rows_of<float>(name, value);
    Array<float> target = output<float>("the output of " + name, out, size);
    trivet::Values values{{}, per_token, target.mutable_data()};
    if (per_token) {
        values.of = row_pointers(name + ", a field", rows, share, starts, 0);
    } else {
        const auto* flat = std::get_if<Array<float>>(&rows);
        if (flat == nullptr) throw std::invalid_argument(name + " is a list; a field with one value per sequence is one array");
        for (int64_t place = 0; place < share.sequences(); ++place) {
            if (share.order[place] >= flat->size()) throw std::invalid_argument(name + ", a field has too few entries: " + text(flat->size()));
            values.of.push_back(flat->data() + share.order[place]);
        }
    }
    fields.inputs.push_back(rows);
    fields.outputs.push_back(target);
    fields.values.push_back(std::move(values));
}

trivet::Share share_of(const Array<int32_t>& order, const Array<int64_t>& offsets, const Array<int64_t>& lengths, const Array<int64_t>& totals,
                       int64_t seq_multiple) {
    in_range("seq_multiple", seq_multiple, 1, LARGEST);
    const trivet::Share share{order.data(), offsets.data(), lengths.data(), totals.data(), totals.size(), seq_multiple};
    if (offsets.size() != totals.size() + 1 || share.sequences() != order.size()) {
        throw std::invalid_argument("order, offsets and totals have inconsistent sizes: " + text(order.size()) + ", " + text(offsets.size()) + " and " +
                                    text(totals.size()));
    }
    for (int64_t j = 0; j <= share.microbatches; ++j) {
        const std::string name = "offsets[" + text(j) + "]";
        in_range(name, offsets.data()[j], j == 0 ? 0 : offsets.data()[j - 1], j == 0 ? 0 : order.size());
    }
    for (int64_t j = 0; j < share.microbatches; ++j) {
        in_range("totals[" + text(j) + "]", share.totals[j], 0, LARGEST);
        int64_t tokens = 0;
        for (int64_t place = share.offsets[j]; place < share.offsets[j + 1]; ++place) {
            const int32_t id = share.order[place];
            if (id < 0 || id >= lengths.size() || share.lengths[id] < 0 || share.lengths[id] > LARGEST) {
                throw std::invalid_argument("order has an unknown sequence id, " + text(id) + ", or one without a length from 0 to " + text(LARGEST));
            }
            tokens += trivet::round_up(share.lengths[id], seq_multiple);
        }
        if (tokens > share.totals[j]) {
            throw std::invalid_argument("totals has " + text(share.totals[j]) + " for a microbatch of " + text(tokens) + " tokens");
        }
    }
    return share;
}

py::tuple collate(const py::object& order, const py::object& offsets, const py::object& lengths, const py::object& totals, int64_t seq_multiple,
                  const py::object& starts, const py::object& tokens, const py::object& mask, const std::vector<Field>& fields,
                  const py::object& tokens_out, const py::object& targets_out, const py::object& positions_out, const py::object& mask_out,
                  int64_t threads) {
    in_range("threads", threads, 1, MOST_THREADS);
    const Array<int32_t> ids = array_of<int32_t>("order", order);
    const Array<int64_t> bounds = array_of<int64_t>("offsets", offsets), lengths_N = array_of<int64_t>("lengths", lengths),
                         sizes = array_of<int64_t>("totals", totals);
    const trivet::Share share = share_of(ids, bounds, lengths_N, sizes, seq_multiple);
    const int64_t size = std::accumulate(share.totals, share.totals + share.microbatches, int64_t{0});
    const Numbers first = numbers_of("starts", starts, lengths_N.size());
    const Rows<int32_t> token_rows = rows_of<int32_t>("tokens", tokens);
    const Rows<uint8_t> mask_rows = rows_of<uint8_t>("mask", mask);
    std::array<Array<int32_t>, 3> out{output<int32_t>("tokens_out", tokens_out, size), output<int32_t>("targets_out", targets_out, size),
                                      output<int32_t>("positions_out", positions_out, size)};
    Array<uint8_t> mask_target = output<uint8_t>("mask_out", mask_out, size);
    trivet::Batch batch{row_pointers("tokens", token_rows, share, data_or_null(first), 1),
                        row_pointers("mask", mask_rows, share, data_or_null(first), 0),
                        {},
                        out[0].mutable_data(),
                        out[1].mutable_data(),
                        out[2].mutable_data(),
                        mask_target.mutable_data()};
    Fields more;
    for (const Field& field : fields) add_field(field, share, data_or_null(first), size, more);
    batch.values = std::move(more.values);
    std::vector<Span> inputs{span_of("order", ids), span_of("offsets", bounds), span_of("lengths", lengths_N), span_of("totals", sizes)};
    std::vector<Span> outputs{span_of("tokens_out", out[0]), span_of("targets_out", out[1]), span_of("positions_out", out[2]),
                              span_of("mask_out", mask_target)};
    add_spans("tokens", token_rows, inputs);
    add_spans("mask", mask_rows, inputs);
    for (const Rows<float>& rows : more.inputs) add_spans("a field", rows, inputs);
    for (const Array<float>& array : more.outputs) outputs.push_back(span_of("the output of a field", array));
    check_overlap(outputs, inputs);
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
