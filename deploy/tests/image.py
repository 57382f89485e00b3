#!/usr/bin/env python3
"""Tests of the container images: deploy/tests/image.py cpu=rerankd:cpu full=rerankd:full

Each image runs twice: with the engine's defaults, and with a read-only root, no capabilities and no new privileges. At the end,
an image with planted mistakes must fail exactly the checks that look for them. deploy/image/build.sh builds the images and calls
this. Needs Python 3.9, Linux, and docker or podman on this machine:

    ENGINE       command of the engine with its options (default: docker)
    RUN_OPTIONS  more options of its `run` command
"""

import collections
import contextlib
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

ENGINE = shlex.split(os.environ.get("ENGINE", "docker"))
RUN_OPTIONS = shlex.split(os.environ.get("RUN_OPTIONS", ""))
NAME = f"rerankd-test-{os.getpid()}"
MB = 1_000_000
# Maximum size of all files together. cpu: 43 MB when this was written. full: 653 MB of CUDA's libraries in addition.
MAX_BYTES = {"cpu": 60 * MB, "full": 730 * MB}
# More than --drain-timeout.
STOP_S = 40
HARDENED = ["--read-only", "--cap-drop", "all", "--security-opt", "no-new-privileges"]
LICENSES = {"cpu": ["rerankd", "libc6", "libgcc-s1"], "full": ["nvidia_cublas", "nvidia_cuda_nvrtc"]}
CUDA_LIBRARIES = ["libnvrtc.so.13", "libnvrtc-builtins.so.13.0", "libcublasLt.so.13"]
LOADER = {"x86_64": "/lib64/ld-linux-x86-64.so.2", "aarch64": "/lib/ld-linux-aarch64.so.1"}
QUESTION = {"model": "rerankd-mini", "query": "Apple", "documents": ["apple", "banana", "fruit", "vegetable"]}
# Two or three seconds of work on two idle processors: far less than --drain-timeout on busy ones, and more than `stop` needs.
LONG = {"model": "rerankd-mini", "query": "time", "documents": [f"{i} " + "time person year way " * 90 for i in range(400)]}

failures = collections.defaultdict(set)


def engine(*arguments, check=True):
    done = subprocess.run([*ENGINE, *arguments], capture_output=True, text=True)
    if check and done.returncode != 0:
        raise RuntimeError(f"{arguments[0]}: exit code {done.returncode}: {done.stdout}{done.stderr}")
    return done


@contextlib.contextmanager
def check(subject, name):
    """Prints whether the body passes; records it if it does not."""
    try:
        yield
        print(f"ok    {name}", flush=True)
    except Exception as error:
        failures[subject].add(name)
        print(f"FAIL  {name}: {type(error).__name__}: {error}", flush=True)


def expect(condition, text):
    if not condition:
        raise AssertionError(text)


class Container:
    """A server in a container with a new volume. Both are removed at the end."""

    def __init__(self, image, options=(), arguments=()):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port = listener.getsockname()[1]
        network = [] if "--network" in RUN_OPTIONS else ["-p", f"127.0.0.1:{self.port}:{self.port}"]
        # A proxy that does not exist, as engines pass on those of their host.
        proxy = [f"--env={name}=http://127.0.0.1:1" for name in ("http_proxy", "HTTP_PROXY", "all_proxy")]
        settings = [f"--env=RERANKD_PORT={self.port}", "--env=RERANKD_MAX_QUEUE_WAIT=600"]
        volume = ["-v", f"{NAME}:/cache"]
        engine("run", "-d", "--name", NAME, *network, *proxy, *settings, *volume, *RUN_OPTIONS, *options, image, *arguments)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        engine("rm", "-f", NAME, check=False)
        engine("volume", "rm", "-f", NAME, check=False)

    def request(self, path, body=None):
        url = f"http://127.0.0.1:{self.port}{path}"
        request = urllib.request.Request(url, json.dumps(body).encode() if body else None)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=120) as answer:
            return json.load(answer) if body else answer.read().decode()

    def wait_until_ready(self):
        for _ in range(600):
            try:
                return self.request("/ready")
            except OSError:
                time.sleep(0.1)
        raise AssertionError("not ready after a minute: " + engine("logs", NAME, check=False).stderr[-2000:])

    def run(self, *arguments, user=None):
        """Runs rerankd in the container, with these arguments."""
        return engine("exec", *(["--user", user] if user else []), NAME, "rerankd", *arguments, check=False)

    def writes_to(self, folder, user=None):
        # `rerankd man` writes files; the images have no other program.
        return self.run("man", folder, user=user).returncode == 0

    def inspect(self, template):
        return engine("inspect", "--format", template, NAME).stdout.strip()

    def stop(self):
        engine("stop", "-t", str(STOP_S), NAME)
        return int(self.inspect("{{.State.ExitCode}}"))


def check_server(subject, image, target, options):
    with Container(image, options) as server:
        with check(subject, "is ready and healthy"):
            server.wait_until_ready()
            server.request("/health")
        with check(subject, "ranks apple first"):
            results = server.request("/v1/rerank", QUESTION)["results"]
            expect(results[0]["index"] == 0, results)
        with check(subject, "runs as user 10001, as process 1"):
            status = Path("/proc", server.inspect("{{.State.Pid}}"), "status").read_text()
            lines = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
            expect(lines["Uid"].split() == ["10001"] * 4, lines["Uid"])
            expect(lines["NSpid"].split()[-1] == "1", lines["NSpid"])
        with check(subject, "a new volume is writable"):
            expect(server.writes_to("/cache/man"), "writing to /cache failed")
        with check(subject, "health check, with a proxy in the environment"):
            check_health(server)
        if options:
            with check(subject, "the root is read-only, for uid 0 too"):
                expect(not server.writes_to("/man", user="0"), "uid 0 writes to /")
        with check(subject, "stops at SIGTERM when idle"):
            code = server.stop()
            expect(code == 0, f"exit code {code}")
    with check(subject, "answers a request in progress at SIGTERM"), Container(image, options) as server:
        server.wait_until_ready()
        check_drain(server)


def check_health(server):
    if "podman" in ENGINE[0]:
        done = engine("healthcheck", "run", NAME, check=False)
        expect(done.returncode == 0, done.stdout + done.stderr)
        return
    for _ in range(60):
        status = server.inspect("{{.State.Health.Status}}")
        if status != "starting":
            break
        time.sleep(1)
    expect(status == "healthy", status)


def check_drain(server):
    answers = []

    def ask():
        try:
            answers.append(len(server.request("/v1/rerank", LONG)["results"]))
        except (OSError, ValueError) as error:
            answers.append(error)

    client = threading.Thread(target=ask)
    client.start()
    while not any(line.startswith("rerankd_queue_tokens") and not line.endswith(" 0") for line in server.request("/metrics").splitlines()):
        expect(not answers, f"no request is in progress: {answers}")
    expect(not answers, "the request was answered before the stop")
    code = server.stop()
    client.join()
    expect(answers == [len(LONG["documents"])], f"answer: {answers}")
    expect(code == 0, f"exit code {code}")


def check_files(subject, image, target):
    """Size, licenses, no shell."""
    engine("create", "--name", NAME, *RUN_OPTIONS, image)
    try:
        process = subprocess.Popen([*ENGINE, "export", NAME], stdout=subprocess.PIPE)
        with process, tarfile.open(fileobj=process.stdout, mode="r|") as archive:
            files = {"/" + member.name.lstrip("./"): member.size for member in archive if member.isfile()}
    finally:
        engine("rm", "-f", NAME, check=False)
    total = sum(files.values())
    with check(subject, f"at most {MAX_BYTES[target] // MB} MB of files"):
        expect(total <= MAX_BYTES[target], f"{total / MB:.1f} MB")
    print(f"      {total / MB:.1f} MB, of it {files.get('/usr/local/bin/rerankd', 0) / MB:.1f} MB rerankd")
    with check(subject, "has the licenses"):
        for name in LICENSES["cpu"] + (LICENSES["full"] if target == "full" else []):
            expect(files.get(f"/usr/share/doc/{name}/copyright"), name)
    with check(subject, "has no program but rerankd"):
        programs = [name for name in files if "/bin/" in name or "/sbin/" in name]
        expect(programs == ["/usr/local/bin/rerankd"], programs)


def run_once(image, *arguments, options=()):
    return engine("run", "--rm", *RUN_OPTIONS, *options, image, *arguments, check=False)


def check_cuda(subject, image):
    for library in CUDA_LIBRARIES:
        with check(subject, f"{library} has its libraries"):
            loader = ["--entrypoint", LOADER[platform.machine()]]
            done = run_once(image, "--list", f"/usr/local/lib/cuda/{library}", options=loader)
            expect(done.returncode == 0 and "libc.so.6" in done.stdout, done.stdout + done.stderr)
            expect("not found" not in done.stdout, done.stdout)
    if Path("/dev/nvidiactl").exists():
        print("SKIPPED: the error without a GPU, because this machine has one")
        return
    with check(subject, "says that there is no GPU"):
        done = run_once(image, "serve", "--device", "cuda", "--log", "error")
        expect(done.returncode == 78 and "driver" in done.stderr, f"{done.returncode}: {done.stderr}")


def check_image(subject, image, target):
    print(f"== {subject}: files")
    check_files(subject, image, target)
    for mode, options in (("default options", []), ("read-only, no capabilities", HARDENED)):
        print(f"== {subject}: {mode}")
        check_server(subject, image, target, options)
    print(f"== {subject}: any user of group 0")
    with check(subject, "any user of group 0 can write to a new volume"):
        with Container(image, [*HARDENED, "--user", "1000650000:0"]) as server:
            server.wait_until_ready()
            expect(server.writes_to("/cache/man"), "writing to /cache failed")
    if target == "full":
        print(f"== {subject}: CUDA")
        check_cuda(subject, image)


def check_planted_mistakes(image):
    """An image that is too large, runs as root, asks for health at the wrong port, has a shell's name, and does not drain."""
    expected = {
        f"at most {MAX_BYTES['cpu'] // MB} MB of files",
        "has no program but rerankd",
        "runs as user 10001, as process 1",
        "health check, with a proxy in the environment",
        "stops at SIGTERM when idle",
        "answers a request in progress at SIGTERM",
    }
    tag = f"localhost/{NAME}:planted"
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "large").write_bytes(bytes(MAX_BYTES["cpu"]))
        lines = [f"FROM {image}", "COPY large /usr/bin/large", "USER 0:0", "STOPSIGNAL SIGKILL"]
        lines.append('HEALTHCHECK --interval=2s --retries=1 CMD ["rerankd", "health", "--port", "1"]')
        Path(folder, "Dockerfile").write_text("\n".join(lines) + "\n")
        form = ["--format", "docker"] if "podman" in ENGINE[0] else []
        engine("build", *form, "--tag", tag, folder)
    print("== planted mistakes; these checks must fail:", "; ".join(sorted(expected)))
    try:
        check_files("planted", tag, "cpu")
        check_server("planted", tag, "cpu", [])
    finally:
        engine("rmi", "-f", tag, check=False)
    found = failures.pop("planted", set())
    with check("planted mistakes", "the checks find the planted mistakes and nothing else"):
        expect(found == expected, f"not found: {expected - found}; found wrongly: {found - expected}")


def main():
    if not sys.argv[1:]:
        sys.exit(__doc__)
    images = dict(argument.split("=", 1) for argument in sys.argv[1:])
    for target, image in images.items():
        check_image(target, image, target)
    if "cpu" in images:
        check_planted_mistakes(images["cpu"])
    for subject, names in failures.items():
        print(f"{subject}: FAILED: " + "; ".join(sorted(names)))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
