"""The servers for the clients: one without keys, one with a key, and three that are overloaded in different ways."""

import json
import os
import random
import re
import socket
import string
import subprocess
import threading
import time
import urllib.error
import urllib.request

KEY = "a-right-key"

# The name under which the model is served, whichever model it is.
MODEL = "rerankd-mini"

# A name that LibreChat always sends, and the origin of a web page.
ALIAS = "jina-reranker-v2-base-multilingual"
ORIGIN = "https://app.example"

MIB = 1 << 20

# A request of 100,000 random words keeps the built-in model busy for a minute; a larger model for the whole run.
BUSY_DOCUMENTS = 1000
BUSY_WORDS = 100


class Servers:
    """Context manager: starts the servers on entry and stops them on exit."""

    def __init__(self, binary, model, log_folder):
        self.binary = binary
        self.model = f"{MODEL}={model}" if model else MODEL
        self.log_folder = log_folder
        self.running = []
        self.stopping = threading.Event()
        self.urls = {}

    def __enter__(self):
        try:
            self.urls["OPEN"] = self.start("open")
            self.urls["CLOSED"] = self.start("closed", "--api-key", KEY)
            # This server computes all the time: one thread at the lowest priority leaves the processor to the others.
            limits = ["--max-queue-tokens", "1", "--threads", "1", "--request-timeout", "3600"]
            self.urls["BUSY"] = self.start("busy", *limits, niceness=19)
            self.keep_busy(self.urls["BUSY"])
            # A body that never ends holds all the memory for bodies of one server, and the only connection of the other.
            body = ["--max-body-bytes", str(64 * MIB), "--max-inflight-bytes", str(64 * MIB), "--body-timeout", "3600"]
            self.urls["FULL"] = self.start("full", *body)
            # The server's buffer doubles when it is full: 33 MiB take one of 64 MiB.
            self.hold_body(self.urls["FULL"], 64 * MIB, 33 * MIB)
            self.urls["CAPPED"] = self.start("capped", "--max-connections", "1", "--body-timeout", "3600")
            self.hold_body(self.urls["CAPPED"], 8 * MIB, 0)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self.stopping.set()
        for process in self.running:
            process.kill()
        for process in self.running:
            process.wait()

    def start(self, name, *flags, niceness=0):
        log = self.log_folder / f"server-{name}.log"
        command = [self.binary, "serve", "--model", self.model, "--alias", ALIAS, "--allowed-origin", ORIGIN]
        command += ["--host", "127.0.0.1", "--port", "0", *flags]
        # RERANKD_* variables of the caller's environment would change the test.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RERANKD_")}
        environment["HF_HUB_OFFLINE"] = "1"
        with open(log, "w") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, preexec_fn=lambda: os.nice(niceness)
            )
        self.running.append(process)
        return wait_until_ready(process, log)

    def keep_busy(self, url):
        random_word = random.Random(7)
        words = ["".join(random_word.choices(string.ascii_lowercase, k=6)) for _ in range(BUSY_DOCUMENTS * BUSY_WORDS)]
        documents = [" ".join(words[i::BUSY_DOCUMENTS]) for i in range(BUSY_DOCUMENTS)]
        body = request_body("busy", documents)
        threading.Thread(target=self.send_repeatedly, args=(url, body), daemon=True).start()
        wait_for(lambda: post(url, request_body("q", ["d"])) == 503, "the busy server does not answer 503")

    def send_repeatedly(self, url, body):
        """Sends the request again and again. Between two requests the server is briefly idle."""
        while not self.stopping.is_set():
            try:
                post(url, body)
            except OSError:
                pass  # the server is being stopped

    def hold_body(self, url, length, sent):
        """Announces a body of `length` bytes, sends `sent` of them at once, and then 1 KiB each second: the server requires less."""
        host, port = url.removeprefix("http://").split(":")
        connection = socket.create_connection((host, int(port)))
        head = f"POST /v1/rerank HTTP/1.1\r\nhost: localhost\r\nexpect: 100-continue\r\ncontent-length: {length}\r\n\r\n"
        connection.sendall(head.encode())
        connection.recv(100)  # 100 Continue: the server is waiting for the body
        connection.sendall(b" " * sent)
        threading.Thread(target=self.trickle, args=(connection,), daemon=True).start()
        wait_for(lambda: post(url, request_body("q", ["d"])) == 503, "the held body does not lead to 503")

    def trickle(self, connection):
        while not self.stopping.wait(1):
            try:
                connection.sendall(b" " * 1024)
            except OSError:
                return  # the server is being stopped


def request_body(query, documents):
    return json.dumps({"model": MODEL, "query": query, "documents": documents}).encode()


def wait_until_ready(process, log):
    """Returns the URL from the log line `listening on ...`, which is written once the models are loaded."""
    found = None

    def listening():
        nonlocal found
        if process.poll() is not None:
            raise SystemExit(f"the server ended with {process.returncode}:\n{log.read_text()}")
        found = re.search(r"listening on (http://\S+)", log.read_text())
        return found

    wait_for(listening, f"the server has not started; see {log.name}")
    return found.group(1)


def post(url, body):
    """Sends a rerank request and returns the HTTP status."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url + "/v1/rerank", body), timeout=3600) as response:
            response.read()
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


def wait_for(condition, problem, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise SystemExit(problem)
        time.sleep(0.05)
