#include "cpu/pack.h"

#include <cmath>

#include "check.h"
#include "float_bits.h"
#include "mlp_spec.h"
#include "partition.h"

namespace flame {
namespace {

constexpr float kHalfMax = 65504.0f;
constexpr float kBfloatMax = 0x1.FEp127f;

int inputs_of(const PackShape& s) { return s.action_dim + s.obs_dim + s.num_features; }

// One member's view of one layer in the flat buffer.
struct FlatLayer {
    const float* weight;  // (outputs, inputs)
    const float* bias;
    const float* gain;
    const float* offset;
    int inputs, outputs;
    int number;
};

class FlatReader {
  public:
    // Reads nothing itself, so that it can also measure a buffer before its size is checked.
    FlatReader(const NetDesc& net, int member) : net_(net), member_(member) {}

    FlatLayer next(int inputs, int outputs, bool norm) {
        FlatLayer layer;
        layer.weight = take(static_cast<int64_t>(outputs) * inputs);
        layer.bias = take(outputs);
        layer.gain = norm ? take(outputs) : nullptr;
        layer.offset = norm ? take(outputs) : nullptr;
        layer.inputs = inputs;
        layer.outputs = outputs;
        layer.number = number_++;
        return layer;
    }

    int64_t position() const { return position_; }

  private:
    const float* take(int64_t floats) {
        const float* p = net_.flat + position_ + member_ * floats;
        position_ += round_up(net_.members * floats, kParameterAlignment);
        return p;
    }

    const NetDesc& net_;
    int member_;
    int64_t position_ = 0;
    int number_ = 0;
};

// Hands out 64-byte aligned pieces of the storage; without storage it only counts.
class Writer {
  public:
    explicit Writer(float* storage) : storage_(storage) {}

    float* take(int64_t floats) {
        float* p = storage_ == nullptr ? nullptr : storage_ + used_;
        used_ += padded(floats);
        return p;
    }
    // Room for weights of either width.
    float* take_weights(int64_t count, Precision precision) {
        return take(precision == Precision::kFloat ? count : divide_up(count, 2));
    }
    int64_t used() const { return used_; }

  private:
    float* storage_;
    int64_t used_ = 0;
};

void check_finite(float value, int layer) {
    check(std::isfinite(value), "the parameters hold ", value, " in layer ", layer,
          "; every weight must be finite");
}

void check_range(float value, float most, const char* name, int layer) {
    check(std::fabs(value) <= most, "a weight of layer ", layer, " is ", value, ", outside of ",
          name, "'s range of +-", most, "; use precision='fp32'");
}

// Where a bfloat16 lies: the halves of a block's words.
int64_t bfloat_position(int64_t index) {
    const int64_t word = index % kBfloatWords;
    return index / kBlock * kBlock + 2 * word + index % kBlock / kBfloatWords;
}

// Element `index` of a layer's weights, whose rows are whole blocks.
void put_weight(void* to, int64_t index, float value, Precision precision, int layer) {
    check_finite(value, layer);
    switch (precision) {
        case Precision::kFloat:
            static_cast<float*>(to)[index] = value;
            return;
        case Precision::kHalf:
            check_range(value, kHalfMax, "fp16", layer);
            static_cast<uint16_t*>(to)[index] = to_half(value);
            return;
        case Precision::kBfloat:
            check_range(value, kBfloatMax, "bf16", layer);
            static_cast<uint16_t*>(to)[bfloat_position(index)] = to_bfloat(value);
            return;
    }
}

// Input columns [first, first + count) of a layer, as panels.
ActLayer pack_panels(const FlatLayer& from, int first, int count, Precision precision,
                     Writer& writer) {
    const int64_t outputs = padded(from.outputs);
    void* weight = writer.take_weights(outputs * count, precision);
    ActLayer layer = {count, from.outputs, weight, nullptr, nullptr, nullptr};
    if (weight == nullptr) return layer;
    for (int o = 0; o < from.outputs; ++o) {
        const int64_t first_output = o / kPanel * kPanel;
        const int64_t width = row_count(first_output, outputs, kPanel);
        for (int k = 0; k < count; ++k) {
            const int64_t at = first_output * count + k * width + o % kPanel;
            put_weight(weight, at, from.weight[static_cast<int64_t>(o) * from.inputs + first + k],
                       precision, from.number);
        }
    }
    return layer;
}

const float* pack_vector(const float* from, int count, int layer, Writer& writer) {
    float* to = writer.take(count);
    if (to == nullptr || from == nullptr) return to;
    for (int i = 0; i < count; ++i) {
        check_finite(from[i], layer);
        to[i] = from[i];
    }
    return to;
}

void pack_norm(const FlatLayer& from, ActLayer& layer, Writer& writer) {
    if (from.gain == nullptr) return;
    layer.gain = pack_vector(from.gain, from.outputs, from.number, writer);
    layer.offset = pack_vector(from.offset, from.outputs, from.number, writer);
}

ActLayer pack_output(const FlatLayer& from, Precision precision, Writer& writer) {
    const int64_t inputs = padded(from.inputs);
    void* weight = writer.take_weights(inputs * from.outputs, precision);
    if (weight != nullptr) {
        for (int o = 0; o < from.outputs; ++o) {
            for (int k = 0; k < from.inputs; ++k) {
                put_weight(weight, o * inputs + k,
                           from.weight[static_cast<int64_t>(o) * from.inputs + k], precision,
                           from.number);
            }
        }
    }
    const float* bias = pack_vector(from.bias, from.outputs, from.number, writer);
    return {from.inputs, from.outputs, weight, bias, nullptr, nullptr};
}

// The first bias of each step: the constant time columns are folded in, summed in double.
const float* pack_first_bias(const FlatLayer& from, const PackShape& shape, const float* features,
                             int64_t steps, Writer& writer) {
    const int64_t width = padded(from.outputs);
    float* to = writer.take(steps * width);
    if (to == nullptr) return to;
    for (int64_t s = 0; s < steps; ++s) {
        for (int o = 0; o < from.outputs; ++o) {
            const float* row = from.weight + static_cast<int64_t>(o) * from.inputs +
                               shape.action_dim + shape.obs_dim;
            double bias = from.bias[o];
            for (int k = 0; k < shape.num_features; ++k) {
                bias += static_cast<double>(row[k]) * features[s * shape.num_features + k];
            }
            to[s * width + o] = static_cast<float>(bias);
            check_finite(to[s * width + o], from.number);
        }
    }
    return to;
}

ActNet pack(const NetDesc& net, const PackShape& shape, int member, const float* features,
            int64_t steps, Writer& writer) {
    FlatReader reader(net, member);
    ActNet packed = {};
    packed.activation = net.activation;
    packed.num_hidden = static_cast<int32_t>(net.hidden.size()) - 1;
    const Precision precision = shape.precision;
    const FlatLayer first = reader.next(inputs_of(shape), net.hidden[0], net.layer_norm);
    packed.obs = pack_panels(first, shape.action_dim, shape.obs_dim, precision, writer);
    packed.obs.bias = pack_vector(nullptr, first.outputs, first.number, writer);
    packed.first_bias = pack_first_bias(first, shape, features, steps, writer);
    packed.action = pack_panels(first, 0, shape.action_dim, precision, writer);
    pack_norm(first, packed.action, writer);
    for (int i = 0; i < packed.num_hidden; ++i) {
        const FlatLayer layer = reader.next(net.hidden[i], net.hidden[i + 1], net.layer_norm);
        packed.hidden[i] = pack_panels(layer, 0, layer.inputs, precision, writer);
        packed.hidden[i].bias = pack_vector(layer.bias, layer.outputs, layer.number, writer);
        pack_norm(layer, packed.hidden[i], writer);
    }
    packed.output =
        pack_output(reader.next(net.hidden.back(), shape.outputs, false), precision, writer);
    return packed;
}

}  // namespace

int64_t flat_size(const NetDesc& net, const PackShape& shape) {
    FlatReader reader(net, 0);
    int inputs = inputs_of(shape);
    for (const int width : net.hidden) {
        reader.next(inputs, width, net.layer_norm);
        inputs = width;
    }
    reader.next(inputs, shape.outputs, false);
    return reader.position();
}

int64_t packed_floats(const NetDesc& net, const PackShape& shape, int64_t steps) {
    Writer counter(nullptr);
    pack(net, shape, 0, nullptr, steps, counter);
    return counter.used();
}

ActNet pack_net(const NetDesc& net, const PackShape& shape, int member, const float* features,
                int64_t steps, float* storage) {
    Writer writer(storage);
    return pack(net, shape, member, features, steps, writer);
}

uint16_t to_bfloat(float x) {
    const uint32_t bits = float_to_bits(x);
    return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

uint16_t to_half(float x) {
    const uint32_t bits = float_to_bits(x);
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
    const float magnitude = std::fabs(x);
    if (magnitude < 0x1p-14f) {
        // Subnormal or zero: multiples of 2^-24; adding 0.5 (whose last bit is 2^-24) rounds to
        // one.
        return static_cast<uint16_t>(sign | (float_to_bits(magnitude + 0.5f) - 0x3F000000u));
    }
    const uint32_t rounded = (bits & 0x7FFFFFFFu) + 0x0FFFu + ((bits >> 13) & 1u);
    return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

}  // namespace flame
