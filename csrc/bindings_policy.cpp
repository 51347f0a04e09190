// PackedPolicy: numpy in, numpy out, one call per action.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <limits>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "bindings.h"
#include "bindings_arrays.h"
#include "bindings_networks.h"
#include "check.h"
#include "packed_policy.h"

namespace py = pybind11;

namespace flame {
namespace {

constexpr int kAligned = py::detail::npy_api::NPY_ARRAY_ALIGNED_;
using Floats = py::array_t<float, py::array::c_style | py::array::forcecast | kAligned>;

// numpy gives arrays over byte buffers that begin anywhere.
bool is_aligned(const py::array& a) { return (a.flags() & kAligned) != 0; }

std::vector<float> to_vector(const std::optional<Floats>& values) {
    if (!values) return {};
    return {values->data(), values->data() + values->size()};
}

Precision parse_precision(const std::string& name) {
    if (name == "fp32") return Precision::kFloat;
    if (name == "fp16") return Precision::kHalf;
    check(name == "bf16", "precision='", name, "' is unknown; choose one of fp32, fp16, bf16");
    return Precision::kBfloat;
}

NetDesc net_desc(const Floats& flat, const std::vector<int>& hidden, const std::string& activation,
                 bool layer_norm, int members) {
    NetDesc net;
    net.flat = flat.data();
    net.size = flat.size();
    net.members = members;
    net.hidden = hidden;
    net.activation = parse_activation(activation);
    net.layer_norm = layer_norm;
    return net;
}

constexpr int kCritics = 2;  // whose minimum chooses

std::unique_ptr<PackedPolicy> pack_policy(
    const std::string& kind, int obs_dim, int action_dim, const Floats& policy,
    const std::vector<int>& hidden, const std::string& activation, bool layer_norm,
    const std::optional<Floats>& time_features, const std::optional<Floats>& steps,
    std::pair<float, float> log_std_range, const std::optional<Floats>& critics,
    const std::vector<int>& critic_hidden, const std::string& critic_activation,
    bool critic_layer_norm, const std::optional<Floats>& state_encoder,
    const std::optional<Floats>& pair_encoder, const std::vector<int>& encoder_hidden,
    const std::string& encoder_activation, int embedding_dim, float embedding_min_scale,
    const std::string& precision, const std::optional<Floats>& obs_shift,
    const std::optional<Floats>& obs_scale, float obs_clip, const std::optional<Floats>& action_low,
    const std::optional<Floats>& action_high) {
    check(kind == "flow" || kind == "gaussian", "kind='", kind,
          "' is unknown; choose flow or gaussian");
    PolicyDesc d;
    d.kind = kind == "flow" ? PolicyKind::kFlow : PolicyKind::kGaussian;
    d.obs_dim = obs_dim;
    d.action_dim = action_dim;
    d.policy = net_desc(policy, hidden, activation, layer_norm, 1);
    if (critics) {
        d.critics =
            net_desc(*critics, critic_hidden, critic_activation, critic_layer_norm, kCritics);
    }
    const auto encoder = [&](const std::optional<Floats>& flat) {
        return flat ? net_desc(*flat, encoder_hidden, encoder_activation, false, 1) : NetDesc{};
    };
    d.state_encoder = encoder(state_encoder);
    d.pair_encoder = encoder(pair_encoder);
    d.embedding_dim = embedding_dim;
    d.embedding_min_scale = embedding_min_scale;
    d.precision = parse_precision(precision);
    if (d.kind == PolicyKind::kFlow) {
        check(time_features && time_features->ndim() == 2 && steps && steps->ndim() == 2 &&
                  steps->shape(1) == 5 && steps->shape(0) == time_features->shape(0),
              "a flow policy needs time_features (n, features) and steps (n, 5)");
        d.time_features = to_vector(time_features);
        d.num_features = static_cast<int>(time_features->shape(1));
        d.steps = act_steps(steps->data(), steps->shape(0));
    }
    d.log_std_min = log_std_range.first;
    d.log_std_max = log_std_range.second;
    d.obs_shift = to_vector(obs_shift);
    d.obs_scale = to_vector(obs_scale);
    d.obs_clip = obs_clip;
    d.action_low = to_vector(action_low);
    d.action_high = to_vector(action_high);
    const WithoutGil without_gil;
    return std::make_unique<PackedPolicy>(d);
}

// A view of (O,) or (B, O) float32 or float64 of any strides; other dtypes and misaligned arrays
// are converted first.
MatrixView obs_view(py::array& obs, int64_t obs_dim) {
    const auto is = [&](char code) {
        return obs.dtype().char_() == code && obs.dtype().byteorder() == '=';
    };
    const bool single = is('f');
    if ((!single && !is('d')) || !is_aligned(obs)) {
        obs = Floats(std::move(obs));
        return obs_view(obs, obs_dim);
    }
    check(obs.ndim() == 1 || obs.ndim() == 2, "obs has ", obs.ndim(),
          " axes; give one observation (O,) or a batch (B, O)");
    const bool batch = obs.ndim() == 2;
    const auto columns = obs.shape(obs.ndim() - 1);
    if (columns != obs_dim) {  // an if, not check(): its message would be put together every time
        throw std::invalid_argument(concat("obs has shape ", shape_text(obs),
                                           ", this policy takes (", obs_dim, ",) or (B, ", obs_dim,
                                           ")"));
    }
    return {obs.data(),
            !single,
            batch ? obs.shape(0) : 1,
            columns,
            batch ? obs.strides(0) : 0,
            obs.strides(obs.ndim() - 1)};
}

// The number of particles that the noise's shape means, checked against the observations.
int64_t particles_of(const Floats& noise, bool batch, int64_t rows, int64_t action_dim) {
    const int lead = batch ? 1 : 0;
    const auto axes = noise.ndim();
    const bool fits = (axes == lead + 1 || axes == lead + 2) &&
                      (!batch || noise.shape(0) == rows) && noise.shape(axes - 1) == action_dim;
    if (!fits) {  // as in obs_view
        throw std::invalid_argument(concat(
            "noise does not fit: for obs (O,) give (A,) or (N, A), for obs (B, O) give (B, A) or "
            "(B, N, A), here with A = ",
            action_dim, batch ? concat(" and B = ", rows) : ""));
    }
    return axes == lead + 2 ? noise.shape(lead) : 1;
}

py::array_t<float> act(const PackedPolicy& policy, py::array obs,
                       const std::optional<Floats>& noise, int64_t num_particles, uint64_t seed,
                       uint64_t stream, uint64_t offset) {
    const MatrixView view = obs_view(obs, policy.obs_dim());
    const bool batch = obs.ndim() == 2;
    const int64_t action_dim = policy.action_dim();
    if (noise) num_particles = particles_of(*noise, batch, view.rows, action_dim);
    auto out = batch ? py::array_t<float>({view.rows, action_dim}) : py::array_t<float>(action_dim);
    float* action = out.mutable_data();
    const float* base = noise ? noise->data() : nullptr;
    {
        const WithoutGil without_gil;
        policy.act(view, num_particles, base, {seed, stream, offset}, action);
    }
    return out;
}

// --- `act` is called at every control step, where pybind's dispatch and casters would take a tenth
// of an action's time. So it is a METH_FASTCALL method that reads its arguments itself.

constexpr std::array kActArguments = {"obs", "noise", "num_particles", "seed", "stream", "offset"};
using ActArguments = std::array<py::handle, kActArguments.size()>;

// Arguments by position and by keyword; missing ones stay null.
ActArguments read_arguments(PyObject* const* values, Py_ssize_t positional, PyObject* keywords) {
    ActArguments arguments;
    if (positional > static_cast<Py_ssize_t>(arguments.size())) {
        throw py::type_error(
            concat("act() takes at most ", arguments.size(), " arguments, got ", positional));
    }
    std::copy_n(values, positional, arguments.begin());
    const Py_ssize_t named = keywords == nullptr ? 0 : PyTuple_GET_SIZE(keywords);
    for (Py_ssize_t i = 0; i < named; ++i) {
        PyObject* name = PyTuple_GET_ITEM(keywords, i);
        const auto known = std::find_if(kActArguments.begin(), kActArguments.end(), [&](auto text) {
            return PyUnicode_CompareWithASCIIString(name, text) == 0;
        });
        const auto index = static_cast<size_t>(known - kActArguments.begin());
        if (known == kActArguments.end() || arguments[index]) {
            throw py::type_error(concat("act() got an unexpected or repeated argument '",
                                        std::string(py::str(name)), "'"));
        }
        arguments[index] = values[positional + i];
    }
    if (!arguments[0]) throw py::type_error("act() misses its argument 'obs'");
    return arguments;
}

template <typename Array>
Array array_of(py::handle value) {
    if (py::isinstance<Array>(value)) {
        auto array = py::reinterpret_borrow<Array>(value);
        if (is_aligned(array)) return array;
    }
    return Array(py::reinterpret_borrow<py::object>(value));
}

template <typename Integer>
Integer integer_of(py::handle value, Integer missing) {
    return value ? py::cast<Integer>(value) : missing;
}

PyObject* act_fastcall(PyObject* self, PyObject* const* values, Py_ssize_t positional,
                       PyObject* keywords) {
    try {
        const auto [obs, noise, num_particles, seed, stream, offset] =
            read_arguments(values, positional, keywords);
        const auto* policy = static_cast<const PackedPolicy*>(
            reinterpret_cast<py::detail::instance*>(self)->get_value_and_holder().value_ptr());
        check(policy != nullptr, "this PackedPolicy was not initialised");
        std::optional<Floats> base;
        if (noise && !noise.is_none()) base = array_of<Floats>(noise);
        return act(*policy, array_of<py::array>(obs), base, integer_of<int64_t>(num_particles, 1),
                   integer_of<uint64_t>(seed, 0), integer_of<uint64_t>(stream, 0),
                   integer_of<uint64_t>(offset, 0))
            .release()
            .ptr();
    } catch (py::error_already_set& error) {
        error.restore();
    } catch (const py::cast_error&) {
        PyErr_SetString(PyExc_TypeError,
                        "act() takes integers >= 0 as num_particles, seed, stream and offset");
    } catch (const py::builtin_exception& error) {
        error.set_error();
    } catch (const std::invalid_argument& error) {
        PyErr_SetString(PyExc_ValueError, error.what());
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
}

void bind_act(py::class_<PackedPolicy>& type) {
    static PyMethodDef method = {
        "act",
        reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&act_fastcall)),
        METH_FASTCALL | METH_KEYWORDS,
        "act(obs, noise=None, num_particles=1, seed=0, stream=0, offset=0)",
    };
    auto* owner = reinterpret_cast<PyTypeObject*>(type.ptr());
    type.attr("act") = py::reinterpret_steal<py::object>(PyDescr_NewMethod(owner, &method));
}

py::array_t<float> q_min(const PackedPolicy& policy, py::array obs, const Floats& action) {
    const MatrixView view = obs_view(obs, policy.obs_dim());
    check(obs.ndim() == 2 && action.ndim() == 2 && action.shape(0) == view.rows &&
              action.shape(1) == policy.action_dim(),
          "q_min needs obs (B, ", policy.obs_dim(), ") and action (B, ", policy.action_dim(), ")");
    py::array_t<float> out(view.rows);
    float* q = out.mutable_data();
    const float* actions = action.data();
    {
        const WithoutGil without_gil;
        policy.q_min(view, actions, q);
    }
    return out;
}

// Least time of one pass over the policy's weights.
double read_weights_seconds(const PackedPolicy& policy, int repeats) {
    check(repeats >= 1, "repeats is ", repeats, "; give at least 1");
    const WithoutGil without_gil;
    double best = std::numeric_limits<double>::infinity();
    volatile float sink = 0.0f;
    for (int i = 0; i < repeats; ++i) {
        const auto start = std::chrono::steady_clock::now();
        sink = policy.read_weights();
        const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
        best = std::min(best, elapsed.count());
    }
    (void)sink;
    return best;
}

}  // namespace

void bind_policy(py::module_& m) {
    py::class_<PackedPolicy> type(m, "PackedPolicy");
    bind_act(type);
    type.def(py::init(&pack_policy), py::kw_only(), py::arg("kind"), py::arg("obs_dim"),
             py::arg("action_dim"), py::arg("policy"), py::arg("hidden"), py::arg("activation"),
             py::arg("layer_norm") = false, py::arg("time_features") = py::none(),
             py::arg("steps") = py::none(), py::arg("log_std_range") = std::pair(-5.0f, 2.0f),
             py::arg("critics") = py::none(), py::arg("critic_hidden") = std::vector<int>{},
             py::arg("critic_activation") = "mish", py::arg("critic_layer_norm") = false,
             py::arg("state_encoder") = py::none(), py::arg("pair_encoder") = py::none(),
             py::arg("encoder_hidden") = std::vector<int>{}, py::arg("encoder_activation") = "silu",
             py::arg("embedding_dim") = 0, py::arg("embedding_min_scale") = 0.0f,
             py::arg("precision") = "fp32", py::arg("obs_shift") = py::none(),
             py::arg("obs_scale") = py::none(), py::arg("obs_clip") = 10.0f,
             py::arg("action_low") = py::none(), py::arg("action_high") = py::none())
        .def("q_min", &q_min, py::arg("obs"), py::arg("action"))
        .def_property_readonly("has_critics", &PackedPolicy::has_critics)
        .def_property_readonly("weight_bytes", &PackedPolicy::weight_bytes)
        .def("read_weights_seconds", &read_weights_seconds, py::arg("repeats") = 100);
}

}  // namespace flame
