// Prompts on their way into the batch, and the first tokens of their completions.
#pragma once

#include <string.h>

#include "../ops.h"
#include "going.h"

namespace reasonrl {
namespace {

// Every token of the prompts as a row; the last of each is asked.
struct Prompts {
    std::vector<int64_t> token, home, seen, position;
    std::vector<uint8_t> asked;

    Prompts(const std::vector<std::vector<int64_t>>& prompts, const std::vector<int64_t>& homes) {
        for (size_t p = 0; p < prompts.size(); p++) {
            const int64_t size = (int64_t)prompts[p].size();
            token.insert(token.end(), prompts[p].begin(), prompts[p].end());
            home.insert(home.end(), size, homes[p]);
            asked.insert(asked.end(), size, 0);
            asked.back() = 1;
            for (int64_t i = 0; i < size; i++) position.push_back(i), seen.push_back(i + 1);
        }
    }

    DecodeRows rows() const {
        return {token.data(),    home.data(),  seen.data(),          nullptr,
                position.data(), asked.data(), (int64_t)token.size()};
    }
};

// Completions first, first + 1, ... and their first tokens into the slots `at`, as many of every
// prompt; from its logits.
inline void begin(const DecodeModel& m, const DecodeState& s, const Prompts& prompts,
                  const char* logits, const std::vector<int64_t>& at, int64_t first, int threads) {
    const int64_t rows = (int64_t)at.size(), bytes = m.vocab * (m.dtype == F32 ? 4 : 2);
    const int64_t group = rows / std::count(prompts.asked.begin(), prompts.asked.end(), 1);
    Going going(m, rows);
    going.slot = at;
    int64_t last = -1;  // of a prompt
    for (int64_t i = 0; i < rows; i++) {
        if (i % group == 0) {
            while (!prompts.asked[++last]) continue;
        }
        const int64_t b = at[i], row = first + i;
        s.row[b] = row, s.home[b] = prompts.home[last], s.prompt[b] = prompts.seen[last];
        s.length[b] = -1;  // nothing is kept yet
        going.uniform[i] = s.uniform[row * s.most];
        memcpy((char*)going.logits.data() + i * bytes, logits + i / group * bytes, bytes);
    }
    const DrawTask draw = {going.logits.data(),
                           going.uniform.data(),
                           going.drawn.data(),
                           going.logp.data(),
                           rows,
                           m.vocab,
                           m.dtype,
                           s.temperature};
    ops().draw(draw, threads);
    for (int64_t i = 0; i < rows; i++) going.enter(s, i);
}

}  // namespace
}  // namespace reasonrl
