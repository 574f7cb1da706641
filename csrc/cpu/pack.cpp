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

}  // namespace

int64_t packed_words(int dtype, int64_t inputs, int64_t outputs) {
    return words(dtype, inputs) * ((outputs + PANEL - 1) / PANEL * PANEL);
}

int64_t panel() {
    return PANEL;
}

void pack(const PackTask& t, int threads) {
    const int64_t each = words(t.to, t.inputs), wide = vectors(each);
    const int64_t all = t.halves ? 2 * vectors(t.parts[0].outputs) : t.outputs();
    const int64_t panels = (all + PANEL - 1) / PANEL;
#pragma omp parallel num_threads(threads)
    {
        Store store;
        const Words rows = store.words(LANES, wide), square = store.words(LANES, LANES);
        std::vector<float> row(t.inputs);
        const Share mine = share_of(panels * 2);
        for (int64_t i = mine.begin; i < mine.end; i++) {
            memset(rows.at, 0, LANES * wide * sizeof(uint32_t));
            for (int64_t r = 0; r < LANES;) {
                const Rows from = rows_of(t, i * LANES + r);
                if (from.count <= 0) break;
                for (int64_t n = 0; n < from.count && r < LANES; n++, r++) {
                    const int64_t at = (from.first + n) * t.inputs;
                    read_any(from.part->dtype, from.part->weight, at, t.inputs, row.data());
                    write_any(t.to, rows.row(r), 0, t.inputs, row.data());
                }
            }
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
    }
}

}  // namespace ISA
}  // namespace reasonrl
