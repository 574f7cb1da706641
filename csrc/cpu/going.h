// The batch that is decoded, from token to token.
#pragma once

#include <algorithm>
#include <vector>

#include "../decode.h"

namespace reasonrl {
namespace {

// The rows of slots that go on, and what is drawn for them.
struct Going {
    std::vector<int64_t> token, home, prompt, slot, position, drawn;
    std::vector<double> uniform;
    std::vector<float> logits, logp;  // (N, V) in the model's type
    int64_t rows = 0;

    Going(const DecodeModel& m, int64_t slots)
        : token(slots),
          home(slots),
          prompt(slots),
          position(slots),
          drawn(slots),
          uniform(slots),
          logits(slots * m.vocab),
          logp(slots) {}

    DecodeRows list(const DecodeState& s) {
        slot.clear();
        for (int64_t b = 0; b < s.slots; b++) {
            if (!s.done[b]) slot.push_back(b);
        }
        std::stable_sort(slot.begin(), slot.end(),
                         [&](int64_t a, int64_t b) { return s.home[a] < s.home[b]; });
        rows = (int64_t)slot.size();
        for (int64_t i = 0; i < rows; i++) {
            const int64_t b = slot[i];
            token[i] = s.token[b], home[i] = s.home[b], prompt[i] = s.prompt[b];
            position[i] = s.prompt[b] + s.length[b];
            uniform[i] = s.uniform[s.row[b] * s.most + s.count[s.row[b]]];
        }
        return {token.data(),    home.data(), prompt.data(), slot.data(),
                position.data(), nullptr,     rows};
    }

    // What row i has drawn, into the books.
    void enter(const DecodeState& s, int64_t i) const {
        const int64_t b = slot[i], row = s.row[b], at = s.count[row]++;
        const int64_t word = drawn[i], place = row * (s.most + 1) + at;
        s.tokens[place] = s.token[b] = word, s.logp[place] = logp[i];
        s.length[b]++;
        const int64_t* end = s.eos + s.eos_count;
        s.done[b] = at + 1 >= s.most || std::find(s.eos, end, word) != end;
    }
};

}  // namespace
}  // namespace reasonrl
