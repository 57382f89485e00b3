#!/usr/bin/env python3
"""The Spark and the Ray example on the real packages, in two worker processes on this machine, one of which is killed half-way.

    python3 -m venv v && v/bin/pip install -r deploy/tests/requirements.txt && cargo build --release
    v/bin/python deploy/tests/engines.py [spark] [ray] [--queries 10000] [--no-kill]

Compares every score with a single `rerankd rank` over the same queries, and prints pairs per second of each. Spark needs Java 17.
Only processes that this script started are killed.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

DEPLOY = Path(__file__).resolve().parent.parent
REPOSITORY = DEPLOY.parent
RERANKD = os.environ.get("RERANKD_BIN") or str(REPOSITORY / "target" / "release" / "rerankd")
DOCUMENTS = 10
# Queries per Spark task and per Ray block, by the defaults of the two examples.
SPARK_TASK_QUERIES, RAY_BLOCK_QUERIES = 500, 1000
WORDS = """time person year way day thing man world life hand part child eye woman place work week case point government
company number group problem fact reset password account orange river engine budget weather music mountain""".split()


def write_input(work, queries):
    """The same queries as JSON Lines and as Parquet."""
    rng = random.Random(1)
    text = lambda words: " ".join(rng.choices(WORDS, k=words))
    rows = [
        {"id": f"q{i}", "query": text(6), "documents": [text(rng.randint(5, 60)) for _ in range(DOCUMENTS)]}
        for i in range(queries)
    ]
    (work / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), work / "queries.parquet", row_group_size=1000)


def single_process(work, model):
    """Ranks the queries in one process on all processors. Returns {query id: [(index, score)]} and the seconds that it took."""
    output = work / "single.jsonl"
    for old in work.glob("single.jsonl*"):
        old.unlink()
    begun = time.monotonic()
    command = [RERANKD, "rank", "--model", model, "--input", work / "queries.jsonl", "--output", output, "--log", "warn"]
    subprocess.run(command, check=True)
    seconds = time.monotonic() - begun
    lines = map(json.loads, output.read_text().splitlines())
    return {line["id"]: [(r["index"], r["relevance_score"]) for r in line["results"]] for line in lines}, seconds


def descendants(pid):
    """All descendant processes of `pid`, as {pid: command line}."""
    parents, commands = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
                commands[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                pass
    found, new = {}, [pid]
    while new:
        new = [child for child, parent in parents.items() if parent in new and child not in found]
        found.update({child: commands[child] for child in new})
    return found


def run(name, command, is_worker, is_half_way, kill):
    """Runs a job; kills one of its workers when `is_half_way()`. Returns its seconds."""
    begun = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = []
    readers = [threading.Thread(target=lambda pipe=pipe: log.extend(pipe)) for pipe in (process.stdout, process.stderr)]
    for reader in readers:
        reader.start()
    killed = None
    while process.poll() is None:
        if kill and killed is None and is_half_way():
            workers = {pid: text for pid, text in descendants(process.pid).items() if is_worker(text)}
            if workers:
                killed = min(workers)
                print(f"{name}: killing worker {killed} of {len(workers)}: {workers[killed][:60]}", flush=True)
                os.kill(killed, signal.SIGKILL)
        time.sleep(0.1)
    for reader in readers:
        reader.join()
    text = "".join(log)
    if process.returncode != 0 or (kill and killed is None):
        sys.exit(f"{text[-6000:]}\n{name}: exit code {process.returncode}, killed: {killed}")
    result = [line for line in log if "pairs/s" in line]
    print(f"{name}: {result[-1].strip() if result else 'no result line'}", flush=True)
    return time.monotonic() - begun


def check(name, rows, expected):
    """`rows` is id, ranking and error of each row of the output."""
    found = {}
    for key, ranking, error in rows:
        if key in found:
            sys.exit(f"{name}: {key} is there twice")
        if error:
            sys.exit(f"{name}: {key}: {error}")
        found[key] = ranking
    if found != expected:
        missing = expected.keys() - found.keys()
        sys.exit(f"{name}: {len(missing)} queries are missing, or scores differ")
    print(f"{name}: {len(found)} queries, each once, every score bitwise as in the single process", flush=True)


def spark(work, options, expected):
    output = work / "spark.parquet"
    shutil.rmtree(output, ignore_errors=True)
    tasks = -(-options.queries // SPARK_TASK_QUERIES)
    command = [
        str(Path(sys.executable).parent / "spark-submit"),
        *("--master", "local-cluster[2,1,1024]", "--conf", "spark.ui.enabled=false"),
        *("--conf", "spark.sql.adaptive.enabled=false"),
        *("--py-files", str(DEPLOY / "python" / "reranker.py")),
        str(DEPLOY / "spark" / "rank.py"),
        *("--input", str(work / "queries.parquet"), "--output", str(output)),
        *("--model", options.model, "--rerankd", RERANKD),
    ]
    os.environ["PYSPARK_PYTHON"] = sys.executable
    os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
    is_half_way = lambda: len(list(output.glob("_temporary/*/task_*"))) >= tasks / 2
    seconds = run("spark", command, lambda text: "CoarseGrainedExecutorBackend" in text, is_half_way, options.kill)
    rows = pq.read_table(output).to_pylist()
    ranking = lambda row: [(r["index"], r["relevance_score"]) for r in row["results"]]
    check("spark", ((row["id"], ranking(row), row["error"]) for row in rows), expected)
    return seconds


def ray(work, options, expected):
    output = work / "ray"
    for old in work.glob("ray*"):
        shutil.rmtree(old, ignore_errors=True)
    blocks = -(-options.queries // RAY_BLOCK_QUERIES)
    command = [
        *(sys.executable, str(DEPLOY / "ray" / "rank.py"), "--input", str(work / "queries.parquet")),
        *("--output", str(output), "--model", options.model, "--rerankd", RERANKD, "--actors", "2", "--cpus", "1"),
        # Two for the actors; the rest reads and writes.
        *("--local-cpus", "4"),
    ]
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    is_half_way = lambda: len(list(work.glob("ray.new-*/*.parquet"))) >= blocks / 2
    is_worker = lambda text: text.startswith("ray::") and ("RankActor" in text or "MapWorker" in text)
    seconds = run("ray", command, is_worker, is_half_way, options.kill)
    rows = pq.read_table(output).to_pylist()
    ranking = lambda row: list(zip(row["index"], row["relevance_score"]))
    check("ray", ((row["id"], ranking(row), row["error"]) for row in rows), expected)
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", nargs="*", choices=["spark", "ray", []], default=["spark", "ray"])
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--model", default="rerankd-mini")
    parser.add_argument("--no-kill", dest="kill", action="store_false", help="measure only")
    parser.add_argument("--work", type=Path, default=REPOSITORY / "target" / "engines")
    options = parser.parse_args()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    write_input(work, options.queries)
    pairs = options.queries * DOCUMENTS
    expected, seconds = single_process(work, options.model)
    print(f"single process: {seconds:.1f} s, {pairs / seconds:.0f} pairs/s", flush=True)
    for engine in options.engines:
        seconds = {"spark": spark, "ray": ray}[engine](work, options, expected)
        print(f"{engine}: {seconds:.1f} s with start and end of the job, {pairs / seconds:.0f} pairs/s", flush=True)


if __name__ == "__main__":
    main()
