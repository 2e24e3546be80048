// Each instruction set that processor and build have computes what the plain kernels do, through the C interface: for
// processors that are emulated, on which tests in Python take too long. Prints how many results of each set were
// compared; what differs is said, and ends it with 1. `test_arm.py` builds and runs it.
#include "../tardis_llm/runtime/cpu/interface.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

using namespace tardis;

namespace {

const char* const kNames[] = {
    "portable", "avx2", "avxvnni", "avx512bw", "avx512vnni", "avx512", "amx", "neon", "i8mm",
};

std::mt19937 generator;

uint32_t below(uint32_t limit) { return generator() % limit; }

std::vector<float> normal(int64_t count) {
    std::normal_distribution<float> distribution;
    std::vector<float> numbers(count);
    for (float& number : numbers) number = distribution(generator);
    return numbers;
}

// Numbers in the type's bits; those of 16 bits are cut off, or are fp16 numbers between 1 and 2 with a sign.
std::vector<char> written(const std::vector<float>& numbers, int32_t type) {
    std::vector<char> bytes;
    for (float number : numbers) {
        uint32_t bits;
        memcpy(&bits, &number, 4);
        if (type == TARDIS_BF16) bits >>= 16;
        if (type == TARDIS_FP16) bits = (bits >> 16 & 0x8000) | 0x3c00 | (bits >> 13 & 0x3ff);
        const auto* first = reinterpret_cast<const char*>(&bits);
        bytes.insert(bytes.end(), first, first + (type == TARDIS_FP32 ? 4 : 2));
    }
    return bytes;
}

// A matrix with what it points to.
struct Owned {
    TardisMatrix m = {};
    std::vector<char> data;
    std::vector<uint16_t> scale;

    const TardisMatrix& view() {
        m.data = data.data(), m.scale = scale.data();
        return m;
    }
};

Owned dense(int64_t rows, int64_t columns, int32_t type) {
    Owned made;
    made.m.rows = rows, made.m.columns = made.m.group_size = columns, made.m.type = type;
    made.data = written(normal(rows * columns), type);
    return made;
}

// Of the same codes, in planes and in panels.
struct FewBits {
    Owned planes, panels;

    FewBits(int64_t rows, int64_t columns, int32_t bits, int64_t group_size) {
        const int64_t groups = (columns + group_size - 1) / group_size, filled = (rows + 31) / 32 * 32;
        for (Owned* each : {&planes, &panels}) {
            TardisMatrix& m = each->m;
            m.rows = rows, m.columns = columns, m.group_size = group_size;
            m.bits = bits, m.twice_zero = (1 << bits) - 1;
            m.type = each == &planes ? TARDIS_LOW_BIT : TARDIS_LOW_BIT_PANELS;
        }
        planes.data.resize(rows * bits * ((columns + 7) / 8)), planes.scale.resize(rows * groups);
        panels.data.resize(filled * lines() * 4), panels.scale.resize(filled * groups);
        for (int64_t i = 0; i < rows; ++i) {
            for (int64_t g = 0; g < groups; ++g)
                planes.scale[i * groups + g] = panels.scale[(i / 32 * groups + g) * 32 + i % 32] = 0x2000 + below(4096);
            for (int64_t j = 0; j < columns; ++j) {
                const uint32_t code = below(1u << bits);
                put_in_planes(i, j, code), put_in_panels(i, j, code);
            }
        }
    }

private:
    int64_t line_columns() const { return 32 / panels.m.bits; }
    int64_t lines() const { return (panels.m.columns + line_columns() - 1) / line_columns(); }

    void put_in_planes(int64_t i, int64_t j, uint32_t code) {
        const int64_t columns = planes.m.columns, begin = j / 512 * 512;
        const int64_t bytes = (std::min<int64_t>(columns - begin, 512) + 7) / 8, bit = (j - begin) / bytes;
        for (int32_t b = 0; b < planes.m.bits; ++b) {
            const int64_t row = (i * planes.m.bits + b) * ((columns + 7) / 8);
            planes.data[row + begin / 8 + (j - begin) % bytes] |= (code >> (planes.m.bits - 1 - b) & 1) << bit;
        }
    }

    void put_in_panels(int64_t i, int64_t j, uint32_t code) {
        const int64_t line = i / 32 * lines() + j / line_columns();
        panels.data[(line * 32 + i % 32) * 4 + j % 4] |= code << (j % line_columns() / 4 * panels.m.bits);
    }
};

float number(const void* data, int64_t i, int32_t type) {
    if (type == TARDIS_FP32) return static_cast<const float*>(data)[i];
    const uint16_t half = static_cast<const uint16_t*>(data)[i];
    if (type == TARDIS_FP16) {
        const float size = std::ldexp((half & 0x3ff) + 1024.0f, (half >> 10 & 31) - 25);
        return half >> 15 ? -size : size;
    }
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float wide;
    memcpy(&wide, &bits, sizeof wide);
    return wide;
}

// What a call writes; nothing where it cannot.
using Result = std::vector<float>;

template <typename F>
Result called(const std::vector<char>& x, int64_t tokens, int64_t width, int32_t type, int32_t bits, const F& call) {
    std::vector<char> y(tokens * width * 4);
    const TardisBatch batch = {x.data(), y.data(), tokens, type, bits, 1, 0};
    Result numbers(call(batch) == TARDIS_OK ? tokens * width : 0);
    for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = number(y.data(), i, type);
    return numbers;
}

Result product(const TardisMatrix& m, const std::vector<char>& x, int64_t tokens, int32_t type, int32_t bits) {
    const TardisVector none = {};
    return called(x, tokens, m.rows, type, bits, [&](const TardisBatch& batch) {
        return tardis_linear(&m, &none, &batch);
    });
}

class Comparison {
public:
    explicit Comparison(int32_t isa) : isa_(isa) {}

    // By the set, and by the plain kernels; a difference may be so large a part of the largest number.
    template <typename F, typename P>
    void compare(const std::string& what, float bound, const F& found, const P& plain) {
        tardis_use(isa_);
        const Result y = found();
        tardis_use(TARDIS_PORTABLE);
        const Result expected = plain();
        float largest = 0, error = expected.empty() || y.size() != expected.size() ? INFINITY : 0;
        for (float number : expected) largest = std::fmax(largest, std::fabs(number));
        for (size_t i = 0; i < y.size() && i < expected.size(); ++i)
            if (std::isnan(y[i]) != std::isnan(expected[i])) error = INFINITY;
            else if (!std::isnan(y[i])) error = std::fmax(error, std::fabs(y[i] - expected[i]));
        ++count_;
        if (error <= bound * largest) return;
        ++wrong_;
        printf("%s, %s: differs by %g, the largest number being %g\n", kNames[isa_], what.c_str(), error, largest);
    }

    int64_t count() const { return count_; }
    int64_t wrong() const { return wrong_; }

private:
    int32_t isa_;
    int64_t count_ = 0, wrong_ = 0;
};

std::string text(std::initializer_list<int64_t> numbers) {
    std::string all;
    for (int64_t number : numbers) all += " " + std::to_string(number);
    return all;
}

const std::pair<int64_t, int64_t> kShapes[] = {{3, 5}, {37, 100}, {70, 518}, {33, 1300}};

void compare_dense(Comparison& to) {
    for (int32_t type : {TARDIS_BF16, TARDIS_FP16, TARDIS_FP32}) {
        const float bound = type == TARDIS_BF16 ? 1.0f / 128 : type == TARDIS_FP16 ? 1.0f / 1024 : 1e-5f;
        for (auto [rows, columns] : kShapes) {
            Owned m = dense(rows, columns, type);
            for (int64_t tokens : {1, 2, 3, 9}) {
                const auto x = written(normal(tokens * columns), type);
                const auto run = [&] { return product(m.view(), x, tokens, type, 8); };
                to.compare("dense" + text({type, rows, columns, tokens}), bound, run, run);
            }
        }
    }
}

void compare_few_bits(Comparison& to, int32_t bits) {
    for (auto [rows, columns] : kShapes) {
        for (int64_t group_size : {7, 64, 128, 2048}) {
            FewBits m(rows, columns, bits, group_size);
            for (int64_t tokens : {1, 2, 5, 8}) {
                std::vector<float> numbers = normal(tokens * columns);
                if (tokens == 5) numbers[columns] = NAN, numbers[3 * columns - 1] = INFINITY;
                const auto x = written(numbers, TARDIS_FP32);
                for (int32_t of_x : {8, 16}) {
                    const auto run = [&](Owned& own) { return product(own.view(), x, tokens, TARDIS_FP32, of_x); };
                    const std::string what = text({bits, rows, columns, group_size, tokens, of_x});
                    const auto planes = [&] { return run(m.planes); };
                    to.compare("planes" + what, 1e-5f, planes, planes);
                    if (tardis_can_be_in_panels(&m.panels.view()))
                        to.compare("panels" + what, 1e-5f, [&] { return run(m.panels); }, planes);
                }
            }
        }
    }
}

// An FFN of h neurons, all of which are fixed, with the residuals' rows in few bits or dense.
void compare_folded(Comparison& to, int32_t bits, int32_t type, int32_t activation, int64_t d, int64_t h) {
    FewBits predictor(h, d, 4, 64), down(h, d, bits ? bits : 1, 64), up(h, d, 4, 64);
    Owned fold = dense(d, d, type), dense_down = dense(h, d, type), dense_up = dense(h, d, type);
    const std::vector<float> low(h, 1), high(h, -1), line = normal(h), bias = normal(d);
    const auto vector = [](const std::vector<float>& of) { return TardisVector{of.data(), TARDIS_FP32, 0}; };
    TardisFFN ffn = {};
    ffn.fold = fold.view(), ffn.predictor = predictor.planes.view();
    ffn.up = bits ? up.planes.view() : dense_up.view(), ffn.down = bits ? down.planes.view() : dense_down.view();
    ffn.bias = vector(bias), ffn.low = vector(low), ffn.high = vector(high);
    ffn.slope = ffn.offset = vector(line), ffn.activation = {activation, 0.8f, 0.8f, 0.5f, -1e-6f};
    ffn.k = 1, ffn.activation_bits = 16;
    for (int64_t tokens : {1, 3}) {
        const auto x = written(normal(tokens * d), type);
        const auto run = [&] {
            return called(x, tokens, d, type, 16, [&](const TardisBatch& batch) {
                return tardis_folded_ffn(&ffn, &batch);
            });
        };
        const float bound = type == TARDIS_BF16 ? 1.0f / 128 : bits ? 1e-4f : 1e-5f;
        to.compare("folded" + text({bits, type, activation, d, h, tokens}), bound, run, run);
    }
}

}  // namespace

int main() {
    int64_t wrong = 0;
    for (int32_t isa = TARDIS_PORTABLE + 1; isa <= TARDIS_I8MM; ++isa) {
        if (!tardis_supports(isa)) continue;
        Comparison to(isa);
        compare_dense(to);
        for (int32_t bits = 1; bits <= kMaxBits; ++bits) {
            compare_few_bits(to, bits);
            compare_folded(to, bits, TARDIS_FP32, TARDIS_GELU, 41, 131);
            compare_folded(to, bits, TARDIS_BF16, TARDIS_SILU, 600, 37);
        }
        for (int32_t activation = TARDIS_GELU; activation <= TARDIS_XIELU; ++activation)
            for (int32_t type : {TARDIS_BF16, TARDIS_FP32}) compare_folded(to, 0, type, activation, 72, 200);
        printf("%s: %lld\n", kNames[isa], static_cast<long long>(to.count()));
        wrong += to.wrong();
    }
    return wrong ? 1 : 0;
}
