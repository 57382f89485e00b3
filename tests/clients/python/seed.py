"""The example request and the checks for every client.

A client's file defines `rank(server, model, top_n, texts)`. It sends the request through the client and returns
(index, score, text or None) for each result, in the client's order. `check` runs it against three servers of
`../servers.py` (without a key, with a key, and busy) and prints one line of JSON.
"""

import json
import math
import os
import sys
import time
import urllib.request
from importlib.metadata import version
from typing import NamedTuple

QUERY = "Apple"
DOCUMENTS = ["apple", "banana", "fruit", "vegetable"]
MODEL = "rerankd-mini"
UNKNOWN_MODEL = "no-such-model"

# The server's error messages, which should reach the user of a client.
MESSAGES = {"wrong key": "Invalid token", "unknown model": "Model does not exist", "overload": "overloaded"}

# A few clients store scores as 32-bit floats. The logit of a score near 1 loses one or two more digits.
SCORE_TOLERANCE = 1e-5
LOGIT_TOLERANCE = 1e-3


class Server(NamedTuple):
    url: str
    key: str


OPEN = Server(os.environ["RERANKD_OPEN"], "any-key-at-all")
CLOSED = Server(os.environ["RERANKD_CLOSED"], os.environ["RERANKD_KEY"])
WRONG_KEY = Server(CLOSED.url, "a-wrong-key")
BUSY = Server(os.environ["RERANKD_BUSY"], "any-key-at-all")


def forbid_remote_connections(event, args):
    """Fails on any other connection (telemetry, price lists, model hubs): a correctly configured client needs none."""
    if event == "socket.getaddrinfo":
        host = args[0]
    elif event == "socket.connect" and isinstance(args[1], tuple):
        host = args[1][0]
    else:
        return
    if host not in (None, "", b"", "localhost", b"localhost", "127.0.0.1", b"127.0.0.1", "::1", b"::1"):
        raise OSError(f"connection to another host: {host!r}")


sys.addaudithook(forbid_remote_connections)

# Some clients' retries cannot be disabled; they sleep for the overloaded server's Retry-After.
real_sleep = time.sleep
time.sleep = lambda seconds: real_sleep(min(seconds, 0.01))


def ask_directly(server):
    """The server's answer without a client: [(index, score)], best first."""
    body = json.dumps({"model": MODEL, "query": QUERY, "documents": DOCUMENTS}).encode()
    with urllib.request.urlopen(urllib.request.Request(server.url + "/v1/rerank", body), timeout=60) as answer:
        return [(result["index"], result["relevance_score"]) for result in json.load(answer)["results"]]


EXPECTED = ask_directly(OPEN)


def check(client, package, rank, *, wrong_key, unknown_model, overload, logits=False, keyless=False, not_offered=None):
    """Runs every check of one client. `package` is None for an application whose requests are copied.

    `wrong_key`, `unknown_model`, `overload`: the exception (or exceptions) that a user of the client would catch.
    `logits`: this request format returns logits instead of scores.
    `keyless`: the client cannot send a key, so only the open server is tested.
    `not_offered`: checks that the client does not support, with the reason.
    """

    def success():
        for server in (OPEN,) if keyless else (OPEN, CLOSED):
            compare(rank(server, MODEL, None, False), EXPECTED, logits)

    def top_n():
        compare(rank(OPEN, MODEL, 2, False), EXPECTED[:2], logits)

    def return_documents():
        results = rank(OPEN, MODEL, None, True)
        compare(results, EXPECTED, logits)
        for index, _, text in results:
            assert text == DOCUMENTS[index], f"document {index} came back as {text!r}"

    checks = {
        "success": success,
        "top_n": top_n,
        "return_documents": return_documents,
        "wrong key": lambda: raises(wrong_key, "wrong key", lambda: rank(WRONG_KEY, MODEL, None, False)),
        "unknown model": lambda: raises(unknown_model, "unknown model", lambda: rank(OPEN, UNKNOWN_MODEL, None, False)),
        "overload": lambda: raises(overload, "overload", lambda: rank(BUSY, MODEL, None, False)),
    }
    cells = {}
    for name, run in checks.items():
        if name in (not_offered or {}):
            cells[name] = {"state": "n/a", "note": not_offered[name]}
            continue
        try:
            cells[name] = {"state": "ok", "note": run() or ""}
        except Exception as error:  # any exception of a client is reported in its row of the table
            cells[name] = {"state": "FAIL", "note": f"{type(error).__name__}: {error}"}
    print(json.dumps({"client": client, "version": package_version(package), "cells": cells}), flush=True)


def package_version(package):
    return f"{package} {version(package)}" if package else "its requests, copied"


def not_possible(client, package, reason):
    """Prints a row for a client that cannot be directed to this server, with the reason."""
    cell = {"state": "n/a", "note": reason}
    print(json.dumps({"client": client, "version": f"{package} {version(package)}", "cells": {"success": cell}}), flush=True)


def compare(results, expected, logits):
    got = [(index, score) for index, score, _ in results]
    assert [index for index, _ in got] == [index for index, _ in expected], f"got {got}, expected {expected}"
    for (_, score), (_, plain) in zip(got, expected):
        wanted, tolerance = (math.log(plain / (1 - plain)), LOGIT_TOLERANCE) if logits else (plain, SCORE_TOLERANCE)
        assert abs(score - wanted) <= tolerance, f"score {score}, expected {wanted}"
        assert logits or 0 <= score <= 1, f"score {score}"


def raises(expected, problem, ask):
    """Returns the name of the exception that `ask` raises, and whether it contains the server's message.

    For overload, it makes several attempts, because the busy server accepts a request between two of those that keep it busy.
    """
    for _ in range(5 if problem == "overload" else 1):
        try:
            answer = ask()
        except expected as error:
            has_message = MESSAGES[problem] in f"{error} {vars(error)}"
            return qualified_name(type(error)) + ("" if has_message else " (without the server's message)")
        real_sleep(0.3)
    raise AssertionError(f"no exception, but {answer!r}")


def qualified_name(kind):
    package = kind.__module__.split(".")[0]
    return kind.__name__ if package == "builtins" else f"{package}.{kind.__name__}"
