// What fibers and threads have in common: the shared memory of a block, and faults for the tests of the checkers.
#pragma once

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
