"""A `rerankd rank` process that ranks what it is sent, for a Python worker of Spark or Ray. Standard library only.

The process reads one JSON object per line and writes one per line, in the same order, so that one process serves many batches
and the model is loaded once.
"""

import atexit
import json
import subprocess
import threading
from collections import deque
from typing import Any, Iterable, Iterator

# Restarts of a process that dies, for one batch.
MAX_RESTARTS = 3


class Reranker:
    """Owns one process, which the first `rank` starts. It runs until `close` or the end of the Python process.

    `command` is the program and its model: ["rerankd", "rank", "--model", "BAAI/bge-reranker-v2-m3"].
    """

    def __init__(self, command: list[str]):
        self.command = [*command, "--input", "-", "--output", "-", "--on-error", "skip"]
        self.process = None
        self.lock = threading.Lock()
        atexit.register(self.close)

    def rank(self, jobs: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yields the answer to each of {"id", "query", "documents"}: {"id", "results"} or {"id", "error"}, in order.

        If the process dies, a new one ranks the jobs that have no answer yet.
        """
        with self.lock:
            waiting = deque(json.dumps(job) + "\n" for job in jobs)
            restarts = 0
            while waiting:
                try:
                    for answer in self._answers(list(waiting)):
                        waiting.popleft()
                        yield answer
                except (BrokenPipeError, EOFError):
                    code = self.close()
                    restarts += 1
                    if restarts > MAX_RESTARTS:
                        raise RuntimeError(f"rerankd ended {restarts} times, the last time with exit code {code}")

    def _answers(self, lines: list[str]) -> Iterator[dict[str, Any]]:
        if self.process is None:
            self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        process = self.process

        # On a thread of its own: the process stops reading while its answers are not read.
        def write():
            try:
                process.stdin.writelines(lines)
                process.stdin.flush()
            except (OSError, ValueError):
                pass  # the reader below sees the end of the process

        writer = threading.Thread(target=write)
        writer.start()
        try:
            for _ in lines:
                answer = process.stdout.readline()
                if not answer.endswith("\n"):
                    raise EOFError
                yield json.loads(answer)
        except (GeneratorExit, ValueError):
            # The caller does not want the rest, or an answer is no JSON. A process with unread answers cannot be used again.
            self.close()
            raise
        finally:
            writer.join()

    def close(self) -> Any:
        """Ends the process and returns its exit code."""
        process, self.process = self.process, None
        if process is None:
            return None
        process.kill()
        code = process.wait()
        for pipe in (process.stdin, process.stdout):
            try:
                pipe.close()
            except OSError:
                pass  # what was still to be written
        return code


_shared: dict[tuple[str, ...], Reranker] = {}
_shared_lock = threading.Lock()


def shared_reranker(command: list[str]) -> Reranker:
    """One reranker for this Python process, however many batches and partitions it works on."""
    key = tuple(command)
    with _shared_lock:
        if key not in _shared:
            _shared[key] = Reranker(command)
        return _shared[key]
