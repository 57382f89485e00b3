// A stand-in for libcublasLt.so.13: cublasLtMatmul with the real ABI, on a CPU, in the streams of driver.cpp.
//
// D = activation(alpha * op(A) op(B) + beta * C + bias), column-major, batched by strides. A and B are both f16, bf16 or
// f32; C and D have the same type, or f32. Or A and B are both E4M3, on devices that have it, with A transposed and B not; all
// sizes and leading dimensions are then multiples of 16, and C and D are f16 or bf16. Sums are f32, and rounded once to
// D's type. Epilogues: none, RELU, GELU (by tanh), each with BIAS or without; the bias has m elements of D's type.
//
// There are three algorithms, which sum over k in different orders and so differ in the last bits. As in the real library, the
// heuristic's order depends on the shape. One algorithm is split-K with two parts and needs workspace.
//
// It rejects what the real library rejects, as far as that is documented. Not supported: other 8-bit types, scale pointers of A to D
// (use alpha), integers and complex numbers, row-major and tiled orders, scalars on the device, auxiliary outputs, pointer-array
// batches, and the summation order inside a tensor core. cublasLtMatmulAlgoInit and the enumeration of algorithms are missing.
//
// Environment: STANDIN_LOG=path gets a line per GEMM.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <mutex>
#include <set>
#include <vector>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "shared.h"

// In driver.cpp.
EXPORT Result cuCtxGetCurrent(void** handle);
EXPORT Result cuCtxGetDevice(int* device);
EXPORT Result cuDeviceGetAttribute(int* value, int attribute, int device);

namespace {

// cublasStatus_t, as cublas_api.h numbers it.
enum Status : int {
    BLAS_SUCCESS = 0,
    BLAS_NOT_INITIALIZED = 1,
    BLAS_INVALID_VALUE = 7,
    BLAS_EXECUTION_FAILED = 13,
    BLAS_NOT_SUPPORTED = 15,
};

enum Type : int { F32 = 0, F16 = 2, BF16 = 14, E4M3 = 28 };

enum Compute : int { COMPUTE_32F = 68, COMPUTE_32F_PEDANTIC = 69, COMPUTE_32F_FAST_TF32 = 77 };

enum Epilogue : unsigned { NO_EPILOGUE = 1, RELU = 2, BIAS = 4, GELU = 32 };

struct Layout {
    int type = F32;
    int order = 0; // column-major
    uint64_t rows = 0, columns = 0;
    int64_t leading = 0;
    int batches = 1;
    int64_t batch_stride = 0;
};

struct Description {
    int compute = COMPUTE_32F, scale_type = F32, pointer_mode = 0;
    int transposed_a = 0, transposed_b = 0, transposed_c = 0, fill_mode = 2 /* full */;
    unsigned epilogue = NO_EPILOGUE;
    const void* bias = nullptr;
    int64_t bias_batch_stride = 0;
    int bias_type = -1; // -1: the type of D
    bool unknown = false; // an unsupported attribute was set
};

struct Preference {
    uint64_t workspace_bytes = 0;
    unsigned reduction_schemes = ~0u;
};

// Inside cublasLtMatmulAlgo_t, 64 bytes that callers copy.
struct Algorithm {
    uint64_t magic;
    uint32_t types; // the types that it was chosen for
    int32_t id;
    uint32_t tile, stages;
    int32_t splits;
    uint32_t reduction_scheme;
    uint32_t chunk; // values of k per partial sum; 0: all of a split
    uint32_t unused[7];
};
static_assert(sizeof(Algorithm) == 64, "as in cublasLt.h");
constexpr uint64_t MAGIC = 0x6e692d646e617473;

struct HeuristicResult {
    Algorithm algorithm;
    size_t workspace_bytes;
    int state;
    float waves;
    int reserved[4];
};
static_assert(sizeof(HeuristicResult) == 96, "as in cublasLt.h");

// ---------------------------------------------------------------------------------------------------------------------
// Numbers
// ---------------------------------------------------------------------------------------------------------------------

float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

uint32_t as_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

float from_bf16(uint16_t bits) { return as_float(uint32_t(bits) << 16); }

uint16_t to_bf16(float value) {
    const uint32_t bits = as_bits(value);
    if (std::isnan(value)) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#if defined(__F16C__)
float from_f16(uint16_t bits) { return _cvtsh_ss(bits); }
uint16_t to_f16(float value) { return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
#else
float from_f16(uint16_t bits) {
    const uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
    if (exponent == 31) return as_float(sign | 0x7f800000 | fraction << 13);
    if (exponent == 0) return as_float(sign | as_bits(std::ldexp(float(fraction), -24)));
    return as_float(sign | (exponent + 112) << 23 | fraction << 13);
}

uint16_t to_f16(float value) {
    const uint32_t bits = as_bits(value);
    const uint16_t sign = bits >> 16 & 0x8000;
    if (std::isnan(value)) return sign | 0x7e00;
    const float magnitude = std::fabs(value);
    if (magnitude >= 65520.0f) return sign | 0x7c00;
    // Below 2^-14 the step is 2^-24; above, 2^-10 of the leading bit. nearbyint ties to even.
    if (magnitude < 6.103515625e-5f) return sign | static_cast<uint16_t>(std::nearbyint(magnitude * 16777216.0f));
    const uint32_t rounded = (bits & 0x7fffffff) + 0xfff + (bits >> 13 & 1);
    return sign | static_cast<uint16_t>((rounded >> 13) - (112 << 10));
}
#endif

// Rounds to ten fraction bits.
float to_tf32(float value) {
    const uint32_t bits = as_bits(value);
    return std::isfinite(value) ? as_float((bits + 0xfff + (bits >> 13 & 1)) & ~0x1fffu) : value;
}

float from_e4m3(uint8_t bits) {
    const int exponent = bits >> 3 & 15, fraction = bits & 7;
    if (exponent == 15 && fraction == 7) return NAN;
    const float magnitude = exponent == 0 ? std::ldexp(float(fraction), -9) : std::ldexp(float(8 + fraction), exponent - 10);
    return (bits & 0x80) != 0 ? -magnitude : magnitude;
}

size_t bytes_of(int type) { return type == F32 ? 4 : type == E4M3 ? 1 : 2; }

float load(const void* from, size_t index, int type) {
    if (type == F32) return static_cast<const float*>(from)[index];
    const uint16_t bits = static_cast<const uint16_t*>(from)[index];
    return type == F16 ? from_f16(bits) : from_bf16(bits);
}

void store(void* to, size_t index, int type, float value) {
    if (type == F32) {
        static_cast<float*>(to)[index] = value;
    } else {
        static_cast<uint16_t*>(to)[index] = type == F16 ? to_f16(value) : to_bf16(value);
    }
}

float activated(float x, unsigned epilogue) {
    if ((epilogue & RELU) != 0) return x > 0 || std::isnan(x) ? x : 0;
    if ((epilogue & GELU) != 0) return 0.5f * x * (1 + std::tanh(0.7978845608f * (x + 0.044715f * x * x * x)));
    return x;
}

// ---------------------------------------------------------------------------------------------------------------------
// The GEMM
// ---------------------------------------------------------------------------------------------------------------------

struct Gemm {
    Description description;
    Layout a, b, c, d;
    const void *a_at, *b_at, *c_at;
    void* d_at;
    float alpha, beta;
    uint64_t m, n, k;
    Algorithm algorithm;
    float* workspace;
    size_t workspace_bytes;
};

// D is computed in tiles of 16 x 6, which fit the registers of AVX2. A is packed into panels of 16 rows, B into panels of 6
// columns. In a panel the elements of one k are adjacent; past the edge of the matrix there are zeros.
constexpr size_t TILE_ROWS = 16, TILE_COLUMNS = 6;
typedef float Lanes __attribute__((vector_size(4 * TILE_ROWS), aligned(4), may_alias));

// Packed panels, [ceil(outer / width), k, width], from a matrix whose element (k, outer) is at
// k * k_stride + outer * outer_stride.
std::vector<float> packed(const void* from, int type, bool tf32, uint64_t outer, size_t outer_stride, uint64_t k,
                          size_t k_stride, size_t width) {
    const size_t panels = (outer + width - 1) / width;
    std::vector<float> panel_values(panels * k * width);
    const auto fill = [&](auto element) {
        for (size_t o = 0; o < outer; ++o) {
            float* const column = panel_values.data() + o / width * k * width + o % width;
            for (size_t i = 0; i < k; ++i) column[i * width] = element(i * k_stride + o * outer_stride);
        }
    };
    if (type == F16) {
        fill([=](size_t i) { return from_f16(static_cast<const uint16_t*>(from)[i]); });
    } else if (type == BF16) {
        fill([=](size_t i) { return from_bf16(static_cast<const uint16_t*>(from)[i]); });
    } else if (type == E4M3) {
        float values[256];
        for (int bits = 0; bits < 256; ++bits) values[bits] = from_e4m3(uint8_t(bits));
        fill([=](size_t i) { return values[static_cast<const uint8_t*>(from)[i]]; });
    } else if (tf32) {
        fill([=](size_t i) { return to_tf32(static_cast<const float*>(from)[i]); });
    } else {
        fill([=](size_t i) { return static_cast<const float*>(from)[i]; });
    }
    return panel_values;
}

// The sums of one tile over `k` values, added in order of k.
void multiply(const float* a_panel, const float* b_panel, size_t k, Lanes (&sums)[TILE_COLUMNS]) {
    Lanes sum0 = {}, sum1 = {}, sum2 = {}, sum3 = {}, sum4 = {}, sum5 = {};
    for (size_t i = 0; i < k; ++i, a_panel += TILE_ROWS, b_panel += TILE_COLUMNS) {
        const Lanes a = *reinterpret_cast<const Lanes*>(a_panel);
        sum0 += a * b_panel[0];
        sum1 += a * b_panel[1];
        sum2 += a * b_panel[2];
        sum3 += a * b_panel[3];
        sum4 += a * b_panel[4];
        sum5 += a * b_panel[5];
    }
    sums[0] = sum0, sums[1] = sum1, sums[2] = sum2, sums[3] = sum3, sums[4] = sum4, sums[5] = sum5;
}

const void* batch_of(const void* start, const Layout& layout, int batch) {
    return static_cast<const char*>(start) + batch * layout.batch_stride * int64_t(bytes_of(layout.type));
}

void run_batch(const Gemm& p, int batch) {
    const Description& description = p.description;
    const bool tf32 = description.compute == COMPUTE_32F_FAST_TF32;
    const size_t a_leading = p.a.leading, b_leading = p.b.leading;
    const bool a_by_k = description.transposed_a != 0, b_by_k = description.transposed_b == 0;
    const std::vector<float> a = packed(batch_of(p.a_at, p.a, batch), p.a.type, tf32, p.m, a_by_k ? a_leading : 1, p.k,
                                        a_by_k ? 1 : a_leading, TILE_ROWS);
    const std::vector<float> b = packed(batch_of(p.b_at, p.b, batch), p.b.type, tf32, p.n, b_by_k ? b_leading : 1, p.k,
                                        b_by_k ? 1 : b_leading, TILE_COLUMNS);
    const void* const c = p.c_at == nullptr ? nullptr : batch_of(p.c_at, p.c, batch);
    void* const d = const_cast<void*>(batch_of(p.d_at, p.d, batch));
    const bool biased = (description.epilogue & BIAS) != 0;
    std::vector<float> bias(p.m);
    for (size_t row = 0; biased && row < p.m; ++row) {
        bias[row] = load(description.bias, batch * description.bias_batch_stride + row, p.d.type);
    }

    const Algorithm& algorithm = p.algorithm;
    const size_t split = (p.k + algorithm.splits - 1) / algorithm.splits;
    const size_t chunk = algorithm.chunk != 0 ? algorithm.chunk : split;
    for (size_t first_row = 0; first_row < p.m; first_row += TILE_ROWS) {
        const float* const a_panel = a.data() + first_row * p.k;
        for (size_t first_column = 0; first_column < p.n; first_column += TILE_COLUMNS) {
            const float* const b_panel = b.data() + first_column * p.k;
            const size_t rows = std::min(TILE_ROWS, p.m - first_row), columns = std::min(TILE_COLUMNS, p.n - first_column);
            float totals[TILE_COLUMNS][TILE_ROWS] = {};
            for (size_t start = 0; start < p.k; start += chunk) {
                Lanes sums[TILE_COLUMNS];
                multiply(a_panel + start * TILE_ROWS, b_panel + start * TILE_COLUMNS, std::min(chunk, p.k - start), sums);
                for (size_t column = 0; column < columns; ++column) {
                    for (size_t row = 0; row < rows; ++row) {
                        float* const total = &totals[column][row];
                        *total = start == 0 ? sums[column][row] : *total + sums[column][row];
                        if (algorithm.splits == 1) continue;
                        const size_t place = (start / split * p.n + first_column + column) * p.m + first_row + row;
                        p.workspace[place] = sums[column][row];
                    }
                }
            }
            for (size_t column = 0; column < columns; ++column) {
                for (size_t row = 0; row < rows; ++row) {
                    const size_t at_row = first_row + row, at_column = first_column + column;
                    float value = p.alpha * totals[column][row];
                    if (p.beta != 0) value += p.beta * load(c, at_column * p.c.leading + at_row, p.c.type);
                    if (biased) value += bias[at_row];
                    store(d, at_column * p.d.leading + at_row, p.d.type, activated(value, description.epilogue));
                }
            }
        }
    }
}

bool is_there(const void* at, const Layout& layout) {
    const size_t last = size_t(layout.columns - 1) * layout.leading + layout.rows;
    for (int batch = 0; batch < layout.batches; ++batch) {
        if (!standin_is_device_memory(batch_of(at, layout, batch), last * bytes_of(layout.type))) return false;
    }
    return true;
}

Result run(void* payload) {
    const Gemm& p = *static_cast<const Gemm*>(payload);
    const Description& description = p.description;
    bool there = is_there(p.a_at, p.a) && is_there(p.b_at, p.b) && is_there(p.d_at, p.d);
    if (p.beta != 0) there = there && is_there(p.c_at, p.c);
    if ((description.epilogue & BIAS) != 0) {
        const size_t last = (p.d.batches - 1) * description.bias_batch_stride + p.m;
        there = there && standin_is_device_memory(description.bias, last * bytes_of(p.d.type));
    }
    if (p.workspace_bytes != 0) there = there && standin_is_device_memory(p.workspace, p.workspace_bytes);
    if (!there) return ILLEGAL_ADDRESS;
    for (int batch = 0; batch < p.d.batches; ++batch) run_batch(p, batch);
    return SUCCESS;
}

// ---------------------------------------------------------------------------------------------------------------------
// Validation
// ---------------------------------------------------------------------------------------------------------------------

struct Shape {
    uint64_t m, n, k;
};

// fp8 needs compute capability 8.9.
bool device_has_e4m3() {
    int device = 0, major = 0, minor = 0;
    return cuCtxGetDevice(&device) == SUCCESS && cuDeviceGetAttribute(&major, 75, device) == SUCCESS &&
           cuDeviceGetAttribute(&minor, 76, device) == SUCCESS && major * 10 + minor >= 89;
}

Status check(const Description* description, const Layout* a, const Layout* b, const Layout* c, const Layout* d,
             Shape& shape) {
    for (const Layout* const layout : {a, b, c, d}) {
        if (description == nullptr || layout == nullptr) return BLAS_INVALID_VALUE;
        if (layout->rows == 0 || layout->columns == 0 || layout->batches < 1) return BLAS_INVALID_VALUE;
        if (layout->order != 0) return BLAS_NOT_SUPPORTED;
        if (layout->leading < 0 || uint64_t(layout->leading) < layout->rows) return BLAS_INVALID_VALUE;
        if (layout->batches != d->batches) return BLAS_INVALID_VALUE;
    }
    const bool turned_a = description->transposed_a != 0, turned_b = description->transposed_b != 0;
    shape = {d->rows, d->columns, turned_a ? a->rows : a->columns};
    const bool a_fits = (turned_a ? a->columns : a->rows) == shape.m;
    const bool b_fits = (turned_b ? b->columns : b->rows) == shape.k && (turned_b ? b->rows : b->columns) == shape.n;
    if (!a_fits || !b_fits || c->rows != d->rows || c->columns != d->columns) return BLAS_INVALID_VALUE;

    const int compute = description->compute;
    const bool computes = compute == COMPUTE_32F || compute == COMPUTE_32F_PEDANTIC ||
                          (compute == COMPUTE_32F_FAST_TF32 && a->type == F32);
    const bool eight = a->type == E4M3;
    const bool input = a->type == F32 || a->type == F16 || a->type == BF16 || eight;
    const bool output = eight ? d->type == F16 || d->type == BF16 : d->type == a->type || d->type == F32;
    if (eight) {
        if (!device_has_e4m3() || !turned_a || turned_b) return BLAS_NOT_SUPPORTED;
        const uint64_t sizes[] = {shape.m, shape.n, shape.k, uint64_t(a->leading), uint64_t(b->leading), uint64_t(d->leading)};
        for (const uint64_t size : sizes) {
            if (size % 16 != 0) return BLAS_NOT_SUPPORTED;
        }
    }
    if (!computes || description->scale_type != F32 || !input || !output) return BLAS_NOT_SUPPORTED;
    if (a->type != b->type || c->type != d->type) return BLAS_NOT_SUPPORTED;

    if (description->unknown || description->pointer_mode != 0 || description->transposed_c != 0) return BLAS_NOT_SUPPORTED;
    const unsigned epilogue = description->epilogue;
    const unsigned known[] = {NO_EPILOGUE, RELU, GELU, BIAS, RELU | BIAS, GELU | BIAS};
    if (std::find(std::begin(known), std::end(known), epilogue) == std::end(known)) return BLAS_NOT_SUPPORTED;
    const bool other_bias = description->bias_type != -1 && description->bias_type != d->type;
    if ((epilogue & BIAS) != 0 && other_bias) return BLAS_NOT_SUPPORTED;
    return BLAS_SUCCESS;
}

// Tensor cores read their operands 16 bytes at a time.
bool is_aligned(const void* pointer, int type) {
    return reinterpret_cast<uintptr_t>(pointer) % (type == F32 ? 4 : 16) == 0;
}

uint32_t types_of(const Layout& a, const Layout& d) { return uint32_t(a.type) << 8 | uint32_t(d.type); }

// ---------------------------------------------------------------------------------------------------------------------
// Algorithms
// ---------------------------------------------------------------------------------------------------------------------

constexpr size_t MOST_WORKSPACE = 1 << 20;
constexpr unsigned REDUCTION_IN_COMPUTE_TYPE = 2;

size_t workspace_of(const Algorithm& algorithm, const Shape& shape) {
    return algorithm.splits == 1 ? 0 : size_t(algorithm.splits) * shape.m * shape.n * sizeof(float);
}

Algorithm algorithm_of(int32_t id, uint32_t tile, uint32_t stages, int32_t splits, uint32_t chunk, uint32_t types) {
    const uint32_t scheme = splits == 1 ? 0 : REDUCTION_IN_COMPUTE_TYPE;
    return {MAGIC, types, id, tile, stages, splits, scheme, chunk, {}};
}

// Best first. Tiles 15 and 20 are 64x64 and 128x128.
std::vector<Algorithm> algorithms(const Shape& shape, uint32_t types, size_t workspace_bytes, unsigned schemes) {
    const Algorithm wide = algorithm_of(66, 20, 15, 1, 0, types), narrow = algorithm_of(66, 15, 20, 1, 64, types);
    const Algorithm split = algorithm_of(21, 15, 13, 2, 0, types);
    std::vector<Algorithm> found = shape.n <= 64 ? std::vector{narrow, wide} : std::vector{wide, narrow};
    const size_t needed = workspace_of(split, shape);
    if (shape.k >= 2 && needed <= std::min(workspace_bytes, MOST_WORKSPACE) && (schemes & REDUCTION_IN_COMPUTE_TYPE) != 0) {
        const bool few_tiles = shape.k >= 1024 && shape.m * shape.n <= 1 << 16;
        found.insert(few_tiles ? found.begin() : found.end(), split);
    }
    return found;
}

HeuristicResult result_of(const Algorithm& algorithm, const Shape& shape) {
    HeuristicResult result = {};
    result.algorithm = algorithm;
    result.workspace_bytes = workspace_of(algorithm, shape);
    const uint64_t side = algorithm.tile == 20 ? 128 : 64;
    const uint64_t tiles = (shape.m + side - 1) / side * ((shape.n + side - 1) / side) * algorithm.splits;
    result.waves = static_cast<float>(tiles) / 132;
    return result;
}

// ---------------------------------------------------------------------------------------------------------------------
// Handles
// ---------------------------------------------------------------------------------------------------------------------

std::mutex handles_mutex;
std::set<const void*>& handles() {
    static auto* const handles = new std::set<const void*>;
    return *handles;
}

template <typename T>
Status take(T& to, const void* from, size_t bytes) {
    if (from == nullptr || bytes < sizeof to) return BLAS_INVALID_VALUE;
    memcpy(&to, from, sizeof to);
    return BLAS_SUCCESS;
}

template <typename T>
Status give(T value, void* to, size_t bytes, size_t* written) {
    if (written != nullptr) *written = sizeof value;
    if (bytes == 0 && written != nullptr) return BLAS_SUCCESS;
    if (to == nullptr || bytes < sizeof value) return BLAS_INVALID_VALUE;
    memcpy(to, &value, sizeof value);
    return BLAS_SUCCESS;
}

} // namespace

EXPORT size_t cublasLtGetVersion() { return 130000; }

EXPORT Status cublasLtCreate(void** handle) {
    void* context = nullptr;
    if (handle == nullptr) return BLAS_INVALID_VALUE;
    if (cuCtxGetCurrent(&context) != SUCCESS || context == nullptr) return BLAS_NOT_INITIALIZED;
    const std::lock_guard<std::mutex> lock(handles_mutex);
    *handle = new char;
    handles().insert(*handle);
    return BLAS_SUCCESS;
}

EXPORT Status cublasLtDestroy(void* handle) {
    const std::lock_guard<std::mutex> lock(handles_mutex);
    if (handles().erase(handle) == 0) return BLAS_NOT_INITIALIZED;
    delete static_cast<char*>(handle);
    return BLAS_SUCCESS;
}

EXPORT const char* cublasLtGetStatusName(Status status) {
    switch (status) {
    case BLAS_SUCCESS: return "CUBLAS_STATUS_SUCCESS";
    case BLAS_NOT_INITIALIZED: return "CUBLAS_STATUS_NOT_INITIALIZED";
    case BLAS_INVALID_VALUE: return "CUBLAS_STATUS_INVALID_VALUE";
    case BLAS_EXECUTION_FAILED: return "CUBLAS_STATUS_EXECUTION_FAILED";
    case BLAS_NOT_SUPPORTED: return "CUBLAS_STATUS_NOT_SUPPORTED";
    }
    return "unknown";
}

EXPORT const char* cublasLtGetStatusString(Status status) { return cublasLtGetStatusName(status); }

EXPORT Status cublasLtMatmulDescCreate(Description** description, int compute, int scale_type) {
    if (description == nullptr) return BLAS_INVALID_VALUE;
    *description = new Description;
    (*description)->compute = compute;
    (*description)->scale_type = scale_type;
    return BLAS_SUCCESS;
}

EXPORT Status cublasLtMatmulDescDestroy(Description* description) {
    delete description;
    return BLAS_SUCCESS;
}

EXPORT Status cublasLtMatmulDescSetAttribute(Description* description, int attribute, const void* from, size_t bytes) {
    if (description == nullptr || from == nullptr) return BLAS_INVALID_VALUE;
    int ignored = 0;
    switch (attribute) {
    case 0: return take(description->compute, from, bytes);
    case 1: return take(description->scale_type, from, bytes);
    case 2: return take(description->pointer_mode, from, bytes);
    case 3: return take(description->transposed_a, from, bytes);
    case 4: return take(description->transposed_b, from, bytes);
    case 5: return take(description->transposed_c, from, bytes);
    case 6: return take(description->fill_mode, from, bytes);
    case 7: return take(description->epilogue, from, bytes);
    case 8: return take(description->bias, from, bytes);
    case 10: return take(description->bias_batch_stride, from, bytes);
    case 15: return take(ignored, from, bytes); // multiprocessors to use
    case 26: return take(description->bias_type, from, bytes);
    default: description->unknown = true; return BLAS_SUCCESS; // rejected when it is used
    }
}

EXPORT Status cublasLtMatrixLayoutCreate(Layout** layout, int type, uint64_t rows, uint64_t columns, int64_t leading) {
    if (layout == nullptr) return BLAS_INVALID_VALUE;
    *layout = new Layout;
    (*layout)->type = type;
    (*layout)->rows = rows;
    (*layout)->columns = columns;
    (*layout)->leading = leading;
    return BLAS_SUCCESS;
}

EXPORT Status cublasLtMatrixLayoutDestroy(Layout* layout) {
    delete layout;
    return BLAS_SUCCESS;
}

EXPORT Status cublasLtMatrixLayoutSetAttribute(Layout* layout, int attribute, const void* from, size_t bytes) {
    if (layout == nullptr || from == nullptr) return BLAS_INVALID_VALUE;
    switch (attribute) {
    case 0: return take(layout->type, from, bytes);
    case 1: return take(layout->order, from, bytes);
    case 2: return take(layout->rows, from, bytes);
    case 3: return take(layout->columns, from, bytes);
    case 4: return take(layout->leading, from, bytes);
    case 5: return take(layout->batches, from, bytes);
    case 6: return take(layout->batch_stride, from, bytes);
    default: return BLAS_INVALID_VALUE;
    }
}

EXPORT Status cublasLtMatmulPreferenceCreate(Preference** preference) {
    if (preference == nullptr) return BLAS_INVALID_VALUE;
    *preference = new Preference;
    return BLAS_SUCCESS;
}

EXPORT Status cublasLtMatmulPreferenceDestroy(Preference* preference) {
    delete preference;
    return BLAS_SUCCESS;
}

EXPORT Status cublasLtMatmulPreferenceSetAttribute(Preference* preference, int attribute, const void* from, size_t bytes) {
    if (preference == nullptr || from == nullptr) return BLAS_INVALID_VALUE;
    unsigned ignored = 0;
    switch (attribute) {
    case 1: return take(preference->workspace_bytes, from, bytes);
    case 3: return take(preference->reduction_schemes, from, bytes);
    case 0: case 5: case 6: case 7: case 8: case 9: return take(ignored, from, bytes);
    case 12: return bytes < 8 ? BLAS_INVALID_VALUE : BLAS_SUCCESS;
    default: return BLAS_INVALID_VALUE;
    }
}

EXPORT Status cublasLtMatmulAlgoGetHeuristic(void* handle, const Description* description, const Layout* a, const Layout* b,
                                             const Layout* c, const Layout* d, const Preference* preference, int requested,
                                             HeuristicResult* results, int* returned) {
    if (handle == nullptr) return BLAS_NOT_INITIALIZED;
    if (preference == nullptr || requested < 1 || results == nullptr || returned == nullptr) return BLAS_INVALID_VALUE;
    *returned = 0;
    Shape shape;
    const Status status = check(description, a, b, c, d, shape);
    if (status != BLAS_SUCCESS) return status;
    for (const Algorithm& algorithm :
         algorithms(shape, types_of(*a, *d), preference->workspace_bytes, preference->reduction_schemes)) {
        if (*returned < requested) results[(*returned)++] = result_of(algorithm, shape);
    }
    return BLAS_SUCCESS;
}

EXPORT Status cublasLtMatmulAlgoCheck(void* handle, const Description* description, const Layout* a, const Layout* b,
                                      const Layout* c, const Layout* d, const Algorithm* algorithm, HeuristicResult* result) {
    if (handle == nullptr) return BLAS_NOT_INITIALIZED;
    if (algorithm == nullptr || result == nullptr || algorithm->magic != MAGIC) return BLAS_INVALID_VALUE;
    Shape shape;
    const Status status = check(description, a, b, c, d, shape);
    if (status != BLAS_SUCCESS) return status;
    if (algorithm->types != types_of(*a, *d)) return BLAS_NOT_SUPPORTED;
    *result = result_of(*algorithm, shape);
    return BLAS_SUCCESS;
}

EXPORT Status cublasLtMatmulAlgoConfigGetAttribute(const Algorithm* algorithm, int attribute, void* to, size_t bytes,
                                                   size_t* written) {
    if (algorithm == nullptr || algorithm->magic != MAGIC) return BLAS_INVALID_VALUE;
    switch (attribute) {
    case 0: return give(algorithm->id, to, bytes, written);
    case 1: return give(algorithm->tile, to, bytes, written);
    case 2: return give(algorithm->splits, to, bytes, written);
    case 3: return give(algorithm->reduction_scheme, to, bytes, written);
    case 4: case 5: return give(uint32_t(0), to, bytes, written);
    case 6: return give(algorithm->stages, to, bytes, written);
    case 7: case 8: return give(uint16_t(0), to, bytes, written);
    default: return BLAS_INVALID_VALUE;
    }
}

EXPORT Status cublasLtMatmul(void* handle, const Description* description, const float* alpha, const void* a_at,
                             const Layout* a, const void* b_at, const Layout* b, const float* beta, const void* c_at,
                             const Layout* c, void* d_at, const Layout* d, const Algorithm* algorithm, void* workspace,
                             size_t workspace_bytes, void* stream) {
    if (handle == nullptr) return BLAS_NOT_INITIALIZED;
    Shape shape;
    const Status status = check(description, a, b, c, d, shape);
    if (status != BLAS_SUCCESS) return status;
    if (alpha == nullptr || beta == nullptr || a_at == nullptr || b_at == nullptr || c_at == nullptr || d_at == nullptr) {
        return BLAS_INVALID_VALUE;
    }
    const bool biased = (description->epilogue & BIAS) != 0;
    if (biased && description->bias == nullptr) return BLAS_INVALID_VALUE;
    const bool aligned = is_aligned(a_at, a->type) && is_aligned(b_at, b->type) && is_aligned(c_at, c->type) &&
                         is_aligned(d_at, d->type);
    const bool bias_aligned = !biased || reinterpret_cast<uintptr_t>(description->bias) % bytes_of(d->type) == 0;
    if (!aligned || !bias_aligned) return BLAS_NOT_SUPPORTED;
    const bool in_place = c_at == d_at;
    if (in_place && *beta != 0 && c->leading != d->leading) return BLAS_INVALID_VALUE;

    const Algorithm chosen =
        algorithm != nullptr ? *algorithm : algorithms(shape, types_of(*a, *d), workspace_bytes, ~0u).front();
    if (chosen.magic != MAGIC) return BLAS_INVALID_VALUE;
    if (chosen.types != types_of(*a, *d)) return BLAS_NOT_SUPPORTED;
    const size_t needed = workspace_of(chosen, shape);
    if (needed > workspace_bytes || (needed > 0 && workspace == nullptr)) return BLAS_INVALID_VALUE;
    if (reinterpret_cast<uintptr_t>(workspace) % 16 != 0) return BLAS_INVALID_VALUE;

    auto gemm = std::make_unique<Gemm>();
    *gemm = {*description, *a, *b, *c, *d, a_at, b_at, c_at, d_at, *alpha, *beta, shape.m, shape.n, shape.k, chosen,
                static_cast<float*>(workspace), needed};
    log_line("matmul m=%llu n=%llu k=%llu types=%d,%d epilogue=%u tile=%u splits=%d", (unsigned long long)shape.m,
             (unsigned long long)shape.n, (unsigned long long)shape.k, a->type, d->type, description->epilogue, chosen.tile,
             chosen.splits);
    const Result result = standin_enqueue(stream, run, gemm.release(), [](void* payload) {
        delete static_cast<Gemm*>(payload);
    });
    return result == SUCCESS ? BLAS_SUCCESS : BLAS_EXECUTION_FAILED;
}
