// Blocks as fibers of one thread. A warp runs until all its lanes wait at a barrier of the block; only then another one
// moves. So what a warp may do too early, because a barrier is missing, it does. Warps and lanes take turns in an order
// that TSFFN_HOST_SEED chooses, and blocks run one after the other.
#include "block.h"
#include "cuda_runtime.h"

#include <sys/mman.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define UNPOISON(at, bytes) __asan_unpoison_memory_region(at, bytes)
#else
#define UNPOISON(at, bytes) (void)0
#endif

namespace {

// ---- switching

enum { STACK_BYTES = 128 << 10 };

#if defined(__x86_64__)
struct context {
    void * sp;
};
extern "C" void tsffn_switch_fiber(void ** from, void * to);
// Saves what a function must keep, and the stack; then the same backwards.
__asm__(".text\n"
        ".type tsffn_switch_fiber, @function\n"
        "tsffn_switch_fiber:\n"
        "    pushq %rbx\n    pushq %rbp\n    pushq %r12\n    pushq %r13\n    pushq %r14\n    pushq %r15\n"
        "    movq %rsp, (%rdi)\n"
        "    movq %rsi, %rsp\n"
        "    popq %r15\n    popq %r14\n    popq %r13\n    popq %r12\n    popq %rbp\n    popq %rbx\n"
        "    ret\n"
        ".size tsffn_switch_fiber, .-tsffn_switch_fiber\n");

void switch_to(context * from, const context * to) {
    tsffn_switch_fiber(&from->sp, to->sp);
}

void make_context(context * made, char * stack, void (*entry)()) {
    enum { SAVED = 6 };
    void ** sp = reinterpret_cast<void **>(stack + STACK_BYTES);
    *--sp = nullptr; // no return address: entry never returns
    *--sp = reinterpret_cast<void *>(entry);
    for (int i = 0; i < SAVED; ++i) {
        *--sp = nullptr;
    }
    made->sp = sp;
}
#else
#include <ucontext.h>
struct context {
    ucontext_t at;
};
void switch_to(context * from, const context * to) {
    swapcontext(&from->at, &to->at);
}
void make_context(context * made, char * stack, void (*entry)()) {
    getcontext(&made->at);
    made->at.uc_stack.ss_sp = stack;
    made->at.uc_stack.ss_size = STACK_BYTES;
    makecontext(&made->at, entry, 0);
}
#endif

// ---- a block

enum fiber_state : uint8_t { READY, AT_BARRIER, DONE };

// Operations of a warp are counted. Those with an even number use the first slot, the others the second one: no lane
// begins the next but one before all have finished this one.
struct warp_state {
    uint64_t values[2][host::WARP_LANES];
    host::fragment fragments[2][host::WARP_LANES];
    unsigned arrived[2];
};

struct block_state {
    unsigned n_threads, n_done, n_waiting;
    context scheduler, fibers[host::MAX_BLOCK_THREADS];
    fiber_state states[host::MAX_BLOCK_THREADS];
    unsigned operations[host::MAX_BLOCK_THREADS];
    warp_state warps[host::MAX_BLOCK_THREADS / host::WARP_LANES];
    char * stacks;
    host::shared_pieces shared;
    const std::function<void()> * body;
};

block_state b;

uint64_t next_random(uint64_t * state) {
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return *state >> 33;
}

void pause(fiber_state state) {
    b.states[host::here.thread] = state;
    switch_to(&b.fibers[host::here.thread], &b.scheduler);
}

void entry() {
    (*b.body)();
    b.n_done += 1;
    pause(DONE);
}

// Whether a fiber of the warp moved.
bool run_warp(unsigned warp, bool backwards) {
    const unsigned first = warp * host::WARP_LANES;
    bool any = false;
    for (bool moved = true; moved;) {
        moved = false;
        for (unsigned k = 0; k < host::WARP_LANES; ++k) {
            const unsigned i = first + (backwards ? host::WARP_LANES - 1 - k : k);
            if (b.states[i] == READY) {
                const unsigned before = b.operations[i];
                host::here.thread = i;
                switch_to(&b.scheduler, &b.fibers[i]);
                moved = moved || b.states[i] != READY || b.operations[i] != before;
            }
        }
        any = any || moved;
    }
    return any;
}

void run_block(uint64_t seed) {
    b.n_done = b.n_waiting = 0;
    memset(b.warps, 0, sizeof(b.warps));
    memset(b.operations, 0, sizeof(b.operations));
    for (unsigned i = 0; i < b.n_threads; ++i) {
        char * stack = b.stacks + (size_t)i * STACK_BYTES;
        UNPOISON(stack + STACK_BYTES - 8192, 8192); // of the block before
        make_context(&b.fibers[i], stack, entry);
        b.states[i] = READY;
    }
    const unsigned n_warps = b.n_threads / host::WARP_LANES;
    unsigned turns[host::MAX_BLOCK_THREADS / host::WARP_LANES];
    for (unsigned i = 0; i < n_warps; ++i) {
        turns[i] = i;
    }
    while (b.n_done < b.n_threads) {
        for (unsigned i = n_warps - 1; seed != 0 && i > 0; --i) {
            std::swap(turns[i], turns[next_random(&seed) % (i + 1)]);
        }
        bool moved = false;
        for (unsigned k = 0; k < n_warps; ++k) {
            moved = run_warp(turns[k], seed != 0 && next_random(&seed) % 2 == 0) || moved;
        }
        if (b.n_waiting == b.n_threads) {
            memset(b.states, READY, b.n_threads);
            b.n_waiting = 0;
        } else if (!moved) {
            host::fail(b.n_waiting > 0 ? "a barrier that not all threads reach" : "lanes that wait for others",
                       host::here.block.x);
        }
    }
}

} // namespace

// ---- for kernels

host::position host::here;

static const host::left_out_barrier left_out;

void host::barrier(const char * file, int line) {
    if (!left_out.is(file, line)) {
        b.n_waiting += 1;
        pause(AT_BARRIER);
    }
}

static warp_state * this_warp() {
    return &b.warps[host::here.thread / host::WARP_LANES];
}

// Puts something into the lane's slot, and returns when all lanes have. finish(slot) comes after that, once.
template <class Put, class Finish> static unsigned together(Put put, Finish finish) {
    warp_state * warp = this_warp();
    const unsigned operation = b.operations[host::here.thread]++, slot = operation % 2;
    const unsigned all = host::WARP_LANES * (operation / 2 + 1);
    put(slot, host::here.thread % host::WARP_LANES);
    warp->arrived[slot] += 1;
    if (warp->arrived[slot] == all) {
        finish(slot);
    }
    while (warp->arrived[slot] < all) {
        pause(READY);
    }
    return slot;
}

static const uint64_t * put(uint64_t value) {
    warp_state * warp = this_warp();
    const auto store = [&](unsigned slot, unsigned lane) { warp->values[slot][lane] = value; };
    return warp->values[together(store, [](unsigned) {})];
}

void host::mma(float c[4], const uint32_t a[4], const uint32_t b_part[2]) {
    warp_state * warp = this_warp();
    const unsigned slot = together(
        [&](unsigned at, unsigned lane) {
            warp->fragments[at][lane] = {{a[0], a[1], a[2], a[3]}, {b_part[0], b_part[1]}, {c[0], c[1], c[2], c[3]}};
        },
        [&](unsigned at) { multiply_fragments(warp->fragments[at]); });
    memcpy(c, warp->fragments[slot][here.thread % WARP_LANES].c, 4 * sizeof(float));
}

uint64_t host::exchange(uint64_t value, unsigned from) {
    return put(value)[from % WARP_LANES];
}

uint32_t host::ballot(bool bit) {
    const uint64_t * bits = put(bit);
    uint32_t result = 0;
    for (unsigned i = 0; i < WARP_LANES; ++i) {
        result |= (uint32_t)bits[i] << i;
    }
    return result;
}

void * host_take_shared(unsigned piece, unsigned bytes) {
    return b.shared.take(piece, bytes, host::here.block.x);
}

void host::run_grid(dim3 grid, unsigned threads, size_t shared, const std::function<void()> & body) {
    const char * seed = getenv("TSFFN_HOST_SEED");
    const uint64_t order = seed != nullptr ? strtoull(seed, nullptr, 10) : 0;
    if (b.stacks == nullptr) {
        void * stacks = mmap(nullptr, (size_t)MAX_BLOCK_THREADS * STACK_BYTES, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (stacks == MAP_FAILED) {
            fail("no memory for stacks", 0);
        }
        b.stacks = static_cast<char *>(stacks);
    }
    host::here.grid = grid;
    b.n_threads = threads;
    b.body = &body;
    unsigned n = 0;
    for (unsigned z = 0; z < grid.z; ++z) {
        for (unsigned y = 0; y < grid.y; ++y) {
            for (unsigned x = 0; x < grid.x; ++x, ++n) {
                host::here.block = dim3(x, y, z);
                b.shared.begin(shared);
                run_block(order == 0 ? 0 : order * 1000003 + n);
            }
        }
    }
    b.shared.begin(0);
}
