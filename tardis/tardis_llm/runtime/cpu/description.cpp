// What the library says of its interface. Python states the same and compares both when it opens the library:
//
//   sources=...               a digest of the files that it was built from
//   kMaxTokens=64             a constant or an enumerator
//   TardisMatrix=48           bytes of a structure
//   TardisMatrix.rows=int64@16    a field and where it begins
//   tardis_isa=int32 ...      a function's result and arguments, by which Python calls it
#include "interface.h"

#include <cstddef>
#include <string>
#include <type_traits>

namespace tardis {
namespace {

template <typename T>
std::string name_of() {
    using Target = std::remove_cv_t<std::remove_pointer_t<T>>;
    if constexpr (std::is_same_v<T, TardisMatrix>) return "TardisMatrix";
    else if constexpr (std::is_same_v<T, TardisVector>) return "TardisVector";
    else if constexpr (std::is_same_v<T, TardisBatch>) return "TardisBatch";
    else if constexpr (std::is_same_v<T, TardisActivation>) return "TardisActivation";
    else if constexpr (std::is_same_v<T, TardisFFN>) return "TardisFFN";
    else if constexpr (std::is_same_v<T, TardisHead>) return "TardisHead";
    else if constexpr (std::is_same_v<T, TardisRounding>) return "TardisRounding";
    else if constexpr (std::is_same_v<T, TardisRows>) return "TardisRows";
    else if constexpr (std::is_same_v<T, TardisOperation>) return "TardisOperation";
    else if constexpr (std::is_void_v<T>) return "void";
    else if constexpr (std::is_integral_v<T>)
        return (std::is_signed_v<T> ? "int" : "uint") + std::to_string(8 * sizeof(T));
    else if constexpr (std::is_floating_point_v<T>) return "float" + std::to_string(8 * sizeof(T));
    else if constexpr (std::is_class_v<Target>) return name_of<Target>() + "*";
    else return "pointer";
}

template <typename Result, typename... Arguments>
std::string type_of(Result (*)(Arguments...)) {
    std::string type = name_of<Result>();
    ((type += " " + name_of<Arguments>()), ...);
    return type;
}

std::string described() {
    std::string lines;
    const auto line = [&](const char* name, const std::string& value) { lines += name + ("=" + value) + "\n"; };
    const auto text = [](auto number) { return std::to_string(number); };
#define NUMBER(name) line(#name, text(name));
#define STRUCTURE(type) line(#type, text(sizeof(type)));
#define FIELD(type, name) line(#type "." #name, name_of<decltype(type::name)>() + "@" + text(offsetof(type, name)));
#define FUNCTION(name) line(#name, type_of(name));
    line("sources", TARDIS_SOURCES);

    NUMBER(kMaxTokens) NUMBER(kMaxBits) NUMBER(kBlockColumns)
    NUMBER(kPanelRows) NUMBER(kBf16Together) NUMBER(kFp16Together) NUMBER(kLineBytes)
    NUMBER(kHeadRows) NUMBER(kRoundedColumns)

    NUMBER(TARDIS_NONE) NUMBER(TARDIS_BF16) NUMBER(TARDIS_FP16) NUMBER(TARDIS_FP32) NUMBER(TARDIS_LOW_BIT)
    NUMBER(TARDIS_BF16_PANELS) NUMBER(TARDIS_FP16_PANELS) NUMBER(TARDIS_LOW_BIT_PANELS) NUMBER(TARDIS_CODE_ROWS)
    NUMBER(TARDIS_OK) NUMBER(TARDIS_NO_MEMORY) NUMBER(TARDIS_BAD_ARGUMENT)
    NUMBER(TARDIS_PORTABLE) NUMBER(TARDIS_AVX2) NUMBER(TARDIS_AVXVNNI) NUMBER(TARDIS_AVX512BW) NUMBER(TARDIS_AVX512VNNI)
    NUMBER(TARDIS_AVX512) NUMBER(TARDIS_AMX) NUMBER(TARDIS_NEON) NUMBER(TARDIS_I8MM)
    NUMBER(TARDIS_GELU) NUMBER(TARDIS_GELU_TANH) NUMBER(TARDIS_QUICK_GELU)
    NUMBER(TARDIS_SILU) NUMBER(TARDIS_RELU) NUMBER(TARDIS_RELU2) NUMBER(TARDIS_XIELU)

    NUMBER(TARDIS_NORM) NUMBER(TARDIS_PRODUCTS) NUMBER(TARDIS_TURN) NUMBER(TARDIS_ATTEND) NUMBER(TARDIS_ADD)
    NUMBER(TARDIS_GATE) NUMBER(TARDIS_FOLDED) NUMBER(TARDIS_HEAD)

    STRUCTURE(TardisMatrix)
    FIELD(TardisMatrix, data) FIELD(TardisMatrix, scale) FIELD(TardisMatrix, rows) FIELD(TardisMatrix, columns)
    FIELD(TardisMatrix, group_size) FIELD(TardisMatrix, type) FIELD(TardisMatrix, bits)
    FIELD(TardisMatrix, twice_zero) FIELD(TardisMatrix, unused)

    STRUCTURE(TardisVector)
    FIELD(TardisVector, data) FIELD(TardisVector, type) FIELD(TardisVector, unused)

    STRUCTURE(TardisBatch)
    FIELD(TardisBatch, x) FIELD(TardisBatch, y) FIELD(TardisBatch, tokens) FIELD(TardisBatch, type)
    FIELD(TardisBatch, activation_bits) FIELD(TardisBatch, threads) FIELD(TardisBatch, unused)

    STRUCTURE(TardisActivation)
    FIELD(TardisActivation, kind) FIELD(TardisActivation, alpha_p) FIELD(TardisActivation, alpha_n)
    FIELD(TardisActivation, beta) FIELD(TardisActivation, eps)

    STRUCTURE(TardisFFN)
    FIELD(TardisFFN, fold) FIELD(TardisFFN, predictor) FIELD(TardisFFN, up) FIELD(TardisFFN, down)
    FIELD(TardisFFN, kept_up) FIELD(TardisFFN, kept_down) FIELD(TardisFFN, kept_bias)
    FIELD(TardisFFN, bias) FIELD(TardisFFN, b1) FIELD(TardisFFN, low) FIELD(TardisFFN, high)
    FIELD(TardisFFN, slope) FIELD(TardisFFN, offset) FIELD(TardisFFN, activation) FIELD(TardisFFN, k)
    FIELD(TardisFFN, activation_bits)

    STRUCTURE(TardisHead)
    FIELD(TardisHead, predictor) FIELD(TardisHead, remainder) FIELD(TardisHead, bias) FIELD(TardisHead, top)

    STRUCTURE(TardisRounding)
    FIELD(TardisRounding, target) FIELD(TardisRounding, base) FIELD(TardisRounding, scale)
    FIELD(TardisRounding, factor) FIELD(TardisRounding, change) FIELD(TardisRounding, rows)
    FIELD(TardisRounding, columns) FIELD(TardisRounding, top) FIELD(TardisRounding, zero)

    STRUCTURE(TardisRows)
    FIELD(TardisRows, data) FIELD(TardisRows, stride)

    STRUCTURE(TardisNorm)
    FIELD(TardisNorm, factor) FIELD(TardisNorm, bias) FIELD(TardisNorm, eps) FIELD(TardisNorm, centred)
    FIELD(TardisNorm, rounded_first) FIELD(TardisNorm, vectors)

    STRUCTURE(TardisProduct)
    FIELD(TardisProduct, weight) FIELD(TardisProduct, bias) FIELD(TardisProduct, y)

    STRUCTURE(TardisTurn)
    FIELD(TardisTurn, cosine) FIELD(TardisTurn, sine) FIELD(TardisTurn, heads) FIELD(TardisTurn, size)
    FIELD(TardisTurn, turned)

    STRUCTURE(TardisAttention)
    FIELD(TardisAttention, key) FIELD(TardisAttention, value) FIELD(TardisAttention, keys)
    FIELD(TardisAttention, values) FIELD(TardisAttention, capacity) FIELD(TardisAttention, heads)
    FIELD(TardisAttention, groups) FIELD(TardisAttention, size) FIELD(TardisAttention, window)
    FIELD(TardisAttention, scale) FIELD(TardisAttention, unused)

    STRUCTURE(TardisOperation)
    FIELD(TardisOperation, kind) FIELD(TardisOperation, count) FIELD(TardisOperation, of)
    FIELD(TardisOperation, x) FIELD(TardisOperation, other) FIELD(TardisOperation, y) FIELD(TardisOperation, width)

    FUNCTION(tardis_supports) FUNCTION(tardis_use) FUNCTION(tardis_isa) FUNCTION(tardis_use_openmp)
    FUNCTION(tardis_has_gemm) FUNCTION(tardis_has_low_bit_gemm) FUNCTION(tardis_can_be_in_panels)
    FUNCTION(tardis_can_be_code_rows)
    FUNCTION(tardis_linear) FUNCTION(tardis_head) FUNCTION(tardis_gemm) FUNCTION(tardis_fixed) FUNCTION(tardis_folded_ffn)
    FUNCTION(tardis_has_exact_ffn) FUNCTION(tardis_exact_ffn) FUNCTION(tardis_step)
    FUNCTION(tardis_round_columns) FUNCTION(tardis_read)
    return lines;
}

}  // namespace
}  // namespace tardis

extern "C" const char* tardis_description() {
    static const std::string text = tardis::described();
    return text.c_str();
}
