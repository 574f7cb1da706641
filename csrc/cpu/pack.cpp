// Weights into the panels of a product (product.h): a vector of outputs at a time, its rows as the
// panels' type has them, turned in squares.
#include "share.h"
#include "tiles.h"

namespace reasonrl {
namespace ISA {
namespace {

// Where the outputs of a half panel come from: row `first` of a part, and so many rows.
struct Rows {
    const PackPart* part;
    int64_t first, count;
};

// Halves: the i-th vector of the panels is of the first part where i is even, else of the second.
Rows rows_of(const PackTask& t, int64_t output) {
    if (t.halves) {
        const PackPart& part = t.parts[output / LANES % 2];
        const int64_t first = output / PANEL * LANES + output % LANES;
        return {&part, first, std::min<int64_t>(LANES, part.outputs - first)};
    }
    const PackPart* part = t.parts.data();
    const PackPart* end = part + t.parts.size();
    for (; part != end && output >= part->outputs; part++) output -= part->outputs;
    if (part == end) return {part, 0, 0};
    return {part, output, std::min<int64_t>(LANES, part->outputs - output)};
}

// One thread's memory, and its share of a task.
class Packer {
  public:
    void pack(const PackTask& t) {
        const int64_t all = t.halves ? 2 * vectors(t.parts[0].outputs) : t.outputs();
        const Share mine = share_of((all + PANEL - 1) / PANEL * 2);
        for (int64_t i = mine.begin; i < mine.end; i++) half(t, i);
    }

  private:
    // The i-th half of a panel.
    void half(const PackTask& t, int64_t i) {
        const int64_t each = words(t.to, t.inputs), wide = vectors(each);
        if (rows_.size() < (size_t)(LANES * wide)) rows_.resize(LANES * wide);
        const Words rows = {rows_.data(), wide}, square = {square_, LANES};
        int64_t r = 0;
        while (r < LANES) {
            const Rows from = rows_of(t, i * LANES + r);
            if (from.count <= 0) break;
            for (int64_t n = 0; n < from.count && r < LANES; n++, r++) {
                rows.row(r)[each - 1] = 0;  // its second half, where no input is
                write_any(t.to, rows.row(r), 0, t.inputs, read_row(t, from, n));
            }
        }
        memset(rows.row(r), 0, (LANES - r) * wide * sizeof(uint32_t));
        uint32_t* out = t.out + i / 2 * each * PANEL + i % 2 * LANES;
        for (int64_t k = 0; k < each; k += LANES) {
            const Words here = {rows.at + k, wide}, there = {out + k * PANEL, PANEL};
            const bool whole = k + LANES <= each;
            turn_square(here, whole ? there : square);
            for (int64_t n = 0; !whole && n < each - k; n++) {
                memcpy(there.row(n), square.row(n), LANES * sizeof(uint32_t));
            }
        }
    }

    // The n-th of some rows, where it stands or as float32.
    const float* read_row(const PackTask& t, const Rows& from, int64_t n) {
        const int64_t at = (from.first + n) * t.inputs;
        if (from.part->dtype == F32) return (const float*)from.part->weight + at;
        if (row_.size() < (size_t)t.inputs) row_.resize(t.inputs);
        read_any(from.part->dtype, from.part->weight, at, t.inputs, row_.data());
        return row_.data();
    }

    std::vector<uint32_t> rows_;
    std::vector<float> row_;
    uint32_t square_[LANES * LANES];
};

}  // namespace

int64_t packed_words(int dtype, int64_t inputs, int64_t outputs) {
    return words(dtype, inputs) * ((outputs + PANEL - 1) / PANEL * PANEL);
}

int64_t panel() {
    return PANEL;
}

void pack(const std::vector<PackTask>& tasks, int threads) {
#pragma omp parallel num_threads(threads)
    {
        Packer packer;
        for (const PackTask& task : tasks) packer.pack(task);
    }
}

}  // namespace ISA
}  // namespace reasonrl
