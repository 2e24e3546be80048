// Inputs in the forms in which the kernels take them.
#pragma once
#include "kernels.h"

#include <memory>
#include <new>
#include <vector>

namespace tardis {

// Numbers that begin on a line of memory: a load of 64 bytes across two lines costs twice as much.
template <typename T>
struct LineAllocator {
    using value_type = T;
    static constexpr std::align_val_t kLine{64};
    LineAllocator() = default;
    template <typename U>
    LineAllocator(const LineAllocator<U>&) {}
    T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), kLine)); }
    void deallocate(T* p, size_t) { ::operator delete(p, kLine); }
    bool operator==(const LineAllocator&) const { return true; }
    bool operator!=(const LineAllocator&) const { return false; }
};

template <typename T>
using Numbers = std::vector<T, LineAllocator<T>>;

// Makes room for so many numbers; new ones are zero.
template <typename T>
void grow(Numbers<T>& numbers, int64_t count) {
    if (static_cast<int64_t>(numbers.size()) < count) numbers.resize(static_cast<size_t>(count));
}

// Owns what a `Layout` points to. Panels have columns in order, and only their pieces and segments are read.
class GroupLayout {
public:
    GroupLayout(int64_t columns, int64_t group_size, bool panels);
    GroupLayout(const GroupLayout&) = delete;
    GroupLayout& operator=(const GroupLayout&) = delete;
    const Layout& view() const { return layout_; }
    int64_t columns() const { return columns_; }
    int64_t group_size() const { return group_size_; }
    bool panels() const { return panels_; }

private:
    void add_block(int64_t begin, int64_t end);
    void add_piece(const Block& block, int64_t bit, int64_t first, int64_t column, int64_t count);

    int64_t columns_, group_size_;
    bool panels_;
    std::vector<Block> blocks_;
    std::vector<Piece> pieces_;
    std::vector<Segment> segments_;
    Layout layout_;
};

// Made when first asked for, and kept by the thread that calls.
const GroupLayout& layout_for(const TardisMatrix& m);

// A batch of inputs widened and padded, and quantised for each layout that is asked for. The memory that it takes is the
// thread's, who uses it again for the next one: a step has hundreds.
class Inputs {
public:
    Inputs(const TardisBatch& batch, int64_t columns);
    ~Inputs();
    Inputs(const Inputs&) = delete;
    Inputs& operator=(const Inputs&) = delete;
    // With the quantised values that `m` needs, made when first asked for; not from several threads at once. `bits` are
    // 8 or 16.
    const Input& for_matrix(const TardisMatrix& m, int32_t bits);

private:
    struct Variant {
        Variant(const TardisMatrix& m, int32_t parts) : layout(layout_for(m)), halves(parts) {}
        const GroupLayout& layout;
        const int32_t halves;
        Numbers<int8_t> values;
        Numbers<float> scale, sum;
        Input input;
        bool quantised = false;
    };
    struct Memory {
        Numbers<float> f32;
        Numbers<uint16_t> bf16;
        std::vector<std::unique_ptr<Variant>> variants;
    };
    static std::vector<std::unique_ptr<Memory>>& unused();  // the thread's
    Variant& variant(const TardisMatrix& m, int32_t halves);
    void quantise(Variant& variant);
    void quantise_segment(Variant& variant, int64_t token, int64_t segment);

    std::unique_ptr<Memory> memory_;
    Input plain_;
    int32_t threads_;
};

}  // namespace tardis
