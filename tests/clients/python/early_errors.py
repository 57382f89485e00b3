"""Errors that the server sends while a large body is still being sent.

The client must get the status, the JSON body and Retry-After, not a broken connection. Each client sends the body as bytes
(with Content-Length) and from a generator (chunked).
"""

import asyncio
import json
import os
import time
import urllib.error
import urllib.request
from importlib.metadata import version
from platform import python_version

import aiohttp
import httpx
import requests
import urllib3

BODY_BYTES = 32 << 20
CHUNK_BYTES = 256 << 10
REPETITIONS = 2
TIMEOUT_S = 60
KEY = os.environ["RERANKD_KEY"]

# Column of the table -> server, path, key, status, part of the message, whether there is a Retry-After.
# The servers are those of servers.py: CLOSED has a key, FULL has no memory left for bodies, CAPPED no connection left.
CASES = {
    "401": ("CLOSED", "/v1/rerank", "a-wrong-key", 401, "Invalid token", False),
    "404": ("CLOSED", "/no/such/path", KEY, 404, "does not exist", False),
    "413": ("CLOSED", "/v1/rerank", KEY, 413, "more than", False),
    "503 memory": ("FULL", "/v1/rerank", KEY, 503, "overloaded", True),
    "503 connections": ("CAPPED", "/v1/rerank", KEY, 503, "overloaded", True),
}


def generated_body():
    for _ in range(BODY_BYTES // CHUNK_BYTES):
        time.sleep(0.001)  # so that the error is sent before the last chunk
        yield b" " * CHUNK_BYTES


async def async_body():
    for chunk in generated_body():
        yield chunk


def with_requests(url, headers, body):
    answer = requests.post(url, data=body, headers=headers, timeout=TIMEOUT_S)
    return answer.status_code, answer.headers, answer.content


def with_httpx(url, headers, body):
    answer = httpx.post(url, content=body, headers=headers, timeout=TIMEOUT_S)
    return answer.status_code, answer.headers, answer.content


def with_urllib3(url, headers, body):
    with urllib3.PoolManager(retries=False, timeout=TIMEOUT_S) as pool:
        answer = pool.request("POST", url, body=body, headers=headers)
        return answer.status, answer.headers, answer.data


def with_urllib(url, headers, body):
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=TIMEOUT_S) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def with_aiohttp(url, headers, body):
    async def post():
        data = body if isinstance(body, bytes) else async_body()
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(TIMEOUT_S)) as session:
            async with session.post(url, data=data, headers=headers) as answer:
                return answer.status, answer.headers, await answer.read()

    return asyncio.run(post())


def run_case(post, make_body, server, path, key, status, message, has_retry_after):
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    url = os.environ[f"RERANKD_{server}"] + path
    for _ in range(REPETITIONS):
        got, got_headers, content = post(url, headers, make_body())
        assert got == status, f"status {got}, expected {status}"
        assert message in json.loads(content)["message"], content
        assert ("retry-after" in got_headers) == has_retry_after, dict(got_headers)


def check(client, client_version, post):
    for kind, make_body in (("buffered", lambda: b" " * BODY_BYTES), ("streamed", generated_body)):
        cells = {}
        for column, case in CASES.items():
            try:
                run_case(post, make_body, *case)
                cells[column] = {"state": "ok", "note": ""}
            except Exception as error:  # any exception of a client is reported in its row of the table
                cells[column] = {"state": "FAIL", "note": f"{type(error).__name__}: {error}"}
        print(json.dumps({"client": f"{client}, {kind}", "version": client_version, "cells": cells}), flush=True)


for client, post in [("requests", with_requests), ("httpx", with_httpx), ("urllib3", with_urllib3), ("aiohttp", with_aiohttp)]:
    check(client, f"{client} {version(client)}", post)
check("urllib.request", f"Python {python_version()}", with_urllib)
