// A stand-in for libnvrtc.so.13: compiles CUDA C++ with g++ and the SIMT emulator to a shared object, which it returns as the cubin.
// driver.cpp loads it.
//
// The cubin also contains its target architecture and, for each `extern "C" __global__` kernel, a table of its launch bounds and
// argument sizes. PTX is the same bytes.
//
// Not modeled: NVRTC's own diagnostics (g++ compiles here), name expressions and templated kernels, precompiled headers, LTO, and
// options other than those it reads or ignores (`is_ignored`).
//
// Environment:
//   STANDIN_EMULATOR=path    the emulator's header; build.sh sets the default to that of this checkout
//   STANDIN_CXX=g++          the compiler
//   STANDIN_CXXFLAGS         further options, separated by spaces
//   STANDIN_LOG=path         gets a line per compilation

#include <spawn.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "shared.h"

#ifndef STANDIN_EMULATOR_DEFAULT
#define STANDIN_EMULATOR_DEFAULT "emulator.h"
#endif

extern char** environ;

namespace {

namespace fs = std::filesystem;
using std::string;

// nvrtcResult, as nvrtc.h numbers it.
enum Status : int {
    NVRTC_SUCCESS = 0,
    NVRTC_INVALID_INPUT = 3,
    NVRTC_INVALID_PROGRAM = 4,
    NVRTC_INVALID_OPTION = 5,
    NVRTC_COMPILATION = 6,
    NVRTC_INTERNAL_ERROR = 11,
};

// Architectures that NVRTC 13.0 supports. From 90 on there are architecture-specific variants ("90a"), from 100 on family-specific
// ones ("100f").
constexpr int ARCHITECTURES[] = {75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121};

struct File {
    string name, text;
};

struct Program {
    File source;
    std::vector<File> headers;
    string log, image;
    bool real = false; // for sm_XX: there is a cubin; otherwise for compute_XX: PTX alone
    bool compiled = false;
};

struct Options {
    string architecture = "compute_75";
    std::vector<string> for_compiler;
};

bool starts_with(const string& text, const string& start) { return text.compare(0, start.size(), start) == 0; }

bool is_architecture(const string& text) {
    unsigned number = 0;
    char suffix = 0, more = 0;
    const char* const digits = starts_with(text, "sm_") ? text.c_str() + 3 : text.c_str() + 8;
    if (!starts_with(text, "sm_") && !starts_with(text, "compute_")) return false;
    const int read = sscanf(digits, "%u%c%c", &number, &suffix, &more);
    const bool known = std::find(std::begin(ARCHITECTURES), std::end(ARCHITECTURES), int(number)) != std::end(ARCHITECTURES);
    if (!known || read < 1 || read > 2) return false;
    return read == 1 || (suffix == 'a' && number >= 90) || (suffix == 'f' && number >= 100);
}

// Valid options that have no effect on the emulator.
bool is_ignored(const string& option) {
    static const std::set<string> words = {
        "-default-device", "--device-as-default-execution-space", "-lineinfo", "--generate-line-info", "-G",
        "--device-debug", "-w", "--disable-warnings", "-restrict", "--restrict", "--use_fast_math", "-use_fast_math",
        "--extra-device-vectorization", "-extra-device-vectorization", "-rdc=false", "--relocatable-device-code=false",
        "--no-source-include", "-no-source-include", "--minimal", "-minimal", "--display-error-number", "-err-no",
    };
    static const char* const starts[] = {
        "--std=", "-std=", "--ftz=", "-ftz=", "--fmad=", "-fmad=", "--prec-div=", "-prec-div=", "--prec-sqrt=",
        "-prec-sqrt=", "--maxrregcount=", "-maxrregcount=", "--diag-suppress=", "-diag-suppress=", "--ptxas-options=",
        "-Xptxas=", "--split-compile=", "-split-compile=", "--device-int128",
    };
    if (words.count(option) != 0) return true;
    for (const char* const start : starts) {
        if (starts_with(option, start)) return true;
    }
    return false;
}

// Reads an option's value, after "=" or from the next argument; advances `at` to it in that case.
bool value_of(const std::vector<string>& arguments, size_t& at, const std::vector<string>& names, string& value) {
    for (const string& name : names) {
        if (starts_with(arguments[at], name + "=")) {
            value = arguments[at].substr(name.size() + 1);
            return true;
        }
        if (arguments[at] == name && at + 1 < arguments.size()) {
            value = arguments[++at];
            return true;
        }
    }
    return false;
}

bool read_options(const std::vector<string>& arguments, Options& options, string& log) {
    for (size_t at = 0; at < arguments.size(); ++at) {
        const string& argument = arguments[at];
        string value;
        if (value_of(arguments, at, {"--gpu-architecture", "-arch"}, value)) {
            if (!is_architecture(value)) {
                log += "nvrtc: error: invalid value for --gpu-architecture (-arch)\n";
                return false;
            }
            options.architecture = value;
        } else if (value_of(arguments, at, {"--define-macro", "-D"}, value)) {
            options.for_compiler.push_back("-D" + value);
        } else if (value_of(arguments, at, {"--undefine-macro", "-U"}, value)) {
            options.for_compiler.push_back("-U" + value);
        } else if (value_of(arguments, at, {"--include-path", "-I"}, value)) {
            options.for_compiler.push_back("-I" + value);
        } else if (starts_with(argument, "-D") || starts_with(argument, "-U") || starts_with(argument, "-I")) {
            options.for_compiler.push_back(argument);
        } else if (!is_ignored(argument)) {
            log += "nvrtc: error: unrecognized option " + argument + " found\n";
            return false;
        }
    }
    return true;
}

// ---------------------------------------------------------------------------------------------------------------------
// Kernels in a source
// ---------------------------------------------------------------------------------------------------------------------

struct Kernel {
    string name;
    string bounds; // "(256, 2)" of __launch_bounds__, or empty
};

bool is_letter(char c) { return isalnum(static_cast<unsigned char>(c)) != 0 || c == '_'; }

// Replaces comments by spaces; keeps strings.
string without_comments(const string& text) {
    string plain;
    for (size_t i = 0; i < text.size(); ++i) {
        if (text.compare(i, 2, "//") == 0) {
            i = text.find('\n', i);
            if (i == string::npos) break;
            plain += '\n';
        } else if (text.compare(i, 2, "/*") == 0) {
            i = text.find("*/", i + 2);
            if (i == string::npos) break;
            ++i;
            plain += ' ';
        } else if (text[i] == '"' || (text[i] == '\'' && (i == 0 || !is_letter(text[i - 1])))) {
            const char quote = text[i];
            plain += quote;
            for (++i; i < text.size() && text[i] != quote && text[i] != '\n'; ++i) {
                if (text[i] == '\\') plain += text[i++];
                if (i < text.size()) plain += text[i];
            }
            if (i < text.size()) plain += text[i];
        } else {
            plain += text[i];
        }
    }
    return plain;
}

// Finds each `extern "C" __global__ ... name(` in text with conditionals resolved and macros not expanded.
std::vector<Kernel> kernels_of(const string& preprocessed) {
    const string text = without_comments(preprocessed), word = "__global__";
    std::vector<Kernel> kernels;
    std::set<string> seen;
    for (size_t at = text.find(word); at != string::npos; at = text.find(word, at)) {
        const size_t before = text.find_last_not_of(" \t\n", at == 0 ? 0 : at - 1);
        const bool plainly_named = before != string::npos && before >= 9 && text.compare(before - 2, 3, "\"C\"") == 0;
        at += word.size();
        if (!plainly_named) continue;
        Kernel kernel;
        while (at < text.size() && kernel.name.empty()) {
            while (at < text.size() && isspace(static_cast<unsigned char>(text[at])) != 0) ++at;
            const size_t start = at;
            while (at < text.size() && is_letter(text[at])) ++at;
            const string identifier = text.substr(start, at - start);
            const size_t next = text.find_first_not_of(" \t\n", at);
            if (identifier.empty() || next == string::npos) break;
            if (text[next] != '(') continue;
            if (identifier != "__launch_bounds__") {
                kernel.name = identifier;
                break;
            }
            size_t depth = 0;
            at = next;
            do {
                depth += text[at] == '(';
                depth -= text[at] == ')';
                ++at;
            } while (depth > 0 && at < text.size());
            kernel.bounds = text.substr(next, at - next);
        }
        if (!kernel.name.empty() && seen.insert(kernel.name).second) kernels.push_back(kernel);
    }
    return kernels;
}

// Code that is compiled after the source: the emulator's entry point of each kernel, and its table for the driver.
string epilogue(const std::vector<Kernel>& kernels, const string& architecture) {
    string text = R"(
#define STANDIN_EXPORT extern "C" __attribute__((visibility("default")))
namespace standin {
template <typename... Rest>
constexpr unsigned long first(unsigned long value, Rest...) {
    return value;
}
template <unsigned long COUNT>
struct Table {
    unsigned long max_threads, count, bytes[COUNT + 1];
};
template <typename... Parameters>
constexpr Table<sizeof...(Parameters)> table(unsigned long max_threads, void (*)(Parameters...)) {
    return {max_threads, sizeof...(Parameters), {sizeof(Parameters)..., 0}};
}
} // namespace standin
)";
    text += "STANDIN_EXPORT char standin_architecture[];\nchar standin_architecture[] = \"" + architecture + "\";\n";
    for (const Kernel& kernel : kernels) {
        const string max_threads = kernel.bounds.empty() ? "1024ul" : "standin::first" + kernel.bounds;
        text += "EMULATED_KERNEL(" + kernel.name + ")\n";
        text += "STANDIN_EXPORT const unsigned long* standin_table_" + kernel.name + "() {\n";
        text += "    static constexpr auto table = standin::table(" + max_threads + ", " + kernel.name + ");\n";
        text += "    return &table.max_threads;\n}\n";
    }
    return text;
}

// ---------------------------------------------------------------------------------------------------------------------
// Running the compiler
// ---------------------------------------------------------------------------------------------------------------------

// The folder of a compilation, removed afterwards.
struct Workspace {
    fs::path path;
    Workspace() {
        string name = fs::temp_directory_path() / "standin-nvrtc-XXXXXX";
        if (mkdtemp(name.data()) != nullptr) path = name;
    }
    ~Workspace() {
        std::error_code ignored;
        if (!path.empty()) fs::remove_all(path, ignored);
    }
};

string read_file(const fs::path& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
}

void write_file(const fs::path& path, const string& text) {
    std::error_code ignored;
    fs::create_directories(path.parent_path(), ignored);
    std::ofstream(path, std::ios::binary) << text;
}

// Runs a command and appends its stdout and stderr to `log`. Returns whether it exits with 0.
bool run(const std::vector<string>& command, const fs::path& folder, string& log) {
    std::vector<char*> arguments;
    for (const string& argument : command) arguments.push_back(const_cast<char*>(argument.c_str()));
    arguments.push_back(nullptr);
    const fs::path output = folder / "output";
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0);
    posix_spawn_file_actions_addopen(&actions, 1, output.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
    posix_spawn_file_actions_adddup2(&actions, 1, 2);
    pid_t child = 0;
    const int failed = posix_spawnp(&child, arguments[0], &actions, nullptr, arguments.data(), environ);
    posix_spawn_file_actions_destroy(&actions);
    if (failed != 0) {
        log += command[0] + ": " + strerror(failed) + "\n";
        return false;
    }
    int status = 0;
    while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
    }
    log += read_file(output);
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

string setting(const char* name, const char* otherwise) {
    const char* const value = getenv(name);
    return value != nullptr && *value != 0 ? value : otherwise;
}

Status compile(Program& program, const Options& options) {
    const Workspace workspace;
    if (workspace.path.empty()) return NVRTC_INTERNAL_ERROR;
    // Only the last part: the program's name may be a path.
    const string name = fs::path(program.source.name).filename().string();
    const fs::path source = workspace.path / name, image = workspace.path / "image.so";
    for (const File& header : program.headers) write_file(workspace.path / "include" / header.name, header.text);
    write_file(source, program.source.text);

    std::vector<string> command = {setting("STANDIN_CXX", "g++"), "-std=c++17", "-O2", "-fPIC", "-DEMULATED"};
    if (options.architecture == "sm_90a") command.push_back("-D__CUDA_ARCH_FEAT_SM90_ALL");
    command.insert(command.end(), options.for_compiler.begin(), options.for_compiler.end());
    command.push_back("-I" + (workspace.path / "include").string());
    std::istringstream more(setting("STANDIN_CXXFLAGS", ""));
    command.insert(command.end(), std::istream_iterator<string>(more), {});
    for (const string& argument :
         {string("-include"), setting("STANDIN_EMULATOR", STANDIN_EMULATOR_DEFAULT), string("-x"), string("c++")}) {
        command.push_back(argument);
    }

    // Preprocess to find the kernels, which depend on the macros.
    std::vector<string> preprocess = command;
    const fs::path preprocessed = workspace.path / "preprocessed";
    for (const string& argument : {string("-E"), string("-fdirectives-only"), source.string(), string("-o"),
                                   preprocessed.string()}) {
        preprocess.push_back(argument);
    }
    if (!run(preprocess, workspace.path, program.log)) return NVRTC_COMPILATION;
    const std::vector<Kernel> kernels = kernels_of(read_file(preprocessed));
    program.log.clear(); // the compilation repeats the warnings
    write_file(source, program.source.text + epilogue(kernels, options.architecture));

    // Modules of a process must not share symbols: no unique symbols, and references bind to the module itself.
    for (const string& argument : {string("-shared"), string("-fno-gnu-unique"), string("-Wl,-Bsymbolic"),
                                   source.string(), string("-o"), image.string()}) {
        command.push_back(argument);
    }
    if (!run(command, workspace.path, program.log)) return NVRTC_COMPILATION;
    program.image = read_file(image);
    program.real = starts_with(options.architecture, "sm_");
    program.compiled = !program.image.empty();
    return program.compiled ? NVRTC_SUCCESS : NVRTC_INTERNAL_ERROR;
}

} // namespace

// ---------------------------------------------------------------------------------------------------------------------
// The interface
// ---------------------------------------------------------------------------------------------------------------------

EXPORT Status nvrtcVersion(int* major, int* minor) {
    if (major == nullptr || minor == nullptr) return NVRTC_INVALID_INPUT;
    *major = 13;
    *minor = 0;
    return NVRTC_SUCCESS;
}

EXPORT Status nvrtcGetNumSupportedArchs(int* count) {
    if (count == nullptr) return NVRTC_INVALID_INPUT;
    *count = static_cast<int>(std::size(ARCHITECTURES));
    return NVRTC_SUCCESS;
}

EXPORT Status nvrtcGetSupportedArchs(int* architectures) {
    if (architectures == nullptr) return NVRTC_INVALID_INPUT;
    std::copy(std::begin(ARCHITECTURES), std::end(ARCHITECTURES), architectures);
    return NVRTC_SUCCESS;
}

EXPORT Status nvrtcCreateProgram(Program** program, const char* source, const char* name, int header_count,
                                 const char* const* headers, const char* const* header_names) {
    if (program == nullptr || source == nullptr || header_count < 0) return NVRTC_INVALID_INPUT;
    auto made = std::make_unique<Program>();
    made->source = {name != nullptr && *name != 0 ? name : "default_program", source};
    for (int i = 0; i < header_count; ++i) made->headers.push_back({header_names[i], headers[i]});
    *program = made.release();
    return NVRTC_SUCCESS;
}

EXPORT Status nvrtcDestroyProgram(Program** program) {
    if (program == nullptr || *program == nullptr) return NVRTC_INVALID_PROGRAM;
    delete *program;
    *program = nullptr;
    return NVRTC_SUCCESS;
}

EXPORT Status nvrtcCompileProgram(Program* program, int count, const char* const* arguments) {
    if (program == nullptr) return NVRTC_INVALID_PROGRAM;
    if (count < 0 || (count > 0 && arguments == nullptr)) return NVRTC_INVALID_INPUT;
    program->log.clear();
    program->compiled = false;
    Options options;
    if (!read_options({arguments, arguments + count}, options, program->log)) return NVRTC_INVALID_OPTION;
    const Status status = compile(*program, options);
    log_line("compile %s architecture=%s result=%d bytes=%zu", program->source.name.c_str(), options.architecture.c_str(),
             status, program->image.size());
    return status;
}

// Logs are zero-terminated; cubins are not.
EXPORT Status nvrtcGetProgramLogSize(Program* program, size_t* bytes) {
    if (program == nullptr) return NVRTC_INVALID_PROGRAM;
    if (bytes == nullptr) return NVRTC_INVALID_INPUT;
    *bytes = program->log.size() + 1;
    return NVRTC_SUCCESS;
}

EXPORT Status nvrtcGetProgramLog(Program* program, char* to) {
    if (program == nullptr) return NVRTC_INVALID_PROGRAM;
    if (to == nullptr) return NVRTC_INVALID_INPUT;
    memcpy(to, program->log.c_str(), program->log.size() + 1);
    return NVRTC_SUCCESS;
}

EXPORT Status nvrtcGetCUBINSize(Program* program, size_t* bytes) {
    if (program == nullptr || !program->compiled) return NVRTC_INVALID_PROGRAM;
    if (bytes == nullptr) return NVRTC_INVALID_INPUT;
    *bytes = program->real ? program->image.size() : 0;
    return NVRTC_SUCCESS;
}

EXPORT Status nvrtcGetCUBIN(Program* program, char* to) {
    if (program == nullptr || !program->compiled || !program->real) return NVRTC_INVALID_PROGRAM;
    if (to == nullptr) return NVRTC_INVALID_INPUT;
    memcpy(to, program->image.data(), program->image.size());
    return NVRTC_SUCCESS;
}

EXPORT Status nvrtcGetPTXSize(Program* program, size_t* bytes) {
    if (program == nullptr || !program->compiled) return NVRTC_INVALID_PROGRAM;
    if (bytes == nullptr) return NVRTC_INVALID_INPUT;
    *bytes = program->image.size();
    return NVRTC_SUCCESS;
}

EXPORT Status nvrtcGetPTX(Program* program, char* to) {
    if (program == nullptr || !program->compiled) return NVRTC_INVALID_PROGRAM;
    if (to == nullptr) return NVRTC_INVALID_INPUT;
    memcpy(to, program->image.data(), program->image.size());
    return NVRTC_SUCCESS;
}

EXPORT const char* nvrtcGetErrorString(Status status) {
    switch (status) {
    case NVRTC_SUCCESS: return "NVRTC_SUCCESS";
    case NVRTC_INVALID_INPUT: return "NVRTC_ERROR_INVALID_INPUT";
    case NVRTC_INVALID_PROGRAM: return "NVRTC_ERROR_INVALID_PROGRAM";
    case NVRTC_INVALID_OPTION: return "NVRTC_ERROR_INVALID_OPTION";
    case NVRTC_COMPILATION: return "NVRTC_ERROR_COMPILATION";
    case NVRTC_INTERNAL_ERROR: return "NVRTC_ERROR_INTERNAL_ERROR";
    }
    return "NVRTC_ERROR unknown";
}
