// Checks every kernel on the emulator against a reference in double precision.
//
//     g++ -std=c++17 -O2 -DEMULATED -DELEMENT_F16 -DHIDDEN_SIZE=256 -DHEAD_SIZE=64 kernels.cpp && EMULATED_COPIES=late ./a.out
//
// Prints a line per check. Exits 1 if an error exceeds its bound, and 3 on an access outside a buffer: inputs are read-only and end
// at a guard page; outputs are NaN before the launch.
// -DKERNELS_CU='"..."' uses another kernels.cu (check.sh: one with a planted bug).

#define __CUDA_ARCH_FEAT_SM90_ALL // for attention_wgmma

#include "emulator.h"

#ifndef KERNELS_CU
#define KERNELS_CU "../../src/backend/cuda/kernels/kernels.cu"
#endif
#include KERNELS_CU

EMULATED_KERNEL(embed_norm)
EMULATED_KERNEL(layer_norm)
EMULATED_KERNEL(attention)
EMULATED_KERNEL(attention_local)
#ifdef HAS_ATTENTION_WGMMA
EMULATED_KERNEL(attention_wgmma)
#endif
#ifdef HAS_GEMM_WGMMA
EMULATED_KERNEL(gemm_wgmma)
#endif
EMULATED_KERNEL(cls_attention)
EMULATED_KERNEL(gather_cls)
EMULATED_KERNEL(activate)
EMULATED_KERNEL(gate)
EMULATED_KERNEL(rotate)
EMULATED_KERNEL(mean_rows)
#ifdef ELEMENT_FP8
EMULATED_KERNEL(quantize)
#endif
EMULATED_KERNEL(to_f32)
EMULATED_KERNEL(head_dense)
EMULATED_KERNEL(head_norm)
EMULATED_KERNEL(head_out)

#include <signal.h>
#include <unistd.h>

#include <functional>

namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Bounds
// ---------------------------------------------------------------------------------------------------------------------

// The error of a row is |result - reference| / |reference|. The reference uses the same rounded inputs, so the error comes from
// rounding the stored result, at most half an ulp per element (f16 4.9e-4, bf16 3.9e-3, f32 6e-8); from rounding attention's
// weights, averaged over the keys; and from f32 arithmetic. The last matters only in f32, most for scores of some tens: an
// exponent of 50 has an error of 3e-6. A single wrong element causes an error of 1 / sqrt(row), 3e-2 or more. The largest
// measured errors are f16 4.8e-4, bf16 4.4e-3 and f32 6.3e-6; the bounds allow a factor of two to three for other compilers.
#if defined(ELEMENT_F16)
const char* const ELEMENT_NAME = FP8_GEMM ? "f16, fp8 GEMMs" : "f16";
constexpr double BOUND = 1e-3;
#elif defined(ELEMENT_BF16)
const char* const ELEMENT_NAME = "bf16";
constexpr double BOUND = 8e-3;
#else
const char* const ELEMENT_NAME = "f32";
constexpr double BOUND = 2e-5;
#endif
// The head's outputs are f32 sums of C terms for every element type. Measured: 1.4e-7.
constexpr double HEAD_BOUND = 1e-6;
// In f32 a score of 1e5 has an error of 2^-24 of itself, 6e-3, and a few times that as a sum of D terms; multiplied by 1 / sqrt(D),
// this is the error of the exponent. Measured: 3.9e-3.
constexpr double HUGE_SCORES_BOUND = 2e-2;

// ---------------------------------------------------------------------------------------------------------------------
// Buffers
// ---------------------------------------------------------------------------------------------------------------------

// `size` values that end at a guard page, up to an alignment of 16 bytes. They and the bytes before them start as NaN bytes. Never
// unmapped, as a run needs little memory.
template <typename T>
class Buffer {
public:
    static Buffer unset(size_t size) { return Buffer(size); }
    static Buffer of(const std::vector<T>& from) {
        Buffer buffer(from.size());
        std::copy(from.begin(), from.end(), buffer.values);
        mprotect(buffer.memory, buffer.mapped, PROT_READ);
        return buffer;
    }

    size_t size() const { return count; }
    T* data() { return values; }
    T& operator[](size_t i) { return values[i]; }
    bool same_bits(const Buffer& other, size_t from, size_t other_from, size_t length) const {
        return memcmp(values + from, other.values + other_from, length * sizeof(T)) == 0;
    }
    // Whether the bytes around the values are unmodified.
    bool surroundings_unmodified() const {
        const auto* first = reinterpret_cast<const unsigned char*>(values);
        const auto* last = reinterpret_cast<const unsigned char*>(values + count);
        const auto poison = [](unsigned char byte) { return byte == 0xff; };
        return std::all_of(static_cast<const unsigned char*>(memory), first, poison) &&
               std::all_of(last, static_cast<const unsigned char*>(memory) + mapped, poison);
    }

private:
    explicit Buffer(size_t size) : count(size) {
        const size_t bytes = (size * sizeof(T) + 15) / 16 * 16;
        mapped = (bytes + emulated::PAGE - 1) / emulated::PAGE * emulated::PAGE + emulated::PAGE;
        memory = emulated::map_guarded(mapped);
        memset(memory, 0xff, mapped);
        values = reinterpret_cast<T*>(memory + mapped - bytes);
    }

    size_t count;
    size_t mapped;
    unsigned char* memory;
    T* values;
};

using Kernel = void (*)(const unsigned grid[3], const unsigned block[3], size_t shared_bytes, void** arguments);

struct Grid {
    unsigned x, y;
};

// Launches with pointers to the arguments, like the driver.
template <typename... Arguments>
void launch(Kernel kernel, Grid grid, unsigned threads, size_t shared_bytes, Arguments... arguments) {
    void* pointers[] = {&arguments...};
    const unsigned blocks[3] = {grid.x, grid.y, 1}, block[3] = {threads, 1, 1};
    kernel(blocks, block, shared_bytes, pointers);
}

// ---------------------------------------------------------------------------------------------------------------------
// Random values and checks
// ---------------------------------------------------------------------------------------------------------------------

std::mt19937 random_bits(7);
int failures = 0;

double normal() { return std::normal_distribution<double>()(random_bits); }

element stored(double x) {
#ifdef ELEMENT_F32
    return static_cast<float>(x);
#else
    return to_element(static_cast<float>(x));
#endif
}

double value_of(element x) { return to_float(x); }

template <typename T>
std::vector<T> filled(size_t size, const std::function<double(size_t)>& value) {
    std::vector<T> values(size);
    for (size_t i = 0; i < size; ++i) {
        if constexpr (std::is_same_v<T, element>) {
            values[i] = stored(value(i));
        } else {
            values[i] = static_cast<T>(value(i));
        }
    }
    return values;
}

std::vector<element> normal_elements(size_t size) {
    return filled<element>(size, [](size_t) { return normal(); });
}

std::vector<float> normal_floats(size_t size, double mean, double deviation) {
    return filled<float>(size, [=](size_t) { return mean + deviation * normal(); });
}

double as_double(float x) { return x; }
#ifndef ELEMENT_F32
double as_double(element x) { return value_of(x); }
#endif

void report(const std::string& name, bool good, const std::string& what) {
    printf("%-6s %-58s %s\n", good ? "ok" : "FAILED", name.c_str(), what.c_str());
    if (good) return;
    ++failures;
    if (getenv("EMULATED_STOP_AT_FAILURE")) {
        fflush(stdout);
        _exit(1);
    }
}

// Checks the worst row's error. `reference` and `result` are [rows, columns].
template <typename T>
void check(const std::string& name, Buffer<T>& result, const std::vector<double>& reference, size_t columns, double bound) {
    double worst = 0;
    for (size_t row = 0; row < reference.size() / columns; ++row) {
        double error = 0, norm = 0;
        for (size_t i = row * columns; i < (row + 1) * columns; ++i) {
            error += std::pow(as_double(result[i]) - reference[i], 2);
            norm += reference[i] * reference[i];
        }
        const double relative = error == 0 ? 0 : std::sqrt(error / norm);
        worst = relative <= worst ? worst : relative; // NaN stays
    }
    char text[80];
    snprintf(text, sizeof text, "error %.1e, bound %.0e%s", worst, bound, result.surroundings_unmodified() ? "" : ", WROTE OUTSIDE ITS BUFFER");
    report(name, worst <= bound && result.surroundings_unmodified(), text);
}

double value_of_e4m3(e4m3 x) {
    const int exponent = x >> 3 & 15, fraction = x & 7;
    const double magnitude = exponent == 0 ? fraction * 0x1p-9 : std::ldexp(8 + fraction, exponent - 10);
    return (x & 0x7f) == 0x7f ? NAN : x & 0x80 ? -magnitude : magnitude;
}

// Checks an fp8 operand against `reference` times `scale`, value by value: an error of at most half a step, with saturation at 448. The
// extra 5 % is for f32 errors near ties, and near zero, where the error is 1e-5 of the row's mean.
void check_fp8_operand(const std::string& name, Buffer<e4m3>& result, const std::vector<double>& reference, double scale) {
    double worst = 0;
    for (size_t i = 0; i < reference.size(); ++i) {
        const double wanted = std::clamp(reference[i] * scale, -448.0, 448.0);
        const double half_step = std::ldexp(1, std::max(wanted == 0 ? -6 : std::ilogb(wanted), -6) - 4);
        const double steps = std::fabs(value_of_e4m3(result[i]) - wanted) / half_step;
        worst = steps <= worst ? worst : steps;
    }
    char text[80];
    snprintf(text, sizeof text, "%.4f half steps%s", worst, result.surroundings_unmodified() ? "" : ", WROTE OUTSIDE ITS BUFFER");
    report(name, worst <= 1.05 && result.surroundings_unmodified(), text);
}

void check_same(const std::string& name, bool same) { report(name, same, same ? "same bits" : "BITS DIFFER"); }

// ---------------------------------------------------------------------------------------------------------------------
// Batches
// ---------------------------------------------------------------------------------------------------------------------

struct Batch {
    std::vector<u32> lengths;
    std::vector<u32> offsets = {0};
    std::vector<uint2> tiles;

    explicit Batch(const std::vector<u32>& of) : lengths(of) {
        for (u32 sequence = 0; sequence < lengths.size(); ++sequence) {
            offsets.push_back(offsets.back() + lengths[sequence]);
            for (u32 row = 0; row < lengths[sequence]; row += QUERY_ROWS) tiles.push_back({sequence, row});
        }
    }
    u32 tokens() const { return offsets.back(); }
    u32 sequences() const { return static_cast<u32>(lengths.size()); }
    std::vector<u32> counts() const { return {tokens(), sequences(), static_cast<u32>(tiles.size())}; }
};

const std::vector<u32> AWKWARD_LENGTHS = {1, 63, 64, 65, 127, 128, 129, 200};
const std::vector<u32> MIXED_LENGTHS = {129, 1, 200, 64, 63, 1, 128, 333, 65, 127, 2};

std::string lengths_text(const std::vector<u32>& lengths) {
    if (lengths.size() == 1) return "length " + std::to_string(lengths[0]);
    return std::to_string(lengths.size()) + " sequences";
}

// Adds softmax(q k^T / sqrt(D)) v of one query and head to `out` [D], for `length` keys. `stride` is the row stride of k and v in
// elements.
void attend(const element* q, const element* k, const element* v, u32 length, size_t stride, double* out) {
    std::vector<double> weights(length), query(D);
    for (u32 i = 0; i < D; ++i) query[i] = value_of(q[i]);
    double highest = -HUGE_VAL, sum = 0;
    for (u32 key = 0; key < length; ++key) {
        double score = 0;
        for (u32 i = 0; i < D; ++i) score += query[i] * value_of(k[key * stride + i]);
        weights[key] = score / std::sqrt(static_cast<double>(D));
        highest = std::max(highest, weights[key]);
    }
    for (double& weight : weights) sum += weight = std::exp(weight - highest);
    for (u32 key = 0; key < length; ++key) {
        for (u32 i = 0; i < D; ++i) out[i] += weights[key] / sum * value_of(v[key * stride + i]);
    }
}

const float SCALE = static_cast<float>(1 / std::sqrt(static_cast<double>(D)));
constexpr u32 H = C / D;

// ---------------------------------------------------------------------------------------------------------------------
// Attention
// ---------------------------------------------------------------------------------------------------------------------

// Generates values of Q and K, given the token's relative position in its sequence, 0 to 1.
using Values = double (*)(double position);
double spread(double) { return normal(); }
// Scores rise along the sequence: the maximum changes at nearly every step.
double rising(double position) { return normal() * (1 + 2 * position); }
// Scores of about 1e5, outside the range of f16, that differ by some hundreds.
double huge(double) { return 40 * std::sqrt(64.0 / D) + normal(); }

std::vector<element> attention_input(const Batch& batch, Values values) {
    std::vector<element> qkv(static_cast<size_t>(batch.tokens()) * 3 * C);
    for (u32 sequence = 0; sequence < batch.sequences(); ++sequence)
        for (u32 row = 0; row < batch.lengths[sequence]; ++row)
            for (u32 i = 0; i < 3 * C; ++i) {
                const double position = static_cast<double>(row) / batch.lengths[sequence];
                qkv[static_cast<size_t>(batch.offsets[sequence] + row) * 3 * C + i] =
                    stored(i < 2 * C ? values(position) : normal());
            }
    return qkv;
}

struct Attention {
    const char* name;
    Kernel kernel;
    unsigned blocks_per_tile;
    size_t shared_bytes;
};

const Attention ATTENTIONS[] = {
    {"attention", emulated_kernel_attention, 1, ATTENTION_SHARED_BYTES},
#ifdef HAS_ATTENTION_WGMMA
    {"attention_wgmma", emulated_kernel_attention_wgmma, 2, ATTENTION_WGMMA_SHARED_BYTES},
#endif
};

constexpr u32 NO_WINDOW = ~0u;

// With a window, launches attention_local instead of `attention`.
void run_attention(
    const Attention& attention, const Batch& batch, Buffer<element>& qkv, Buffer<element>& out, u32 window = NO_WINDOW) {
    auto counts = Buffer<u32>::of(batch.counts());
    auto offsets = Buffer<u32>::of(batch.offsets);
    auto tiles = Buffer<uint2>::of(batch.tiles);
    const auto blocks = static_cast<unsigned>((batch.tiles.size() + 2) * attention.blocks_per_tile); // two more tiles than needed
    if (window != NO_WINDOW) {
        launch(emulated_kernel_attention_local, {blocks, H}, ATTENTION_THREADS, ATTENTION_SHARED_BYTES, counts.data(),
               offsets.data(), tiles.data(), qkv.data(), out.data(), SCALE, window);
        return;
    }
    launch(attention.kernel, {blocks, H}, ATTENTION_THREADS, attention.shared_bytes, counts.data(), offsets.data(), tiles.data(),
           qkv.data(), out.data(), SCALE);
}

void check_attention_of(const char* name, const std::vector<u32>& lengths, Values values, double bound) {
    const Batch batch(lengths);
    const std::vector<element> host = attention_input(batch, values);
    auto qkv = Buffer<element>::of(host);
    std::vector<double> reference(static_cast<size_t>(batch.tokens()) * C);
    for (u32 sequence = 0; sequence < batch.sequences(); ++sequence) {
        const element* rows = host.data() + static_cast<size_t>(batch.offsets[sequence]) * 3 * C;
        for (u32 row = 0; row < lengths[sequence]; ++row)
            for (u32 head = 0; head < H; ++head) {
                const element* q = rows + static_cast<size_t>(row) * 3 * C + head * D;
                double* to = &reference[static_cast<size_t>(batch.offsets[sequence] + row) * C + head * D];
                attend(q, rows + C + head * D, rows + 2 * C + head * D, lengths[sequence], 3 * C, to);
            }
    }
    for (const Attention& attention : ATTENTIONS) {
        auto out = Buffer<element>::unset(reference.size());
        run_attention(attention, batch, qkv, out);
        const std::string what = std::string(attention.name) + ", " + name + ", " + lengths_text(lengths);
        check(what, out, reference, D, bound);
    }
}

// Attention to keys at a distance of at most `window`, for steps that a query sees in whole, in part, or not at all.
void check_local_attention(const std::vector<u32>& lengths, u32 window, Values values) {
    const Batch batch(lengths);
    const std::vector<element> host = attention_input(batch, values);
    auto qkv = Buffer<element>::of(host);
    std::vector<double> reference(static_cast<size_t>(batch.tokens()) * C);
    for (u32 sequence = 0; sequence < batch.sequences(); ++sequence) {
        const element* rows = host.data() + static_cast<size_t>(batch.offsets[sequence]) * 3 * C;
        for (u32 row = 0; row < lengths[sequence]; ++row) {
            const u32 first = row > window ? row - window : 0;
            const u32 last = lengths[sequence] - 1 - row > window ? row + window : lengths[sequence] - 1;
            const element* keys = rows + static_cast<size_t>(first) * 3 * C + C;
            for (u32 head = 0; head < H; ++head) {
                const element* q = rows + static_cast<size_t>(row) * 3 * C + head * D;
                double* to = &reference[static_cast<size_t>(batch.offsets[sequence] + row) * C + head * D];
                attend(q, keys + head * D, keys + C + head * D, last - first + 1, 3 * C, to);
            }
        }
    }
    auto out = Buffer<element>::unset(reference.size());
    run_attention(ATTENTIONS[0], batch, qkv, out, window);
    check("attention_local, window " + std::to_string(window) + ", " + lengths_text(lengths), out, reference, D, BOUND);
}

// A sequence gives the same bits alone and in a batch.
void check_attention_alone(const Attention& attention, u32 window) {
    const Batch batch(MIXED_LENGTHS);
    const std::vector<element> host = attention_input(batch, spread);
    auto qkv = Buffer<element>::of(host);
    auto out = Buffer<element>::unset(static_cast<size_t>(batch.tokens()) * C);
    run_attention(attention, batch, qkv, out, window);
    bool same = true;
    for (u32 sequence = 0; sequence < batch.sequences(); ++sequence) {
        const Batch alone({batch.lengths[sequence]});
        const size_t row = static_cast<size_t>(3) * C, first = batch.offsets[sequence];
        auto own = Buffer<element>::of({host.begin() + first * row, host.begin() + (first + batch.lengths[sequence]) * row});
        auto own_out = Buffer<element>::unset(static_cast<size_t>(alone.tokens()) * C);
        run_attention(attention, alone, own, own_out, window);
        same = same && out.same_bits(own_out, first * C, 0, own_out.size());
    }
    const char* local = window == NO_WINDOW ? "" : "_local";
    check_same(std::string(attention.name) + local + ", each sequence alone and in a batch", same);
}

void check_attention() {
    for (u32 length : AWKWARD_LENGTHS) check_attention_of("spread scores", {length}, spread, BOUND);
    check_attention_of("spread scores", MIXED_LENGTHS, spread, BOUND);
    check_attention_of("rising scores", MIXED_LENGTHS, rising, BOUND);
    check_attention_of("huge scores", {1, 130, 65}, huge, HUGE_SCORES_BOUND);
    for (const Attention& attention : ATTENTIONS) check_attention_alone(attention, NO_WINDOW);
    for (u32 window : {0, 1, 63, 64, 65, 200}) check_local_attention(MIXED_LENGTHS, window, spread);
    check_local_attention({333, 1}, 64, rising);
    check_attention_alone(ATTENTIONS[0], 64);
    // Long sequences, and tiles whose second warpgroup has no rows.
    if (D == 64 && C == 256) check_attention_of("spread scores", {1000, 192, 17}, spread, BOUND);
}

// ---------------------------------------------------------------------------------------------------------------------
// The last layer
// ---------------------------------------------------------------------------------------------------------------------

void run_cls_attention(const Batch& batch, Buffer<element>& q, Buffer<element>& kv, Buffer<element>& out, u32 keys = ~0u) {
    auto counts = Buffer<u32>::of(batch.counts());
    auto offsets = Buffer<u32>::of(batch.offsets);
    launch(emulated_kernel_cls_attention, {batch.sequences() + 1, H}, 128, 0, counts.data(), offsets.data(), q.data(),
           kv.data(), out.data(), SCALE, keys);
}

// `keys` is the number of keys that are read.
void check_cls_attention_of(
    const char* name, const std::vector<u32>& lengths, double size, double bound, u32 keys = ~0u) {
    const Batch batch(lengths);
    const auto sized = [size](size_t) { return size * normal(); };
    const size_t columns = 2 * C;
    const std::vector<element> host_q = filled<element>(static_cast<size_t>(batch.sequences()) * C, sized);
    const std::vector<element> host_kv = filled<element>(batch.tokens() * columns, sized);
    auto q = Buffer<element>::of(host_q);
    auto kv = Buffer<element>::of(host_kv);
    auto out = Buffer<element>::unset(host_q.size());
    run_cls_attention(batch, q, kv, out, keys);

    std::vector<double> reference(out.size());
    bool same = true;
    for (u32 sequence = 0; sequence < batch.sequences(); ++sequence) {
        const size_t first = batch.offsets[sequence], own = static_cast<size_t>(sequence) * C;
        for (u32 head = 0; head < H; ++head) {
            const element* k = host_kv.data() + first * columns + head * D;
            attend(&host_q[own + head * D], k, k + C, std::min(lengths[sequence], keys), columns, &reference[own + head * D]);
        }
        const Batch alone({lengths[sequence]});
        auto own_q = Buffer<element>::of({host_q.begin() + own, host_q.begin() + own + C});
        auto own_out = Buffer<element>::unset(C);
        auto own_kv = Buffer<element>::of(
            {host_kv.begin() + first * columns, host_kv.begin() + (first + lengths[sequence]) * columns});
        run_cls_attention(alone, own_q, own_kv, own_out, keys);
        same = same && out.same_bits(own_out, own, 0, C);
    }
    const std::string what = std::string("cls_attention, ") + name + ", " + lengths_text(lengths);
    check(what, out, reference, D, bound);
    if (lengths.size() > 1) check_same(what + ", alone", same);
}

void check_cls_attention() {
    for (u32 length : AWKWARD_LENGTHS) check_cls_attention_of("spread scores", {length}, 1, BOUND);
    check_cls_attention_of("spread scores", MIXED_LENGTHS, 1, BOUND);
    check_cls_attention_of("sharp scores", MIXED_LENGTHS, 4, BOUND);
    check_cls_attention_of("spread scores", {2050}, 1, BOUND);
    for (u32 keys : {1, 2, 65}) check_cls_attention_of("first keys", MIXED_LENGTHS, 1, BOUND, keys);
}

void check_gather_cls() {
    const Batch batch(MIXED_LENGTHS);
    const std::vector<element> host = normal_elements(static_cast<size_t>(batch.tokens()) * C);
    auto counts = Buffer<u32>::of(batch.counts());
    auto offsets = Buffer<u32>::of(batch.offsets);
    auto x = Buffer<element>::of(host);
    auto out = Buffer<element>::unset(static_cast<size_t>(batch.sequences()) * C);
    launch(emulated_kernel_gather_cls, {2, 1}, 128, 0, counts.data(), offsets.data(), x.data(), out.data());
    bool same = out.surroundings_unmodified();
    for (u32 sequence = 0; sequence < batch.sequences(); ++sequence) {
        same = same && out.same_bits(x, sequence * C, static_cast<size_t>(batch.offsets[sequence]) * C, C);
    }
    check_same("gather_cls", same);
}

// ---------------------------------------------------------------------------------------------------------------------
// Norms
// ---------------------------------------------------------------------------------------------------------------------

constexpr float EPS = 1e-5f;
// Scale of fp8 operands: some of the normally distributed values exceed 448, some are subnormal.
constexpr float OPERAND_SCALE = 128;

// Normalizes each row of C values in place.
void norm_rows(std::vector<double>& rows, const std::vector<float>& weight, const std::vector<float>& bias) {
    for (size_t row = 0; row < rows.size() / C; ++row) {
        double* x = &rows[row * C];
        double mean = 0, variance = 0;
        for (u32 i = 0; i < C; ++i) mean += x[i] / C;
        for (u32 i = 0; i < C; ++i) variance += (x[i] - mean) * (x[i] - mean) / C;
        for (u32 i = 0; i < C; ++i) x[i] = (x[i] - mean) / std::sqrt(variance + EPS) * weight[i] + bias[i];
    }
}

void check_embed_norm(u32 tokens, unsigned blocks, bool with_positions, bool with_types) {
    constexpr u32 VOCABULARY = 50, POSITIONS = 40, TYPES = 2;
    const auto below = [](u32 end) { return [end](size_t i) -> double { return i == 0 ? end - 1 : random_bits() % end; }; };
    const std::vector<u32> ids = filled<u32>(tokens, below(VOCABULARY)), types = filled<u32>(tokens, below(TYPES));
    const std::vector<u32> positions = filled<u32>(tokens, below(POSITIONS));
    const std::vector<element> words = normal_elements(VOCABULARY * C), type_table = normal_elements(TYPES * C);
    const std::vector<element> position_table = normal_elements(POSITIONS * C);
    const std::vector<float> weight = normal_floats(C, 1, 0.2), bias = normal_floats(C, 0, 0.2);
    std::vector<double> reference;
    for (u32 token = 0; token < tokens; ++token)
        for (u32 i = 0; i < C; ++i) {
            const double type = with_types ? value_of(type_table[types[token] * C + i]) : 0;
            const double position = with_positions ? value_of(position_table[positions[token] * C + i]) : 0;
            reference.push_back(value_of(words[ids[token] * C + i]) + type + position);
        }
    norm_rows(reference, weight, bias);

    auto counts = Buffer<u32>::of({tokens, 1, 1});
    auto ids_in = Buffer<u32>::of(ids);
    auto types_in = Buffer<u32>::of(types);
    auto positions_in = Buffer<u32>::of(positions);
    auto words_in = Buffer<element>::of(words);
    auto types_table_in = Buffer<element>::of(type_table);
    auto position_table_in = Buffer<element>::of(position_table);
    auto out = Buffer<element>::unset(reference.size());
    auto operand = Buffer<e4m3>::unset(FP8_GEMM ? reference.size() : 0);
    auto weight_in = Buffer<float>::of(weight);
    auto bias_in = Buffer<float>::of(bias);
    launch(emulated_kernel_embed_norm, {blocks, 1}, 256, 0, counts.data(), ids_in.data(), types_in.data(),
           positions_in.data(), words_in.data(), with_positions ? position_table_in.data() : static_cast<element*>(nullptr),
           with_types ? types_table_in.data() : static_cast<element*>(nullptr), weight_in.data(), bias_in.data(), EPS, out.data(), operand.data(), OPERAND_SCALE);
    const std::string name = "embed_norm, " + std::to_string(tokens) + " tokens, grid " + std::to_string(blocks) +
                             (with_positions ? "" : ", no positions") + (with_types ? "" : ", no types");
    check(name, out, reference, C, BOUND);
    if (FP8_GEMM) check_fp8_operand(name + ", operand", operand, reference, OPERAND_SCALE);
}

// Rows with a mean far from zero, for which a one-pass variance would cancel; one row is constant.
void check_layer_norm(u32 rows, unsigned blocks) {
    const std::vector<float> weight = normal_floats(C, 1, 0.2), bias = normal_floats(C, 0, 0.2);
    const std::vector<element> host = filled<element>(static_cast<size_t>(rows) * C, [](size_t i) {
        const size_t row = i / C;
        return row == 2 ? 3 : (row % 3 == 1 ? 30 : 0) + normal();
    });
    std::vector<double> reference;
    for (element x : host) reference.push_back(value_of(x));
    norm_rows(reference, weight, bias);

    auto rows_in = Buffer<u32>::of({rows});
    auto x = Buffer<element>::of(host);
    auto out = Buffer<element>::unset(host.size());
    auto in_place = Buffer<element>::unset(host.size());
    auto operand = Buffer<e4m3>::unset(FP8_GEMM ? host.size() : 0);
    auto operand_in_place = Buffer<e4m3>::unset(operand.size());
    std::copy(host.begin(), host.end(), in_place.data());
    auto weight_in = Buffer<float>::of(weight);
    auto bias_in = Buffer<float>::of(bias);
    launch(emulated_kernel_layer_norm, {blocks, 1}, 256, 0, rows_in.data(), x.data(), weight_in.data(), bias_in.data(), EPS,
           out.data(), operand.data(), OPERAND_SCALE);
    launch(emulated_kernel_layer_norm, {blocks + 1, 1}, 256, 0, rows_in.data(), in_place.data(), weight_in.data(),
           bias_in.data(), EPS, in_place.data(), operand_in_place.data(), OPERAND_SCALE);
    const std::string name = "layer_norm, " + std::to_string(rows) + " rows, grid " + std::to_string(blocks);
    check(name, out, reference, C, BOUND);
    const bool same = out.same_bits(in_place, 0, 0, out.size()) && operand.same_bits(operand_in_place, 0, 0, operand.size());
    check_same(name + ", in place and in another grid", same && in_place.surroundings_unmodified());
    if (FP8_GEMM) check_fp8_operand(name + ", operand", operand, reference, OPERAND_SCALE);
}

// ---------------------------------------------------------------------------------------------------------------------
// Element-wise kernels, the wgmma GEMM and the head
// ---------------------------------------------------------------------------------------------------------------------

double gelu_erf(double x) { return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0))); }
double gelu_tanh(double x) { return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x))); }
double relu(double x) { return std::max(x, 0.0); }
double silu(double x) { return x / (1 + std::exp(-x)); }

void check_activate(u32 function, const char* name, double (*reference_of)(double)) {
    const u32 rows = 9, columns = 4 * C;
    const std::vector<element> host = filled<element>(rows * columns, [](size_t i) {
        const double far[] = {0, -0.0, 30, -30, 6e4, -6e4, 1e-7, -1e-7};
        return i < 8 ? far[i] : 2 * normal();
    });
    // The first row has extreme values, which dominate its norm; the other rows are ordinary.
    std::vector<double> reference;
    for (element x : host) reference.push_back(reference_of(value_of(x)));
    auto rows_in = Buffer<u32>::of({rows});
    auto x = Buffer<element>::unset(host.size());
    std::copy(host.begin(), host.end(), x.data());
    launch(emulated_kernel_activate, {3, 1}, 256, 0, rows_in.data(), columns, function, x.data());
    check(std::string("activate, ") + name, x, reference, columns, BOUND);
}

// Columns of the value are not rounded before the product, so the error is that of one rounding.
void check_gate(u32 function, const char* name, double (*reference_of)(double)) {
    const u32 rows = 9, columns = C + 24;
    const std::vector<element> host = filled<element>(rows * 2 * columns, [](size_t) { return 2 * normal(); });
    std::vector<double> reference;
    for (u32 row = 0; row < rows; ++row)
        for (u32 i = 0; i < columns; ++i) {
            const element* gate = &host[row * 2 * columns + i];
            reference.push_back(reference_of(value_of(gate[0])) * value_of(gate[columns]));
        }
    auto rows_in = Buffer<u32>::of({rows});
    auto x = Buffer<element>::of(host);
    auto out = Buffer<element>::unset(reference.size());
    launch(emulated_kernel_gate, {3, 1}, 256, 0, rows_in.data(), columns, function, x.data(), out.data());
    check(std::string("gate, ") + name, out, reference, columns, BOUND);
}

// Rotates the first `heads` heads of rows of one more head.
void check_rotate(u32 heads) {
    const Batch batch(MIXED_LENGTHS);
    constexpr u32 HALF = D / 2, POSITIONS = 333;
    const u32 columns = (heads + 1) * D;
    const std::vector<element> host = normal_elements(static_cast<size_t>(batch.tokens()) * columns);
    std::vector<float> cosines, sines;
    for (u32 position = 0; position < POSITIONS; ++position)
        for (u32 i = 0; i < HALF; ++i) {
            const double angle = position * std::pow(100.0, -static_cast<double>(i) / HALF);
            cosines.push_back(static_cast<float>(std::cos(angle)));
            sines.push_back(static_cast<float>(std::sin(angle)));
        }
    std::vector<u32> positions;
    for (u32 length : batch.lengths)
        for (u32 row = 0; row < length; ++row) positions.push_back(row);
    std::vector<double> reference;
    for (u32 row = 0; row < batch.tokens(); ++row)
        for (u32 i = 0; i < columns; ++i) {
            const element* x = &host[static_cast<size_t>(row) * columns + i];
            const u32 pair = i % HALF;
            const double c = cosines[positions[row] * HALF + pair], s = sines[positions[row] * HALF + pair];
            const bool second = i % D >= HALF;
            if (i >= heads * D) reference.push_back(value_of(*x));
            else if (second) reference.push_back(value_of(*x) * c + value_of(*(x - HALF)) * s);
            else reference.push_back(value_of(*x) * c - value_of(x[HALF]) * s);
        }
    auto counts = Buffer<u32>::of(batch.counts());
    auto positions_in = Buffer<u32>::of(positions);
    auto cos_in = Buffer<float>::of(cosines), sin_in = Buffer<float>::of(sines);
    auto x = Buffer<element>::unset(host.size());
    std::copy(host.begin(), host.end(), x.data());
    launch(emulated_kernel_rotate, {3, 1}, 256, 0, counts.data(), positions_in.data(), cos_in.data(), sin_in.data(), heads,
           columns, x.data());
    check("rotate, " + std::to_string(heads) + " heads", x, reference, columns, BOUND);
}

// Each sequence, in a batch and alone.
void check_mean_rows() {
    const Batch batch(MIXED_LENGTHS);
    const std::vector<element> host = normal_elements(static_cast<size_t>(batch.tokens()) * C);
    std::vector<double> reference;
    for (u32 sequence = 0; sequence < batch.sequences(); ++sequence)
        for (u32 i = 0; i < C; ++i) {
            double sum = 0;
            for (u32 row = batch.offsets[sequence]; row < batch.offsets[sequence + 1]; ++row) {
                sum += value_of(host[static_cast<size_t>(row) * C + i]);
            }
            reference.push_back(sum / batch.lengths[sequence]);
        }
    const auto run = [](const Batch& of, Buffer<element>& x, Buffer<element>& out) {
        auto counts = Buffer<u32>::of(of.counts());
        auto offsets = Buffer<u32>::of(of.offsets);
        launch(emulated_kernel_mean_rows, {of.sequences() + 2, (C + 63) / 64}, 256, 0, counts.data(), offsets.data(), x.data(),
               out.data());
    };
    auto x = Buffer<element>::of(host);
    auto out = Buffer<element>::unset(reference.size());
    run(batch, x, out);
    check("mean_rows", out, reference, C, BOUND);
    bool same = true;
    for (u32 sequence = 0; sequence < batch.sequences(); ++sequence) {
        const auto row = [&](u32 sequence) { return host.begin() + static_cast<size_t>(batch.offsets[sequence]) * C; };
        const Batch alone({batch.lengths[sequence]});
        auto own = Buffer<element>::of({row(sequence), row(sequence + 1)});
        auto own_out = Buffer<element>::unset(C);
        run(alone, own, own_out);
        same = same && out.same_bits(own_out, sequence * C, 0, C);
    }
    check_same("mean_rows, each sequence alone and in a batch", same);
}

#ifdef HAS_GEMM_WGMMA
double identity_or_gelu(u32 function, double x) { return function == 0 ? gelu_erf(x) : x; }

// `function` is 0 for GELU by erf, 3 for the identity. The calls in `main` cover more and fewer tiles than blocks, and more depth
// steps than pipeline stages.
void check_gemm(u32 rows, u32 outputs, u32 inputs, u32 function, bool with_residual, unsigned blocks) {
    const auto spread = [](double size) { return [size](size_t) { return size * normal(); }; };
    const auto x = filled<element>(size_t(rows) * inputs, spread(1));
    const auto weight = filled<element>(size_t(outputs) * inputs, spread(1 / std::sqrt(double(inputs))));
    const auto bias = filled<element>(outputs, spread(1)), residual = filled<element>(size_t(rows) * outputs, spread(1));
    std::vector<double> reference(size_t(rows) * outputs);
    for (u32 r = 0; r < rows; ++r)
        for (u32 o = 0; o < outputs; ++o) {
            double sum = value_of(bias[o]) + (with_residual ? value_of(residual[size_t(r) * outputs + o]) : 0);
            for (u32 i = 0; i < inputs; ++i) sum += double(value_of(x[size_t(r) * inputs + i])) * value_of(weight[size_t(o) * inputs + i]);
            reference[size_t(r) * outputs + o] = identity_or_gelu(function, sum);
        }
    auto x_in = Buffer<element>::of(x), weight_in = Buffer<element>::of(weight), bias_in = Buffer<element>::of(bias);
    auto out = Buffer<element>::unset(reference.size()), in_place = Buffer<element>::unset(reference.size());
    std::copy(residual.begin(), residual.end(), in_place.data());
    auto& to = with_residual ? in_place : out;
    const auto map = [](Buffer<element>& of, u32 rows, u32 columns, u32 box_rows) {
        return TensorMap{{reinterpret_cast<u64>(of.data()), columns, rows, columns * sizeof(element), GEMM_TILE_DEPTH, box_rows}};
    };
    launch(emulated_kernel_gemm_wgmma, {blocks, 1}, GEMM_THREADS, GEMM_SHARED_BYTES,
           map(x_in, rows, inputs, GEMM_TILE_ROWS), map(weight_in, outputs, inputs, GEMM_TILE_COLUMNS), bias_in.data(),
           with_residual ? to.data() : static_cast<element*>(nullptr), to.data(), rows, outputs, inputs, function);
    const std::string name = "gemm_wgmma, " + std::to_string(rows) + " x " + std::to_string(outputs) + " x " +
                             std::to_string(inputs) + (function == 0 ? ", gelu" : "") + (with_residual ? ", residual" : "");
    check(name, to, reference, outputs, BOUND);
    check_same(name + ", nothing around it is written", to.surroundings_unmodified());
}
#endif

#ifndef ELEMENT_F32
// Erf GELU of every finite value: the error is at most rounding plus the approximation's error.
void check_gelu_of_every_value() {
#ifdef ELEMENT_BF16
    const double rounding = 0x1p-8;
#else
    const double rounding = 0x1p-11;
#endif
    std::vector<element> host;
    for (u32 bits = 0; bits < 0x10000; ++bits) {
        if (std::isfinite(value_of(static_cast<element>(bits)))) host.push_back(static_cast<element>(bits));
    }
    auto rows_in = Buffer<u32>::of({static_cast<u32>(host.size() / 8)});
    auto x = Buffer<element>::unset(host.size());
    std::copy(host.begin(), host.end(), x.data());
    launch(emulated_kernel_activate, {8, 1}, 256, 0, rows_in.data(), 8u, 0u, x.data());
    bool within_bound = true;
    for (size_t i = 0; i < host.size(); ++i) {
        const double wanted = gelu_erf(value_of(host[i])), size = std::fabs(wanted);
        within_bound = within_bound && std::fabs(value_of(x[i]) - wanted) <= size * rounding + std::min(1e-5, 1.4e-4 * size + 4e-6) + 0x1p-25;
    }
    within_bound = within_bound && x.surroundings_unmodified();
    report("activate, gelu by erf of every value", within_bound, within_bound ? "within its bound" : "ERROR ABOVE ITS BOUND");
}
#endif

#ifdef ELEMENT_FP8
double identity(double x) { return x; }

// The values include every finite f16, so every tie of e4m3 and values that saturate.
void check_quantize(u32 function, const char* name, double (*reference_of)(double), float scale) {
    const u32 rows = 8, columns = 2 * 31 * 256;
    const std::vector<element> host =
        filled<element>(rows * columns, [](size_t i) { return value_of(static_cast<u16>(i % 0x7c00 | i / 0x7c00 << 15)); });
    std::vector<double> reference;
    for (element x : host) reference.push_back(reference_of(value_of(x)));
    // The first half of the rows has every value. The kernel must leave out the second half.
    auto rows_in = Buffer<u32>::of({rows / 2});
    auto x = Buffer<element>::of(host);
    auto out = Buffer<e4m3>::unset(host.size() / 2);
    reference.resize(out.size());
    launch(emulated_kernel_quantize, {5, 1}, 256, 0, rows_in.data(), columns, function, x.data(), out.data(), scale);
    const std::string what = std::string("quantize, ") + name + ", scale " + std::to_string(scale);
    check_fp8_operand(what, out, reference, scale);
    if (function != 3) return;
    // With identity nothing is rounded before e4m3, so an error of exactly half a step must come with an even result.
    bool even = true;
    for (size_t i = 0; i < reference.size(); ++i) {
        const double wanted = reference[i] * scale, step = std::fabs(value_of_e4m3(out[i] ^ 1) - value_of_e4m3(out[i]));
        const bool tie = std::fabs(wanted) < 448 && std::fabs(value_of_e4m3(out[i]) - wanted) * 2 == step;
        even = even && !(tie && out[i] % 2 == 1);
    }
    check_same(what + ", ties to even", even);
}
#endif

void check_head(u32 rows, unsigned blocks, u32 function, double (*reference_of)(double)) {
    const std::vector<element> host = normal_elements(static_cast<size_t>(rows) * C);
    const std::vector<float> weight = normal_floats(static_cast<size_t>(C) * C, 0, 1 / std::sqrt(C));
    const std::vector<float> bias = normal_floats(C, 0, 0.2), out_weight = normal_floats(C, 0.1, 0.1);
    std::vector<double> dense;
    for (u32 row = 0; row < rows; ++row)
        for (u32 output = 0; output < C; ++output) {
            double sum = bias[output];
            for (u32 i = 0; i < C; ++i) {
                sum += static_cast<double>(weight[static_cast<size_t>(output) * C + i]) * value_of(host[row * C + i]);
            }
            dense.push_back(reference_of(sum));
        }
    auto rows_in = Buffer<u32>::of({rows});
    auto x = Buffer<element>::of(host);
    auto weight_in = Buffer<float>::of(weight);
    auto bias_in = Buffer<float>::of(bias);
    auto out = Buffer<float>::unset(dense.size());
    launch(emulated_kernel_head_dense, {blocks, 1}, 256, 0, rows_in.data(), x.data(), weight_in.data(), bias_in.data(),
           out.data(), function);
    const std::string of =
        ", " + std::to_string(rows) + " rows, grid " + std::to_string(blocks) + ", function " + std::to_string(function);
    check("head_dense" + of, out, dense, C, HEAD_BOUND);

    // The norm of a head, in place.
    const std::vector<float> norm_weight = normal_floats(C, 1, 0.2), norm_bias = normal_floats(C, 0, 0.2);
    std::vector<double> normed;
    for (size_t i = 0; i < out.size(); ++i) normed.push_back(out[i]);
    norm_rows(normed, norm_weight, norm_bias);
    auto rows_of_norm = Buffer<float>::unset(out.size());
    std::copy(out.data(), out.data() + out.size(), rows_of_norm.data());
    auto norm_weight_in = Buffer<float>::of(norm_weight), norm_bias_in = Buffer<float>::of(norm_bias);
    launch(emulated_kernel_head_norm, {blocks, 1}, 256, 0, rows_in.data(), rows_of_norm.data(), norm_weight_in.data(),
           norm_bias_in.data(), EPS);
    check("head_norm" + of, rows_of_norm, normed, C, HEAD_BOUND);

    // The reference of the second layer uses the first layer's actual output. The error is relative to the sum of magnitudes, because a
    // logit can be near zero.
    auto logit_weight = Buffer<float>::of(out_weight);
    auto logit_bias = Buffer<float>::of({0.25f});
    auto logits = Buffer<float>::unset(rows);
    launch(emulated_kernel_head_out, {blocks, 1}, 256, 0, rows_in.data(), out.data(), logit_weight.data(), logit_bias.data(),
           logits.data());
    double worst = 0;
    for (u32 row = 0; row < rows; ++row) {
        double sum = 0.25, magnitudes = 0.25;
        for (u32 i = 0; i < C; ++i) {
            const double term = static_cast<double>(out[row * C + i]) * out_weight[i];
            sum += term;
            magnitudes += std::fabs(term);
        }
        const double relative = std::fabs(logits[row] - sum) / magnitudes;
        worst = relative <= worst ? worst : relative;
    }
    char text[80];
    snprintf(text, sizeof text, "error %.1e, bound %.0e", worst, HEAD_BOUND);
    report("head_out" + of, worst <= HEAD_BOUND && logits.surroundings_unmodified(), text);
}

void check_to_f32(u32 rows, u32 columns) {
    const std::vector<element> host = normal_elements(static_cast<size_t>(rows) * columns);
    auto rows_in = Buffer<u32>::of({rows});
    auto x = Buffer<element>::of(host);
    auto out = Buffer<float>::unset(host.size());
    launch(emulated_kernel_to_f32, {2, 1}, 256, 0, rows_in.data(), columns, x.data(), out.data());
    bool same = out.surroundings_unmodified();
    for (size_t i = 0; i < host.size(); ++i) same = same && out[i] == value_of(host[i]);
    check_same("to_f32, [" + std::to_string(rows) + ", " + std::to_string(columns) + "]", same);
}

void report_bad_access(int, siginfo_t* info, void*) {
    fflush(stdout);
    fprintf(stderr, "emulator: block (%u, %u), thread %u accessed %p outside its buffers\n", blockIdx.x, blockIdx.y,
            emulated::block.current, info->si_addr);
    _exit(3);
}

} // namespace

int main() {
    // On its own stack, as a fiber may have overflowed its stack.
    static unsigned char signal_stack[64 * 1024];
    stack_t stack = {};
    stack.ss_sp = signal_stack;
    stack.ss_size = sizeof signal_stack;
    sigaltstack(&stack, nullptr);
    struct sigaction action = {};
    action.sa_sigaction = report_bad_access;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, nullptr);
    sigaction(SIGBUS, &action, nullptr);

    printf("kernels, %s, C = %u, D = %u, copies complete %s\n", ELEMENT_NAME, C, D,
           emulated::copies == emulated::Copies::LATE ? "late" : "early");
    for (u32 rows : {1, 7, 8, 9, 37}) {
        check_embed_norm(rows, rows % 3 + 1, true, true);
        check_layer_norm(rows, rows % 3 + 1);
    }
    check_embed_norm(9, 2, false, false);
    check_embed_norm(9, 2, false, true);
    if (C % D == 0) {
        check_attention();
        check_cls_attention();
    } else {
        printf("attention is not checked: C is not a multiple of D\n");
    }
    check_gather_cls();
#ifdef HAS_GEMM_WGMMA
    if (C == 256) {
        check_gemm(128, 256, 64, 3, false, 1);
        check_gemm(256, 512, 320, 0, false, 3);
        check_gemm(384, 256, 192, 3, true, 2);
        check_gemm(128, 512, 128, 0, false, 5);
        check_gemm(384, 512, 64, 0, false, 2); // three tiles per block: every mbarrier's parity repeats
    }
#endif
    check_activate(0, "gelu by erf", gelu_erf);
    check_activate(1, "gelu by tanh", gelu_tanh);
    check_activate(2, "relu", relu);
    check_activate(4, "silu", silu);
    check_gate(0, "gelu by erf", gelu_erf);
    check_gate(1, "gelu by tanh", gelu_tanh);
    check_gate(2, "relu", relu);
    check_gate(4, "silu", silu);
    check_rotate(1);
    check_rotate(3);
    check_mean_rows();
#ifndef ELEMENT_F32
    check_gelu_of_every_value();
#endif
#ifdef ELEMENT_FP8
    for (float scale : {1.0f, 0.125f, 4096.0f}) check_quantize(3, "identity", identity, scale);
    check_quantize(0, "gelu by erf", gelu_erf, 8);
    check_quantize(1, "gelu by tanh", gelu_tanh, 8);
    check_quantize(2, "relu", relu, 8);
#endif
    for (u32 rows : {1, 8, 9}) check_head(rows, rows * 3, 5, std::tanh);
    check_head(9, 4, 0, gelu_erf);
    check_head(9, 4, 2, relu);
    check_head(9, 4, 4, silu);
    check_to_f32(5, C);
    check_to_f32(3, 1);
    check_to_f32(3, 13);
    printf("%d failures\n", failures);
    return failures ? 1 : 0;
}
