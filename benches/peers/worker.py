"""Runs one of the other engines in its own process: loads it, prints a ready line, then answers each input line.

    python worker.py ENGINE FOLDER THREADS

README.md describes the protocol. Output of libraries goes to standard error, so that standard output has protocol lines only.
"""

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, Callable, NamedTuple

import numpy as np

import workloads

# Pairs per batch of each mode. Pairs are sorted by length first, and padded within a batch.
# The streams modes give each thread a batch of its own; for short pairs larger batches are faster there too.
BATCH = {"one": 1, "batch8": 8, "batch32": 32, "streams": 1, "streams4": 4, "streams8": 8}
STREAMS = [mode for mode in BATCH if mode.startswith("streams")]

Pairs = list[list[int]]
# Scores prepared input and returns one logit per pair, in the order of the input.
Score = Callable[[Any], np.ndarray]


class Mode(NamedTuple):
    """`prepare` converts the pairs to the engine's input and is not timed; `score` is timed."""

    prepare: Callable[[Pairs], Any]
    score: Score


class Engine(NamedTuple):
    version: str
    modes: dict[str, Mode]


def main() -> None:
    name, folder, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    family, precision = name.rsplit("-", 1)
    engine = LOADERS[family](precision, folder, threads)
    pairs = workloads.read(folder / "workloads.json")
    order = {name: longest_first(ids) for name, ids in pairs.items()}
    inputs: dict[tuple[str, str], Any] = {}
    print(json.dumps({"engine": name, "ready": True, "version": engine.version, "modes": list(engine.modes)}), file=answers)
    for line in sys.stdin:
        question = json.loads(line)
        workload, mode_name, runs = question["workload"], question["mode"], question["runs"]
        mode = engine.modes[mode_name]
        if (workload, mode_name) not in inputs:
            inputs[workload, mode_name] = mode.prepare([pairs[workload][index] for index in order[workload]])
        seconds = []
        for _ in range(runs):
            start = time.perf_counter()
            scores = mode.score(inputs[workload, mode_name])
            seconds.append(time.perf_counter() - start)
        logits = np.empty(len(pairs[workload]))
        logits[order[workload]] = np.asarray(scores, dtype=np.float64).reshape(-1)
        answer = {
            "engine": name,
            "workload": workload,
            "seconds": seconds,
            "tokens": sum(map(len, pairs[workload])),
            "logits": logits.tolist(),
        }
        print(json.dumps(answer), file=answers)


def longest_first(pairs: Pairs) -> list[int]:
    return sorted(range(len(pairs)), key=lambda index: -len(pairs[index]))


def padded(pairs: Pairs, batch: int) -> list[dict[str, np.ndarray]]:
    """Padded arrays of ids and attention masks, `[batch, longest]` each."""
    batches = []
    for start in range(0, len(pairs), batch):
        rows = pairs[start : start + batch]
        ids = np.full((len(rows), max(map(len, rows))), workloads.PADDING, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, pair in enumerate(rows):
            ids[row, : len(pair)] = pair
            mask[row, : len(pair)] = 1
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def batches_of(mode: str) -> Callable[[Pairs], list[dict[str, np.ndarray]]]:
    return lambda pairs: padded(pairs, BATCH[mode])


# The engines.


def load_openvino(precision: str, folder: Path, threads: int) -> Engine:
    """The latency hint gives all threads to one inference; the throughput hint gives one thread to each of several."""
    import openvino

    core = openvino.Core()
    graph = "openvino-w8a8.xml" if precision == "w8a8" else "openvino.xml"
    # Softmax and norms, which W8A8 does not quantize, run in bf16.
    rest = "f32" if precision == "f32" else "bf16"

    def compiled(hint: str, streams: int) -> Any:
        settings = {
            "PERFORMANCE_HINT": hint,
            "NUM_STREAMS": streams,
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": rest,
        }
        model = core.compile_model(folder / "graphs" / graph, "CPU", settings)
        if model.get_property("INFERENCE_PRECISION_HINT").to_string() != rest:
            sys.exit(f"OpenVINO has no {rest} on this processor")
        return model

    request = compiled("LATENCY", 1).create_infer_request()
    queue = openvino.AsyncInferQueue(compiled("THROUGHPUT", threads), threads)
    results: dict[int, np.ndarray] = {}
    queue.set_callback(lambda done, index: results.__setitem__(index, done.get_output_tensor().data.copy()))

    def one_after_another(batches: list[dict[str, np.ndarray]]) -> np.ndarray:
        return np.concatenate([request.infer(batch)[0].copy() for batch in batches])

    def streams(batches: list[dict[str, np.ndarray]]) -> np.ndarray:
        for index, batch in enumerate(batches):
            queue.start_async(batch, index)
        queue.wait_all()
        return np.concatenate([results[index] for index in range(len(batches))])

    modes = {mode: Mode(batches_of(mode), one_after_another) for mode in ("one", "batch8")}
    return Engine(version("openvino"), modes | {mode: Mode(batches_of(mode), streams) for mode in STREAMS})


def load_onnxruntime(precision: str, folder: Path, threads: int) -> Engine:
    import onnxruntime

    graph = folder / "graphs" / ("fused-int8.onnx" if precision == "int8" else "fused.onnx")

    def session(threads_each: int) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads_each
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    all_threads, one_thread = session(threads), session(1)
    pool = ThreadPoolExecutor(threads)

    def one_after_another(batches: list[dict[str, np.ndarray]]) -> np.ndarray:
        return np.concatenate([all_threads.run(None, batch)[0] for batch in batches])

    def streams(batches: list[dict[str, np.ndarray]]) -> np.ndarray:
        return np.concatenate(list(pool.map(lambda batch: one_thread.run(None, batch)[0], batches)))

    modes = {mode: Mode(batches_of(mode), one_after_another) for mode in ("one", "batch8")}
    return Engine(version("onnxruntime"), modes | {mode: Mode(batches_of(mode), streams) for mode in STREAMS})


def load_sentence_transformers(precision: str, folder: Path, threads: int) -> Engine:
    """CrossEncoder.predict as users call it, from text to logits. It sorts by length itself; its default is batch32."""
    import torch
    from sentence_transformers import CrossEncoder

    torch.set_num_threads(threads)
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[precision]
    model = CrossEncoder(
        str(folder),
        device="cpu",
        max_length=workloads.WINDOW,
        activation_fn=torch.nn.Identity(),
        model_kwargs={"dtype": dtype},
        local_files_only=True,
    )

    def texts(pairs: Pairs) -> list[tuple[str, str]]:
        texts = [workloads.text(ids) for ids in pairs]
        if model.tokenizer([first for first, _ in texts], [second for _, second in texts])["input_ids"] != pairs:
            sys.exit("the tokenizer's ids of the texts differ from the workload's ids")
        return texts

    def predict(mode: str) -> Score:
        return lambda pairs: model.predict(pairs, batch_size=BATCH[mode], show_progress_bar=False)

    return Engine(version("sentence-transformers"), {mode: Mode(texts, predict(mode)) for mode in ("one", "batch8", "batch32")})


LOADERS: dict[str, Callable[[str, Path, int], Engine]] = {
    "openvino": load_openvino,
    "onnxruntime": load_onnxruntime,
    "sentence-transformers": load_sentence_transformers,
}

if __name__ == "__main__":
    main()
