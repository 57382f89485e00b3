"""Ranks a table of queries and their documents on Ray Data.

    python deploy/ray/rank.py --input queries.parquet --output ranked --actors 4 --cpus 8 --model BAAI/bge-reranker-v2-m3

Input columns: id string, query string, documents list<string>. Output, one row per query: id, index list<int> and
relevance_score list<double> with the best document first, and error string, which is empty unless the query could not be ranked.

- An actor pool: each actor holds one `rerankd` process, which takes the actor's CPUs (or its GPU) and loads the model once.
- Blocks are small, so that a lost actor costs little. Ray restarts an actor that dies and repeats its batches; a `rerankd`
  process that dies is restarted by its actor.
- The output is idempotent: the job writes to a new folder beside the output, which replaces it when everything is written.
- Metrics: rerankd_pairs_total and rerankd_batch_seconds of each actor, which Ray exports to Prometheus with the prefix `ray_`.
"""

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import ray
from ray.util.metrics import Counter, Histogram

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "python"))


class RankActor:
    """`command` is the program with its model."""

    def __init__(self, command: list[str]):
        from reranker import Reranker

        self.reranker = Reranker(command)
        self.pairs = Counter("rerankd_pairs_total", "Pairs ranked by this actor")
        self.seconds = Histogram("rerankd_batch_seconds", "Seconds per batch", boundaries=[0.1, 0.3, 1, 3, 10, 30])

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list]:
        begun = time.monotonic()
        rows = zip(batch["id"], batch["query"], batch["documents"])
        jobs = ({"id": str(i), "query": str(q), "documents": list(d)} for i, q, d in rows)
        answers = list(self.reranker.rank(jobs))
        ranked = {
            "id": batch["id"],
            "index": [[result["index"] for result in answer.get("results", [])] for answer in answers],
            "relevance_score": [[result["relevance_score"] for result in answer.get("results", [])] for answer in answers],
            "error": [answer.get("error", "") for answer in answers],
        }
        self.pairs.inc(sum(map(len, ranked["index"])))
        self.seconds.observe(time.monotonic() - begun)
        return ranked


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, help="Parquet")
    parser.add_argument("--output", required=True, help="folder of Parquet files on a shared file system; replaced")
    parser.add_argument("--model", default="rerankd-mini")
    parser.add_argument("--rerankd", default="rerankd", help="the program on the nodes")
    parser.add_argument("--actors", type=int, default=1)
    parser.add_argument("--cpus", type=int, default=1, help="of each actor")
    parser.add_argument("--gpus", type=int, default=0, help="of each actor")
    parser.add_argument("--queries-per-batch", type=int, default=100)
    parser.add_argument("--local-cpus", type=int, help="CPUs of a cluster that is started on this machine, for tests")
    options = parser.parse_args()
    command = [options.rerankd, "rank", "--model", options.model, "--threads", str(options.cpus), "--log", "warn"]
    if options.gpus:
        command += ["--device", "cuda"]

    reranker = str(Path(__file__).resolve().parent.parent / "python" / "reranker.py")
    ray.init(num_cpus=options.local_cpus, runtime_env={"py_modules": [reranker]})
    cpus = int(ray.cluster_resources().get("CPU", 0))
    if cpus <= options.actors * options.cpus:
        # Ray would wait for ever for a CPU to read the input with.
        sys.exit(f"the actors would take all {cpus} CPUs; leave at least one for reading and writing")
    begun = time.monotonic()
    table = ray.data.read_parquet(options.input, columns=["id", "query", "documents"])
    rows = table.count()
    ranked = table.repartition(max(1, -(-rows // (10 * options.queries_per_batch)))).map_batches(
        RankActor,
        fn_constructor_args=[command],
        batch_size=options.queries_per_batch,
        compute=ray.data.ActorPoolStrategy(size=options.actors),
        num_cpus=options.cpus,
        num_gpus=options.gpus,
    )
    new, old = f"{options.output}.new-{os.getpid()}", f"{options.output}.old-{os.getpid()}"
    ranked.write_parquet(new)
    if os.path.exists(options.output):
        os.rename(options.output, old)
    os.rename(new, options.output)
    shutil.rmtree(old, ignore_errors=True)
    seconds = time.monotonic() - begun
    written = ray.data.read_parquet(options.output)
    pairs = sum(len(row["index"]) for row in written.select_columns(["index"]).iter_rows())
    print(f"{written.count()} queries, {pairs} pairs in {seconds:.1f} s, {pairs / seconds:.0f} pairs/s", flush=True)
    print(ranked.stats(), flush=True)


if __name__ == "__main__":
    main()
