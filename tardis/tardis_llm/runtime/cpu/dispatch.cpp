#include "dispatch.h"

#include <atomic>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace tardis {
namespace {

bool has_avx2() {
#if defined(__x86_64__) || defined(__i386__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    return false;
#endif
}

#if defined(__x86_64__)
// Skylake-X has the first, Cascade Lake and Ice Lake the second, Zen 4 and Sapphire Rapids all.
bool has_avx512bw() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512vnni() { return has_avx512bw() && __builtin_cpu_supports("avx512vnni"); }
bool has_avx512() { return has_avx512vnni() && __builtin_cpu_supports("avx512bf16"); }
#else
bool has_avx512bw() { return false; }
bool has_avx512vnni() { return false; }
bool has_avx512() { return false; }
#endif

bool find_avxvnni() {
#if defined(__x86_64__)
    unsigned eax, ebx, ecx, edx;
    return has_avx2() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & 1u << 4);
#else
    return false;
#endif
}

bool find_amx() {
#if defined(__x86_64__)
    unsigned eax, ebx, ecx, edx;
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
    return has_avx512() && __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kBf16) && (edx & kTile);
#else
    return false;
#endif
}

#if defined(__aarch64__) && defined(__linux__)
constexpr unsigned long kDotProduct = 1ul << 20, kI8mm = 1ul << 13;  // of AT_HWCAP, of AT_HWCAP2

bool find_neon() { return getauxval(AT_HWCAP) & kDotProduct; }
bool find_i8mm() { return find_neon() && (getauxval(AT_HWCAP2) & kI8mm); }
#elif defined(__aarch64__) && defined(__APPLE__)
bool has_feature(const char* name) {
    int32_t value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}

bool find_neon() { return has_feature("hw.optional.arm.FEAT_DotProd"); }
bool find_i8mm() { return find_neon() && has_feature("hw.optional.arm.FEAT_I8MM"); }
#else
bool find_neon() { return false; }
bool find_i8mm() { return false; }
#endif

// Asked once: in a virtual machine the instruction that tells takes as long as a small product.
bool has_avxvnni() {
    static const bool found = find_avxvnni();
    return found;
}

bool has_amx() {
    static const bool found = find_amx();
    return found;
}

bool has_neon() {
    static const bool found = find_neon();
    return found;
}

bool has_i8mm() {
    static const bool found = find_i8mm();
    return found;
}

// Null where processor or build lack it.
const Table* table_of(int32_t isa) {
    switch (isa) {
        case TARDIS_AMX: return has_amx() ? amx_table() : nullptr;
        case TARDIS_AVX512BW: return has_avx512bw() ? avx512bw_table() : nullptr;
        case TARDIS_AVX512VNNI: return has_avx512vnni() ? avx512vnni_table() : nullptr;
        case TARDIS_AVX512: return has_avx512() ? avx512_table() : nullptr;
        case TARDIS_AVXVNNI: return has_avxvnni() ? avxvnni_table() : nullptr;
        case TARDIS_AVX2: return has_avx2() ? avx2_table() : nullptr;
        case TARDIS_NEON: return has_neon() ? neon_table() : nullptr;
        case TARDIS_I8MM: return has_i8mm() ? i8mm_table() : nullptr;
        case TARDIS_PORTABLE: return portable_table();
        default: return nullptr;
    }
}

int32_t best() {
    for (int32_t isa = TARDIS_I8MM; isa > TARDIS_PORTABLE; --isa)
        if (table_of(isa)) return isa;
    return TARDIS_PORTABLE;
}

std::atomic<int32_t>& in_use() {
    static std::atomic<int32_t> isa{best()};
    return isa;
}

}  // namespace

const Table& kernels() { return *table_of(in_use().load(std::memory_order_relaxed)); }

}  // namespace tardis

extern "C" {

int32_t tardis_supports(int32_t isa) { return tardis::table_of(isa) != nullptr; }

int32_t tardis_use(int32_t isa) {
    if (!tardis::table_of(isa)) return TARDIS_BAD_ARGUMENT;
    tardis::in_use().store(isa, std::memory_order_relaxed);
    return TARDIS_OK;
}

int32_t tardis_isa() { return tardis::in_use().load(std::memory_order_relaxed); }
}
