// Tests the stand-in libraries through the public CUDA interfaces.
//
//     tests/cuda/standin/build.sh OUT_DIR selftest
//
// Each case runs in its own process, because settings are read once and errors are sticky. Prints a line per case; exits 1 if one
// fails.

#include <sys/wait.h>

#include <chrono>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "shared.h"

#ifndef KERNELS_CU
#define KERNELS_CU "src/backend/cuda/kernels/kernels.cu"
#endif

using std::string;
using Pointer = unsigned long long;

extern "C" {
Result cuInit(unsigned);
Result cuDeviceGetCount(int*);
Result cuDeviceGet(int*, int);
Result cuDeviceGetName(char*, int, int);
Result cuDeviceGetAttribute(int*, int, int);
Result cuDevicePrimaryCtxRetain(void**, int);
Result cuDevicePrimaryCtxRelease_v2(int);
Result cuCtxSetCurrent(void*);
Result cuCtxSynchronize();
Result cuMemAlloc_v2(Pointer*, size_t);
Result cuMemFree_v2(Pointer);
Result cuMemGetInfo_v2(size_t*, size_t*);
Result cuMemHostAlloc(void**, size_t, unsigned);
Result cuMemFreeHost(void*);
Result cuMemcpyHtoD_v2(Pointer, const void*, size_t);
Result cuMemcpyDtoH_v2(void*, Pointer, size_t);
Result cuMemcpyHtoDAsync_v2(Pointer, const void*, size_t, void*);
Result cuMemcpyDtoHAsync_v2(void*, Pointer, size_t, void*);
Result cuMemcpyDtoDAsync_v2(Pointer, Pointer, size_t, void*);
Result cuMemsetD8_v2(Pointer, unsigned char, size_t);
Result cuMemsetD8Async(Pointer, unsigned char, size_t, void*);
Result cuStreamCreate(void**, unsigned);
Result cuStreamDestroy_v2(void*);
Result cuStreamSynchronize(void*);
Result cuStreamQuery(void*);
Result cuStreamWaitEvent(void*, void*, unsigned);
Result cuStreamBeginCapture_v2(void*, unsigned);
Result cuStreamEndCapture(void*, void**);
Result cuStreamIsCapturing(void*, int*);
Result cuEventCreate(void**, unsigned);
Result cuEventRecord(void*, void*);
Result cuEventSynchronize(void*);
Result cuEventQuery(void*);
Result cuEventElapsedTime_v2(float*, void*, void*);
Result cuEventDestroy_v2(void*);
Result cuModuleLoadData(void**, const void*);
Result cuModuleUnload(void*);
Result cuModuleGetFunction(void**, void*, const char*);
Result cuFuncSetAttribute(void*, int, int);
Result cuFuncGetAttribute(int*, int, void*);
Result cuLaunchKernel(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**);
Result cuGraphInstantiateWithFlags(void**, void*, unsigned long long);
Result cuGraphLaunch(void*, void*);
Result cuGraphExecDestroy(void*);
Result cuGraphDestroy(void*);
Result cuGetErrorName(int, const char**);

int nvrtcCreateProgram(void**, const char*, const char*, int, const char* const*, const char* const*);
int nvrtcCompileProgram(void*, int, const char* const*);
int nvrtcGetCUBINSize(void*, size_t*);
int nvrtcGetCUBIN(void*, char*);
int nvrtcGetPTXSize(void*, size_t*);
int nvrtcGetProgramLogSize(void*, size_t*);
int nvrtcGetProgramLog(void*, char*);
int nvrtcDestroyProgram(void**);

int cublasLtCreate(void**);
int cublasLtDestroy(void*);
int cublasLtMatmulDescCreate(void**, int, int);
int cublasLtMatmulDescDestroy(void*);
int cublasLtMatmulDescSetAttribute(void*, int, const void*, size_t);
int cublasLtMatrixLayoutCreate(void**, int, uint64_t, uint64_t, int64_t);
int cublasLtMatrixLayoutDestroy(void*);
int cublasLtMatrixLayoutSetAttribute(void*, int, const void*, size_t);
int cublasLtMatmulPreferenceCreate(void**);
int cublasLtMatmulPreferenceDestroy(void*);
int cublasLtMatmulPreferenceSetAttribute(void*, int, const void*, size_t);
int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void*, int*);
int cublasLtMatmulAlgoCheck(void*, void*, void*, void*, void*, void*, const void*, void*);
int cublasLtMatmulAlgoConfigGetAttribute(const void*, int, void*, size_t, size_t*);
int cublasLtMatmul(void*, void*, const void*, const void*, void*, const void*, void*, const void*, const void*, void*, void*,
                   void*, const void*, void*, size_t, void*);
}

namespace {

#define CHECK(condition)                                                          \
    do {                                                                          \
        if (!(condition)) {                                                       \
            printf("    line %d: %s does not hold\n", __LINE__, #condition);      \
            exit(1);                                                              \
        }                                                                         \
    } while (false)

#define CHECK_IS(call, expected)                                                                        \
    do {                                                                                                \
        const int result_of_check = (call);                                                             \
        if (result_of_check != (expected)) {                                                            \
            printf("    line %d: %s gives %d, not %s\n", __LINE__, #call, result_of_check, #expected);   \
            exit(1);                                                                                    \
        }                                                                                               \
    } while (false)

#define DO(call) CHECK_IS(call, SUCCESS)

constexpr unsigned NON_BLOCKING = 1, DISABLE_TIMING = 2;
constexpr int GLOBAL = 0, THREAD_LOCAL = 1, RELAXED = 2; // capture modes
constexpr int MAX_DYNAMIC_SHARED = 8, MAX_THREADS = 0;   // function attributes

void open_device() {
    void* context = nullptr;
    DO(cuInit(0));
    DO(cuDevicePrimaryCtxRetain(&context, 0));
    DO(cuCtxSetCurrent(context));
}

void* new_stream(unsigned flags = NON_BLOCKING) {
    void* stream = nullptr;
    DO(cuStreamCreate(&stream, flags));
    return stream;
}

void* new_event(unsigned flags = 0) {
    void* event = nullptr;
    DO(cuEventCreate(&event, flags));
    return event;
}

Pointer new_device(size_t bytes) {
    Pointer pointer = 0;
    DO(cuMemAlloc_v2(&pointer, bytes));
    CHECK(pointer % 256 == 0);
    return pointer;
}

template <typename T>
Pointer on_device(const std::vector<T>& values) {
    const Pointer pointer = new_device(values.size() * sizeof(T));
    DO(cuMemcpyHtoD_v2(pointer, values.data(), values.size() * sizeof(T)));
    return pointer;
}

template <typename T>
T* new_pinned(size_t count) {
    void* pointer = nullptr;
    DO(cuMemHostAlloc(&pointer, count * sizeof(T), 0));
    return static_cast<T*>(pointer);
}

int read_int(Pointer from) {
    int value = 0;
    DO(cuMemcpyDtoH_v2(&value, from, sizeof value));
    return value;
}

struct Compiled {
    int status = 0;
    string log;
    std::vector<char> cubin;
};

// `headers` are pairs of name and text.
Compiled compile(const string& source, std::vector<string> options,
                 const std::vector<std::pair<string, string>>& headers = {}) {
    Compiled compiled;
    // The emulator needs an element type.
    if (source.find("ELEMENT_F16") == string::npos) options.push_back("-DELEMENT_F16");
    void* program = nullptr;
    std::vector<const char*> names, texts;
    for (const auto& [name, text] : headers) {
        names.push_back(name.c_str());
        texts.push_back(text.c_str());
    }
    CHECK_IS(nvrtcCreateProgram(&program, source.c_str(), "test.cu", int(names.size()), texts.data(), names.data()), 0);
    std::vector<const char*> pointers;
    for (const string& option : options) pointers.push_back(option.c_str());
    compiled.status = nvrtcCompileProgram(program, int(pointers.size()), pointers.data());
    size_t bytes = 0;
    CHECK_IS(nvrtcGetProgramLogSize(program, &bytes), 0);
    compiled.log.resize(bytes);
    CHECK_IS(nvrtcGetProgramLog(program, compiled.log.data()), 0);
    compiled.log.pop_back();
    if (compiled.status == 0) {
        CHECK_IS(nvrtcGetCUBINSize(program, &bytes), 0);
        compiled.cubin.resize(bytes);
        if (bytes > 0) CHECK_IS(nvrtcGetCUBIN(program, compiled.cubin.data()), 0);
    }
    CHECK_IS(nvrtcDestroyProgram(&program), 0);
    CHECK(program == nullptr);
    return compiled;
}

const char SOURCE[] = R"(
// extern "C" __global__ void in_a_comment(int x) {}
#ifdef ABSENT
extern "C" __global__ void absent(int x) {}
#endif
extern "C" __global__ void __launch_bounds__(128, 2) scale(const float* __restrict__ x, unsigned short n, float factor,
                                                          float* __restrict__ out) {
    unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = x[i] * factor + OFFSET;
}
extern "C" __global__ void reverse(int* x) {
    DYNAMIC_SHARED(shared);
    int* const copy = (int*)shared;
    copy[blockDim.x - 1 - threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    x[threadIdx.x] = copy[threadIdx.x];
}
extern "C" __global__ void add_one(int* x) {
    if (threadIdx.x == 0) *x += 1;
}
extern "C" __global__ void write_at(int* x, int index) {
    if (threadIdx.x == 0) x[index] = 7;
}
)";

void* load(const char* offset = "-DOFFSET=0") {
    const Compiled compiled = compile(SOURCE, {"--gpu-architecture=sm_90", offset});
    if (compiled.status != 0) printf("%s", compiled.log.c_str());
    CHECK_IS(compiled.status, 0);
    CHECK(compiled.log.empty());
    void* module = nullptr;
    DO(cuModuleLoadData(&module, compiled.cubin.data()));
    return module;
}

void* function(void* module, const char* name) {
    void* function = nullptr;
    DO(cuModuleGetFunction(&function, module, name));
    return function;
}

Result launch(void* function, unsigned blocks, unsigned threads, unsigned shared, void* stream,
              std::vector<void*> arguments) {
    return cuLaunchKernel(function, blocks, 1, 1, threads, 1, 1, shared, stream, arguments.data(), nullptr);
}

// ---------------------------------------------------------------------------------------------------------------------
// Driver
// ---------------------------------------------------------------------------------------------------------------------

void devices() {
    CHECK_IS(cuInit(0), SUCCESS);
    int count = 0, device = -1, value = 0;
    char name[64];
    DO(cuDeviceGetCount(&count));
    CHECK(count == 2);
    DO(cuDeviceGet(&device, 1));
    CHECK_IS(cuDeviceGet(&device, 2), INVALID_DEVICE);
    DO(cuDeviceGetName(name, sizeof name, 0));
    DO(cuDeviceGetAttribute(&value, 75, 0));
    CHECK(value == 8);
    DO(cuDeviceGetAttribute(&value, 76, 0));
    CHECK(value == 6);
    DO(cuDeviceGetAttribute(&value, 97, 0));
    CHECK(value == 99 << 10);
    Pointer pointer;
    CHECK_IS(cuMemAlloc_v2(&pointer, 4), INVALID_CONTEXT);
}

void no_devices() { CHECK_IS(cuInit(0), NO_DEVICE); }

void before_init() {
    int count;
    CHECK_IS(cuDeviceGetCount(&count), NOT_INITIALIZED);
}

void contexts_end() {
    open_device();
    const Pointer x = new_device(100);
    void* const stream = new_stream();
    DO(cuDevicePrimaryCtxRelease_v2(0));
    CHECK_IS(cuMemFree_v2(x), INVALID_CONTEXT);
    open_device();
    CHECK_IS(cuStreamSynchronize(stream), INVALID_HANDLE);
    size_t free = 0, total = 0;
    DO(cuMemGetInfo_v2(&free, &total));
    CHECK(free == total);
}

void work_is_deferred() {
    open_device();
    void* const stream = new_stream();
    const Pointer x = new_device(4);
    int* const pinned = new_pinned<int>(2);
    CHECK(read_int(x) == -1); // NaN bytes

    // Pinned memory that is reused too early is copied with the new value; a result read too early is missing.
    pinned[0] = 1;
    DO(cuMemcpyHtoDAsync_v2(x, &pinned[0], 4, stream));
    DO(cuMemcpyDtoHAsync_v2(&pinned[1], x, 4, stream));
    pinned[0] = 2;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    CHECK(pinned[1] == -1);
    DO(cuStreamSynchronize(stream));
    CHECK(pinned[1] == 2);

    // Pageable memory is read during the call, and written before the call returns.
    int source = 3, target = 0;
    DO(cuMemcpyHtoDAsync_v2(x, &source, 4, stream));
    source = 4;
    DO(cuMemcpyDtoHAsync_v2(&target, x, 4, stream));
    CHECK(target == 3);

    // Polling runs one operation at a time.
    DO(cuMemsetD8Async(x, 5, 4, stream));
    DO(cuMemcpyDtoHAsync_v2(&pinned[1], x, 4, stream));
    CHECK_IS(cuStreamQuery(stream), NOT_READY);
    CHECK(pinned[1] == 2);
    CHECK_IS(cuStreamQuery(stream), NOT_READY);
    DO(cuStreamQuery(stream));
    CHECK(pinned[1] == 0x05050505);

    // A destroyed stream still runs its pending work.
    DO(cuMemsetD8Async(x, 6, 4, stream));
    DO(cuStreamDestroy_v2(stream));
    CHECK_IS(cuStreamSynchronize(stream), INVALID_HANDLE);
    DO(cuCtxSynchronize());
    CHECK(read_int(x) == 0x06060606);
    DO(cuMemFreeHost(pinned));
    CHECK_IS(cuMemFreeHost(&source), INVALID_VALUE);
    DO(cuMemFree_v2(x));
    CHECK_IS(cuMemFree_v2(x), INVALID_VALUE);
}

void streams_depend_by_events() {
    open_device();
    void *const first = new_stream(), *const second = new_stream();
    const Pointer x = new_device(4), y = new_device(4);
    void *const start = new_event(), *const done = new_event(), *const untimed = new_event(DISABLE_TIMING);
    float milliseconds = -1;
    DO(cuEventQuery(done));

    // Without an event the second stream does not see the first one's work.
    DO(cuMemsetD8Async(x, 1, 4, first));
    DO(cuMemcpyDtoDAsync_v2(y, x, 4, second));
    DO(cuStreamSynchronize(second));
    CHECK(read_int(y) == -1);
    DO(cuStreamSynchronize(first));

    DO(cuEventRecord(start, first));
    DO(cuMemsetD8Async(x, 2, 4, first));
    DO(cuEventRecord(done, first));
    DO(cuMemsetD8Async(x, 3, 4, first));
    DO(cuStreamWaitEvent(second, done, 0));
    DO(cuMemcpyDtoDAsync_v2(y, x, 4, second));
    CHECK_IS(cuEventElapsedTime_v2(&milliseconds, start, done), NOT_READY);
    DO(cuStreamSynchronize(second));
    CHECK(read_int(y) == 0x02020202);
    DO(cuEventElapsedTime_v2(&milliseconds, start, done));
    CHECK(milliseconds >= 0);
    CHECK_IS(cuEventElapsedTime_v2(&milliseconds, start, untimed), INVALID_HANDLE);

    DO(cuEventRecord(done, first));
    DO(cuEventSynchronize(done));
    CHECK(read_int(x) == 0x03030303);
    DO(cuEventRecord(done, second));
    while (cuEventQuery(done) == NOT_READY) {
    }
    DO(cuEventDestroy_v2(done));
    CHECK_IS(cuEventRecord(done, first), INVALID_HANDLE);
}

void legacy_stream() {
    open_device();
    void *const blocking = new_stream(0), *const independent = new_stream();
    const Pointer x = new_device(4), y = new_device(4);
    DO(cuMemsetD8Async(x, 1, 4, blocking));
    DO(cuMemsetD8Async(y, 1, 4, independent));
    CHECK(read_int(x) == 0x01010101); // a synchronous copy waits for blocking streams,
    CHECK(read_int(y) == -1);         // and for no others
    DO(cuMemsetD8Async(x, 2, 4, nullptr));
    DO(cuStreamSynchronize(blocking));
    DO(cuMemcpyDtoDAsync_v2(y, x, 4, blocking));
    DO(cuStreamSynchronize(blocking));
    CHECK(read_int(y) == 0x02020202);
}

void threads() {
    open_device();
    const Pointer x = on_device(std::vector<int>(1, 0));
    void* const add = function(load(), "add_one");
    std::vector<std::thread> threads;
    for (int i = 0; i < 4; ++i) {
        threads.emplace_back([=] {
            open_device();
            void* const stream = new_stream();
            Pointer argument = x;
            for (int j = 0; j < 50; ++j) {
                DO(launch(add, 1, 32, 0, stream, {&argument}));
                if (j % 7 == 0) DO(cuStreamSynchronize(stream));
                if (j % 11 == 0) cuStreamQuery(stream);
            }
            DO(cuStreamSynchronize(stream));
        });
    }
    for (std::thread& thread : threads) thread.join();
    CHECK(read_int(x) == 200);
}

// ---------------------------------------------------------------------------------------------------------------------
// Kernels
// ---------------------------------------------------------------------------------------------------------------------

void kernels() {
    open_device();
    void* const module = load();
    void* const other = load("-DOFFSET=100");
    void *const scale = function(module, "scale"), *const reverse = function(module, "reverse");
    void* nothing = nullptr;
    CHECK_IS(cuModuleGetFunction(&nothing, module, "absent"), NOT_FOUND);
    CHECK_IS(cuModuleGetFunction(&nothing, module, "in_a_comment"), NOT_FOUND);

    // Arguments are taken at the call.
    void* const stream = new_stream();
    const std::vector<float> values(40, 3);
    std::vector<float> results(40);
    Pointer x = on_device(values), out = new_device(160);
    unsigned short n = 40;
    float factor = 10;
    DO(launch(scale, 2, 32, 0, stream, {&x, &n, &factor, &out}));
    n = 0, factor = -1;
    DO(cuMemcpyDtoHAsync_v2(results.data(), out, 160, stream));
    CHECK(results == std::vector<float>(40, 30));
    n = 40, factor = 1;
    DO(launch(function(other, "scale"), 1, 128, 0, stream, {&x, &n, &factor, &out}));
    DO(cuMemcpyDtoHAsync_v2(results.data(), out, 160, stream));
    CHECK(results == std::vector<float>(40, 103));

    std::vector<int> numbered(64);
    for (int i = 0; i < 64; ++i) numbered[i] = i;
    Pointer numbers = on_device(numbered);
    DO(launch(reverse, 1, 64, 256, stream, {&numbers}));
    DO(cuStreamSynchronize(stream));
    CHECK(read_int(numbers) == 63);

    // Limits.
    int most = 0;
    DO(cuFuncGetAttribute(&most, MAX_THREADS, scale));
    CHECK(most == 128);
    CHECK_IS(launch(scale, 1, 160, 0, stream, {&x, &n, &factor, &out}), INVALID_VALUE);
    CHECK_IS(launch(reverse, 1, 1056, 4224, stream, {&numbers}), INVALID_VALUE);
    CHECK_IS(launch(reverse, 0, 64, 256, stream, {&numbers}), INVALID_VALUE);
    CHECK_IS(launch(reverse, 1, 64, 49153, stream, {&numbers}), INVALID_VALUE);
    DO(cuFuncSetAttribute(reverse, MAX_DYNAMIC_SHARED, 100 << 10));
    DO(launch(reverse, 1, 64, 100 << 10, stream, {&numbers}));
    DO(cuStreamSynchronize(stream));
    CHECK(read_int(numbers) == 0);
    CHECK_IS(cuFuncSetAttribute(reverse, MAX_DYNAMIC_SHARED, (227 << 10) + 1), INVALID_VALUE);
    CHECK_IS(launch(scale, 1, 32, 0, reinterpret_cast<void*>(0x1234), {&x, &n, &factor, &out}), INVALID_HANDLE);
    DO(cuModuleUnload(module));
    CHECK_IS(launch(reverse, 1, 64, 256, stream, {&numbers}), INVALID_HANDLE);
}

void kernel_outside_its_memory() {
    open_device();
    void* const stream = new_stream();
    Pointer x = new_device(1000);
    int index = 1024 / 4;
    DO(launch(function(load(), "write_at"), 1, 32, 0, stream, {&x, &index}));
    cuStreamSynchronize(stream);
}

void kernel_in_freed_memory() {
    open_device();
    void* const stream = new_stream();
    Pointer x = new_device(1000);
    int index = 0;
    void* const kernel = function(load(), "write_at");
    DO(cuMemFree_v2(x));
    DO(launch(kernel, 1, 32, 0, stream, {&x, &index}));
    cuStreamSynchronize(stream);
}

void compiler() {
    constexpr int INVALID_OPTION = 5, COMPILATION = 6;
    CHECK_IS(compile("extern \"C\" __global__ void f(", {}).status, COMPILATION);
    const Compiled wrong = compile("extern \"C\" __global__ void f(int* x) {\n    *x = undeclared;\n}\n", {});
    CHECK_IS(wrong.status, COMPILATION);
    CHECK(wrong.log.find("test.cu:2:") != string::npos && wrong.log.find("undeclared") != string::npos);

    const string kernel = "extern \"C\" __global__ void f(int* x) { *x = A + B; }\n";
    const Compiled right =
        compile(kernel, {"--gpu-architecture=sm_90a", "-DA=1", "--define-macro=B=2", "--std=c++17", "-default-device"});
    CHECK_IS(right.status, 0);
    CHECK_IS(compile(kernel, {"-arch=sm_120", "-D", "A=1", "-DB"}).status, 0);
    for (const char* architecture : {"sm_70", "sm_91", "sm_80a", "sm_90f", "sm_", "90", "gfx942", "sm_90ab"}) {
        const Compiled refused = compile(kernel, {string("--gpu-architecture=") + architecture, "-DA", "-DB"});
        CHECK_IS(refused.status, INVALID_OPTION);
        CHECK(refused.log.find("--gpu-architecture") != string::npos);
    }
    CHECK_IS(compile(kernel, {"--no-such-option", "-DA", "-DB"}).status, INVALID_OPTION);
    const Compiled ptx = compile(kernel, {"--gpu-architecture=compute_90", "-DA", "-DB"});
    CHECK_IS(ptx.status, 0);
    CHECK(ptx.cubin.empty());
}

void modules_are_checked() { // on a device of capability 8.6
    open_device();
    const string kernel = "extern \"C\" __global__ void f(int* x) { *x = 1; }\n";
    const auto loaded = [&](const char* architecture) {
        void* module = nullptr;
        return cuModuleLoadData(&module, compile(kernel, {string("-arch=") + architecture}).cubin.data());
    };
    DO(loaded("sm_80"));
    DO(loaded("sm_86"));
    CHECK_IS(loaded("sm_89"), NO_BINARY_FOR_GPU);
    CHECK_IS(loaded("sm_90"), NO_BINARY_FOR_GPU);
    void* module = nullptr;
    CHECK_IS(cuModuleLoadData(&module, "no image at all, and long enough to hold a header of sixty-four"), INVALID_IMAGE);
}

// The backend's kernels, through NVRTC and the driver.
void backend_kernels() {
    open_device();
    string source;
    std::vector<std::pair<string, string>> headers;
    for (const auto& entry : std::filesystem::directory_iterator(std::filesystem::path(KERNELS_CU).parent_path())) {
        std::ifstream file(entry.path());
        const string name = entry.path().filename().string(), text{std::istreambuf_iterator<char>(file), {}};
        if (name == "kernels.cu") {
            source = text;
        } else {
            headers.push_back({name, text});
        }
    }
    CHECK(!source.empty() && !headers.empty());
    constexpr unsigned C = 256, ROWS = 5;
    for (const char* type : {"-DELEMENT_F32", "-DELEMENT_F16", "-DELEMENT_BF16", "-DELEMENT_FP8"}) {
        const Compiled compiled = compile(source, {"-arch=sm_90", type, "-DHIDDEN_SIZE=256", "-DHEAD_SIZE=64"}, headers);
        if (compiled.status != 0) printf("%s", compiled.log.c_str());
        CHECK_IS(compiled.status, 0);
        void* module = nullptr;
        DO(cuModuleLoadData(&module, compiled.cubin.data()));
        function(module, "attention");
        void* const layer_norm = function(module, "layer_norm");
        if (type != string("-DELEMENT_F32")) continue;
        std::vector<float> values(ROWS * C), results(ROWS * C);
        for (size_t i = 0; i < values.size(); ++i) values[i] = float(i % 17) - float(i / C);
        Pointer rows = on_device(std::vector<unsigned>{ROWS}), x = on_device(values);
        Pointer weight = on_device(std::vector<float>(C, 2)), bias = on_device(std::vector<float>(C, 3));
        Pointer no_operand = 0;
        float eps = 1e-5f, scale = 0;
        void* const stream = new_stream();
        DO(launch(layer_norm, 2, 256, 0, stream, {&rows, &x, &weight, &bias, &eps, &x, &no_operand, &scale}));
        DO(cuMemcpyDtoHAsync_v2(results.data(), x, results.size() * 4, stream));
        for (unsigned row = 0; row < ROWS; ++row) {
            double mean = 0, squares = 0;
            for (unsigned i = 0; i < C; ++i) mean += results[row * C + i] / double(C);
            for (unsigned i = 0; i < C; ++i) squares += std::pow(results[row * C + i] - mean, 2) / C;
            CHECK(std::fabs(mean - 3) < 1e-5 && std::fabs(squares - 4) < 1e-4);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Captures
// ---------------------------------------------------------------------------------------------------------------------

void capture_and_replay() {
    open_device();
    void *const stream = new_stream(), *const side = new_stream();
    void* const add = function(load(), "add_one");
    Pointer x = new_device(4), y = new_device(4);
    int* const pinned = new_pinned<int>(2);
    void *graph = nullptr, *executable = nullptr;
    int status = -1;

    DO(cuStreamBeginCapture_v2(stream, THREAD_LOCAL));
    DO(cuStreamIsCapturing(stream, &status));
    CHECK(status == 1);
    DO(cuMemcpyHtoDAsync_v2(x, &pinned[0], 4, stream));
    DO(launch(add, 1, 32, 0, stream, {&x}));
    // Another stream joins by an event, and comes back.
    void *const fork = new_event(), *const join = new_event();
    DO(cuEventRecord(fork, stream));
    DO(cuStreamWaitEvent(side, fork, 0));
    DO(cuMemcpyDtoDAsync_v2(y, x, 4, side));
    DO(cuEventRecord(join, side));
    DO(cuStreamWaitEvent(stream, join, 0));
    DO(launch(add, 1, 32, 0, stream, {&y}));
    DO(cuMemcpyDtoHAsync_v2(&pinned[1], y, 4, stream));
    DO(cuStreamEndCapture(stream, &graph));
    DO(cuStreamIsCapturing(side, &status));
    CHECK(status == 0);
    DO(cuStreamSynchronize(stream));
    CHECK(read_int(x) == -1); // captured, not run

    DO(cuGraphInstantiateWithFlags(&executable, graph, 0));
    DO(cuGraphDestroy(graph));
    for (int value : {10, 20}) {
        pinned[0] = value;
        DO(cuGraphLaunch(executable, stream));
        CHECK(pinned[1] != value + 2);
        DO(cuStreamSynchronize(stream));
        CHECK(pinned[1] == value + 2);
    }
    DO(cuGraphExecDestroy(executable));
    CHECK_IS(cuGraphLaunch(executable, stream), INVALID_HANDLE);
}

void illegal_in_capture() {
    open_device();
    void *const stream = new_stream(), *const other = new_stream();
    void* const event = new_event();
    const Pointer x = new_device(4);
    Pointer more = 0;
    int value = 0;
    void* graph = nullptr;
    const std::function<Result()> illegal[] = {
        [&] { return cuStreamSynchronize(stream); },
        [&] { return cuStreamQuery(stream); },
        [&] { return cuCtxSynchronize(); },
        [&] { return cuMemAlloc_v2(&more, 4); },
        [&] { return cuMemFree_v2(x); },
        [&] { return cuMemcpyDtoH_v2(&value, x, 4); },
        [&] { return cuMemcpyHtoDAsync_v2(x, &value, 4, stream); },
        [&] { return cuEventQuery(event); },
    };
    for (const auto& call : illegal) {
        DO(cuStreamBeginCapture_v2(stream, GLOBAL));
        CHECK_IS(call(), CAPTURE_UNSUPPORTED);
        CHECK_IS(cuMemsetD8Async(x, 0, 4, stream), CAPTURE_INVALIDATED);
        CHECK_IS(cuStreamEndCapture(stream, &graph), CAPTURE_INVALIDATED);
        CHECK(graph == nullptr);
    }
    // Only a global capture is invalidated by another thread.
    for (const int mode : {GLOBAL, THREAD_LOCAL}) {
        DO(cuStreamBeginCapture_v2(stream, mode));
        std::thread([&] {
            open_device();
            CHECK_IS(cuMemAlloc_v2(&more, 4), mode == GLOBAL ? CAPTURE_UNSUPPORTED : SUCCESS);
        }).join();
        CHECK_IS(cuStreamEndCapture(stream, &graph), mode == GLOBAL ? CAPTURE_INVALIDATED : SUCCESS);
    }
    DO(cuStreamBeginCapture_v2(stream, RELAXED));
    DO(cuMemAlloc_v2(&more, 4));
    DO(cuStreamSynchronize(other));
    DO(cuStreamEndCapture(stream, &graph));
    CHECK_IS(cuStreamBeginCapture_v2(nullptr, GLOBAL), CAPTURE_UNSUPPORTED);
    CHECK_IS(cuStreamEndCapture(stream, &graph), ILLEGAL_STATE);
}

// ---------------------------------------------------------------------------------------------------------------------
// Faults
// ---------------------------------------------------------------------------------------------------------------------

void memory_ends() { // at 16 MiB
    open_device();
    Pointer pointer = 0;
    size_t free = 0, total = 0;
    const Pointer most = new_device(15 << 20);
    CHECK_IS(cuMemAlloc_v2(&pointer, 2 << 20), OUT_OF_MEMORY);
    DO(cuMemGetInfo_v2(&free, &total));
    CHECK(total == 16 << 20 && free == 1 << 20);
    DO(cuMemFree_v2(most));
    new_device(16 << 20);
}

void injected_mallocs() { // malloc:2:2
    open_device();
    Pointer pointer = 0;
    new_device(4);
    CHECK_IS(cuMemAlloc_v2(&pointer, 4), OUT_OF_MEMORY);
    CHECK_IS(cuMemAlloc_v2(&pointer, 4), OUT_OF_MEMORY);
    new_device(4);
}

void injected_mallocs_for_good() { // malloc:2
    open_device();
    Pointer pointer = 0;
    new_device(4);
    for (int i = 0; i < 5; ++i) CHECK_IS(cuMemAlloc_v2(&pointer, 4), OUT_OF_MEMORY);
}

void check_all_is_lost(void* stream, Pointer x) {
    Pointer more = 0;
    int value = 0;
    void* handle = nullptr;
    const char* name = nullptr;
    CHECK_IS(cuStreamSynchronize(stream), ILLEGAL_ADDRESS);
    CHECK_IS(cuCtxSynchronize(), ILLEGAL_ADDRESS);
    CHECK_IS(cuMemAlloc_v2(&more, 4), ILLEGAL_ADDRESS);
    CHECK_IS(cuMemFree_v2(x), ILLEGAL_ADDRESS);
    CHECK_IS(cuMemcpyDtoH_v2(&value, x, 4), ILLEGAL_ADDRESS);
    CHECK_IS(cuStreamCreate(&handle, 0), ILLEGAL_ADDRESS);
    CHECK_IS(cuDevicePrimaryCtxRetain(&handle, 0), ILLEGAL_ADDRESS);
    DO(cuGetErrorName(ILLEGAL_ADDRESS, &name));
    CHECK(name == string("CUDA_ERROR_ILLEGAL_ADDRESS"));
}

void injected_launch() { // launch:3: the third launch fails, here the graph's second
    open_device();
    void* const stream = new_stream();
    void* const add = function(load(), "add_one");
    void *graph = nullptr, *executable = nullptr;
    Pointer x = on_device(std::vector<int>{0});
    DO(launch(add, 1, 32, 0, stream, {&x}));
    DO(cuStreamSynchronize(stream));
    DO(cuStreamBeginCapture_v2(stream, THREAD_LOCAL));
    DO(launch(add, 1, 32, 0, stream, {&x}));
    DO(cuStreamEndCapture(stream, &graph));
    DO(cuGraphInstantiateWithFlags(&executable, graph, 0));
    DO(cuGraphLaunch(executable, stream));
    DO(cuStreamSynchronize(stream));
    DO(cuGraphLaunch(executable, stream)); // the fault comes when it runs
    check_all_is_lost(stream, x);
}

void copy_outside_allocations() {
    open_device();
    void* const stream = new_stream();
    const Pointer x = new_device(100);
    int* const pinned = new_pinned<int>(100);
    DO(cuMemcpyHtoDAsync_v2(x + 40, pinned, 60, stream));
    DO(cuStreamSynchronize(stream));
    DO(cuMemcpyHtoDAsync_v2(x + 40, pinned, 61, stream));
    check_all_is_lost(stream, x);
}

// ---------------------------------------------------------------------------------------------------------------------
// GEMMs
// ---------------------------------------------------------------------------------------------------------------------

constexpr int F32 = 0, F16 = 2, BF16 = 14, E4M3 = 28;
constexpr unsigned NO_EPILOGUE = 1, RELU = 2, BIAS = 4, GELU = 32;

size_t bytes_of(int type) { return type == F32 ? 4 : type == E4M3 ? 1 : 2; }

// Independent of cublaslt.cpp, in double precision.
double decoded(const std::vector<char>& bytes, size_t index, int type) {
    if (type == E4M3) {
        const unsigned char bits = static_cast<unsigned char>(bytes[index]);
        const int exponent = bits >> 3 & 15, fraction = bits & 7;
        return (bits >> 7 ? -1 : 1) * std::ldexp(exponent == 0 ? fraction : fraction + 8, std::max(exponent, 1) - 10);
    }
    if (type == F32) {
        float value;
        memcpy(&value, &bytes[index * 4], 4);
        return value;
    }
    uint16_t bits;
    memcpy(&bits, &bytes[index * 2], 2);
    const int exponent_bits = type == F16 ? 5 : 8, fraction_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
    const int exponent = bits >> fraction_bits & ((1 << exponent_bits) - 1), fraction = bits & ((1 << fraction_bits) - 1);
    const double sign = bits >> 15 ? -1 : 1;
    if (exponent == (1 << exponent_bits) - 1) {
        return fraction != 0 ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
    }
    const double significand = exponent == 0 ? fraction : fraction + (1 << fraction_bits);
    return sign * std::ldexp(significand, std::max(exponent, 1) - bias - fraction_bits);
}

// Half a unit in the last place of a value of this type.
double rounding(double value, int type) {
    const int fraction_bits = type == F32 ? 23 : type == F16 ? 10 : 7, smallest = type == F16 ? -14 : -126;
    const int exponent = value == 0 ? smallest : std::max(std::ilogb(value), smallest);
    return std::ldexp(0.5, exponent - fraction_bits);
}

// Values that every type represents exactly: small, with few bits.
std::vector<char> random_matrix(size_t count, int type, std::mt19937& random) {
    std::vector<char> bytes(count * bytes_of(type));
    for (size_t i = 0; i < count; ++i) {
        if (type == E4M3) { // all that are below 4
            bytes[i] = static_cast<char>(random() % 0x48 | random() % 2 << 7);
            continue;
        }
        const float value = (int(random() % 255) - 127) / 64.0f;
        uint32_t bits;
        memcpy(&bits, &value, 4);
        if (type == F32) {
            memcpy(&bytes[i * 4], &bits, 4);
            continue;
        }
        // At most seven fraction bits and no subnormals, so that truncation is exact.
        const uint16_t sign = bits >> 16 & 0x8000;
        const uint16_t half = value == 0 ? 0 : sign | uint16_t((bits >> 13 & 0x3ffff) - (112 << 10));
        const uint16_t encoded = type == F16 ? half : uint16_t(bits >> 16);
        memcpy(&bytes[i * 2], &encoded, 2);
    }
    return bytes;
}

struct Heuristic {
    uint64_t algorithm[8];
    size_t workspace_bytes;
    int state;
    float waves;
    int reserved[4];
};

struct Case {
    int type, output;
    bool turned_a, turned_b;
    unsigned epilogue;
    uint64_t m, n, k;
    float alpha = 1, beta = 0;
    int batches = 1;
    int padding = 0; // leading dimension minus rows
};

struct Matrix {
    void* layout = nullptr;
    uint64_t rows, columns, leading, stride;
    std::vector<char> bytes;
    Pointer at = 0;

    Matrix(uint64_t rows, uint64_t columns, int type, const Case& shape, std::mt19937& random)
        : rows(rows), columns(columns), leading(rows + shape.padding), stride(leading * columns + 8 - leading * columns % 8) {
        CHECK_IS(cublasLtMatrixLayoutCreate(&layout, type, rows, columns, int64_t(leading)), 0);
        CHECK_IS(cublasLtMatrixLayoutSetAttribute(layout, 5, &shape.batches, 4), 0);
        CHECK_IS(cublasLtMatrixLayoutSetAttribute(layout, 6, &stride, 8), 0);
        bytes = random_matrix(stride * shape.batches, type, random);
        at = on_device(bytes);
    }
    ~Matrix() {
        cublasLtMatrixLayoutDestroy(layout);
        cuMemFree_v2(at);
    }
    size_t index(uint64_t row, uint64_t column, int batch) const { return batch * stride + column * leading + row; }
};

struct Blas {
    void *handle = nullptr, *preference = nullptr, *stream = nullptr;
    Pointer workspace = 0;
    size_t workspace_bytes = 1 << 20;

    Blas() {
        open_device();
        stream = new_stream();
        workspace = new_device(workspace_bytes);
        CHECK_IS(cublasLtCreate(&handle), 0);
        CHECK_IS(cublasLtMatmulPreferenceCreate(&preference), 0);
        CHECK_IS(cublasLtMatmulPreferenceSetAttribute(preference, 1, &workspace_bytes, 8), 0);
    }
};

// Checks every algorithm that the heuristic returns, each element of D against a sum in double precision. Returns their number.
int check_gemm(Blas& blas, const Case& shape) {
    std::mt19937 random(7);
    Matrix a(shape.turned_a ? shape.k : shape.m, shape.turned_a ? shape.m : shape.k, shape.type, shape, random);
    Matrix b(shape.turned_b ? shape.n : shape.k, shape.turned_b ? shape.k : shape.n, shape.type, shape, random);
    Matrix c(shape.m, shape.n, shape.output, shape, random), d(shape.m, shape.n, shape.output, shape, random);
    const std::vector<char> bias = random_matrix(shape.m, shape.output, random);
    const Pointer bias_at = on_device(bias);

    void* description = nullptr;
    const int turned_a = shape.turned_a, turned_b = shape.turned_b;
    CHECK_IS(cublasLtMatmulDescCreate(&description, 68, F32), 0);
    CHECK_IS(cublasLtMatmulDescSetAttribute(description, 3, &turned_a, 4), 0);
    CHECK_IS(cublasLtMatmulDescSetAttribute(description, 4, &turned_b, 4), 0);
    CHECK_IS(cublasLtMatmulDescSetAttribute(description, 7, &shape.epilogue, 4), 0);
    CHECK_IS(cublasLtMatmulDescSetAttribute(description, 8, &bias_at, 8), 0);

    Heuristic found[8];
    int count = 0;
    CHECK_IS(cublasLtMatmulAlgoGetHeuristic(blas.handle, description, a.layout, b.layout, c.layout, d.layout,
                                            blas.preference, 8, found, &count), 0);
    CHECK(count >= 2);
    for (int i = 0; i < count; ++i) {
        CHECK(found[i].state == 0 && found[i].workspace_bytes <= blas.workspace_bytes);
        DO(cuMemsetD8_v2(d.at, 0xFF, d.bytes.size()));
        CHECK_IS(cublasLtMatmul(blas.handle, description, &shape.alpha, (void*)a.at, a.layout, (void*)b.at, b.layout,
                                &shape.beta, (void*)c.at, c.layout, (void*)d.at, d.layout, found[i].algorithm,
                                (void*)blas.workspace, found[i].workspace_bytes, blas.stream), 0);
        DO(cuMemcpyDtoHAsync_v2(d.bytes.data(), d.at, d.bytes.size(), blas.stream));
        for (int batch = 0; batch < shape.batches; ++batch) {
            for (uint64_t row = 0; row < shape.m; ++row) {
                for (uint64_t column = 0; column < shape.n; ++column) {
                    double sum = 0, size = 0;
                    for (uint64_t j = 0; j < shape.k; ++j) {
                        const size_t of_a = shape.turned_a ? a.index(j, row, batch) : a.index(row, j, batch);
                        const size_t of_b = shape.turned_b ? b.index(column, j, batch) : b.index(j, column, batch);
                        const double x = decoded(a.bytes, of_a, shape.type), y = decoded(b.bytes, of_b, shape.type);
                        sum += x * y;
                        size += std::fabs(x * y);
                    }
                    double value = shape.alpha * sum;
                    if (shape.beta != 0) value += shape.beta * decoded(c.bytes, c.index(row, column, batch), shape.output);
                    if ((shape.epilogue & BIAS) != 0) value += decoded(bias, row, shape.output);
                    if ((shape.epilogue & RELU) != 0) value = std::max(value, 0.0);
                    if ((shape.epilogue & GELU) != 0) {
                        value *= 0.5 * (1 + std::tanh(std::sqrt(2 / M_PI) * (value + 0.044715 * value * value * value)));
                    }
                    // Half a unit for D, and k f32 additions of terms of this size.
                    const double got = decoded(d.bytes, d.index(row, column, batch), shape.output);
                    const double bound = rounding(value, shape.output) * 1.01 + (size + 4) * 6e-8 * double(shape.k + 8);
                    if (!(std::fabs(got - value) <= bound)) {
                        printf("    types %d,%d turned %d,%d epilogue %u m %d n %d k %d algorithm %d: D(%d, %d) is %g, not %g\n",
                               shape.type, shape.output, turned_a, turned_b, shape.epilogue, int(shape.m), int(shape.n),
                               int(shape.k), i, int(row), int(column), got, value);
                        exit(1);
                    }
                }
            }
        }
        // The padding between columns is untouched.
        const size_t width = bytes_of(shape.output);
        for (int batch = 0; batch < shape.batches; ++batch) {
            for (uint64_t column = 0; column < shape.n; ++column) {
                for (size_t at = d.index(shape.m, column, batch) * width; at < d.index(d.leading, column, batch) * width; ++at) {
                    CHECK(d.bytes[at] == char(0xFF));
                }
            }
        }
    }
    CHECK_IS(cublasLtMatmulDescDestroy(description), 0);
    DO(cuMemFree_v2(bias_at));
    return count;
}

void gemms() {
    Blas blas;
    const std::pair<int, int> types[] = {{F32, F32}, {F16, F16}, {BF16, BF16}, {F16, F32}, {BF16, F32}};
    for (const auto& [type, output] : types) {
        for (const bool turned_a : {false, true}) {
            for (const bool turned_b : {false, true}) {
                for (const unsigned epilogue : {NO_EPILOGUE, BIAS, RELU, RELU | BIAS, GELU, GELU | BIAS}) {
                    check_gemm(blas, {type, output, turned_a, turned_b, epilogue, 19, 7, 33});
                }
                check_gemm(blas, {type, output, turned_a, turned_b, GELU | BIAS, 16, 6, 130, 0.5f, 2, 1, 5});
                check_gemm(blas, {type, output, turned_a, turned_b, BIAS, 1, 1, 1, 1, 0, 3, 0});
            }
        }
    }
    // E4M3: the one supported layout, and 16-bit results.
    for (const int output : {F16, BF16}) {
        for (const unsigned epilogue : {NO_EPILOGUE, BIAS, RELU | BIAS, GELU | BIAS}) {
            check_gemm(blas, {E4M3, output, true, false, epilogue, 48, 32, 112, 0.5f, 1});
        }
    }
    // Split-K is offered if the workspace suffices.
    CHECK(check_gemm(blas, {F16, F16, true, false, BIAS, 64, 32, 1024}) == 3);
    CHECK(check_gemm(blas, {F16, F16, true, false, BIAS, 512, 300, 40}) == 2);
}

// Conversions at the limits of their ranges, through a GEMM with 1.
void conversions() {
    Blas blas;
    const float infinity = std::numeric_limits<float>::infinity();
    const std::vector<std::pair<float, double>> to_f16 = {
        {65519, 65504}, {65520, infinity}, {2049, 2048}, {2051, 2052}, {5.9604645e-8f, 5.9604645e-8f}, {2.9e-8f, 0},
        {-infinity, -infinity}};
    const std::vector<std::pair<float, double>> to_bf16 = {
        {257, 256}, {259, 260}, {3.4e38f, infinity}, {-infinity, -infinity}};
    // cuBLASLt has no f16 x f32 GEMM, so alpha carries the value.
    for (const int type : {F16, BF16}) {
        for (const auto& [value, expected] : type == F16 ? to_f16 : to_bf16) {
            std::mt19937 random(1);
            const Case shape = {type, type, false, false, NO_EPILOGUE, 1, 1, 1};
            Matrix a(1, 1, type, shape, random), b(1, 1, type, shape, random), d(1, 1, type, shape, random);
            const uint16_t one = type == F16 ? 0x3c00 : 0x3f80;
            DO(cuMemcpyHtoD_v2(a.at, &one, 2));
            DO(cuMemcpyHtoD_v2(b.at, &one, 2));
            void* description = nullptr;
            const float zero = 0;
            CHECK_IS(cublasLtMatmulDescCreate(&description, 68, F32), 0);
            CHECK_IS(cublasLtMatmul(blas.handle, description, &value, (void*)a.at, a.layout, (void*)b.at, b.layout, &zero,
                                    (void*)d.at, d.layout, (void*)d.at, d.layout, nullptr, nullptr, 0, blas.stream), 0);
            DO(cuMemcpyDtoHAsync_v2(d.bytes.data(), d.at, 2, blas.stream));
            const double got = decoded(d.bytes, 0, type);
            if (got != expected) printf("    type %d: %g becomes %g, not %g\n", type, value, got, expected);
            CHECK(got == expected);
        }
    }
}

void rejected_gemms() {
    constexpr int INVALID = 7, UNSUPPORTED = 15;
    Blas blas;
    std::mt19937 random(1);
    const Case shape = {F16, F16, false, false, NO_EPILOGUE, 64, 32, 1024};
    Matrix a(64, 1024, F16, shape, random), b(1024, 32, F16, shape, random), d(64, 32, F16, shape, random);
    const float one = 1, zero = 0;
    void* description = nullptr;
    CHECK_IS(cublasLtMatmulDescCreate(&description, 68, F32), 0);
    Heuristic found[4];
    int count = 0;
    const auto heuristic = [&](void* of_a, void* of_d) {
        return cublasLtMatmulAlgoGetHeuristic(blas.handle, description, of_a, b.layout, of_d, of_d, blas.preference, 4,
                                              found, &count);
    };
    const auto multiply = [&](Pointer at, const void* algorithm, size_t workspace_bytes) {
        return cublasLtMatmul(blas.handle, description, &one, (void*)at, a.layout, (void*)b.at, b.layout, &zero,
                              (void*)d.at, d.layout, (void*)d.at, d.layout, algorithm, (void*)blas.workspace,
                              workspace_bytes, blas.stream);
    };
    CHECK_IS(heuristic(a.layout, d.layout), 0);
    // Split-K comes first here: 2 x 64 x 32 x 4 bytes of workspace.
    int splits = 0;
    size_t written = 0;
    CHECK_IS(cublasLtMatmulAlgoConfigGetAttribute(found[0].algorithm, 2, &splits, 4, &written), 0);
    CHECK(count == 3 && splits == 2 && written == 4 && found[0].workspace_bytes == 16384);
    CHECK_IS(multiply(a.at, found[0].algorithm, 16384), 0);
    CHECK_IS(multiply(a.at, found[0].algorithm, 16383), INVALID);
    CHECK_IS(multiply(a.at + 2, found[1].algorithm, 0), UNSUPPORTED);
    CHECK_IS(multiply(0, found[1].algorithm, 0), INVALID);
    const uint64_t nonsense[8] = {};
    CHECK_IS(multiply(a.at, nonsense, 0), INVALID);
    Heuristic checked;
    CHECK_IS(cublasLtMatmulAlgoCheck(blas.handle, description, a.layout, b.layout, d.layout, d.layout, found[0].algorithm,
                                     &checked), 0);
    CHECK(checked.workspace_bytes == 16384);

    void *short_layout = nullptr, *other_layout = nullptr, *type_layout = nullptr;
    CHECK_IS(cublasLtMatrixLayoutCreate(&short_layout, F16, 64, 1024, 63), 0);
    CHECK_IS(cublasLtMatrixLayoutCreate(&other_layout, F16, 64, 1000, 64), 0);
    CHECK_IS(cublasLtMatrixLayoutCreate(&type_layout, BF16, 64, 32, 64), 0);
    CHECK_IS(heuristic(short_layout, d.layout), INVALID);
    CHECK_IS(heuristic(other_layout, d.layout), INVALID);
    CHECK_IS(heuristic(a.layout, type_layout), UNSUPPORTED);

    // E4M3: one layout, and sizes that are multiples of 16.
    const auto of_e4m3 = [&](bool turned_a, uint64_t k) {
        const uint64_t rows = turned_a ? k : 64, columns = turned_a ? 64 : k;
        const int turned = turned_a;
        void *description = nullptr, *a = nullptr, *b = nullptr;
        CHECK_IS(cublasLtMatmulDescCreate(&description, 68, F32), 0);
        CHECK_IS(cublasLtMatmulDescSetAttribute(description, 3, &turned, 4), 0);
        CHECK_IS(cublasLtMatrixLayoutCreate(&a, E4M3, rows, columns, int64_t(rows)), 0);
        CHECK_IS(cublasLtMatrixLayoutCreate(&b, E4M3, k, 32, int64_t(k)), 0);
        return cublasLtMatmulAlgoGetHeuristic(blas.handle, description, a, b, d.layout, d.layout, blas.preference, 4, found,
                                              &count);
    };
    CHECK_IS(of_e4m3(true, 64), 0);
    CHECK_IS(of_e4m3(true, 72), UNSUPPORTED);
    CHECK_IS(of_e4m3(false, 64), UNSUPPORTED);

    unsigned epilogue = BIAS;
    const int bias_type = F32;
    const void* const no_bias = nullptr;
    CHECK_IS(cublasLtMatmulDescSetAttribute(description, 7, &epilogue, 4), 0);
    CHECK_IS(cublasLtMatmulDescSetAttribute(description, 8, &no_bias, 8), 0);
    CHECK_IS(multiply(a.at, found[1].algorithm, 0), INVALID);
    CHECK_IS(cublasLtMatmulDescSetAttribute(description, 26, &bias_type, 4), 0);
    CHECK_IS(heuristic(a.layout, d.layout), UNSUPPORTED);
    epilogue = 128 | GELU;
    CHECK_IS(cublasLtMatmulDescSetAttribute(description, 7, &epilogue, 4), 0);
    CHECK_IS(heuristic(a.layout, d.layout), UNSUPPORTED);
}

void gemm_outside_allocations() {
    Blas blas;
    std::mt19937 random(1);
    const Case shape = {F32, F32, false, false, NO_EPILOGUE, 8, 8, 8};
    Matrix a(8, 8, F32, shape, random), b(8, 8, F32, shape, random), d(8, 8, F32, shape, random);
    const float one = 1, zero = 0;
    void* description = nullptr;
    CHECK_IS(cublasLtMatmulDescCreate(&description, 68, F32), 0);
    const auto multiply = [&] {
        return cublasLtMatmul(blas.handle, description, &one, (void*)(a.at + 64), a.layout, (void*)b.at, b.layout, &zero,
                              (void*)d.at, d.layout, (void*)d.at, d.layout, nullptr, nullptr, 0, blas.stream);
    };
    CHECK_IS(multiply(), 0);
    check_all_is_lost(blas.stream, d.at);
    CHECK_IS(multiply(), 13);
}

void gemms_in_graphs() {
    Blas blas;
    std::mt19937 random(1);
    const Case shape = {F32, F32, false, false, NO_EPILOGUE, 1, 1, 1};
    Matrix a(1, 1, F32, shape, random), b(1, 1, F32, shape, random), d(1, 1, F32, shape, random);
    const float zero = 0;
    float two = 2, x = 3, y = 5, result = 0;
    void *description = nullptr, *graph = nullptr, *executable = nullptr;
    CHECK_IS(cublasLtMatmulDescCreate(&description, 68, F32), 0);
    DO(cuStreamBeginCapture_v2(blas.stream, THREAD_LOCAL));
    CHECK_IS(cublasLtMatmul(blas.handle, description, &two, (void*)a.at, a.layout, (void*)b.at, b.layout, &zero,
                            (void*)d.at, d.layout, (void*)d.at, d.layout, nullptr, nullptr, 0, blas.stream), 0);
    DO(cuStreamEndCapture(blas.stream, &graph));
    CHECK_IS(cublasLtMatmulDescDestroy(description), 0); // what was captured stays
    two = -1;
    DO(cuGraphInstantiateWithFlags(&executable, graph, 0));
    DO(cuMemcpyHtoD_v2(b.at, &y, 4));
    for (x = 3; x < 6; ++x) {
        DO(cuMemcpyHtoDAsync_v2(a.at, &x, 4, blas.stream));
        DO(cuGraphLaunch(executable, blas.stream));
        DO(cuMemcpyDtoHAsync_v2(&result, d.at, 4, blas.stream));
        CHECK(result == 2 * x * y);
    }
}

// f32 is multiplied exactly, or with ten fraction bits if the caller allows TF32.
void tf32() {
    Blas blas;
    std::mt19937 random(1);
    const Case shape = {F32, F32, false, false, NO_EPILOGUE, 1, 1, 1};
    Matrix a(1, 1, F32, shape, random), b(1, 1, F32, shape, random), d(1, 1, F32, shape, random);
    const float one = 1, zero = 0, fine = 1 + 0x1p-12f;
    float result = 0;
    DO(cuMemcpyHtoD_v2(a.at, &fine, 4));
    DO(cuMemcpyHtoD_v2(b.at, &one, 4));
    for (const auto& [compute, expected] : {std::pair(68, fine), std::pair(69, fine), std::pair(77, one)}) {
        void* description = nullptr;
        CHECK_IS(cublasLtMatmulDescCreate(&description, compute, F32), 0);
        CHECK_IS(cublasLtMatmul(blas.handle, description, &one, (void*)a.at, a.layout, (void*)b.at, b.layout, &zero,
                                (void*)d.at, d.layout, (void*)d.at, d.layout, nullptr, nullptr, 0, blas.stream), 0);
        DO(cuMemcpyDtoHAsync_v2(&result, d.at, 4, blas.stream));
        CHECK(result == expected);
    }
}

void gemm_speed() {
    Blas blas;
    for (const int type : {F32, F16, BF16}) {
        std::mt19937 random(1);
        const Case shape = {type, type, true, false, NO_EPILOGUE, 1024, 200, 256};
        Matrix a(256, 1024, type, shape, random), b(256, 200, type, shape, random), d(1024, 200, type, shape, random);
        const float one = 1, zero = 0;
        const int turned = 1;
        void* description = nullptr;
        CHECK_IS(cublasLtMatmulDescCreate(&description, 68, F32), 0);
        CHECK_IS(cublasLtMatmulDescSetAttribute(description, 3, &turned, 4), 0);
        double best = 1e9;
        for (int i = 0; i < 5; ++i) {
            const auto start = std::chrono::steady_clock::now();
            CHECK_IS(cublasLtMatmul(blas.handle, description, &one, (void*)a.at, a.layout, (void*)b.at, b.layout, &zero,
                                    (void*)d.at, d.layout, (void*)d.at, d.layout, nullptr, nullptr, 0, blas.stream), 0);
            DO(cuStreamSynchronize(blas.stream));
            best = std::min(best, std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count());
        }
        printf("    m 1024 n 200 k 256 type %d: %.2f ms\n", type, best);
    }
}

void log_is_written() {
    open_device();
    void* const stream = new_stream();
    Pointer x = new_device(1234);
    DO(launch(function(load(), "add_one"), 1, 32, 0, stream, {&x}));
    std::ifstream file(getenv("STANDIN_LOG"));
    const string text{std::istreambuf_iterator<char>(file), {}};
    for (const char* line : {"malloc bytes=1234 result=0", "launch add_one grid=1,1,1 block=32,1,1 shared=0",
                             "compile test.cu architecture=sm_90 result=0"}) {
        CHECK(text.find(line) != string::npos);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Cases
// ---------------------------------------------------------------------------------------------------------------------

struct Test {
    const char* name;
    void (*run)();
    std::vector<string> environment;
    int signal = 0; // the signal that must end the process; 0: it must exit with 0
};

const std::vector<Test>& tests() {
    static const std::vector<Test> tests = {
        {"devices", devices, {"STANDIN_DEVICES=2", "STANDIN_CAPABILITY=8.6"}},
        {"no_devices", no_devices, {"STANDIN_DEVICES=0"}},
        {"before_init", before_init, {}},
        {"contexts_end", contexts_end, {}},
        {"work_is_deferred", work_is_deferred, {}},
        {"streams_depend_by_events", streams_depend_by_events, {}},
        {"legacy_stream", legacy_stream, {}},
        {"threads", threads, {}},
        {"kernels", kernels, {}},
        {"kernel_outside_its_memory", kernel_outside_its_memory, {}, SIGSEGV},
        {"kernel_in_freed_memory", kernel_in_freed_memory, {}, SIGSEGV},
        {"compiler", compiler, {}},
        {"modules_are_checked", modules_are_checked, {"STANDIN_CAPABILITY=8.6"}},
        {"backend_kernels", backend_kernels, {}},
        {"capture_and_replay", capture_and_replay, {}},
        {"illegal_in_capture", illegal_in_capture, {}},
        {"memory_ends", memory_ends, {"STANDIN_MEMORY_MIB=16"}},
        {"injected_mallocs", injected_mallocs, {"STANDIN_FAIL=malloc:2:2"}},
        {"injected_mallocs_for_good", injected_mallocs_for_good, {"STANDIN_FAIL=launch:9,malloc:2"}},
        {"injected_launch", injected_launch, {"STANDIN_FAIL=launch:3"}},
        {"copy_outside_allocations", copy_outside_allocations, {}},
        {"gemms", gemms, {}},
        {"conversions", conversions, {}},
        {"rejected_gemms", rejected_gemms, {}},
        {"gemm_outside_allocations", gemm_outside_allocations, {}},
        {"gemms_in_graphs", gemms_in_graphs, {}},
        {"tf32", tf32, {}},
        {"gemm_speed", gemm_speed, {}},
        {"log_is_written", log_is_written, {"STANDIN_LOG=standin-selftest.log"}},
    };
    return tests;
}

bool passes(const Test& test, const char* program) {
    fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
        for (const char* name : {"DEVICES", "CAPABILITY", "MEMORY_MIB", "DRIVER_VERSION", "FAIL", "LOG"}) {
            unsetenv((string("STANDIN_") + name).c_str());
        }
        for (const string& variable : test.environment) putenv(const_cast<char*>(variable.c_str()));
        execl(program, program, test.name, nullptr);
        _exit(127);
    }
    int status = 0;
    waitpid(child, &status, 0);
    if (test.signal != 0) return WIFSIGNALED(status) && WTERMSIG(status) == test.signal;
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

} // namespace

int main(int count, char** arguments) {
    if (count > 1) {
        for (const Test& test : tests()) {
            if (test.name != string(arguments[1])) continue;
            test.run();
            fflush(stdout);
            return 0;
        }
        return 2;
    }
    int failed = 0;
    for (const Test& test : tests()) {
        const bool passed = passes(test, "/proc/self/exe");
        printf("%s %s\n", passed ? "ok    " : "FAILED", test.name);
        failed += !passed;
    }
    remove("standin-selftest.log");
    printf("%zu cases, %d failed\n", tests().size(), failed);
    return failed > 0 ? 1 : 0;
}
