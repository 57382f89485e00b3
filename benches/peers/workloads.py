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


class Shape(NamedTuple):
    """Dimensions of an XLM-RoBERTa cross-encoder, and the pairs per workload: a few seconds of work on two cores."""

    layers: int
    hidden: int
    heads: int
    feed_forward: int
    positions: int
    pairs: dict[str, int]


SHAPES = {
    "base": Shape(12, 768, 12, 3072, 514, {"a": 8, "b": 16, "c": 48, "d": 1}),
    "large": Shape(24, 1024, 16, 4096, 8194, {"a": 4, "b": 8, "c": 24, "d": 1}),
    "minilm": Shape(12, 384, 12, 1536, 514, {"a": 16, "b": 32, "c": 100, "d": 1}),
}


def operations(shape: Shape, lengths: list[int]) -> tuple[float, float]:
    """Floating-point operations (multiplications and additions) of the linear layers, and of attention.

    Counts the least that any engine must compute: in the last layer keys and values for every token, everything else for
    each pair's first token. Embeddings, norms, activations and the head are left out.
    """
    tokens, pairs = sum(lengths), len(lengths)
    weights = 4 * shape.hidden * shape.hidden + 2 * shape.hidden * shape.feed_forward
    keys_and_values = 2 * shape.hidden * shape.hidden
    linear = (shape.layers - 1) * weights * tokens + keys_and_values * tokens + (weights - keys_and_values) * pairs
    scores = (shape.layers - 1) * sum(n * n for n in lengths) + tokens
    return 2.0 * linear, 2.0 * 2 * shape.hidden * scores


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
