// Runs the CUDA backend's kernels on a CPU: kernels.cu and its headers, compiled by g++ with this header before them.
//
//     g++ -std=c++17 -O2 -DEMULATED -DELEMENT_F16 -DHIDDEN_SIZE=256 -DHEAD_SIZE=64 -include emulator.h -x c++ kernels.cu
//
// A CUDA thread is a fiber. Blocks run one after the other. Within a block, a warp runs until all its lanes wait, then the next
// warp, in a random order that changes at each barrier. Warp collectives (shuffles, ldmatrix, mma) and __syncthreads are
// rendezvous of fibers.
//
// It detects errors that a plain run on a CPU would hide:
// - Shared memory is NaN bytes when a block starts, and ends at a guard page.
// - Asynchronous copies complete as late or as early as PTX allows (`Copies`). wgmma does the opposite: it reads its operands,
//   including registers, at once if copies are late, and at the wait if they are early. Until the wait, its sums are NaN.
// - wgmma fails on bytes whose copy was not followed by a proxy fence, and on registers modified since the last wgmma.fence.
// - Warps run as far apart as the barriers allow, so a missing barrier shows.
// - Lanes of a warp that meet in different operations, barriers that never complete, and addresses outside the block's shared
//   memory end the process with a message.
// - TMA copies complete as late or as early as other copies. An mbarrier fails on more arrivals or bytes than it expects.
//
// Not modeled: lanes of a warp that run ahead of each other between two collectives (so a missing __syncwarp is not found), the
// operands of the inline PTX (NVRTC checks those), the memory model beyond barriers and the fences above, the summation order of
// tensor cores, and speed. Launches must come from one host thread at a time.
//
// -DEMULATED_WGMMA_WRONG makes wgmma give wrong results, to test the backend's numerical cross-checks.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <type_traits>
#include <utility>
#include <vector>

// On other architectures, or with -DEMULATED_UCONTEXT, ucontext switches between fibers; it is slower, as it saves the signal mask.
#if !defined(__x86_64__) && !defined(EMULATED_UCONTEXT)
#define EMULATED_UCONTEXT
#endif
#ifdef EMULATED_UCONTEXT
#include <ucontext.h>
#endif

// As in config.cuh.
#if defined(ELEMENT_FP8) && !defined(ELEMENT_F16)
#define ELEMENT_F16
#endif

// Only the kernels are exported, so that a process can load shared objects of several configurations.
#pragma GCC visibility push(hidden)

// ---------------------------------------------------------------------------------------------------------------------
// Keywords and types of CUDA C++
// ---------------------------------------------------------------------------------------------------------------------

#define __device__ __attribute__((visibility("hidden")))
#define __global__ __attribute__((visibility("hidden")))
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
// One block runs at a time, so static shared memory is a static variable. The section is filled with NaN when a block starts.
#define __shared__ static __attribute__((section("emulated_shared")))
#define DYNAMIC_SHARED(name) unsigned char* const name = emulated::block.shared

struct __attribute__((may_alias, aligned(8))) uint2 {
    unsigned x, y;
};
struct __attribute__((may_alias, aligned(16))) uint4 {
    unsigned x, y, z, w;
};
struct __attribute__((may_alias, aligned(16))) float4 {
    float x, y, z, w;
};
struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

extern "C" unsigned char __start_emulated_shared[] __attribute__((weak, visibility("hidden")));
extern "C" unsigned char __stop_emulated_shared[] __attribute__((weak, visibility("hidden")));

namespace emulated {

// ---------------------------------------------------------------------------------------------------------------------
// Fibers
// ---------------------------------------------------------------------------------------------------------------------

#ifndef EMULATED_UCONTEXT
// Saves the callee-saved registers and the stack pointer at `*save`, and continues where `resume` was saved.
extern "C" void emulated_switch(void** save, void* resume);
asm(R"(
    .text
    .type emulated_switch, @function
emulated_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size emulated_switch, . - emulated_switch
)");

class FiberContext {
public:
    // Makes this context call `entry`, which must not return, on the stack that ends at `top`.
    void prepare(unsigned char* bottom, unsigned char* top, void (*entry)()) {
        (void)bottom;
        void** stack = reinterpret_cast<void**>(top);
        *--stack = nullptr; // in place of a return address, which gives the stack the alignment of a call
        *--stack = reinterpret_cast<void*>(entry);
        for (int saved = 0; saved < 6; ++saved) *--stack = nullptr;
        pointer = stack;
    }
    void switch_to(FiberContext& other) { emulated_switch(&pointer, other.pointer); }

private:
    void* pointer = nullptr;
};
#else
class FiberContext {
public:
    void prepare(unsigned char* bottom, unsigned char* top, void (*entry)()) {
        getcontext(&context);
        context.uc_stack.ss_sp = bottom;
        context.uc_stack.ss_size = top - bottom;
        context.uc_link = nullptr;
        makecontext(&context, entry, 0);
    }
    void switch_to(FiberContext& other) { swapcontext(&context, &other.context); }

private:
    ucontext_t context;
};
#endif

constexpr size_t PAGE = 4096;

// Memory between two guard pages. Never freed.
inline unsigned char* map_guarded(size_t bytes) {
    void* mapped = mmap(nullptr, bytes + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) {
        perror("emulator: mmap");
        abort();
    }
    unsigned char* usable = static_cast<unsigned char*>(mapped) + PAGE;
    mprotect(usable, bytes, PROT_READ | PROT_WRITE);
    return usable;
}

// ---------------------------------------------------------------------------------------------------------------------
// A block's state
// ---------------------------------------------------------------------------------------------------------------------

// When asynchronous copies complete.
enum class Copies {
    LATE, // at the wait that covers them; until then the destination is NaN bytes
    EARLY, // at once
};

enum class State { READY, IN_COLLECTIVE, AT_BARRIER, AT_PHASE, FINISHED };

struct Copy {
    unsigned char* to;
    const void* from;
    unsigned bytes;
};

struct Thread {
    FiberContext context;
    unsigned char* stack = nullptr;
    State state = State::FINISHED;
    std::vector<Copy> open_group;
    std::vector<std::vector<Copy>> groups; // oldest first
    std::vector<Copy> unfenced; // completed, without a proxy fence since
    unsigned awaited = 0, awaited_parity = 0; // the mbarrier and parity of State::AT_PHASE
};

// A TMA copy of a box of a matrix: rows of 128 bytes, swizzled.
struct BoxCopy {
    unsigned char* to;
    const unsigned char* from;
    unsigned rows, rows_there; // of the box; of these, rows within the matrix (the others are zero)
    size_t stride;
};

// An mbarrier, and the TMA copies that it waits for.
struct PhaseBarrier {
    unsigned arrivals = 0, missing = 0, phase = 0;
    long expected = 0, landed = 0; // bytes of this phase: announced by arrivals, and copied
    std::vector<BoxCopy> pending;
};

constexpr unsigned WARP = 32;
constexpr unsigned SLOT_WORDS = 12;

// Inputs and outputs of a warp's lanes in a collective.
struct Slots {
    unsigned words[WARP][SLOT_WORDS];
};

// Registers of a wgmma operand, an array in each lane, and their values at the last wgmma.fence or after the last wgmma.
struct Registers {
    unsigned* at[WARP];
    unsigned count;
    std::vector<unsigned> shown; // the values at that time, lane after lane

    std::vector<unsigned> held() const {
        std::vector<unsigned> values;
        for (const unsigned* lane : at) values.insert(values.end(), lane, lane + count);
        return values;
    }
    void hold(const std::vector<unsigned>& values) const {
        for (unsigned lane = 0; lane < WARP; ++lane) memcpy(at[lane], &values[lane * count], count * sizeof(unsigned));
    }
};

// A warp's part of a wgmma: 16 rows of sums.
struct Wgmma {
    Registers *sums, *a; // `a` is null if that operand is in shared memory
    uint64_t a_rows, b_rows; // matrix descriptors of the operands in shared memory
    unsigned columns;
    bool adds, done; // whether it adds to the sums, whether it has been computed
};

// Sums of pending wgmmas: the number of wgmmas, and the values. The registers hold NaN bytes meanwhile.
struct WgmmaSums {
    unsigned pending;
    std::vector<unsigned> values;
};

struct Warp {
    const char* collective = nullptr; // the collective that lanes have entered
    unsigned arrived = 0;
    // Alternating: a lane can be at most one collective ahead of another that has not read its result yet.
    unsigned turn = 0;
    Slots slots[2];

    std::vector<Wgmma> open_wgmmas;
    std::vector<std::vector<Wgmma>> wgmma_groups; // oldest first
    std::map<Registers*, WgmmaSums> wgmma_sums;
    std::map<unsigned*, Registers> registers; // by lane 0's address
    bool fenced = false;
    std::vector<uint64_t> started; // the operands of all wgmmas: the warps of a warpgroup must execute the same
};

constexpr unsigned MOST_THREADS = 1024;
constexpr size_t STACK_BYTES = 256 * 1024;
constexpr size_t MOST_SHARED = 57 * PAGE; // 228 KiB, more than a block can have
// The first shared address. Not zero, so that an offset used as an address is detected.
constexpr unsigned SHARED_BASE = 0x400;

struct Block {
    unsigned threads = 0;
    unsigned finished = 0;
    unsigned at_barrier = 0;
    unsigned current = 0; // thread
    Thread thread[MOST_THREADS];
    Warp warp[MOST_THREADS / WARP];
    unsigned char* shared = nullptr;
    size_t shared_bytes = 0;
    std::map<unsigned, PhaseBarrier> barriers; // by their addresses in shared memory
    bool barriers_fenced = false; // to TMA
    std::vector<bool> unfenced; // per 16 bytes of shared memory: copied, without a proxy fence since
    void (*body)(void**) = nullptr;
    void** arguments = nullptr;
    FiberContext scheduler;
    std::mt19937 order{1};
};

inline Block block;

inline Copies copies_from_environment() {
    const char* value = getenv("EMULATED_COPIES");
    return value && strcmp(value, "early") == 0 ? Copies::EARLY : Copies::LATE;
}

inline Copies copies = copies_from_environment();

// Overrides the environment variable EMULATED_COPIES (`late`, the default, or `early`).
inline void set_copies(Copies when) { copies = when; }

[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
    fflush(stdout);
    fprintf(stderr, "emulator: block (%u, %u, %u), thread %u: ", blockIdx.x, blockIdx.y, blockIdx.z, block.current);
    va_list values;
    va_start(values, format);
    vfprintf(stderr, format, values);
    va_end(values);
    fputc('\n', stderr);
    abort();
}

// ---------------------------------------------------------------------------------------------------------------------
// The scheduler
// ---------------------------------------------------------------------------------------------------------------------

inline Thread& this_thread() { return block.thread[block.current]; }

// Yields to the scheduler until the thread is ready again.
inline void wait_as(State state) {
    Thread& thread = this_thread();
    thread.state = state;
    thread.context.switch_to(block.scheduler);
}

inline void thread_entry() {
    block.body(block.arguments);
    ++block.finished;
    wait_as(State::FINISHED);
    abort(); // a finished thread is not resumed
}

inline void resume(unsigned index) {
    block.current = index;
    threadIdx.x = index % blockDim.x;
    threadIdx.y = index / blockDim.x % blockDim.y;
    threadIdx.z = index / blockDim.x / blockDim.y;
    block.scheduler.switch_to(block.thread[index].context);
}

inline void run_warp_as_far_as_it_gets(unsigned warp) {
    for (bool moved = true; moved;) {
        moved = false;
        for (unsigned index = warp * WARP; index < (warp + 1) * WARP; ++index) {
            if (block.thread[index].state != State::READY) continue;
            resume(index);
            moved = true;
        }
    }
}

[[noreturn]] inline void report_deadlock() {
    fprintf(stderr, "emulator: the lanes of each warp, and where they wait:\n");
    for (unsigned warp = 0; warp < block.threads / WARP; ++warp) {
        unsigned count[5] = {};
        for (unsigned lane = 0; lane < WARP; ++lane) ++count[static_cast<int>(block.thread[warp * WARP + lane].state)];
        const char* name = block.warp[warp].collective ? block.warp[warp].collective : "a collective";
        fprintf(stderr, "    warp %u: in %s %u, at __syncthreads %u, at an mbarrier %u, finished %u\n", warp, name,
                count[static_cast<int>(State::IN_COLLECTIVE)], count[static_cast<int>(State::AT_BARRIER)],
                count[static_cast<int>(State::AT_PHASE)], count[static_cast<int>(State::FINISHED)]);
    }
    fail("deadlock: no thread can go on");
}

inline void check_warpgroups() {
    for (unsigned warp = 0; warp < block.threads / WARP; ++warp) {
        const Warp& own = block.warp[warp];
        if (own.started != block.warp[warp / 4 * 4].started) fail("wgmma: warp %u has not executed the same wgmmas as its warpgroup", warp);
        if (!own.wgmma_sums.empty()) fail("wgmma: warp %u ends before its wgmmas complete", warp);
    }
}

inline void complete(const BoxCopy& copy) {
    for (unsigned row = 0; row < copy.rows; ++row)
        for (unsigned chunk = 0; chunk < 8; ++chunk) {
            unsigned char* to = copy.to + row * 128 + (chunk ^ row % 8) * 16;
            if (row < copy.rows_there) {
                memcpy(to, copy.from + row * copy.stride + chunk * 16, 16);
            } else {
                memset(to, 0, 16);
            }
        }
}

// Whether the phase of this parity is complete. Completes the current phase if all its arrivals have come: nothing else does.
inline bool phase_is_over(unsigned address, unsigned parity) {
    const auto found = block.barriers.find(address);
    if (found == block.barriers.end()) fail("mbarrier: there is none at shared address %#x", address);
    PhaseBarrier& barrier = found->second;
    if (barrier.missing == 0) {
        for (const BoxCopy& copy : barrier.pending) {
            if (copies == Copies::LATE) complete(copy);
            barrier.landed += copy.rows * 128;
        }
        barrier.pending.clear();
        if (barrier.landed > barrier.expected) fail("mbarrier: more bytes came than were announced");
        if (barrier.landed == barrier.expected) {
            barrier.missing = barrier.arrivals;
            barrier.landed = barrier.expected = 0;
            ++barrier.phase;
        }
    }
    return (barrier.phase & 1) != parity;
}

// Readies the threads whose phase is complete. Returns whether there were any.
inline bool wake_at_phases() {
    bool any = false;
    for (unsigned index = 0; index < block.threads; ++index) {
        Thread& thread = block.thread[index];
        if (thread.state != State::AT_PHASE || !phase_is_over(thread.awaited, thread.awaited_parity)) continue;
        thread.state = State::READY;
        any = true;
    }
    return any;
}

inline void run_block() {
    memset(block.shared, 0xff, block.shared_bytes);
    block.barriers.clear();
    block.barriers_fenced = false;
    block.unfenced.assign((block.shared_bytes + 15) / 16, false);
    if (__start_emulated_shared) memset(__start_emulated_shared, 0xff, __stop_emulated_shared - __start_emulated_shared);
    block.finished = block.at_barrier = 0;
    for (unsigned index = 0; index < block.threads; ++index) {
        Thread& thread = block.thread[index];
        if (!thread.stack) thread.stack = map_guarded(STACK_BYTES);
        thread.context.prepare(thread.stack, thread.stack + STACK_BYTES, thread_entry);
        thread.state = State::READY;
        thread.open_group.clear();
        thread.groups.clear();
        thread.unfenced.clear();
    }
    std::vector<unsigned> warps(block.threads / WARP);
    for (unsigned warp = 0; warp < warps.size(); ++warp) {
        warps[warp] = warp;
        block.warp[warp] = {};
    }
    while (true) {
        std::shuffle(warps.begin(), warps.end(), block.order);
        for (unsigned warp : warps) run_warp_as_far_as_it_gets(warp);
        if (block.finished == block.threads) return check_warpgroups();
        if (wake_at_phases()) continue;
        if (block.at_barrier + block.finished != block.threads) report_deadlock();
        block.at_barrier = 0;
        for (unsigned index = 0; index < block.threads; ++index) {
            if (block.thread[index].state == State::AT_BARRIER) block.thread[index].state = State::READY;
        }
    }
}

// Runs `body(arguments)` in every thread of the grid.
inline void launch(dim3 grid, dim3 threads, size_t shared_bytes, void (*body)(void** arguments), void** arguments) {
    static unsigned char* const shared_memory = map_guarded(MOST_SHARED);
    gridDim = grid;
    blockDim = threads;
    block.threads = threads.x * threads.y * threads.z;
    if (block.threads == 0 || block.threads > MOST_THREADS || block.threads % WARP != 0) {
        fail("cannot run blocks of %u threads: at most %u, in whole warps", block.threads, MOST_THREADS);
    }
    if (shared_bytes > MOST_SHARED) fail("no block has %zu bytes of shared memory", shared_bytes);
    // It ends at the guard page, up to its alignment.
    block.shared_bytes = shared_bytes;
    block.shared = shared_memory + MOST_SHARED - (shared_bytes + 127) / 128 * 128;
    block.body = body;
    block.arguments = arguments;
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                blockIdx = {x, y, z};
                run_block();
            }
}

// ---------------------------------------------------------------------------------------------------------------------
// Collectives
// ---------------------------------------------------------------------------------------------------------------------

// A warp collective. Collects `input` of every lane; the last lane runs `operation`, which replaces inputs by outputs in place. Returns
// the lane's output.
template <typename Output, typename Input, typename Operation>
inline Output collective(const char* name, const Input& input, Operation operation) {
    static_assert(sizeof(Input) <= sizeof(unsigned[SLOT_WORDS]) && sizeof(Output) <= sizeof(unsigned[SLOT_WORDS]), "");
    const unsigned first = block.current / WARP * WARP, lane = block.current % WARP;
    Warp& warp = block.warp[block.current / WARP];
    Slots& slots = warp.slots[warp.turn];
    if (warp.arrived == 0) warp.collective = name;
    if (strcmp(warp.collective, name) != 0) fail("calls %s where other lanes call %s", name, warp.collective);
    memcpy(slots.words[lane], &input, sizeof input);
    if (++warp.arrived < WARP) {
        wait_as(State::IN_COLLECTIVE);
    } else {
        operation(slots);
        warp.collective = nullptr;
        warp.arrived = 0;
        warp.turn ^= 1;
        for (unsigned index = first; index < first + WARP; ++index) block.thread[index].state = State::READY;
    }
    Output output;
    memcpy(&output, slots.words[lane], sizeof output);
    return output;
}

inline float as_float(unsigned bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

inline unsigned as_bits(float value) {
    unsigned bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

} // namespace emulated

inline void __syncthreads() {
    ++emulated::block.at_barrier;
    emulated::wait_as(emulated::State::AT_BARRIER);
}

inline void __syncwarp() {
    emulated::collective<unsigned>("__syncwarp", 0u, [](emulated::Slots&) {});
}

inline unsigned __shfl_sync(unsigned mask, unsigned value, unsigned from) {
    if (mask != 0xffffffff) emulated::fail("shuffles with a part of the warp (mask %08x) are not emulated", mask);
    return emulated::collective<unsigned>("__shfl_sync", value, [from](emulated::Slots& slots) {
        const unsigned chosen = slots.words[from % emulated::WARP][0];
        for (auto& lane : slots.words) lane[0] = chosen;
    });
}

inline float __shfl_xor_sync(unsigned mask, float value, unsigned distance) {
    if (mask != 0xffffffff) emulated::fail("shuffles with a part of the warp (mask %08x) are not emulated", mask);
    return emulated::collective<float>("__shfl_xor_sync", value, [distance](emulated::Slots& slots) {
        const emulated::Slots inputs = slots;
        for (unsigned lane = 0; lane < emulated::WARP; ++lane) slots.words[lane][0] = inputs.words[lane ^ distance][0];
    });
}

// ---------------------------------------------------------------------------------------------------------------------
// Replacements for ptx.cuh
// ---------------------------------------------------------------------------------------------------------------------

struct alignas(64) TensorMap {
    unsigned long long words[16];
};

inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline float exp2_approx(float x) { return exp2f(x); }
inline float rcp_approx(float x) { return 1 / x; }

namespace emulated {
inline unsigned to_e4m3(float x) {
    const unsigned sign = as_bits(x) >> 24 & 0x80, magnitude = as_bits(x) & 0x7fffffff;
    if (magnitude > 0x7f800000) return 0x7f;
    if (magnitude >= 0x43e00000) return sign | 0x7e; // 448
    if (magnitude < 0x3c800000) { // subnormal: the sum with 2^14 rounds to a multiple of 2^-9
        return sign | (as_bits(as_float(magnitude) + 0x1p14f) - 0x46800000);
    }
    return sign | ((magnitude + 0x7ffff + (magnitude >> 20 & 1) - 0x3c000000) >> 20);
}
} // namespace emulated

inline unsigned pack_e4m3_pair(float low, float high) {
    return emulated::to_e4m3(low) | emulated::to_e4m3(high) << 8;
}

#if defined(ELEMENT_BF16)
inline float to_float(uint16_t x) { return emulated::as_float(static_cast<unsigned>(x) << 16); }

inline uint16_t to_element(float x) {
    const unsigned bits = emulated::as_bits(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
#elif defined(ELEMENT_F16)
namespace emulated {
inline float f16_value(uint16_t x) {
    const unsigned sign = (x & 0x8000u) << 16, exponent = x >> 10 & 31, fraction = x & 1023;
    if (exponent == 31) return as_float(sign | 0x7f800000 | fraction << 13);
    if (exponent == 0) return as_float(sign | as_bits(static_cast<float>(fraction) * 0x1p-24f));
    return as_float(sign | (exponent + 112) << 23 | fraction << 13);
}

struct F16Values {
    std::vector<float> values;
    F16Values() : values(65536) {
        for (unsigned x = 0; x < values.size(); ++x) values[x] = f16_value(static_cast<uint16_t>(x));
    }
};
inline const F16Values f16_values;
} // namespace emulated

inline float to_float(uint16_t x) { return emulated::f16_values.values[x]; }

inline uint16_t to_element(float x) {
    const unsigned bits = emulated::as_bits(x), sign = bits >> 16 & 0x8000;
    unsigned magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return 0x7fff;
    if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00); // 65520 and more round to infinity
    if (magnitude < 0x38800000) { // subnormal: the sum with 0.5 rounds to a multiple of 2^-24
        return static_cast<uint16_t>(sign | (emulated::as_bits(emulated::as_float(magnitude) + 0.5f) - 0x3f000000));
    }
    magnitude += 0xfff + (magnitude >> 13 & 1);
    return static_cast<uint16_t>(sign | (magnitude - 0x38000000) >> 13);
}
#endif

#if !defined(ELEMENT_F32)

inline unsigned pack_pair(float low, float high) { return to_element(low) | static_cast<unsigned>(to_element(high)) << 16; }

inline unsigned shared_address(const void* at) {
    return emulated::SHARED_BASE + static_cast<unsigned>(static_cast<const unsigned char*>(at) - emulated::block.shared);
}

namespace emulated {

// The 16 bytes at a shared address, with checks.
inline unsigned char* shared_chunk(unsigned address, const char* who) {
    if (address % 16 != 0) fail("%s: shared address %#x is no multiple of 16", who, address);
    if (address < SHARED_BASE || address - SHARED_BASE + 16 > block.shared_bytes) {
        fail("%s: shared address %#x lies outside the block's %zu bytes", who, address, block.shared_bytes);
    }
    return block.shared + (address - SHARED_BASE);
}

inline void complete(const Copy& copy) {
    memset(copy.to, 0, 16);
    memcpy(copy.to, copy.from, copy.bytes);
    block.unfenced[(copy.to - block.shared) / 16] = true;
}

struct FourWords {
    unsigned words[4];
};

// Element `column` of row `row` of matrix `matrix`, the lanes having given the rows' addresses.
inline uint16_t matrix_element(const Slots& addresses, unsigned matrix, unsigned row, unsigned column) {
    uint16_t value;
    memcpy(&value, shared_chunk(addresses.words[matrix * 8 + row][0], "ldmatrix") + column * 2, sizeof value);
    return value;
}

inline void ldmatrix_x4(unsigned (&matrices)[4], unsigned row, bool transposed) {
    const char* name = transposed ? "ldmatrix.trans" : "ldmatrix";
    const FourWords loaded = collective<FourWords>(name, row, [transposed](Slots& slots) {
        const Slots addresses = slots;
        for (unsigned lane = 0; lane < WARP; ++lane)
            for (unsigned matrix = 0; matrix < 4; ++matrix) {
                const unsigned r = lane / 4, c = lane % 4 * 2;
                const auto element_at = [&](unsigned row, unsigned column) -> unsigned {
                    return transposed ? matrix_element(addresses, matrix, column, row)
                                      : matrix_element(addresses, matrix, row, column);
                };
                const unsigned low = element_at(r, c), high = element_at(r, c + 1);
                slots.words[lane][matrix] = low | high << 16;
            }
    });
    memcpy(matrices, loaded.words, sizeof loaded.words);
}

struct Operands {
    float sums[4];
    unsigned a[4];
    unsigned b[2];
};

inline float low_half(unsigned pair) { return to_float(static_cast<uint16_t>(pair)); }
inline float high_half(unsigned pair) { return to_float(static_cast<uint16_t>(pair >> 16)); }

// mma.m16n8k16, with the fragment layouts of the PTX manual.
inline void mma_m16n8k16_warp(Slots& slots) {
    float a[16][16], b[16][8], sums[16][8];
    for (unsigned lane = 0; lane < WARP; ++lane) {
        Operands operands;
        memcpy(&operands, slots.words[lane], sizeof operands);
        const unsigned group = lane / 4, pair = lane % 4 * 2;
        for (unsigned i = 0; i < 4; ++i) { // a: rows alternate first, then columns
            a[group + i % 2 * 8][pair + i / 2 * 8] = low_half(operands.a[i]);
            a[group + i % 2 * 8][pair + i / 2 * 8 + 1] = high_half(operands.a[i]);
        }
        for (unsigned i = 0; i < 2; ++i) {
            b[pair + i * 8][group] = low_half(operands.b[i]);
            b[pair + i * 8 + 1][group] = high_half(operands.b[i]);
        }
        for (unsigned i = 0; i < 4; ++i) sums[group + i / 2 * 8][pair + i % 2] = operands.sums[i];
    }
    for (unsigned row = 0; row < 16; ++row)
        for (unsigned depth = 0; depth < 16; ++depth)
            for (unsigned column = 0; column < 8; ++column) sums[row][column] += a[row][depth] * b[depth][column];
    for (unsigned lane = 0; lane < WARP; ++lane)
        for (unsigned i = 0; i < 4; ++i) {
            slots.words[lane][i] = as_bits(sums[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2]);
        }
}

// An element of shared memory as wgmma reads it, with the 128-byte swizzle: address bits 4 to 6 are XORed with bits 7 to 9.
inline float wgmma_element(unsigned address) {
    const unsigned swizzled = address ^ (address >> 7 & 7) << 4;
    const unsigned char* chunk = shared_chunk(swizzled & ~15u, "wgmma");
    if (block.unfenced[(chunk - block.shared) / 16]) {
        fail("wgmma: reads shared address %#x, which was copied without a fence.proxy.async since", swizzled);
    }
    uint16_t value;
    memcpy(&value, chunk + (swizzled & 15), sizeof value);
    return to_float(value);
}

// An operand given by a matrix descriptor (PTX ISA 9.0, 9.7.15.5.1), in the canonical K-major or MN-major layout. In both, eight rows of
// 128 bytes are contiguous.
struct WgmmaOperand {
    unsigned start, stride;

    explicit WgmmaOperand(uint64_t descriptor)
        : start((descriptor & 0x3fff) << 4), stride((descriptor >> 32 & 0x3fff) << 4) {
        const unsigned base_offset = descriptor >> 49 & 7, swizzle = descriptor >> 62;
        if (swizzle != 1 || base_offset != 0) fail("wgmma: only operands swizzled over 128 bytes, with no offset, are emulated");
        if (start % 1024 >= 128) fail("wgmma: address %#x is not in the first of a swizzle's eight rows", start);
    }
    float operator()(unsigned row, unsigned column) const {
        return wgmma_element(start + row / 8 * stride + row % 8 * 128 + column * 2);
    }
};

// Register fragments of m64nNk16: a warp's 16 rows are laid out as in mma.m16n8k16, N / 8 times.
inline void run_wgmma(Warp& warp, Wgmma& wgmma) {
    static float b[16][256], a[16][16], sums[16][256];
    const unsigned columns = wgmma.columns, held = columns / 2;
    const WgmmaOperand b_rows(wgmma.b_rows);
    for (unsigned k = 0; k < 16; ++k)
        for (unsigned n = 0; n < columns; ++n) b[k][n] = wgmma.a ? b_rows(k, n) : b_rows(n, k);
    const std::vector<unsigned> of_a = wgmma.a ? wgmma.a->held() : std::vector<unsigned>();
    if (!wgmma.a) {
        const WgmmaOperand a_rows(wgmma.a_rows);
        const unsigned first = (&warp - block.warp) % 4 * 16;
        for (unsigned m = 0; m < 16; ++m)
            for (unsigned k = 0; k < 16; ++k) a[m][k] = a_rows(first + m, k);
    }
    std::vector<unsigned>& values = warp.wgmma_sums.at(wgmma.sums).values;
    for (unsigned lane = 0; lane < WARP; ++lane) {
        const unsigned row = lane / 4, column = lane % 4 * 2;
        for (unsigned i = 0; wgmma.a && i < 4; ++i) {
            a[row + i % 2 * 8][column + i / 2 * 8] = low_half(of_a[lane * 4 + i]);
            a[row + i % 2 * 8][column + i / 2 * 8 + 1] = high_half(of_a[lane * 4 + i]);
        }
        for (unsigned i = 0; i < held; ++i) {
            sums[row + i / 2 % 2 * 8][column + i / 4 * 8 + i % 2] = wgmma.adds ? as_float(values[lane * held + i]) : 0;
        }
    }
    for (unsigned row = 0; row < 16; ++row)
        for (unsigned depth = 0; depth < 16; ++depth)
            for (unsigned column = 0; column < columns; ++column) sums[row][column] += a[row][depth] * b[depth][column];
#ifdef EMULATED_WGMMA_WRONG
    for (float& sum : sums[5]) sum *= 1.1f;
#endif
    for (unsigned lane = 0; lane < WARP; ++lane)
        for (unsigned i = 0; i < held; ++i) {
            values[lane * held + i] = as_bits(sums[lane / 4 + i / 2 % 2 * 8][lane % 4 * 2 + i / 4 * 8 + i % 2]);
        }
    wgmma.done = true;
}

struct WgmmaOperands {
    unsigned *sums, *a;
    uint64_t a_rows, b_rows;
    unsigned adds, columns;
};

// The registers that the lanes pass; fails if they were modified since the last fence.
inline Registers* given_registers(Warp& warp, const Slots& slots, unsigned* WgmmaOperands::*which, unsigned count) {
    Registers given = {{}, count, {}};
    for (unsigned lane = 0; lane < WARP; ++lane) {
        WgmmaOperands operands;
        memcpy(&operands, slots.words[lane], sizeof operands);
        given.at[lane] = operands.*which;
    }
    Registers& known = warp.registers.emplace(given.at[0], given).first->second;
    if (known.count != count) known = given; // the compiler placed other registers at this address before
    const bool is_pending = warp.wgmma_sums.count(&known) != 0;
    if (known.shown.empty()) known.shown = known.held();
    if (!is_pending && known.shown != known.held()) fail("wgmma: its registers have changed since the last wgmma.fence");
    return &known;
}

inline void start_wgmma(Slots& slots) {
    Warp& warp = block.warp[block.current / WARP];
    if (!warp.fenced) fail("wgmma: there was no wgmma.fence before the first");
    WgmmaOperands operands, others;
    memcpy(&operands, slots.words[0], sizeof operands);
    for (unsigned lane = 1; lane < WARP; ++lane) {
        memcpy(&others, slots.words[lane], sizeof others);
        const bool same = others.a_rows == operands.a_rows && others.b_rows == operands.b_rows && others.adds == operands.adds;
        if (!same) fail("wgmma: the lanes of a warp pass different operands");
    }
    Wgmma wgmma = {given_registers(warp, slots, &WgmmaOperands::sums, operands.columns / 2),
                   operands.a ? given_registers(warp, slots, &WgmmaOperands::a, 4) : nullptr,
                   operands.a_rows, operands.b_rows, operands.columns, operands.adds != 0, false};
    WgmmaSums& sums = warp.wgmma_sums[wgmma.sums];
    if (sums.pending++ == 0) {
        sums.values = wgmma.sums->held();
        wgmma.sums->hold(std::vector<unsigned>(sums.values.size(), 0xffffffff));
    }
    if (copies == Copies::LATE) run_wgmma(warp, wgmma);
    warp.open_wgmmas.push_back(wgmma);
    warp.started.insert(warp.started.end(), {operands.a_rows, operands.b_rows, operands.adds * 2 + (operands.a != nullptr)});
}

inline void finish_wgmmas(unsigned newest) {
    Warp& warp = block.warp[block.current / WARP];
    while (warp.wgmma_groups.size() > newest) {
        for (Wgmma& wgmma : warp.wgmma_groups.front()) {
            if (!wgmma.done) run_wgmma(warp, wgmma);
            WgmmaSums& sums = warp.wgmma_sums.at(wgmma.sums);
            if (--sums.pending > 0) continue;
            for (unsigned value : wgmma.sums->held()) {
                if (value != 0xffffffff) fail("wgmma: its sums were written while it was pending");
            }
            wgmma.sums->hold(sums.values);
            wgmma.sums->shown = sums.values;
            warp.wgmma_sums.erase(wgmma.sums);
        }
        warp.wgmma_groups.erase(warp.wgmma_groups.begin());
    }
}

} // namespace emulated

inline void fence_proxy_async() {
    emulated::Thread& thread = emulated::this_thread();
    for (const emulated::Copy& copy : thread.unfenced) emulated::block.unfenced[(copy.to - emulated::block.shared) / 16] = false;
    thread.unfenced.clear();
}

inline void wgmma_fence() {
    emulated::collective<unsigned>("wgmma.fence", 0u, [](emulated::Slots&) {
        emulated::Warp& warp = emulated::block.warp[emulated::block.current / emulated::WARP];
        warp.fenced = true;
        for (auto& [_, registers] : warp.registers) {
            if (warp.wgmma_sums.count(&registers) == 0) registers.shown = registers.held();
        }
    });
}

template <bool ADD>
inline void wgmma_m64n64k16(float (&sums)[8][4], uint64_t a, uint64_t b) {
    const emulated::WgmmaOperands operands = {reinterpret_cast<unsigned*>(sums), nullptr, a, b, ADD, 64};
    emulated::collective<unsigned>("wgmma.mma_async", operands, emulated::start_wgmma);
}

inline void wgmma_m64n64k16(float (&sums)[8][4], const unsigned (&a)[4], uint64_t b) {
    const emulated::WgmmaOperands operands = {reinterpret_cast<unsigned*>(sums), const_cast<unsigned*>(a), 0, b, true, 64};
    emulated::collective<unsigned>("wgmma.mma_async", operands, emulated::start_wgmma);
}

inline void wgmma_m64n256k16(float (&sums)[32][4], uint64_t a, uint64_t b, bool add) {
    const emulated::WgmmaOperands operands = {reinterpret_cast<unsigned*>(sums), nullptr, a, b, add, 256};
    emulated::collective<unsigned>("wgmma.mma_async", operands, emulated::start_wgmma);
}

inline void wgmma_commit_group() {
    emulated::collective<unsigned>("wgmma.commit_group", 0u, [](emulated::Slots&) {
        emulated::Warp& warp = emulated::block.warp[emulated::block.current / emulated::WARP];
        warp.wgmma_groups.push_back(std::move(warp.open_wgmmas));
        warp.open_wgmmas.clear();
    });
}

template <unsigned NEWEST>
inline void wgmma_wait_group() {
    emulated::collective<unsigned>("wgmma.wait_group", 0u, [](emulated::Slots&) { emulated::finish_wgmmas(NEWEST); });
}
template <unsigned NEWEST, size_t BLOCKS>
inline void wgmma_wait_group(float (&)[BLOCKS][4]) {
    wgmma_wait_group<NEWEST>();
}

inline void mbarrier_init(unsigned barrier, unsigned arrivals) {
    if (barrier % 8 != 0) emulated::fail("mbarrier: %#x is no multiple of 8", barrier);
    emulated::shared_chunk(barrier / 16 * 16, "mbarrier");
    emulated::block.barriers[barrier] = {};
    emulated::block.barriers[barrier].arrivals = emulated::block.barriers[barrier].missing = arrivals;
}

inline void fence_mbarrier_init() { emulated::block.barriers_fenced = true; }

inline void mbarrier_arrive_expect_tx(unsigned barrier, unsigned bytes) {
    emulated::phase_is_over(barrier, 0); // completes a pending phase first
    emulated::PhaseBarrier& its = emulated::block.barriers.at(barrier);
    if (its.missing == 0) emulated::fail("mbarrier: more arrivals than it was initialized for");
    --its.missing;
    its.expected += bytes;
}

inline void mbarrier_arrive(unsigned barrier) { mbarrier_arrive_expect_tx(barrier, 0); }

inline void mbarrier_wait_parity(unsigned barrier, unsigned parity) {
    while (!emulated::phase_is_over(barrier, parity)) {
        emulated::this_thread().awaited = barrier;
        emulated::this_thread().awaited_parity = parity;
        emulated::wait_as(emulated::State::AT_PHASE);
    }
}

// Words of an emulated TensorMap: address, columns, rows and bytes per row of the matrix, then columns and rows of the box.
inline void tma_load_2d(unsigned to, const TensorMap& map, unsigned row, unsigned column, unsigned barrier) {
    const auto [address, columns, rows, stride, box_columns, box_rows] =
        std::array<unsigned long long, 6>{map.words[0], map.words[1], map.words[2], map.words[3], map.words[4], map.words[5]};
    if (!emulated::block.barriers_fenced) emulated::fail("TMA: no fence.mbarrier_init before the first copy");
    if (box_columns != 64 || to % 1024 != 0) emulated::fail("only boxes of rows of 128 bytes at multiples of 1024 are emulated");
    if (column + box_columns > columns || row >= rows) emulated::fail("a box at (%u, %u) is not in its matrix", row, column);
    emulated::shared_chunk(to + box_rows * 128 - 16, "cp.async.bulk.tensor");
    const emulated::BoxCopy copy = {emulated::shared_chunk(to, "cp.async.bulk.tensor"),
                                    reinterpret_cast<const unsigned char*>(address) + row * stride + column * 2,
                                    static_cast<unsigned>(box_rows),
                                    static_cast<unsigned>(std::min(box_rows, rows - row)), static_cast<size_t>(stride)};
    if (emulated::copies == emulated::Copies::EARLY) {
        emulated::complete(copy);
    } else {
        memset(copy.to, 0xff, copy.rows * 128);
    }
    emulated::block.barriers.at(barrier).pending.push_back(copy);
}

template <unsigned REGISTERS>
inline void setmaxnreg_dec() {}
template <unsigned REGISTERS>
inline void setmaxnreg_inc() {}

inline void keep_wait_below(bool) {}
inline void keep_registers_alive(bool, const unsigned (&)[4], unsigned) {}
inline void pin_registers(unsigned (&)[4]) {}

inline void cp_async_16(unsigned to, const void* from, unsigned bytes) {
    if (bytes != 0 && bytes != 16) emulated::fail("cp.async of %u bytes is not emulated", bytes);
    if (reinterpret_cast<uintptr_t>(from) % 16 != 0) emulated::fail("cp.async: %p is no multiple of 16", from);
    const emulated::Copy copy = {emulated::shared_chunk(to, "cp.async"), from, bytes};
    if (emulated::copies == emulated::Copies::EARLY) {
        emulated::complete(copy);
    } else {
        memset(copy.to, 0xff, 16);
    }
    emulated::this_thread().open_group.push_back(copy);
}

inline void cp_async_commit_group() {
    emulated::Thread& thread = emulated::this_thread();
    thread.groups.push_back(std::move(thread.open_group));
    thread.open_group.clear();
}

template <unsigned NEWEST>
inline void cp_async_wait_group() {
    auto& groups = emulated::this_thread().groups;
    while (groups.size() > NEWEST) {
        for (const emulated::Copy& copy : groups.front()) {
            if (emulated::copies == emulated::Copies::LATE) emulated::complete(copy);
            emulated::this_thread().unfenced.push_back(copy);
        }
        groups.erase(groups.begin());
    }
}

inline void ldmatrix_x4(unsigned (&matrices)[4], unsigned row) { emulated::ldmatrix_x4(matrices, row, false); }
inline void ldmatrix_x4_trans(unsigned (&matrices)[4], unsigned row) { emulated::ldmatrix_x4(matrices, row, true); }

inline void mma_m16n8k16(float (&sums)[4], const unsigned (&a)[4], unsigned b_upper, unsigned b_lower) {
    const emulated::Operands operands = {
        {sums[0], sums[1], sums[2], sums[3]}, {a[0], a[1], a[2], a[3]}, {b_upper, b_lower}};
    const emulated::FourWords result = emulated::collective<emulated::FourWords>("mma", operands, emulated::mma_m16n8k16_warp);
    memcpy(sums, result.words, sizeof sums);
}

#endif // not ELEMENT_F32

// ---------------------------------------------------------------------------------------------------------------------
// Launches by name
// ---------------------------------------------------------------------------------------------------------------------

namespace emulated {

// Calls a kernel with arguments in the form of cuLaunchKernel: an array of pointers to them.
template <auto kernel>
struct Unpacked;

template <typename... Parameters, void (*kernel)(Parameters...)>
struct Unpacked<kernel> {
    static void call(void** arguments) { call_with(arguments, std::index_sequence_for<Parameters...>()); }

private:
    template <size_t... INDEX>
    static void call_with(void** arguments, std::index_sequence<INDEX...>) {
        kernel(*static_cast<std::remove_cv_t<Parameters>*>(arguments[INDEX])...);
    }
};

} // namespace emulated

// Exports `emulated_kernel_<name>` for dlsym.
#define EMULATED_KERNEL(name)                                                                                            \
    extern "C" __attribute__((visibility("default"))) void emulated_kernel_##name(                                       \
        const unsigned grid[3], const unsigned block[3], size_t shared_bytes, void** arguments) {                         \
        emulated::launch({grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, shared_bytes,                       \
                         emulated::Unpacked<name>::call, arguments);                                                      \
    }

#pragma GCC visibility pop
