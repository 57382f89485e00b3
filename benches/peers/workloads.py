"""The model shapes, and four workloads of token ids for each. Standard library only.

A workload is a list of pairs and a pair is a list of ids. The ids are written to a file once, and every engine reads them.
"""

import json
import random
from pathlib import Path
from typing import NamedTuple

START, PADDING, END, UNKNOWN, MASK = range(5)
VOCABULARY = 8192
QUERY_TOKENS = 8
# <s> query </s> </s> document </s>
SPECIAL_TOKENS = 4
WINDOW = 512

WORKLOADS = {
    "a": "all pairs 512 tokens",
    "b": "mixed, 32 to 512",
    "c": "short, 20 to 64",
    "d": "one pair of 128",
}


# Of a ModernBERT: every third layer, from the first on, attends to the whole sequence, the others to this distance.
GLOBAL_EVERY, LOCAL_DISTANCE = 3, 64


class Shape(NamedTuple):
    """Dimensions of a cross-encoder, and the pairs per workload: a few seconds of work on two cores."""

    layers: int
    hidden: int
    heads: int
    feed_forward: int
    positions: int
    pairs: dict[str, int]
    # "xlm-roberta", or "modernbert" with the pooling of its head.
    kind: str = "xlm-roberta"
    pooling: str = "cls"

    def is_local(self, layer: int) -> bool:
        return self.kind == "modernbert" and layer % GLOBAL_EVERY != 0


SHAPES = {
    "base": Shape(12, 768, 12, 3072, 514, {"a": 8, "b": 16, "c": 48, "d": 1}),
    "large": Shape(24, 1024, 16, 4096, 8194, {"a": 4, "b": 8, "c": 24, "d": 1}),
    "minilm": Shape(12, 384, 12, 1536, 514, {"a": 16, "b": 32, "c": 100, "d": 1}),
    "ettin-17m": Shape(7, 256, 4, 384, 8192, {"a": 16, "b": 32, "c": 100, "d": 1}, "modernbert"),
    "ettin-32m": Shape(10, 384, 6, 576, 8192, {"a": 16, "b": 32, "c": 100, "d": 1}, "modernbert"),
    "ettin-150m": Shape(22, 768, 12, 1152, 8192, {"a": 8, "b": 16, "c": 48, "d": 1}, "modernbert"),
    "gte-modernbert": Shape(22, 768, 12, 1152, 8192, {"a": 8, "b": 16, "c": 48, "d": 1}, "modernbert", "mean"),
}
# Measured unless --shapes names others.
DEFAULT_SHAPES = ("base", "large", "minilm")


def operations(shape: Shape, lengths: list[int]) -> tuple[float, float]:
    """Floating-point operations (multiplications and additions) of the linear layers, and of attention.

    Counts the least that any engine must compute. If the first token is pooled, that is in the last layer keys and values for
    every token and everything else for each pair's first token; with mean pooling it is the whole last layer. Embeddings,
    norms, activations and the head are left out.
    """
    tokens, pairs = sum(lengths), len(lengths)
    feed_forward_layers = 3 if shape.kind == "modernbert" else 2
    weights = 4 * shape.hidden * shape.hidden + feed_forward_layers * shape.hidden * shape.feed_forward
    keys_and_values = 2 * shape.hidden * shape.hidden
    last = keys_and_values * tokens + (weights - keys_and_values) * pairs if shape.pooling == "cls" else weights * tokens
    linear = (shape.layers - 1) * weights * tokens + last
    whole = shape.layers if shape.pooling == "mean" else shape.layers - 1
    scores = sum(visible(n, shape.is_local(layer)) for layer in range(whole) for n in lengths)
    scores += tokens if shape.pooling == "cls" else 0
    return 2.0 * linear, 2.0 * 2 * shape.hidden * scores


def visible(tokens: int, local: bool) -> int:
    """Pairs of a query and a key that a layer computes for a sequence."""
    distance = min(LOCAL_DISTANCE, tokens - 1) if local else tokens - 1
    return tokens * (2 * distance + 1) - distance * (distance + 1)


def lengths(shape: Shape, workload: str) -> list[int]:
    """Tokens of each pair. Smaller shapes have more pairs; the first ones equal those of the larger shapes."""
    dice = random.Random(1234)
    mixed = [dice.randint(32, WINDOW) for _ in range(32)]
    short = [dice.randint(20, 64) for _ in range(100)]
    drawn = {"a": [WINDOW] * 16, "b": mixed, "c": short, "d": [128]}[workload]
    return drawn[: shape.pairs[workload]]


def pair(number: int, tokens: int) -> list[int]:
    """The ids of one pair in a tokenizer's layout, so that there is a text for sentence-transformers."""
    words = [5 + (number * 31 + place * 17) % 8000 for place in range(tokens - SPECIAL_TOKENS)]
    return [START, *words[:QUERY_TOKENS], END, END, *words[QUERY_TOKENS:], END]


def token_ids(shape: Shape) -> dict[str, list[list[int]]]:
    """Workload -> pairs -> ids, as stored in the file."""
    return {
        workload: [pair(number, tokens) for number, tokens in enumerate(lengths(shape, workload))]
        for workload in WORKLOADS
    }


def text(ids: list[int]) -> tuple[str, str]:
    """The query and document that the checkpoint's tokenizer maps to these ids."""
    words = [f"w{token}" for token in ids]
    return " ".join(words[1 : 1 + QUERY_TOKENS]), " ".join(words[3 + QUERY_TOKENS : -1])


def write(shape: Shape, path: Path) -> None:
    path.write_text(json.dumps(token_ids(shape)))


def read(path: Path) -> dict[str, list[list[int]]]:
    return json.loads(path.read_text())
