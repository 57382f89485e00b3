"""Compiles the CUDA backend's kernels with NVRTC for every architecture, element and head size; needs no GPU.

Usage: nvrtc.py FOLDER_OF_LIBNVRTC FOLDER_OF_KERNELS [--quick]
--quick compiles one shape for two architectures.
Prints a line per program, and for sm_90a ptxas's statistics of each kernel. Exits 1 if anything does not compile or gives a
warning, if an attention or GEMM kernel spills registers, or if ptxas serializes wgmmas. With a disassembler (cuobjdump, from CUDA
or Triton's wheel) also if an instruction accesses the sums of a wgmma in flight or overwrites registers that it reads.
"""

import ctypes
import glob
import os
import re
import shutil
import subprocess
import sys
import tempfile

ARCHITECTURES = ["sm_80", "sm_89", "sm_90a", "sm_100", "sm_120"]
QUICK_ARCHITECTURES = ["sm_80", "sm_90a"]
ELEMENTS = ["F16", "BF16", "F32", "FP8"]
# fp8 needs sm_89.
UNSUPPORTED = [("sm_80", "FP8")]
# (C, D). SHAPES, those of bge-reranker-v2-m3 and MiniLM, are compiled for every architecture. MORE_SHAPES are compiled for
# DETAILED only; in some of them the lanes of a warp hold different numbers of vectors of a row.
SHAPES = [(1024, 64), (384, 32)]
MORE_SHAPES = [(256, 32), (256, 64), (384, 64), (768, 64), (512, 64), (1792, 64), (768, 32), (1024, 32), (96, 32), (72, 32)]
DETAILED = "sm_90a"
# Kernels whose registers and machine code are checked.
CHECKED_KERNELS = ("attention", "attention_local", "attention_wgmma", "gemm_wgmma")


class Nvrtc:
    def __init__(self, folder):
        # libnvrtc looks up its builtins by name when it compiles, so they must be loaded first.
        for name in ["libnvrtc-builtins.so.*", "libnvrtc.so.*"]:
            found = [path for path in sorted(glob.glob(os.path.join(folder, name))) if ".alt." not in path]
            if not found:
                sys.exit(f"no {name} in {folder}")
            self.library = ctypes.CDLL(found[0], mode=ctypes.RTLD_GLOBAL)
        self.library.nvrtcGetErrorString.restype = ctypes.c_char_p

    def version(self):
        major, minor = ctypes.c_int(), ctypes.c_int()
        self.check(self.library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
        return f"{major.value}.{minor.value}"

    def check(self, code):
        if code != 0:
            raise RuntimeError(self.library.nvrtcGetErrorString(code).decode())

    def bytes_of(self, program, what):
        size = ctypes.c_size_t()
        self.check(getattr(self.library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        self.check(getattr(self.library, f"nvrtcGet{what}")(program, buffer))
        return buffer.raw

    def compile(self, sources, options):
        """Compiles kernels.cu of `sources` ({file name: text}, the others as headers). Returns (compiled, cubin, log)."""
        program = ctypes.c_void_p()
        headers = {name: text for name, text in sources.items() if name != b"kernels.cu"}
        names, texts = ((ctypes.c_char_p * len(headers))(*strings) for strings in (headers.keys(), headers.values()))
        create = self.library.nvrtcCreateProgram
        self.check(create(ctypes.byref(program), sources[b"kernels.cu"], b"kernels.cu", len(headers), texts, names))
        try:
            texts = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
            code = self.library.nvrtcCompileProgram(program, len(options), texts)
            log = self.bytes_of(program, "ProgramLog").rstrip(b"\0").decode()
            return code == 0, self.bytes_of(program, "CUBIN") if code == 0 else b"", log
        finally:
            self.library.nvrtcDestroyProgram(ctypes.byref(program))


def kernel_statistics(log):
    """Parses `ptxas -v`: {kernel: (registers, spill store bytes, spill load bytes, static shared bytes)}."""
    statistics = {}
    kernel, spills = None, (0, 0)
    for line in log.splitlines():
        if name := re.search(r"Compiling entry function '(\w+)'", line):
            kernel = name[1]
        elif spilled := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spills = (int(spilled[1]), int(spilled[2]))
        elif used := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            statistics[kernel] = (int(used[1]), *spills, int(shared[1]) if shared else 0)
    return statistics


def disassembler():
    try:
        import triton

        beside = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    except ImportError:
        beside = ""
    return shutil.which("cuobjdump") or (beside if os.path.exists(beside) else None)


def machine_code(cuobjdump, cubin):
    """{kernel: [(address, predicate, operation, operands)]}"""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([cuobjdump, "--dump-sass", file.name], capture_output=True, text=True, check=True).stdout
    kernels, code = {}, []
    for line in text.splitlines():
        if name := re.search(r"Function : (\w+)", line):
            code = kernels.setdefault(name[1], [])
        elif found := re.match(r"\s*/\*([0-9a-f]{4,5})\*/\s+(@!?U?P\w+\s+)?([\w.]+)\s*(.*?)\s*;", line):
            code.append((int(found[1], 16), *found.groups()[1:]))
    return kernels


def accesses_in_flight(code):
    """Instructions, on any path of a kernel, that access the sums of a wgmma or write its first operand before the wait for it.
    ptxas may reuse the operand's registers as soon as the wgmma has started, although the wgmma may not have read them yet."""
    # A wgmma is (first register of the sums, number of sums, first register of the operand). `started` has the uncommitted ones,
    # `groups` the committed groups.
    index_of = {address: i for i, (address, *_) in enumerate(code)}
    found, seen, todo = set(), set(), [(0, (), ())]
    while todo:
        i, started, groups = todo.pop()
        while i < len(code) and (i, started, groups) not in seen:
            seen.add((i, started, groups))
            address, predicate, operation, rest = code[i]
            operands = [operand.strip() for operand in rest.split(",")]
            i += 1
            if operation.startswith("HGMMA"):
                columns = int(operation.split("x")[1])
                first = re.fullmatch(r"R(\d+)", operands[1])
                started += ((int(operands[0][1:]), columns // 2, int(first[1]) if first else None),)
                if "gsb0" in rest:
                    started, groups = (), groups + (started,)
            elif operation.startswith("WARPGROUP.DEPBAR"):
                newest = int(operands[1], 16)
                groups = groups[len(groups) - newest :] if newest else ()
            elif operation == "BRA":
                target = index_of.get(int(re.search(r"0x([0-9a-f]+)", rest)[1], 16))
                if target is not None:
                    todo.append((target, started, groups))
                if not predicate:
                    break
            elif operation == "EXIT" and not predicate:
                break
            elif started or groups:
                named = {int(register) for register in re.findall(r"\bR(\d+)\b", rest)}
                target = re.match(r"R(\d+)\b", operands[1 if operands[0].startswith("P") and len(operands) > 1 else 0])
                width = 4 if ".128" in operation or ".M88.4" in operation else 2 if "WIDE" in operation or ".64" in operation else 1
                stores = operation.startswith(("ST", "LDGSTS", "RED"))
                written = set(range(int(target[1]), int(target[1]) + width)) if target and not stores else set()
                for sums, count, operand in (wgmma for group in (*groups, started) for wgmma in group):
                    sum_registers = set(range(sums, sums + count))
                    operand_registers = set() if operand is None else set(range(operand, operand + 4))
                    if (named | written) & sum_registers or written & operand_registers:
                        found.add(f"{address:04x} {operation} {rest}")
    return sorted(found)


def main():
    folder, path, *options = sys.argv[1:]
    quick = options == ["--quick"]
    nvrtc = Nvrtc(folder)
    sources = {}
    for name in os.listdir(path):
        with open(os.path.join(path, name), "rb") as file:
            sources[name.encode()] = file.read()
    cuobjdump = disassembler()
    print(f"NVRTC {nvrtc.version()}")
    if cuobjdump is None:
        print("SKIPPED: no cuobjdump, so the machine code is not checked")

    failures = 0
    details = []
    for architecture in QUICK_ARCHITECTURES if quick else ARCHITECTURES:
        more_shapes = MORE_SHAPES if architecture == DETAILED else []
        for hidden, head in SHAPES[:1] if quick else SHAPES + more_shapes:
            for element in ELEMENTS:
                if (architecture, element) in UNSUPPORTED:
                    continue
                options = [f"--gpu-architecture={architecture}", "--std=c++17", "--ptxas-options=-v"]
                options += [f"-DELEMENT_{element}", f"-DHIDDEN_SIZE={hidden}", f"-DHEAD_SIZE={head}"]
                compiled, cubin, log = nvrtc.compile(sources, options)
                statistics = kernel_statistics(log)
                name = f"{architecture:7} {element:4} C={hidden:<4} D={head}"
                warnings = [line for line in log.splitlines() if "warning" in line or "serialized" in line]
                kernels = ["attention", "attention_local"]
                if architecture == "sm_90a" and head == 64 and element != "F32":
                    kernels.append("attention_wgmma")
                if architecture == "sm_90a" and element in ("F16", "BF16"):
                    kernels.append("gemm_wgmma")
                wgmma_kernels = [kernel for kernel in kernels if kernel.endswith("wgmma")]
                if cuobjdump and wgmma_kernels:
                    code = machine_code(cuobjdump, cubin)
                    warnings += [line for kernel in wgmma_kernels for line in accesses_in_flight(code[kernel])[:3]]
                if not compiled:
                    failures += 1
                    print(f"{name}  FAILED\n{log}")
                elif [kernel for kernel in CHECKED_KERNELS if kernel in statistics] != kernels:
                    failures += 1
                    print(f"{name}  FAILED: ptxas did not report exactly {kernels}\n{log}")
                elif any(any(statistics[kernel][1:3]) for kernel in kernels) or warnings:
                    failures += 1
                    print(f"{name}  FAILED: {[(k, statistics[k]) for k in kernels]} (registers, spills, shared) {warnings}")
                else:
                    registers = ", ".join(f"{kernel} {statistics[kernel][0]} registers" for kernel in kernels)
                    print(f"{name}  ok, cubin {len(cubin)} bytes, {registers}")
                if architecture == DETAILED and (hidden, head) in SHAPES:
                    details.append((name, statistics))
    for name, statistics in details:
        print(f"\n{name}: registers, spill stores and loads in bytes, static shared bytes")
        for kernel, (registers, stores, loads, shared) in sorted(statistics.items()):
            print(f"    {kernel:22} {registers:4} {stores:6} {loads:6} {shared:6}")
    print(f"\n{failures} failures")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
