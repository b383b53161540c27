// What fibers and threads have in common: the shared memory of a block, and faults for the tests of the checkers.
#pragma once

#include "cpu/kernels/half.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

namespace host {

enum { WARP_LANES = 32, MAX_BLOCK_THREADS = 1024 };

[[noreturn]] inline void fail(const char * what, unsigned block) {
    fprintf(stderr, "kernel on the host: %s in block %u\n", what, block);
    abort();
}

inline std::string planted(const char * variable) {
    const char * value = getenv(variable);
    return value != nullptr ? value : "";
}

// A missing barrier: TSFFN_PLANT_BARRIER names the one that is left out, FILE:LINE. It is read when the program begins:
// whatever threads did here in turn could order them, and hide the race.
struct left_out_barrier {
    std::string file;
    int line = 0;

    left_out_barrier() {
        const std::string place = planted("TSFFN_PLANT_BARRIER");
        const size_t colon = place.find(':');
        if (colon != std::string::npos) {
            file = "/" + place.substr(0, colon);
            line = std::stoi(place.substr(colon + 1));
        }
    }

    bool is(const char * in_file, int in_line) const {
        const size_t n = strlen(in_file);
        return line == in_line && n >= file.size() && strcmp(in_file + n - file.size(), file.c_str()) == 0;
    }
};

// A lane's part of the matrices of mma.m16n8k16: A [16][16], B [16][8], C and the result [16][8]. Lane l has, with g =
// l / 4 and t = l % 4,
//
//   a   rows g, g + 8, g, g + 8; columns 2 t and 2 t + 1 of the first, the first, the last, the last 8
//   b   column g; rows 2 t and 2 t + 1 of the first, the last 8
//   c   rows g, g, g + 8, g + 8; columns 2 t, 2 t + 1, 2 t, 2 t + 1
struct fragment {
    uint32_t a[4], b[2]; // two halves each, the first one in the low bits
    float c[4];
};

// c of all lanes = A B + C: products of halves are exact, and sums are floats.
inline void multiply_fragments(fragment lanes[WARP_LANES]) {
    float a[16][16], b[16][8], c[16][8];
    for (unsigned lane = 0; lane < WARP_LANES; ++lane) {
        const fragment & f = lanes[lane];
        const unsigned g = lane / 4, t = lane % 4;
        for (unsigned k = 0; k < 4; ++k) {
            for (unsigned half = 0; half < 2; ++half) {
                a[g + 8 * (k % 2)][2 * t + half + 8 * (k / 2)] = tsffn_f16_to_f32((uint16_t)(f.a[k] >> 16 * half));
            }
            c[g + 8 * (k / 2)][2 * t + k % 2] = f.c[k];
        }
        for (unsigned k = 0; k < 4; ++k) {
            b[2 * t + k % 2 + 8 * (k / 2)][g] = tsffn_f16_to_f32((uint16_t)(f.b[k / 2] >> 16 * (k % 2)));
        }
    }
    for (unsigned i = 0; i < 16; ++i) {
        for (unsigned k = 0; k < 16; ++k) {
            for (unsigned j = 0; j < 8; ++j) {
                c[i][j] += a[i][k] * b[k][j];
            }
        }
    }
    for (unsigned lane = 0; lane < WARP_LANES; ++lane) {
        for (unsigned k = 0; k < 4; ++k) {
            lanes[lane].c[k] = c[lane / 4 + 8 * (k / 2)][2 * (lane % 4) + k % 2];
        }
    }
}

// Each piece is memory of its own, which AddressSanitizer guards. It begins as NaN, not as 0.
class shared_pieces {
  public:
    void begin(size_t limit) {
        pieces.clear();
        used = 0;
        most = limit;
    }

    void * take(unsigned piece, unsigned bytes, unsigned block) {
        if (piece < pieces.size()) {
            return pieces[piece].get();
        }
        used += bytes;
        if (piece != pieces.size() || used > most) {
            fail("more shared memory than the launch asked for", block);
        }
        // An overrun: TSFFN_PLANT_OVERRUN makes pieces too small.
        static const bool is_short = planted("TSFFN_PLANT_OVERRUN") == "shared";
        const unsigned room = is_short && bytes > 16 ? bytes - 16 : bytes;
        void * at = aligned_alloc(16, (room + 15) / 16 * 16);
        memset(at, 0xff, (room + 15) / 16 * 16);
        pieces.emplace_back(at, free);
        return at;
    }

  private:
    std::vector<std::unique_ptr<void, void (*)(void *)>> pieces;
    size_t used = 0, most = 0;
};

} // namespace host
