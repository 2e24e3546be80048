// The codes of matrices in few bits, out of planes; included once per instruction set, behind its registers, `Bytes`.
namespace tardis {
namespace {

constexpr int kBytes = static_cast<int>(sizeof(Bytes)), kFloats = kBytes / 4;  // in a register

// How much less codes are, as they are multiplied, than what they stand for: those of 8 bits may have to fit a sign.
constexpr int less(int32_t bits) { return kSignedCodes && bits == 8 ? 128 : 0; }

// Codes out of kBytes bytes of every plane of a block of a row, in B bits each, 1, 2, 4 or 8: register s has those of
// the bits k with k % B == s, from the lowest on.
template <int B>
struct Codes {
    Bytes line[B];

    // p: at the first plane. Of planes, which come highest first, the first `missing` are zero, B / 2 - 1 at most.
    TARDIS_INLINE void load(const uint8_t* p, int64_t plane, int64_t missing, int64_t bytes) {
        each<B>([&](auto b) TARDIS_INLINE {
            const bool zero = b < B / 2 - 1 && b < missing;
            line[b] = zero ? Bytes{} : load_bytes(p + (b - missing) * plane, bytes);
        });
        if constexpr (B == 8 && kSignedCodes) line[0] = missing ? line[0] : ~line[0];
        if constexpr (B >= 2) each<B / 2>([&](auto b) TARDIS_INLINE { join<1>(line[2 * b], line[2 * b + 1]); });
        if constexpr (B >= 4)
            each<B / 4>([&](auto b) TARDIS_INLINE {
                each<2>([&](auto s) TARDIS_INLINE { join<2>(line[4 * b + s], line[4 * b + 2 + s]); });
            });
        if constexpr (B == 8) each<4>([&](auto s) TARDIS_INLINE { join<4>(line[s], line[4 + s]); });
    }

    // Rows do not begin with a line of the cache: of a block's bytes in each plane, fetches the line in which they end,
    // which leaves the row's first to `prefetch_ends`.
    TARDIS_INLINE static void prefetch_planes(const uint8_t* p, int64_t plane, int64_t missing) {
        each<B>([&](auto b) TARDIS_INLINE {
            if (b >= B / 2 - 1 || b >= missing) prefetch_far(p + (b - missing) * plane + 63);
        });
    }

    template <int k>
    TARDIS_INLINE Bytes code() const {
        return code_at<B, k / B * B>(line[k % B]);
    }
};

// The codes of 8 rows that are added together, by the bits of their bytes.
using Stored = uint8_t[kTermsTogether][8][64];

// Of a row, the first line; of its scales, which usually fit one line and may lie in two, the first and the last.
inline TARDIS_INLINE void prefetch_ends(const uint8_t* row, const uint16_t* scale, int64_t groups) {
    prefetch_far(row), prefetch_far(scale), prefetch_far(scale + groups - 1);
}

}  // namespace
}  // namespace tardis
