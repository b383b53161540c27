// Blocks as threads of the host, two blocks at a time, so that ThreadSanitizer sees what no barrier orders, within a
// block and between blocks. Slow: for tiny grids.
#include "block.h"
#include "cuda_runtime.h"

#include <mutex>
#include <pthread.h>
#include <thread>

namespace {

constexpr unsigned BLOCKS_AT_ONCE = 2;

struct warp_state {
    pthread_barrier_t barrier;
    uint64_t values[host::WARP_LANES];
    host::fragment fragments[host::WARP_LANES];
};

struct block_state {
    dim3 grid, index;
    pthread_barrier_t barrier;
    warp_state warps[host::MAX_BLOCK_THREADS / host::WARP_LANES];
    host::shared_pieces shared;
    std::mutex shared_mutex;
};

thread_local block_state * block;

} // namespace

thread_local host::position host::here;

static const host::left_out_barrier left_out;

void host::barrier(const char * file, int line) {
    if (!left_out.is(file, line)) {
        pthread_barrier_wait(&block->barrier);
    }
}

uint64_t host::exchange(uint64_t value, unsigned from) {
    warp_state * warp = &block->warps[here.thread / WARP_LANES];
    warp->values[here.thread % WARP_LANES] = value;
    pthread_barrier_wait(&warp->barrier);
    const uint64_t result = warp->values[from % WARP_LANES];
    pthread_barrier_wait(&warp->barrier);
    return result;
}

uint32_t host::ballot(bool bit) {
    warp_state * warp = &block->warps[here.thread / WARP_LANES];
    warp->values[here.thread % WARP_LANES] = bit;
    pthread_barrier_wait(&warp->barrier);
    uint32_t result = 0;
    for (unsigned i = 0; i < WARP_LANES; ++i) {
        result |= (uint32_t)warp->values[i] << i;
    }
    pthread_barrier_wait(&warp->barrier);
    return result;
}

void host::mma(float c[4], const uint32_t a[4], const uint32_t b[2]) {
    warp_state * warp = &block->warps[here.thread / WARP_LANES];
    const unsigned lane = here.thread % WARP_LANES;
    warp->fragments[lane] = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, {c[0], c[1], c[2], c[3]}};
    pthread_barrier_wait(&warp->barrier);
    if (lane == 0) {
        multiply_fragments(warp->fragments);
    }
    pthread_barrier_wait(&warp->barrier);
    memcpy(c, warp->fragments[lane].c, 4 * sizeof(float));
}

void * host_take_shared(unsigned piece, unsigned bytes) {
    const std::lock_guard<std::mutex> lock(block->shared_mutex);
    return block->shared.take(piece, bytes, host::here.block.x);
}

void host::run_grid(dim3 grid, unsigned threads, size_t shared, const std::function<void()> & body) {
    const unsigned n_blocks = grid.x * grid.y * grid.z;
    for (unsigned first = 0; first < n_blocks; first += BLOCKS_AT_ONCE) {
        static block_state blocks[BLOCKS_AT_ONCE];
        std::vector<std::thread> running;
        const unsigned n = n_blocks - first < BLOCKS_AT_ONCE ? n_blocks - first : BLOCKS_AT_ONCE;
        for (unsigned k = 0; k < n; ++k) {
            block_state * mine = &blocks[k];
            const unsigned number = first + k;
            mine->grid = grid;
            mine->index = dim3(number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y);
            mine->shared.begin(shared);
            pthread_barrier_init(&mine->barrier, nullptr, threads);
            for (unsigned w = 0; w < threads / WARP_LANES; ++w) {
                pthread_barrier_init(&mine->warps[w].barrier, nullptr, WARP_LANES);
            }
            for (unsigned t = 0; t < threads; ++t) {
                running.emplace_back([mine, t, &body] {
                    block = mine;
                    host::here = {t, mine->index, mine->grid};
                    body();
                });
            }
        }
        for (std::thread & thread : running) {
            thread.join();
        }
        for (unsigned k = 0; k < n; ++k) {
            pthread_barrier_destroy(&blocks[k].barrier);
            for (unsigned w = 0; w < threads / WARP_LANES; ++w) {
                pthread_barrier_destroy(&blocks[k].warps[w].barrier);
            }
        }
    }
}
