// A stand-in for libcuda.so.1: the driver API with the real ABI, on a CPU. With it, nvrtc.cpp and cublaslt.cpp on
// LD_LIBRARY_PATH, a program that uses CUDA runs unchanged on a machine without a GPU.
//
// Work is deferred as long as the CUDA specification allows, so that missing synchronization shows:
// - Work on a stream runs only on synchronization (or polling: each poll runs one operation), in the order of issue, and only on
//   the streams that the synchronized one depends on. The semantics of legacy streams are implemented too.
// - A copy accesses pinned memory when it runs. Pageable memory is read during the call, or written before it returns.
// - Device memory is NaN bytes when allocated. Each allocation ends at a guard page, and freed addresses are never reused: a
//   kernel that accesses memory outside live allocations ends the process with a message.
// - Copies outside live allocations return CUDA_ERROR_ILLEGAL_ADDRESS, which is sticky until the process ends.
// - Calls that are illegal during a capture fail with the real error codes and invalidate the capture.
//
// Not modeled: progress without synchronization (so no host callbacks), stream-ordered allocation, memory pools, unified
// memory, peer access, textures, explicitly built or modified graphs, limits of registers and of static shared memory,
// unjoined streams of a capture, and speed. The host can read device memory through device pointers; a real host
// cannot.
//
// Environment:
//   STANDIN_DEVICES=1            number of devices; with 0, cuInit returns CUDA_ERROR_NO_DEVICE
//   STANDIN_CAPABILITY=9.0       their compute capability
//   STANDIN_MEMORY_MIB=4096      their memory, in MiB
//   STANDIN_DRIVER_VERSION=13000 the result of cuDriverGetVersion
//   STANDIN_FAIL=malloc:N[:M]    M calls of cuMemAlloc from the Nth on (all without M) return CUDA_ERROR_OUT_OF_MEMORY
//   STANDIN_FAIL=launch:N        the Nth kernel run (replays of graphs count too) returns CUDA_ERROR_ILLEGAL_ADDRESS
//                                separate several faults by commas
//   STANDIN_HANG_AT_EXIT         if set, the process hangs at exit
//   STANDIN_LOG=path             logs launches, copies and other important calls, one per line

#include <dlfcn.h>
#include <elf.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <deque>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "shared.h"

namespace {

using std::shared_ptr;
using DevicePointer = unsigned long long;
using Clock = std::chrono::steady_clock;

constexpr size_t PAGE = 4096;
constexpr size_t MIB = 1 << 20;
constexpr unsigned DEFAULT_SHARED_BYTES = 48 << 10;

// ---------------------------------------------------------------------------------------------------------------------
// Settings
// ---------------------------------------------------------------------------------------------------------------------

struct Settings {
    int devices = 1;
    int major = 9, minor = 0;
    size_t memory_bytes = 4096 * MIB;
    int driver_version = 13000;
    long failing_malloc = 0, failing_mallocs = 0; // the first, counted from 1 (0: none), and how many
    long failing_launch = 0;
};

// Imitates a driver whose exit handler waits forever for a lost GPU.
__attribute__((destructor)) void hang_at_exit() {
    while (getenv("STANDIN_HANG_AT_EXIT") != nullptr) pause();
}

Settings settings_from_environment() {
    Settings settings;
    if (const char* text = getenv("STANDIN_DEVICES")) settings.devices = atoi(text);
    if (const char* text = getenv("STANDIN_CAPABILITY")) sscanf(text, "%d.%d", &settings.major, &settings.minor);
    if (const char* text = getenv("STANDIN_MEMORY_MIB")) settings.memory_bytes = strtoull(text, nullptr, 10) * MIB;
    if (const char* text = getenv("STANDIN_DRIVER_VERSION")) settings.driver_version = atoi(text);
    for (const char* text = getenv("STANDIN_FAIL"); text != nullptr && *text != 0;) {
        long first = 0, count = 0;
        if (sscanf(text, "malloc:%ld:%ld", &first, &count) >= 1) {
            settings.failing_malloc = first;
            settings.failing_mallocs = count > 0 ? count : __LONG_MAX__ - first;
        } else if (sscanf(text, "launch:%ld", &first) == 1) {
            settings.failing_launch = first;
        } else {
            fprintf(stderr, "stand-in CUDA: unknown fault in STANDIN_FAIL: \"%s\"\n", text);
            abort();
        }
        text = strchr(text, ',');
        if (text != nullptr) ++text;
    }
    return settings;
}

const Settings& settings() {
    static const Settings settings = settings_from_environment();
    return settings;
}

unsigned max_shared_bytes() {
    const int capability = settings().major * 10 + settings().minor;
    if (capability == 75) return 64 << 10;
    if (capability == 80 || capability == 87) return 163 << 10;
    if (capability / 10 == 8 || capability / 10 == 12) return 99 << 10;
    return 227 << 10;
}

// ---------------------------------------------------------------------------------------------------------------------
// What handles point to
// ---------------------------------------------------------------------------------------------------------------------

struct Context;
struct Stream;

// Operations are numbered in the order of issue over all streams.
struct Operation {
    uint64_t number = 0;
    std::function<Result()> run;
    // Dependency: the operations of stream `after` up to this number run first.
    shared_ptr<Stream> after;
    uint64_t after_number = 0;
};

struct Capture {
    Stream* origin = nullptr;
    int mode = 0;
    std::thread::id thread;
    bool invalid = false;
    std::vector<std::function<Result()>> work;
};

struct Stream {
    Context* context = nullptr;
    bool waits_for_legacy = true; // not created with CU_STREAM_NON_BLOCKING
    std::deque<Operation> queue;
    uint64_t issued = 0, finished = 0; // numbers of the latest operation
    shared_ptr<Capture> capture;
};

struct Event {
    Context* context = nullptr;
    bool timed = true;
    shared_ptr<Stream> stream; // where it was recorded last; none if never
    uint64_t number = 0;
    Clock::time_point when;
    shared_ptr<Capture> capture; // recorded in this capture
};

struct Graph {
    Context* context = nullptr;
    std::vector<std::function<Result()>> work;
};

using Kernel = void (*)(const unsigned grid[3], const unsigned block[3], size_t shared_bytes, void** arguments);

struct Module;

struct Function {
    Module* module = nullptr;
    std::string name;
    Kernel kernel = nullptr;
    unsigned long max_threads = 0;
    std::vector<unsigned long> argument_bytes;
    unsigned max_dynamic_shared = DEFAULT_SHARED_BYTES;
};

struct Module {
    Context* context = nullptr;
    void* library = nullptr;
    std::map<std::string, std::unique_ptr<Function>> functions;
    ~Module() {
        if (library != nullptr) dlclose(library);
    }
};

struct Context {
    int device = 0;
    int retained = 0;
    std::atomic<Result> error{SUCCESS}; // sticky
    size_t used_bytes = 0;
    shared_ptr<Stream> legacy, per_thread;
    std::vector<shared_ptr<Stream>> streams; // all streams, including these two, and destroyed ones until they are idle
};

template <typename T>
using Handles = std::map<const void*, shared_ptr<T>>;

struct Allocation {
    size_t bytes = 0;
    Context* context = nullptr;
};

// Never destroyed: other threads may still run when the process ends.
struct Driver {
    std::mutex mutex;               // guards the fields below and everything that handles point to
    std::recursive_mutex execution; // held while operations run; taken before `mutex`
    bool initialized = false;
    std::vector<std::unique_ptr<Context>> contexts;
    Handles<Stream> streams;
    Handles<Event> events;
    Handles<Graph> graphs, executables;
    Handles<Module> modules;
    std::map<const void*, Function*> functions;
    std::map<DevicePointer, Allocation> device_memory;
    std::map<uintptr_t, size_t> pinned_memory;
    std::vector<shared_ptr<Capture>> captures; // in progress
    uint64_t issued = 0;
    long mallocs = 0, launches = 0;
    char* arena = nullptr; // device memory of all devices: addresses are handed out once, in order
    size_t arena_bytes = 0, arena_used = PAGE;
    int pattern_file = -1; // PATTERN_BYTES of 0xFF
};

constexpr size_t MAX_ARENA_BYTES = 1ull << 40, MIN_ARENA_BYTES = 1ull << 33;
constexpr size_t PATTERN_BYTES = 2 * MIB;

Driver& driver() {
    static Driver* const driver = new Driver;
    return *driver;
}

using Lock = std::unique_lock<std::mutex>;

thread_local Context* current_context = nullptr;

// ---------------------------------------------------------------------------------------------------------------------
// Faults of kernels
// ---------------------------------------------------------------------------------------------------------------------

const char* volatile running = nullptr;
struct sigaction earlier_action;

void write_stderr(const char* text) {
    if (write(STDERR_FILENO, text, strlen(text)) < 0) return;
}

void on_fault(int, siginfo_t* info, void*) {
    const char* const at = static_cast<const char*>(info->si_addr);
    const Driver& d = driver();
    if (d.arena != nullptr && at >= d.arena && at < d.arena + d.arena_bytes) {
        write_stderr("stand-in CUDA: unallocated device memory was accessed by ");
        write_stderr(running != nullptr ? running : "the host");
        write_stderr("\n");
    }
    sigaction(SIGSEGV, &earlier_action, nullptr); // the instruction faults again, now with this action
}

void watch_faults() {
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &earlier_action);
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory
// ---------------------------------------------------------------------------------------------------------------------

// Pages that read as 0xFF and use no memory until they are written: private mappings of one small file.
bool map_pattern(char* at, size_t bytes) {
    Driver& d = driver();
    for (size_t done = 0; done < bytes; done += PATTERN_BYTES) {
        const size_t part = std::min(PATTERN_BYTES, bytes - done);
        void* const mapped =
            mmap(at + done, part, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED, d.pattern_file, 0);
        if (mapped == MAP_FAILED) return false;
    }
    return true;
}

bool make_arena() {
    Driver& d = driver();
    if (d.arena != nullptr) return true;
    d.pattern_file = static_cast<int>(syscall(SYS_memfd_create, "standin-pattern", 1u /* MFD_CLOEXEC */));
    const std::vector<unsigned char> pattern(PATTERN_BYTES, 0xFF);
    if (d.pattern_file < 0 || write(d.pattern_file, pattern.data(), PATTERN_BYTES) != ssize_t(PATTERN_BYTES)) return false;
    // Reserves addresses without memory, as many as the process may have.
    for (size_t bytes = MAX_ARENA_BYTES; bytes >= MIN_ARENA_BYTES; bytes /= 2) {
        void* const arena = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (arena == MAP_FAILED) continue;
        d.arena = static_cast<char*>(arena);
        d.arena_bytes = bytes;
        watch_faults();
        return true;
    }
    return false;
}

size_t whole_pages(size_t bytes) { return (bytes + PAGE - 1) / PAGE * PAGE; }

// Allocations are aligned to 256 bytes, as in the real driver, and end as near to the guard page as the alignment allows.
Result allocate(Context& context, size_t bytes, DevicePointer& pointer) {
    Driver& d = driver();
    const size_t aligned = (bytes + 255) / 256 * 256, pages = whole_pages(aligned);
    const size_t free = settings().memory_bytes - std::min(settings().memory_bytes, context.used_bytes);
    if (pages > free || !make_arena() || pages + PAGE > d.arena_bytes - d.arena_used) return OUT_OF_MEMORY;
    char* const start = d.arena + d.arena_used;
    if (!map_pattern(start, pages)) return OUT_OF_MEMORY;
    d.arena_used += pages + PAGE;
    context.used_bytes += pages;
    pointer = reinterpret_cast<DevicePointer>(start + pages - aligned);
    d.device_memory[pointer] = {bytes, &context};
    return SUCCESS;
}

void release(std::map<DevicePointer, Allocation>::iterator at) {
    Driver& d = driver();
    const size_t aligned = (at->second.bytes + 255) / 256 * 256, pages = whole_pages(aligned);
    char* const start = reinterpret_cast<char*>(at->first) + aligned - pages;
    mmap(start, pages, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    at->second.context->used_bytes -= pages;
    d.device_memory.erase(at);
}

bool is_device_memory(DevicePointer from, size_t bytes) {
    Driver& d = driver();
    auto after = d.device_memory.upper_bound(from);
    if (after == d.device_memory.begin()) return false;
    const auto& [start, allocation] = *std::prev(after);
    return from - start <= allocation.bytes && bytes <= allocation.bytes - (from - start);
}

bool is_pinned(const void* from, size_t bytes) {
    Driver& d = driver();
    const uintptr_t address = reinterpret_cast<uintptr_t>(from);
    auto after = d.pinned_memory.upper_bound(address);
    if (after == d.pinned_memory.begin()) return false;
    const auto& [start, length] = *std::prev(after);
    return address - start <= length && bytes <= length - (address - start);
}

// ---------------------------------------------------------------------------------------------------------------------
// Execution
// ---------------------------------------------------------------------------------------------------------------------

// Runs the first operation of a stream. Both locks are held, except `mutex` while the operation runs.
void run_first(Lock& lock, const shared_ptr<Stream>& stream) {
    Operation operation = std::move(stream->queue.front());
    stream->queue.pop_front();
    Context& context = *stream->context;
    if (context.error == SUCCESS && operation.run) {
        lock.unlock();
        const Result result = operation.run();
        lock.lock();
        if (result != SUCCESS) {
            context.error = result;
            log_line("error %d sticks to device %d", result, context.device);
        }
    }
    stream->finished = operation.number;
}

// Runs a stream up to and including operation `number`, after the dependencies of each operation. This terminates, because
// dependencies always have smaller numbers. The stream is a parameter by value, which keeps it alive: while an operation runs,
// other threads may overwrite or destroy whatever `stream` was taken from.
void run_until(Lock& lock, const shared_ptr<Stream> stream, uint64_t number) {
    Context& context = *stream->context;
    while (!stream->queue.empty() && stream->queue.front().number <= number) {
        const uint64_t mine = stream->queue.front().number;
        if (stream->queue.front().after) {
            run_until(lock, stream->queue.front().after, stream->queue.front().after_number);
        }
        if (stream == context.legacy) {
            const std::vector<shared_ptr<Stream>> streams = context.streams;
            for (const auto& other : streams) {
                if (other != stream && other->waits_for_legacy) run_until(lock, other, mine - 1);
            }
        } else if (stream->waits_for_legacy) {
            run_until(lock, context.legacy, mine - 1);
        }
        run_first(lock, stream);
    }
}

void forget_idle_streams(Context& context) {
    auto& streams = context.streams;
    streams.erase(std::remove_if(streams.begin(), streams.end(),
                                 [&](const shared_ptr<Stream>& stream) {
                                     return stream != context.legacy && stream != context.per_thread &&
                                            stream->queue.empty() && driver().streams.count(stream.get()) == 0;
                                 }),
                  streams.end());
}

// Runs all pending operations of a context, oldest first.
void run_all(Lock& lock, Context& context) {
    for (;;) {
        shared_ptr<Stream> oldest;
        for (const auto& stream : context.streams) {
            if (stream->queue.empty()) continue;
            if (!oldest || stream->queue.front().number < oldest->queue.front().number) oldest = stream;
        }
        if (!oldest) break;
        run_until(lock, oldest, oldest->queue.front().number);
    }
    forget_idle_streams(context);
}

// Takes both locks, in their order.
struct Execution {
    std::unique_lock<std::recursive_mutex> execution{driver().execution};
    Lock lock{driver().mutex};
};

// ---------------------------------------------------------------------------------------------------------------------
// Checks at the start of a call
// ---------------------------------------------------------------------------------------------------------------------

// Checks the calling thread: initialized, with a context, and no sticky error. `mutex` is held.
Result enter(Context*& context) {
    if (!driver().initialized) return NOT_INITIALIZED;
    if (current_context == nullptr || current_context->retained == 0) return INVALID_CONTEXT;
    context = current_context;
    return context->error;
}

// Checks a call that is illegal during a capture. A capture in global mode (0) forbids it to all threads, in thread-local mode (1)
// to its own thread, in relaxed mode (2) to none. As in the real driver, such a call invalidates the capture.
Result unsafe_in_capture() {
    Result result = SUCCESS;
    for (const auto& capture : driver().captures) {
        const bool mine = capture->thread == std::this_thread::get_id();
        if (capture->mode == 0 || (capture->mode == 1 && mine)) {
            capture->invalid = true;
            result = CAPTURE_UNSUPPORTED;
        }
    }
    return result;
}

Result find_stream(Context& context, const void* handle, shared_ptr<Stream>& stream) {
    const uintptr_t special = reinterpret_cast<uintptr_t>(handle);
    if (special == 0 || special == 1) {
        stream = context.legacy;
    } else if (special == 2) {
        stream = context.per_thread;
    } else {
        auto found = driver().streams.find(handle);
        if (found == driver().streams.end() || found->second->context != &context) return INVALID_HANDLE;
        stream = found->second;
    }
    return SUCCESS;
}

template <typename T>
Result find(const Handles<T>& handles, const void* handle, shared_ptr<T>& to) {
    auto found = handles.find(handle);
    if (found == handles.end()) return INVALID_HANDLE;
    to = found->second;
    return SUCCESS;
}

uint64_t push(const shared_ptr<Stream>& stream, Operation operation) {
    operation.number = stream->issued = ++driver().issued;
    stream->queue.push_back(std::move(operation));
    return stream->issued;
}

// Adds work to a stream, or to the graph that it captures.
Result issue(const shared_ptr<Stream>& stream, std::function<Result()> work) {
    if (stream->capture) {
        if (stream->capture->invalid) return CAPTURE_INVALIDATED;
        stream->capture->work.push_back(std::move(work));
        return SUCCESS;
    }
    if (stream == stream->context->legacy) {
        for (const auto& capture : driver().captures) {
            if (capture->mode != 2 && capture->origin->context == stream->context && capture->origin->waits_for_legacy) {
                capture->invalid = true;
                return CAPTURE_IMPLICIT;
            }
        }
    }
    push(stream, {0, std::move(work), nullptr, 0});
    return SUCCESS;
}

#define TRY(call)                                     \
    do {                                              \
        const Result result_of_try = (call);          \
        if (result_of_try != SUCCESS) return result_of_try; \
    } while (false)

// ---------------------------------------------------------------------------------------------------------------------
// Copies
// ---------------------------------------------------------------------------------------------------------------------

Result copy_to_device(DevicePointer to, const void* from, size_t bytes) {
    if (!standin_is_device_memory(reinterpret_cast<void*>(to), bytes)) return ILLEGAL_ADDRESS;
    memcpy(reinterpret_cast<void*>(to), from, bytes);
    return SUCCESS;
}

Result copy_to_host(void* to, DevicePointer from, size_t bytes) {
    if (!standin_is_device_memory(reinterpret_cast<void*>(from), bytes)) return ILLEGAL_ADDRESS;
    memcpy(to, reinterpret_cast<void*>(from), bytes);
    return SUCCESS;
}

Result copy_in_device(DevicePointer to, DevicePointer from, size_t bytes) {
    const bool live = standin_is_device_memory(reinterpret_cast<void*>(from), bytes) &&
                      standin_is_device_memory(reinterpret_cast<void*>(to), bytes);
    if (!live) return ILLEGAL_ADDRESS;
    memmove(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes);
    return SUCCESS;
}

Result fill_device(DevicePointer to, unsigned char value, size_t bytes) {
    if (!standin_is_device_memory(reinterpret_cast<void*>(to), bytes)) return ILLEGAL_ADDRESS;
    memset(reinterpret_cast<void*>(to), value, bytes);
    return SUCCESS;
}

// Runs work on a stream at once, after everything before it; for synchronous calls. Both locks are held.
Result issue_and_run(Lock& lock, Context& context, const shared_ptr<Stream>& stream, std::function<Result()> work) {
    TRY(issue(stream, std::move(work)));
    run_until(lock, stream, stream->issued);
    return context.error;
}

// The synchronous calls: on the legacy stream, so they do not wait for streams created with CU_STREAM_NON_BLOCKING.
Result run_on_legacy(std::function<Result()> work) {
    Execution both;
    Context* context = nullptr;
    TRY(enter(context));
    TRY(unsafe_in_capture());
    return issue_and_run(both.lock, *context, context->legacy, std::move(work));
}

// ---------------------------------------------------------------------------------------------------------------------
// Modules
// ---------------------------------------------------------------------------------------------------------------------

// Length of an ELF image in bytes: up to the end of the section headers or of the last section.
size_t elf_bytes(const char* image) {
    Elf64_Ehdr header;
    memcpy(&header, image, sizeof header);
    size_t end = header.e_shoff + size_t(header.e_shnum) * header.e_shentsize;
    for (unsigned i = 0; i < header.e_shnum; ++i) {
        Elf64_Shdr section;
        memcpy(&section, image + header.e_shoff + size_t(i) * header.e_shentsize, sizeof section);
        if (section.sh_type != SHT_NOBITS) end = std::max<size_t>(end, section.sh_offset + section.sh_size);
    }
    return end;
}

Result open_library(const char* image, void*& library) {
    if (memcmp(image, ELFMAG, SELFMAG) != 0 || image[EI_CLASS] != ELFCLASS64) return INVALID_IMAGE;
    Elf64_Ehdr header;
    memcpy(&header, image, sizeof header);
    constexpr unsigned REAL_CUBIN = 190;
    if (header.e_machine == REAL_CUBIN) return NO_BINARY_FOR_GPU;
    if (header.e_type != ET_DYN) return INVALID_IMAGE;

    // A unique file name, because dlopen treats equal names as the same library.
    std::string path = std::filesystem::temp_directory_path() / "standin-module-XXXXXX";
    const int file = mkstemp(path.data());
    if (file < 0) return OPERATING_SYSTEM;
    const size_t bytes = elf_bytes(image);
    size_t done = 0;
    while (done < bytes) {
        const ssize_t written = write(file, image + done, bytes - done);
        if (written <= 0) break;
        done += written;
    }
    close(file);
    library = done == bytes ? dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL) : nullptr;
    if (library == nullptr) {
        const char* const why = dlerror();
        log_line("module refused: %s", why != nullptr ? why : "no room for its file");
    }
    unlink(path.c_str());
    return library != nullptr ? SUCCESS : INVALID_IMAGE;
}

// Whether the device runs a cubin of this architecture: same major version, and the cubin's minor version or later. A cubin with
// architecture-specific features ("sm_90a") needs exactly its own version.
bool runs_here(const char* architecture) {
    unsigned number = 0;
    char suffix = 0;
    if (sscanf(architecture, "sm_%u%c", &number, &suffix) < 1) return true; // compute_XX: compiled at loading
    const unsigned here = settings().major * 10 + settings().minor;
    if (suffix == 'a') return number == here;
    return number / 10 == here / 10 && number <= here;
}

// ---------------------------------------------------------------------------------------------------------------------
// Launches
// ---------------------------------------------------------------------------------------------------------------------

struct Launch {
    std::string name;
    Kernel kernel = nullptr;
    unsigned grid[3] = {}, block[3] = {};
    size_t shared_bytes = 0;
    std::vector<unsigned char> values; // each argument at a multiple of 16
    std::vector<size_t> offsets;

    Result run() {
        const long count = [] {
            const Lock lock(driver().mutex);
            return ++driver().launches;
        }();
        if (count == settings().failing_launch) {
            log_line("fault: launch %ld, %s", count, name.c_str());
            return ILLEGAL_ADDRESS;
        }
        // Kernels may write to their parameters, and a graph is replayed.
        std::vector<unsigned char> copy = values;
        std::vector<void*> arguments;
        for (const size_t offset : offsets) arguments.push_back(copy.data() + offset);
        running = name.c_str();
        kernel(grid, block, shared_bytes, arguments.data());
        running = nullptr;
        return SUCCESS;
    }
};

} // namespace

// ---------------------------------------------------------------------------------------------------------------------
// For the stand-in of cuBLASLt
// ---------------------------------------------------------------------------------------------------------------------

EXPORT Result standin_enqueue(void* handle, Result (*work)(void*), void* payload, void (*drop)(void*)) {
    const shared_ptr<void> owned(payload, drop);
    const Lock lock(driver().mutex);
    Context* context = nullptr;
    shared_ptr<Stream> stream;
    TRY(enter(context));
    TRY(find_stream(*context, handle, stream));
    return issue(stream, [owned, work] { return work(owned.get()); });
}

EXPORT bool standin_is_device_memory(const void* from, size_t bytes) {
    const Lock lock(driver().mutex);
    return is_device_memory(reinterpret_cast<DevicePointer>(from), bytes);
}

// ---------------------------------------------------------------------------------------------------------------------
// Driver and devices
// ---------------------------------------------------------------------------------------------------------------------

EXPORT Result cuInit(unsigned flags) {
    if (flags != 0) return INVALID_VALUE;
    if (settings().devices <= 0) return NO_DEVICE;
    const Lock lock(driver().mutex);
    if (driver().initialized) return SUCCESS;
    driver().initialized = true;
    for (int device = 0; device < settings().devices; ++device) {
        driver().contexts.push_back(std::make_unique<Context>());
        driver().contexts.back()->device = device;
    }
    log_line("init devices=%d capability=%d.%d memory=%zu", settings().devices, settings().major, settings().minor,
             settings().memory_bytes);
    return SUCCESS;
}

EXPORT Result cuDriverGetVersion(int* version) {
    if (version == nullptr) return INVALID_VALUE;
    *version = settings().driver_version;
    return SUCCESS;
}

namespace {

Result check_device(const void* to, int device) {
    const Lock lock(driver().mutex);
    if (!driver().initialized) return NOT_INITIALIZED;
    if (to == nullptr) return INVALID_VALUE;
    return device >= 0 && device < settings().devices ? SUCCESS : INVALID_DEVICE;
}

} // namespace

EXPORT Result cuDeviceGetCount(int* count) {
    TRY(check_device(count, 0));
    *count = settings().devices;
    return SUCCESS;
}

EXPORT Result cuDeviceGet(int* device, int ordinal) {
    TRY(check_device(device, ordinal));
    *device = ordinal;
    return SUCCESS;
}

EXPORT Result cuDeviceGetName(char* name, int length, int device) {
    TRY(check_device(name, device));
    if (length <= 0) return INVALID_VALUE;
    snprintf(name, length, "Stand-in %d.%d (CPU)", settings().major, settings().minor);
    return SUCCESS;
}

EXPORT Result cuDeviceGetUuid_v2(char* uuid, int device) {
    TRY(check_device(uuid, device));
    memcpy(uuid, "stand-in CUDA...", 16);
    uuid[15] = static_cast<char>(device);
    return SUCCESS;
}

EXPORT Result cuDeviceTotalMem_v2(size_t* bytes, int device) {
    TRY(check_device(bytes, device));
    *bytes = settings().memory_bytes;
    return SUCCESS;
}

EXPORT Result cuDeviceGetAttribute(int* value, int attribute, int device) {
    TRY(check_device(value, device));
    switch (attribute) {
    case 1: *value = 1024; break;                   // threads per block
    case 2: case 3: *value = 1024; break;           // block x, y
    case 4: *value = 64; break;                     // block z
    case 5: *value = 2147483647; break;             // grid x
    case 6: case 7: *value = 65535; break;          // grid y, z
    case 8: *value = DEFAULT_SHARED_BYTES; break;   // shared memory per block
    case 9: *value = 65536; break;                  // constant memory
    case 10: *value = 32; break;                    // warp
    case 12: case 82: *value = 65536; break;        // registers per block, per multiprocessor
    case 13: *value = 1980000; break;               // clock, kHz
    case 16: *value = 4; break;                     // multiprocessors: few, because grid sizes grow with them
    case 18: *value = 0; break;                     // integrated
    case 19: case 31: case 41: *value = 1; break;   // can map host memory, concurrent kernels, unified addressing
    case 36: *value = 2619000; break;               // memory clock, kHz
    case 37: *value = 5120; break;                  // memory bus, bits
    case 38: *value = 50 << 20; break;              // L2
    case 39: *value = 2048; break;                  // threads per multiprocessor
    case 40: *value = 3; break;                     // copy engines
    case 75: *value = settings().major; break;      // compute capability
    case 76: *value = settings().minor; break;
    case 78: *value = 1; break;                     // stream priorities
    case 81: *value = max_shared_bytes() + 1024; break; // shared memory per multiprocessor
    case 97: *value = max_shared_bytes(); break;   // shared memory per block, by opting in
    case 106: *value = 32; break;                   // blocks per multiprocessor
    case 111: *value = 1024; break;                 // shared memory reserved per block
    case 115: *value = 0; break;                    // memory pools: not modeled
    default:
        if (attribute <= 0) return INVALID_VALUE;
        *value = 0;
    }
    return SUCCESS;
}

// ---------------------------------------------------------------------------------------------------------------------
// Contexts
// ---------------------------------------------------------------------------------------------------------------------

EXPORT Result cuDevicePrimaryCtxRetain(void** handle, int device) {
    TRY(check_device(handle, device));
    const Lock lock(driver().mutex);
    Context& context = *driver().contexts[device];
    TRY(context.error);
    if (context.retained++ == 0) {
        for (shared_ptr<Stream>* stream : {&context.legacy, &context.per_thread}) {
            *stream = std::make_shared<Stream>();
            (*stream)->context = &context;
            context.streams.push_back(*stream);
        }
    }
    *handle = &context;
    return SUCCESS;
}

namespace {

template <typename T>
void forget_handles(Handles<T>& handles, const Context& context) {
    for (auto at = handles.begin(); at != handles.end();) {
        if (at->second->context == &context) {
            at = handles.erase(at);
        } else {
            ++at;
        }
    }
}

void forget_functions(const Module& module) {
    for (const auto& [name, function] : module.functions) driver().functions.erase(function.get());
}

} // namespace

EXPORT Result cuDevicePrimaryCtxRelease_v2(int device) {
    TRY(check_device(&device, device));
    Execution both;
    Context& context = *driver().contexts[device];
    if (context.retained == 0) return INVALID_CONTEXT;
    if (--context.retained > 0) return SUCCESS;
    Driver& d = driver();
    run_all(both.lock, context);
    for (auto at = d.device_memory.begin(); at != d.device_memory.end();) {
        const auto next = std::next(at);
        if (at->second.context == &context) release(at);
        at = next;
    }
    for (const auto& [handle, module] : d.modules) {
        if (module->context == &context) forget_functions(*module);
    }
    forget_handles(d.modules, context);
    forget_handles(d.streams, context);
    forget_handles(d.events, context);
    forget_handles(d.graphs, context);
    forget_handles(d.executables, context);
    context.streams.clear();
    log_line("context of device %d destroyed", device);
    return SUCCESS;
}

EXPORT Result cuCtxSetCurrent(void* handle) {
    const Lock lock(driver().mutex);
    if (!driver().initialized) return NOT_INITIALIZED;
    Context* found = nullptr;
    for (const auto& context : driver().contexts) {
        if (context.get() == handle && context->retained > 0) found = context.get();
    }
    if (handle != nullptr && found == nullptr) return INVALID_CONTEXT;
    if (found != nullptr) TRY(found->error);
    current_context = found;
    return SUCCESS;
}

EXPORT Result cuCtxGetCurrent(void** handle) {
    const Lock lock(driver().mutex);
    if (!driver().initialized) return NOT_INITIALIZED;
    *handle = current_context;
    return SUCCESS;
}

EXPORT Result cuCtxGetDevice(int* device) {
    const Lock lock(driver().mutex);
    Context* context = nullptr;
    TRY(enter(context));
    *device = context->device;
    return SUCCESS;
}

EXPORT Result cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    const Lock lock(driver().mutex);
    Context* context = nullptr;
    TRY(enter(context));
    if (least != nullptr) *least = 0;
    if (greatest != nullptr) *greatest = -5;
    return SUCCESS;
}

// Accepted and ignored: the flags choose how a thread waits.
EXPORT Result cuCtxSetFlags(unsigned) {
    Execution both;
    Context* context = nullptr;
    return enter(context);
}

EXPORT Result cuCtxSynchronize() {
    Execution both;
    Context* context = nullptr;
    TRY(enter(context));
    for (const auto& capture : driver().captures) {
        if (capture->origin->context != context) continue;
        capture->invalid = true;
        return CAPTURE_UNSUPPORTED;
    }
    run_all(both.lock, *context);
    return context->error;
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory
// ---------------------------------------------------------------------------------------------------------------------

EXPORT Result cuMemGetInfo_v2(size_t* free, size_t* total) {
    const Lock lock(driver().mutex);
    Context* context = nullptr;
    TRY(enter(context));
    if (total != nullptr) *total = settings().memory_bytes;
    if (free != nullptr) *free = settings().memory_bytes - std::min(settings().memory_bytes, context->used_bytes);
    return SUCCESS;
}

EXPORT Result cuMemAlloc_v2(DevicePointer* pointer, size_t bytes) {
    const Lock lock(driver().mutex);
    Context* context = nullptr;
    TRY(enter(context));
    if (pointer == nullptr || bytes == 0) return INVALID_VALUE;
    TRY(unsafe_in_capture());
    const long since_first = ++driver().mallocs - settings().failing_malloc;
    const bool fails = settings().failing_malloc > 0 && since_first >= 0 && since_first < settings().failing_mallocs;
    const Result result = fails ? OUT_OF_MEMORY : allocate(*context, bytes, *pointer);
    log_line("malloc bytes=%zu result=%d used=%zu", bytes, result, context->used_bytes);
    return result;
}

// Waits for the whole context, as the real driver does (undocumented).
EXPORT Result cuMemFree_v2(DevicePointer pointer) {
    Execution both;
    Context* context = nullptr;
    TRY(enter(context));
    if (pointer == 0) return SUCCESS;
    TRY(unsafe_in_capture());
    run_all(both.lock, *context);
    TRY(context->error);
    const auto found = driver().device_memory.find(pointer);
    if (found == driver().device_memory.end()) return INVALID_VALUE;
    log_line("free bytes=%zu", found->second.bytes);
    release(found);
    return SUCCESS;
}

EXPORT Result cuMemHostAlloc(void** pointer, size_t bytes, unsigned) {
    const Lock lock(driver().mutex);
    Context* context = nullptr;
    TRY(enter(context));
    if (pointer == nullptr || bytes == 0) return INVALID_VALUE;
    TRY(unsafe_in_capture());
    void* const memory = aligned_alloc(PAGE, whole_pages(bytes));
    if (memory == nullptr) return OUT_OF_MEMORY;
    memset(memory, 0xFF, bytes);
    driver().pinned_memory[reinterpret_cast<uintptr_t>(memory)] = bytes;
    *pointer = memory;
    log_line("malloc_host bytes=%zu", bytes);
    return SUCCESS;
}

EXPORT Result cuMemAllocHost_v2(void** pointer, size_t bytes) { return cuMemHostAlloc(pointer, bytes, 0); }

EXPORT Result cuMemFreeHost(void* pointer) {
    Execution both;
    Context* context = nullptr;
    TRY(enter(context));
    TRY(unsafe_in_capture());
    run_all(both.lock, *context);
    TRY(context->error);
    if (driver().pinned_memory.erase(reinterpret_cast<uintptr_t>(pointer)) == 0) return INVALID_VALUE;
    free(pointer);
    return SUCCESS;
}

EXPORT Result cuMemcpyHtoD_v2(DevicePointer to, const void* from, size_t bytes) {
    return run_on_legacy([=] { return copy_to_device(to, from, bytes); });
}

EXPORT Result cuMemcpyDtoH_v2(void* to, DevicePointer from, size_t bytes) {
    return run_on_legacy([=] { return copy_to_host(to, from, bytes); });
}

EXPORT Result cuMemcpyDtoD_v2(DevicePointer to, DevicePointer from, size_t bytes) {
    return run_on_legacy([=] { return copy_in_device(to, from, bytes); });
}

EXPORT Result cuMemsetD8_v2(DevicePointer to, unsigned char value, size_t bytes) {
    return run_on_legacy([=] { return fill_device(to, value, bytes); });
}

namespace {

// Rejects pageable memory during a capture: the graph would contain an address that is invalid later.
Result pageable_in_capture(Stream& stream) {
    if (!stream.capture) return SUCCESS;
    stream.capture->invalid = true;
    return CAPTURE_UNSUPPORTED;
}

} // namespace

EXPORT Result cuMemcpyHtoDAsync_v2(DevicePointer to, const void* from, size_t bytes, void* handle) {
    const Lock lock(driver().mutex);
    Context* context = nullptr;
    shared_ptr<Stream> stream;
    TRY(enter(context));
    TRY(find_stream(*context, handle, stream));
    if (is_pinned(from, bytes)) return issue(stream, [=] { return copy_to_device(to, from, bytes); });
    TRY(pageable_in_capture(*stream));
    const char* const first = static_cast<const char*>(from);
    auto staged = std::make_shared<std::vector<char>>(first, first + bytes);
    return issue(stream, [=] { return copy_to_device(to, staged->data(), bytes); });
}

EXPORT Result cuMemcpyDtoHAsync_v2(void* to, DevicePointer from, size_t bytes, void* handle) {
    const auto copy = [=] { return copy_to_host(to, from, bytes); };
    {
        const Lock lock(driver().mutex);
        Context* context = nullptr;
        shared_ptr<Stream> stream;
        TRY(enter(context));
        TRY(find_stream(*context, handle, stream));
        if (is_pinned(to, bytes)) return issue(stream, copy);
        TRY(pageable_in_capture(*stream));
    }
    Execution both;
    Context* context = nullptr;
    shared_ptr<Stream> stream;
    TRY(enter(context));
    TRY(find_stream(*context, handle, stream));
    return issue_and_run(both.lock, *context, stream, copy);
}

EXPORT Result cuMemcpyDtoDAsync_v2(DevicePointer to, DevicePointer from, size_t bytes, void* handle) {
    const Lock lock(driver().mutex);
    Context* context = nullptr;
    shared_ptr<Stream> stream;
    TRY(enter(context));
    TRY(find_stream(*context, handle, stream));
    return issue(stream, [=] { return copy_in_device(to, from, bytes); });
}

EXPORT Result cuMemsetD8Async(DevicePointer to, unsigned char value, size_t bytes, void* handle) {
    const Lock lock(driver().mutex);
    Context* context = nullptr;
    shared_ptr<Stream> stream;
    TRY(enter(context));
    TRY(find_stream(*context, handle, stream));
    return issue(stream, [=] { return fill_device(to, value, bytes); });
}

// ---------------------------------------------------------------------------------------------------------------------
// Streams
// ---------------------------------------------------------------------------------------------------------------------

EXPORT Result cuStreamCreateWithPriority(void** handle, unsigned flags, int) {
    const Lock lock(driver().mutex);
    Context* context = nullptr;
    TRY(enter(context));
    if (handle == nullptr || flags > 1) return INVALID_VALUE;
    auto stream = std::make_shared<Stream>();
    stream->context = context;
    stream->waits_for_legacy = flags == 0;
    context->streams.push_back(stream);
    driver().streams[stream.get()] = stream;
    *handle = stream.get();
    return SUCCESS;
}

EXPORT Result cuStreamCreate(void** handle, unsigned flags) { return cuStreamCreateWithPriority(handle, flags, 0); }

// Does not wait: pending work still runs when the context is synchronized.
EXPORT Result cuStreamDestroy_v2(void* handle) {
    const Lock lock(driver().mutex);
    Context* context = nullptr;
    TRY(enter(context));
    if (driver().streams.erase(handle) == 0) return INVALID_HANDLE;
    forget_idle_streams(*context);
    return SUCCESS;
}

namespace {

// Synchronizing a capturing stream invalidates the capture; for another stream the rules of unsafe_in_capture apply.
Result may_wait(Stream& stream) {
    if (stream.capture) {
        stream.capture->invalid = true;
        return CAPTURE_UNSUPPORTED;
    }
    return unsafe_in_capture();
}

// Runs one operation, so that repeated polling ends; none if another thread is running operations.
Result poll(const std::function<Result(Context&, shared_ptr<Stream>&, uint64_t&)>& target) {
    std::unique_lock<std::recursive_mutex> execution(driver().execution, std::try_to_lock);
    Lock lock(driver().mutex);
    Context* context = nullptr;
    shared_ptr<Stream> stream;
    uint64_t number = 0;
    TRY(enter(context));
    TRY(target(*context, stream, number));
    if (!stream || stream->finished >= number) return SUCCESS;
    if (execution.owns_lock() && !stream->queue.empty()) run_until(lock, stream, stream->queue.front().number);
    return context->error != SUCCESS ? context->error.load() : NOT_READY;
}

} // namespace

EXPORT Result cuStreamSynchronize(void* handle) {
    Execution both;
    Context* context = nullptr;
    shared_ptr<Stream> stream;
    TRY(enter(context));
    TRY(find_stream(*context, handle, stream));
    TRY(may_wait(*stream));
    run_until(both.lock, stream, stream->issued);
    if (stream == context->legacy) {
        const std::vector<shared_ptr<Stream>> streams = context->streams;
        for (const auto& other : streams) {
            if (other->waits_for_legacy) run_until(both.lock, other, other->issued);
        }
    }
    return context->error;
}

EXPORT Result cuStreamQuery(void* handle) {
    return poll([handle](Context& context, shared_ptr<Stream>& stream, uint64_t& number) {
        TRY(find_stream(context, handle, stream));
        TRY(may_wait(*stream));
        number = stream->issued;
        return SUCCESS;
    });
}

EXPORT Result cuStreamWaitEvent(void* handle, void* event_handle, unsigned) {
    const Lock lock(driver().mutex);
    Context* context = nullptr;
    shared_ptr<Stream> stream;
    shared_ptr<Event> event;
    TRY(enter(context));
    TRY(find_stream(*context, handle, stream));
    TRY(find(driver().events, event_handle, event));
    if (event->capture) {
        if (event->capture->invalid) return CAPTURE_INVALIDATED;
        if (stream->capture && stream->capture != event->capture) return ILLEGAL_STATE;
        // The stream joins the capture. Its work follows in the order of issue, which is one of the legal orders.
        stream->capture = event->capture;
        return SUCCESS;
    }
    if (stream->capture) {
        stream->capture->invalid = true;
        return CAPTURE_ISOLATION;
    }
    if (event->stream) push(stream, {0, nullptr, event->stream, event->number});
    return SUCCESS;
}

// ---------------------------------------------------------------------------------------------------------------------
// Captures and graphs
// ---------------------------------------------------------------------------------------------------------------------

EXPORT Result cuStreamBeginCapture_v2(void* handle, unsigned mode) {
    const Lock lock(driver().mutex);
    Context* context = nullptr;
    shared_ptr<Stream> stream;
    TRY(enter(context));
    TRY(find_stream(*context, handle, stream));
    if (mode > 2) return INVALID_VALUE;
    if (stream == context->legacy) return CAPTURE_UNSUPPORTED;
    if (stream->capture) return ILLEGAL_STATE;
    auto capture = std::make_shared<Capture>();
    capture->origin = stream.get();
    capture->mode = static_cast<int>(mode);
    capture->thread = std::this_thread::get_id();
    stream->capture = capture;
    driver().captures.push_back(capture);
    return SUCCESS;
}

EXPORT Result cuStreamEndCapture(void* handle, void** graph_handle) {
    const Lock lock(driver().mutex);
    Driver& d = driver();
    Context* context = nullptr;
    shared_ptr<Stream> stream;
    TRY(enter(context));
    TRY(find_stream(*context, handle, stream));
    if (graph_handle == nullptr) return INVALID_VALUE;
    *graph_handle = nullptr;
    const shared_ptr<Capture> capture = stream->capture;
    if (!capture) return ILLEGAL_STATE;
    if (capture->origin != stream.get()) return CAPTURE_UNMATCHED;
    if (capture->mode != 2 && capture->thread != std::this_thread::get_id()) return CAPTURE_WRONG_THREAD;
    for (const auto& other : context->streams) {
        if (other->capture == capture) other->capture.reset();
    }
    for (const auto& [event_handle, event] : d.events) {
        if (event->capture == capture) event->capture.reset();
    }
    d.captures.erase(std::find(d.captures.begin(), d.captures.end(), capture));
    if (capture->invalid) return CAPTURE_INVALIDATED;
    auto graph = std::make_shared<Graph>();
    graph->context = context;
    graph->work = std::move(capture->work);
    log_line("graph captured nodes=%zu", graph->work.size());
    d.graphs[graph.get()] = graph;
    *graph_handle = graph.get();
    return SUCCESS;
}

EXPORT Result cuStreamIsCapturing(void* handle, int* status) {
    const Lock lock(driver().mutex);
    Context* context = nullptr;
    shared_ptr<Stream> stream;
    TRY(enter(context));
    TRY(find_stream(*context, handle, stream));
    if (status == nullptr) return INVALID_VALUE;
    *status = !stream->capture ? 0 : stream->capture->invalid ? 2 : 1;
    return SUCCESS;
}

EXPORT Result cuGraphInstantiateWithFlags(void** handle, void* graph_handle, unsigned long long) {
    const Lock lock(driver().mutex);
    Context* context = nullptr;
    shared_ptr<Graph> graph;
    TRY(enter(context));
    TRY(find(driver().graphs, graph_handle, graph));
    auto executable = std::make_shared<Graph>(*graph);
    driver().executables[executable.get()] = executable;
    *handle = executable.get();
    return SUCCESS;
}

EXPORT Result cuGraphUpload(void* handle, void* stream_handle) {
    const Lock lock(driver().mutex);
    Context* context = nullptr;
    shared_ptr<Graph> executable;
    shared_ptr<Stream> stream;
    TRY(enter(context));
    TRY(find(driver().executables, handle, executable));
    return find_stream(*context, stream_handle, stream);
}

EXPORT Result cuGraphLaunch(void* handle, void* stream_handle) {
    const Lock lock(driver().mutex);
    Context* context = nullptr;
    shared_ptr<Graph> executable;
    shared_ptr<Stream> stream;
    TRY(enter(context));
    TRY(find(driver().executables, handle, executable));
    TRY(find_stream(*context, stream_handle, stream));
    for (const auto& work : executable->work) TRY(issue(stream, work));
    log_line("graph launch nodes=%zu", executable->work.size());
    return SUCCESS;
}

EXPORT Result cuGraphExecDestroy(void* handle) {
    const Lock lock(driver().mutex);
    Context* context = nullptr;
    TRY(enter(context));
    return driver().executables.erase(handle) == 1 ? SUCCESS : INVALID_VALUE;
}

EXPORT Result cuGraphDestroy(void* handle) {
    const Lock lock(driver().mutex);
    Context* context = nullptr;
    TRY(enter(context));
    return driver().graphs.erase(handle) == 1 ? SUCCESS : INVALID_VALUE;
}

// ---------------------------------------------------------------------------------------------------------------------
// Events
// ---------------------------------------------------------------------------------------------------------------------

EXPORT Result cuEventCreate(void** handle, unsigned flags) {
    const Lock lock(driver().mutex);
    Context* context = nullptr;
    TRY(enter(context));
    if (handle == nullptr) return INVALID_VALUE;
    auto event = std::make_shared<Event>();
    event->context = context;
    event->timed = (flags & 2) == 0;
    driver().events[event.get()] = event;
    *handle = event.get();
    return SUCCESS;
}

EXPORT Result cuEventDestroy_v2(void* handle) {
    const Lock lock(driver().mutex);
    Context* context = nullptr;
    TRY(enter(context));
    return driver().events.erase(handle) == 1 ? SUCCESS : INVALID_HANDLE;
}

EXPORT Result cuEventRecord(void* handle, void* stream_handle) {
    const Lock lock(driver().mutex);
    Context* context = nullptr;
    shared_ptr<Event> event;
    shared_ptr<Stream> stream;
    TRY(enter(context));
    TRY(find(driver().events, handle, event));
    TRY(find_stream(*context, stream_handle, stream));
    if (event->context != stream->context) return INVALID_HANDLE;
    if (stream->capture) {
        if (stream->capture->invalid) return CAPTURE_INVALIDATED;
        event->capture = stream->capture;
        return SUCCESS;
    }
    const auto mark = [event, number = driver().issued + 1] {
        const Lock lock(driver().mutex);
        if (event->number == number) event->when = Clock::now();
        return SUCCESS;
    };
    TRY(issue(stream, mark));
    event->capture.reset();
    event->stream = stream;
    event->number = stream->issued;
    return SUCCESS;
}

namespace {

Result find_event_to_wait_for(const void* handle, shared_ptr<Event>& event) {
    TRY(find(driver().events, handle, event));
    if (event->capture) {
        event->capture->invalid = true;
        return CAPTURED_EVENT;
    }
    return unsafe_in_capture();
}

} // namespace

EXPORT Result cuEventSynchronize(void* handle) {
    Execution both;
    Context* context = nullptr;
    shared_ptr<Event> event;
    TRY(enter(context));
    TRY(find_event_to_wait_for(handle, event));
    if (event->stream) run_until(both.lock, event->stream, event->number);
    return context->error;
}

EXPORT Result cuEventQuery(void* handle) {
    return poll([handle](Context&, shared_ptr<Stream>& stream, uint64_t& number) {
        shared_ptr<Event> event;
        TRY(find_event_to_wait_for(handle, event));
        stream = event->stream;
        number = event->number;
        return SUCCESS;
    });
}

EXPORT Result cuEventElapsedTime_v2(float* milliseconds, void* start_handle, void* end_handle) {
    const Lock lock(driver().mutex);
    Context* context = nullptr;
    shared_ptr<Event> start, end;
    TRY(enter(context));
    TRY(find(driver().events, start_handle, start));
    TRY(find(driver().events, end_handle, end));
    for (const auto& event : {start, end}) {
        if (!event->stream || !event->timed) return INVALID_HANDLE;
        if (event->stream->finished < event->number) return NOT_READY;
    }
    *milliseconds = std::chrono::duration<float, std::milli>(end->when - start->when).count();
    return SUCCESS;
}

EXPORT Result cuEventElapsedTime(float* milliseconds, void* start, void* end) {
    return cuEventElapsedTime_v2(milliseconds, start, end);
}

// ---------------------------------------------------------------------------------------------------------------------
// Modules and launches
// ---------------------------------------------------------------------------------------------------------------------

EXPORT Result cuModuleLoadData(void** handle, const void* image) {
    const Lock lock(driver().mutex);
    Context* context = nullptr;
    TRY(enter(context));
    if (handle == nullptr || image == nullptr) return INVALID_VALUE;
    TRY(unsafe_in_capture());
    auto module = std::make_shared<Module>();
    module->context = context;
    TRY(open_library(static_cast<const char*>(image), module->library));
    const auto architecture = static_cast<const char*>(dlsym(module->library, "standin_architecture"));
    if (architecture == nullptr) return INVALID_IMAGE;
    if (!runs_here(architecture)) return NO_BINARY_FOR_GPU;
    driver().modules[module.get()] = module;
    *handle = module.get();
    log_line("module architecture=%s", architecture);
    return SUCCESS;
}

EXPORT Result cuModuleUnload(void* handle) {
    Execution both;
    Context* context = nullptr;
    shared_ptr<Module> module;
    TRY(enter(context));
    TRY(find(driver().modules, handle, module));
    run_all(both.lock, *context);
    TRY(context->error);
    forget_functions(*module);
    driver().modules.erase(handle);
    return SUCCESS;
}

EXPORT Result cuModuleGetFunction(void** handle, void* module_handle, const char* name) {
    const Lock lock(driver().mutex);
    Context* context = nullptr;
    shared_ptr<Module> module;
    TRY(enter(context));
    TRY(find(driver().modules, module_handle, module));
    if (handle == nullptr || name == nullptr) return INVALID_VALUE;
    auto& function = module->functions[name];
    if (!function) {
        // nvrtc.cpp generates a table for each kernel: maximum threads per block, number of arguments, size of each argument.
        using Table = const unsigned long* (*)();
        const auto kernel = dlsym(module->library, ("emulated_kernel_" + std::string(name)).c_str());
        const auto table = dlsym(module->library, ("standin_table_" + std::string(name)).c_str());
        if (kernel == nullptr || table == nullptr) {
            module->functions.erase(name);
            return NOT_FOUND;
        }
        const unsigned long* const entries = reinterpret_cast<Table>(table)();
        function = std::make_unique<Function>();
        function->module = module.get();
        function->name = name;
        function->kernel = reinterpret_cast<Kernel>(kernel);
        function->max_threads = entries[0];
        function->argument_bytes.assign(entries + 2, entries + 2 + entries[1]);
        driver().functions[function.get()] = function.get();
    }
    *handle = function.get();
    return SUCCESS;
}

namespace {

enum FunctionAttribute {
    MAX_THREADS_PER_BLOCK = 0,
    SHARED_SIZE_BYTES = 1,
    CONST_SIZE_BYTES = 2,
    LOCAL_SIZE_BYTES = 3,
    NUM_REGS = 4,
    PTX_VERSION = 5,
    BINARY_VERSION = 6,
    MAX_DYNAMIC_SHARED_SIZE_BYTES = 8,
    PREFERRED_SHARED_MEMORY_CARVEOUT = 9,
};

Result find_function(void* handle, Function*& function) {
    const auto found = driver().functions.find(handle);
    if (found == driver().functions.end()) return INVALID_HANDLE;
    function = found->second;
    return SUCCESS;
}

} // namespace

EXPORT Result cuFuncSetAttribute(void* handle, int attribute, int value) {
    const Lock lock(driver().mutex);
    Context* context = nullptr;
    Function* function = nullptr;
    TRY(enter(context));
    TRY(find_function(handle, function));
    if (attribute == PREFERRED_SHARED_MEMORY_CARVEOUT) return value >= -1 && value <= 100 ? SUCCESS : INVALID_VALUE;
    if (attribute != MAX_DYNAMIC_SHARED_SIZE_BYTES) return INVALID_VALUE;
    if (value < 0 || static_cast<unsigned>(value) > max_shared_bytes()) return INVALID_VALUE;
    function->max_dynamic_shared = value;
    return SUCCESS;
}

// Encodes the map in the form that the emulator's tma_load_2d reads.
EXPORT Result cuTensorMapEncodeTiled(uint64_t* map, int type, unsigned rank, void* address, const uint64_t* sizes,
                                     const uint64_t* strides, const unsigned* box_sizes, const unsigned* steps, int interleave,
                                     int swizzle, int, int) {
    constexpr int F16 = 6, BF16 = 9, SWIZZLE_128_BYTES = 3;
    if ((type != F16 && type != BF16) || rank != 2 || interleave != 0 || swizzle != SWIZZLE_128_BYTES) return NOT_SUPPORTED;
    if (reinterpret_cast<uintptr_t>(address) % 16 != 0 || strides[0] % 16 != 0 || steps[0] != 1 || steps[1] != 1) return INVALID_VALUE;
    if (box_sizes[0] * 2 > 128 || box_sizes[0] > 256 || box_sizes[1] > 256) return INVALID_VALUE;
    const uint64_t words[] = {reinterpret_cast<uintptr_t>(address), sizes[0], sizes[1], strides[0], box_sizes[0], box_sizes[1]};
    std::fill(map, map + 16, 0);
    std::copy(std::begin(words), std::end(words), map);
    return SUCCESS;
}

EXPORT Result cuFuncGetAttribute(int* value, int attribute, void* handle) {
    const Lock lock(driver().mutex);
    Context* context = nullptr;
    Function* function = nullptr;
    TRY(enter(context));
    TRY(find_function(handle, function));
    switch (attribute) {
    case MAX_THREADS_PER_BLOCK: *value = static_cast<int>(function->max_threads); break;
    case NUM_REGS: *value = 64; break;
    case PTX_VERSION: case BINARY_VERSION: *value = settings().major * 10 + settings().minor; break;
    case MAX_DYNAMIC_SHARED_SIZE_BYTES: *value = static_cast<int>(function->max_dynamic_shared); break;
    case PREFERRED_SHARED_MEMORY_CARVEOUT: *value = -1; break;
    case SHARED_SIZE_BYTES: case CONST_SIZE_BYTES: case LOCAL_SIZE_BYTES: *value = 0; break;
    default: return INVALID_VALUE;
    }
    return SUCCESS;
}

// Limited by threads and shared memory only: the number of registers is unknown.
EXPORT Result cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void* handle, int threads, size_t shared_bytes) {
    const Lock lock(driver().mutex);
    Context* context = nullptr;
    Function* function = nullptr;
    TRY(enter(context));
    TRY(find_function(handle, function));
    if (blocks == nullptr || threads <= 0) return INVALID_VALUE;
    const bool fits = static_cast<unsigned long>(threads) <= function->max_threads && shared_bytes <= function->max_dynamic_shared;
    const size_t by_threads = 2048 / threads, by_shared = (max_shared_bytes() + 1024) / (shared_bytes + 1024);
    *blocks = fits ? static_cast<int>(std::min<size_t>({by_threads, by_shared, 32})) : 0;
    return SUCCESS;
}

EXPORT Result cuLaunchKernel(void* handle, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                             unsigned block_y, unsigned block_z, unsigned shared_bytes, void* stream_handle,
                             void** arguments, void** extra) {
    const Lock lock(driver().mutex);
    Context* context = nullptr;
    Function* function = nullptr;
    shared_ptr<Stream> stream;
    TRY(enter(context));
    TRY(find_function(handle, function));
    TRY(find_stream(*context, stream_handle, stream));
    log_line("launch %s grid=%u,%u,%u block=%u,%u,%u shared=%u%s", function->name.c_str(), grid_x, grid_y, grid_z, block_x,
             block_y, block_z, shared_bytes, stream->capture ? " captured" : "");

    const bool grid_fits = grid_x >= 1 && grid_x <= 2147483647u && grid_y >= 1 && grid_y <= 65535 && grid_z >= 1 &&
                           grid_z <= 65535;
    const bool block_fits = block_x >= 1 && block_x <= 1024 && block_y >= 1 && block_y <= 1024 && block_z >= 1 &&
                            block_z <= 64 && uint64_t(block_x) * block_y * block_z <= function->max_threads;
    if (!grid_fits || !block_fits || shared_bytes > function->max_dynamic_shared) return INVALID_VALUE;
    if (extra != nullptr || (arguments == nullptr && !function->argument_bytes.empty())) return INVALID_VALUE;

    auto launch = std::make_shared<Launch>();
    launch->name = function->name;
    launch->kernel = function->kernel;
    const unsigned grid[3] = {grid_x, grid_y, grid_z}, block[3] = {block_x, block_y, block_z};
    std::copy(grid, grid + 3, launch->grid);
    std::copy(block, block + 3, launch->block);
    launch->shared_bytes = shared_bytes;
    for (size_t i = 0; i < function->argument_bytes.size(); ++i) {
        const size_t bytes = function->argument_bytes[i], offset = launch->values.size();
        launch->offsets.push_back(offset);
        launch->values.resize(offset + (bytes + 15) / 16 * 16);
        memcpy(launch->values.data() + offset, arguments[i], bytes);
    }
    return issue(stream, [launch] { return launch->run(); });
}

// ---------------------------------------------------------------------------------------------------------------------
// Errors
// ---------------------------------------------------------------------------------------------------------------------

namespace {

struct ErrorText {
    int code;
    const char *name, *text;
};

constexpr ErrorText ERRORS[] = {
    {SUCCESS, "CUDA_SUCCESS", "no error"},
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {INVALID_IMAGE, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {NO_BINARY_FOR_GPU, "CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"},
    {OPERATING_SYSTEM, "CUDA_ERROR_OPERATING_SYSTEM", "OS call failed or operation not supported on this OS"},
    {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {ILLEGAL_STATE, "CUDA_ERROR_ILLEGAL_STATE", "the operation cannot be performed in the present state"},
    {NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
    {ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"},
    {CAPTURE_INVALIDATED, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
     "operation failed due to a previous error during capture"},
    {CAPTURE_UNMATCHED, "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED", "capture was not initiated in this stream"},
    {CAPTURE_ISOLATION, "CUDA_ERROR_STREAM_CAPTURE_ISOLATION", "dependency created on uncaptured work in another stream"},
    {CAPTURE_IMPLICIT, "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT",
     "operation would make the legacy stream depend on a capturing blocking stream"},
    {CAPTURED_EVENT, "CUDA_ERROR_CAPTURED_EVENT", "operation not permitted on an event last recorded in a capturing stream"},
    {CAPTURE_WRONG_THREAD, "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD",
     "attempt to terminate a thread-local capture sequence from another thread"},
};

const ErrorText* find_error(int code) {
    for (const ErrorText& error : ERRORS) {
        if (error.code == code) return &error;
    }
    return nullptr;
}

} // namespace

EXPORT Result cuGetErrorName(int code, const char** name) {
    const ErrorText* const error = find_error(code);
    *name = error != nullptr ? error->name : nullptr;
    return error != nullptr ? SUCCESS : INVALID_VALUE;
}

EXPORT Result cuGetErrorString(int code, const char** text) {
    const ErrorText* const error = find_error(code);
    *text = error != nullptr ? error->text : nullptr;
    return error != nullptr ? SUCCESS : INVALID_VALUE;
}
