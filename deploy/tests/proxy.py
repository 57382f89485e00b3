#!/usr/bin/env python3
"""Three servers behind deploy/haproxy/haproxy.cfg under load: a rolling restart, one frozen server, one full server.

    apt-get install haproxy && cargo build --release && deploy/tests/proxy.py [--model M] [--load 0.8]

Measures the highest goodput and offers a share of it with Poisson arrivals while each server is restarted in turn. Then, at half
the load, stops one with SIGSTOP and kills it, and replaces it by one that answers 503 to everything. Fails if a request fails, or
if the frozen server gets requests after the health check's time. The machine must be idle otherwise. Needs Python 3.9 and Linux;
nothing else has to be installed.
"""

import argparse
import collections
import http.client
import http.server
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

DEPLOY = Path(__file__).resolve().parent.parent
RERANKD = os.environ.get("RERANKD_BIN") or str(DEPLOY.parent / "target" / "release" / "rerankd")
REPLICAS = 3
# Longer than the health check needs: check interval 1 s, its timeout 1 s, and a second failure 0.5 s later with its timeout.
HEALTH_CHECK_S = 3.5
# --shutdown-grace of the servers, as haproxy.cfg says.
GRACE_S = 4
WORDS = "time person year way day thing man world life hand part child eye woman place work week case".split()


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Replica:
    def __init__(self, model, threads):
        self.port = free_port()
        self.command = [RERANKD, "serve", "--model", model, "--port", str(self.port), "--threads", str(threads)]
        self.command += ["--shutdown-grace", str(GRACE_S), "--log", "warn"]
        self.start()

    def start(self):
        self.process = subprocess.Popen(self.command)
        wait_until(lambda: get_status(self.port, "/ready") == 200)

    def restart(self):
        self.process.send_signal(signal.SIGTERM)
        if self.process.wait(timeout=60) != 0:
            sys.exit(f"a server ended with exit code {self.process.returncode}")
        self.start()


def get_status(port, path):
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
        connection.request("GET", path)
        return connection.getresponse().status
    except OSError:
        return None
    finally:
        connection.close()


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            sys.exit("a server did not become ready")
        time.sleep(0.05)


def start_full_server(port):
    """A server that is ready and answers every request with 503 and Retry-After."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.answer(200, {})

        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            self.answer(503, {"Retry-After": "1"})

        def answer(self, status, headers):
            self.send_response(status)
            for name, value in {**headers, "Content-Length": "0"}.items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()


class Proxy:
    """HAProxy with the configuration that ships, on free ports."""

    def __init__(self, replicas, folder):
        self.port, self.statistics = free_port(), free_port()
        ports = {8080: self.port, 8404: self.statistics}
        ports.update({8081 + i: replica.port for i, replica in enumerate(replicas)})
        shipped = (DEPLOY / "haproxy" / "haproxy.cfg").read_text()
        text = re.sub(r"127\.0\.0\.1:(\d+)", lambda found: f"127.0.0.1:{ports[int(found[1])]}", shipped)
        path = Path(folder) / "haproxy.cfg"
        path.write_text(text)
        self.process = subprocess.Popen(["haproxy", "-f", str(path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(lambda: self.servers_up() == REPLICAS)

    def rows(self):
        """The statistics of the servers: name to columns."""
        try:
            connection = http.client.HTTPConnection("127.0.0.1", self.statistics, timeout=2)
            connection.request("GET", "/;csv")
            lines = connection.getresponse().read().decode().lstrip("# ").splitlines()
        except OSError:
            return {}
        head = lines[0].split(",")
        rows = [dict(zip(head, line.split(","))) for line in lines[1:]]
        return {row["svname"]: row for row in rows if row["pxname"] == "replicas" and row["svname"] != "BACKEND"}

    def servers_up(self):
        return sum(row["status"].startswith("UP") for row in self.rows().values())

    def requests(self):
        """Requests that each server was given so far."""
        return {name: int(row["stot"]) for name, row in self.rows().items()}

    def retries(self):
        return sum(int(row["wretr"]) for row in self.rows().values()), sum(int(row["wredis"]) for row in self.rows().values())


class Load:
    """Requests with Poisson arrivals at `rate` per second, whether or not earlier ones are answered."""

    def __init__(self, port, bodies):
        self.port, self.bodies = port, bodies
        self.results, self.lock = [], threading.Lock()
        self.local = threading.local()
        self.stopped = threading.Event()

    def send(self, index):
        """Sends a request on this thread's connection; returns its status, or the exception's name."""
        connection = getattr(self.local, "connection", None)
        begun = time.monotonic()
        try:
            if connection is None:
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=140)
                self.local.connection = connection
            connection.request("POST", "/v1/rerank", self.bodies[index % len(self.bodies)])
            response = connection.getresponse()
            text, status = response.read(), response.status
            if status == 200 and len(json.loads(text)["results"]) == 0:
                status = "no results"
        except (OSError, http.client.HTTPException, ValueError) as error:
            status = type(error).__name__
            self.local.connection = None
            connection.close()
        with self.lock:
            self.results.append((begun, time.monotonic(), status))
        return status

    def closed_loop(self, clients, seconds):
        """Goodput per second when each of `clients` sends its next request at once."""
        end = time.monotonic() + seconds

        def client(number):
            count = 0
            while time.monotonic() < end:
                count += self.send(number + count) == 200
            return count

        with ThreadPoolExecutor(clients) as pool:
            return sum(pool.map(client, range(clients))) / seconds

    def open_loop(self, rate):
        """Starts sending; `stop` ends it."""
        rng = random.Random(3)

        def arrivals():
            with ThreadPoolExecutor(400) as pool:
                at, index = time.monotonic(), 0
                while not self.stopped.is_set():
                    at += rng.expovariate(rate)
                    time.sleep(max(0.0, at - time.monotonic()))
                    pool.submit(self.send, index)
                    index += 1

        self.thread = threading.Thread(target=arrivals)
        self.thread.start()

    def stop(self):
        self.stopped.set()
        self.thread.join()


def summary(name, results):
    statuses = collections.Counter(status for _, _, status in results)
    times = sorted(end - begun for begun, end, status in results if status == 200)
    failed = sum(count for status, count in statuses.items() if status != 200)
    quantile = lambda q: times[min(len(times) - 1, int(q * len(times)))]
    print(
        f"{name}: {len(results)} requests, {failed} failed {dict(statuses)}; "
        f"median {statistics.median(times) * 1e3:.0f} ms, p99 {quantile(0.99) * 1e3:.0f} ms, longest {times[-1] * 1e3:.0f} ms",
        flush=True,
    )
    return failed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="rerankd-mini")
    parser.add_argument("--threads", type=int, default=1, help="of each server")
    parser.add_argument("--load", type=float, default=0.8, help="share of the highest goodput")
    parser.add_argument("--documents", type=int, default=10, help="of each request")
    options = parser.parse_args()
    rng = random.Random(4)
    text = lambda: " ".join(rng.choices(WORDS, k=100))
    body = lambda: json.dumps({"model": options.model, "query": text()[:60], "documents": [text() for _ in range(options.documents)]})
    bodies = [body() for _ in range(64)]
    replicas, proxy = [], None
    try:
        with tempfile.TemporaryDirectory() as folder:
            replicas = [Replica(options.model, options.threads) for _ in range(REPLICAS)]
            proxy = Proxy(replicas, folder)
            Load(proxy.port, bodies).closed_loop(12, 3)
            time.sleep(10)  # slow start
            highest = Load(proxy.port, bodies).closed_loop(12, 10)
            rate = highest * options.load
            print(f"highest goodput {highest:.1f} requests/s of {options.documents} documents; offering {rate:.1f}/s", flush=True)
            before = proxy.retries()
            load = Load(proxy.port, bodies)
            load.open_loop(rate)
            time.sleep(5)
            for replica in replicas:
                replica.restart()
                wait_until(lambda: proxy.servers_up() == REPLICAS)
                time.sleep(5)
            load.stop()
            failed = summary("rolling restart", load.results)
            after = proxy.retries()
            print(f"repeated by the proxy: {after[0] - before[0]}, at another server: {after[1] - before[1]}", flush=True)

            time.sleep(10)
            load = Load(proxy.port, bodies)
            load.open_loop(rate / 2)
            time.sleep(3)
            frozen = replicas[1]
            frozen.process.send_signal(signal.SIGSTOP)
            stopped_at = time.monotonic()
            wait_until(lambda: proxy.rows()["replica2"]["status"].startswith("DOWN"), 10)
            noticed = time.monotonic() - stopped_at
            counts = proxy.requests()
            time.sleep(5)
            later = proxy.requests()
            shares = {name: later[name] - counts[name] for name in later}
            print(f"frozen server noticed after {noticed:.1f} s; requests in the next 5 s: {shares}", flush=True)
            # What a liveness probe does: the requests that the frozen server holds are repeated elsewhere.
            frozen.process.kill()
            frozen.process.wait()
            time.sleep(1)
            load.stop()
            failed_frozen = summary("one server frozen, then killed", load.results)

            start_full_server(frozen.port)
            wait_until(lambda: proxy.servers_up() == REPLICAS)
            before = proxy.retries()
            load = Load(proxy.port, bodies)
            load.open_loop(rate / 2)
            time.sleep(15)
            load.stop()
            failed_full = summary("one server full", load.results)
            repeated = proxy.retries()[1] - before[1]
            print(f"repeated at another server: {repeated}", flush=True)
            if failed or failed_frozen or failed_full or repeated == 0 or noticed > HEALTH_CHECK_S or shares["replica2"]:
                sys.exit("FAILED")
    finally:
        for process in [replica.process for replica in replicas] + ([proxy.process] if proxy else []):
            process.kill()


if __name__ == "__main__":
    main()
