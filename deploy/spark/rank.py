"""Ranks a table of queries and their documents on Spark.

    spark-submit --py-files deploy/python/reranker.py --conf spark.task.cpus=4 --conf spark.executor.cores=4 \\
        deploy/spark/rank.py --input queries.parquet --output ranked.parquet --model BAAI/bge-reranker-v2-m3

Input columns: id string, query string, documents array<string>. Output, one row per query: id, results
array<struct<index int, relevance_score double>> with the best document first, and error string, which is null unless the query
could not be ranked.

- Each executor holds one `rerankd` process: with spark.task.cpus = spark.executor.cores it runs one task at a time, and Spark
  keeps the Python worker between tasks. The process takes all cores of the executor and loads the model once.
- A task is about 5,000 pairs (--pairs-per-task), so that a lost executor costs little. Spark retries a lost task; after
  spark.task.maxFailures failures of one task the job fails. A retry uses the process of the executor on which it runs.
- The output is idempotent: Spark commits the files of each task exactly once, and the job replaces the output.
"""

import argparse
import time
from typing import Iterable, Iterator

import pandas as pd
from pyspark.sql import DataFrame, Observation, SparkSession
from pyspark.sql import functions as F

RESULT = "id string, results array<struct<index:int,relevance_score:double>>, error string"


def rank(table: DataFrame, command: list[str], pairs_per_task: int) -> DataFrame:
    """Ranks each row's documents against its query. `command` is the program with its model."""

    def rank_partition(batches: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        from reranker import shared_reranker  # here, because --py-files ships it to the Python workers

        reranker = shared_reranker(command)
        for batch in batches:
            jobs = ({"id": i, "query": q, "documents": list(d)} for i, q, d in batch.itertuples(index=False))
            answers = list(reranker.rank(jobs))
            yield pd.DataFrame(
                {
                    "id": batch["id"],
                    "results": [answer.get("results") for answer in answers],
                    "error": [answer.get("error") for answer in answers],
                }
            )

    table = table.select("id", "query", "documents")
    pairs = table.agg(F.sum(F.size("documents"))).first()[0] or 0
    tasks = max(1, -(-pairs // pairs_per_task))
    return table.repartition(tasks, "id").mapInPandas(rank_partition, RESULT)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, help="Parquet")
    parser.add_argument("--output", required=True, help="Parquet; replaced")
    parser.add_argument("--model", default="rerankd-mini")
    parser.add_argument("--rerankd", default="rerankd", help="the program on the executors")
    parser.add_argument("--pairs-per-task", type=int, default=5000)
    options = parser.parse_args()
    spark = SparkSession.builder.appName("rerank").getOrCreate()
    # Rows of an Arrow batch: a Python worker holds one batch in memory and has it ranked in one call.
    spark.conf.set("spark.sql.execution.arrow.maxRecordsPerBatch", "500")
    threads = int(spark.conf.get("spark.task.cpus", "1"))
    command = [options.rerankd, "rank", "--model", options.model, "--threads", str(threads), "--log", "warn"]

    begun = time.monotonic()
    metrics = Observation("rank")
    ranked = rank(spark.read.parquet(options.input), command, options.pairs_per_task)
    ranked = ranked.observe(
        metrics,
        F.count(F.lit(1)).alias("queries"),
        F.sum(F.coalesce(F.size("results"), F.lit(0))).alias("pairs"),
        F.count("error").alias("failed"),
    )
    ranked.write.mode("overwrite").parquet(options.output)
    seconds = time.monotonic() - begun
    # A QueryExecutionListener gets the same counts.
    counts = metrics.get
    print(f"{counts} in {seconds:.1f} s, {counts['pairs'] / seconds:.0f} pairs/s", flush=True)
    spark.stop()


if __name__ == "__main__":
    main()
