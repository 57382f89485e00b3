// Shared by the three stand-in libraries: result codes, the log, and the calls through which cublaslt.cpp adds GEMMs to the streams of
// driver.cpp.
#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#define EXPORT extern "C" __attribute__((visibility("default")))

// CUresult, as cuda.h numbers it.
enum Result : int {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    NO_BINARY_FOR_GPU = 209,
    OPERATING_SYSTEM = 304,
    INVALID_HANDLE = 400,
    ILLEGAL_STATE = 401,
    NOT_FOUND = 500,
    NOT_READY = 600,
    ILLEGAL_ADDRESS = 700,
    NOT_SUPPORTED = 801,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
    CAPTURE_UNMATCHED = 903,
    CAPTURE_ISOLATION = 905,
    CAPTURE_IMPLICIT = 906,
    CAPTURED_EVENT = 907,
    CAPTURE_WRONG_THREAD = 908,
};

// Appends a line to the file that STANDIN_LOG names, if set. A line is one write, so threads and libraries can share the file.
__attribute__((format(printf, 1, 2))) inline void log_line(const char* format, ...) {
    static const char* const path = getenv("STANDIN_LOG");
    if (path == nullptr || *path == 0) return;
    static const int file = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    if (file < 0) return;
    char line[1024];
    va_list values;
    va_start(values, format);
    int length = vsnprintf(line, sizeof line - 1, format, values);
    va_end(values);
    if (length < 0) return;
    if (static_cast<size_t>(length) > sizeof line - 2) length = sizeof line - 2;
    line[length] = '\n';
    if (write(file, line, length + 1) < 0) return;
}

// Appends `work` to a stream, or to the graph that the stream captures. It runs later (in a graph at every replay) and returns
// SUCCESS or an error that sticks to the context. `drop` frees the payload, also if this call fails.
EXPORT Result standin_enqueue(void* stream, Result (*work)(void* payload), void* payload, void (*drop)(void* payload));

// Whether the bytes lie in one live allocation of device memory. To be called by running work.
EXPORT bool standin_is_device_memory(const void* from, size_t bytes);
