"""Structured random initial weights: the network starts as an approximate BM25.

A cross-encoder of this size, trained for an hour, does not learn by itself to match a query token with the same token in
the document. Therefore W_q = W_k = one random projection, so that attention starts as token similarity (after Trockman &
Kolter 2023), and a few residual dimensions have an initial meaning:

    identity   random vector of a piece (an entry of the vocabulary); pieces with common characters share a part of it
    meaning    PPMI-SVD vector computed from the training passages (64 dimensions)
    feature    rarity (idf), special token, Chinese
    wave       positions as a square wave, from which a head tells whether a token comes before another
    local      positions as fine sinusoids, for attention to near tokens
    previous   written by layer 0: a projection of the previous token, for matching bigrams
    scratch    written by the heads: segment, matches, pooled matches

Layer 0 finds a token's segment (query or document) and its predecessor. Layer 1 matches across segments: same piece,
similar meaning, same bigram. Layer 2 pools the matches of the query's rare tokens into <s>, and layer 3 those of the
document region with the most matches. Everything is trainable. No weights of another model are used.
"""
import json, os, pickle, sys
import numpy as np, torch
import scipy.sparse as sp
from scipy.sparse.linalg import svds
from transformers import XLMRobertaConfig, XLMRobertaForSequenceClassification

WORK = os.environ.get("MINI_WORK", "./work")
VOCABULARY, WIDTH, LAYERS, HEADS, HEAD, FFN, POSITIONS = 16000, 256, 4, 4, 64, 1024, 514
IDENTITY, MEANING, FEATURE = slice(0, 96), slice(96, 160), slice(160, 168)
WAVE, LOCAL, PREVIOUS, SCRATCH = slice(168, 184), slice(184, 208), slice(208, 232), slice(232, 256)
# Of FEATURE: idf; 1 for a normal token and -1 for a special one; marks of <s>, </s> and Chinese.
RARE, PLAIN, IS_START, IS_SEPARATOR, IS_HAN = range(160, 165)
# Of SCRATCH: the segment; matches by piece, by meaning and by bigram; pooled matches; density of matches; their position.
# S + 4 to S + 6 are matches of rare tokens (by piece, meaning and bigram), and S + 7 is rare tokens without a match.
S = SCRATCH.start
SEGMENT, SAME, LIKE, PAIR, POOLED, DENSE, MATCH_POSITION = S, S + 1, S + 2, S + 3, S + 8, S + 16, S + 20


def config():
    return XLMRobertaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=FFN,
        hidden_act="gelu", max_position_embeddings=POSITIONS, type_vocab_size=1, layer_norm_eps=1e-5, pad_token_id=1,
        bos_token_id=0, eos_token_id=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, id2label={0: "LABEL_0"},
        label2id={"LABEL_0": 0}, architectures=["XLMRobertaForSequenceClassification"])


def meaning_vectors(tokens, dimensions):
    """Truncated SVD of the positive pointwise mutual information of pieces that occur near each other."""
    stream = np.concatenate([np.concatenate([t.astype(np.int32), np.full(6, -1, np.int32)]) for t in tokens])
    counts = sp.csr_matrix((VOCABULARY, VOCABULARY), dtype=np.float32)
    for step in range(1, 7):
        a, b = stream[:-step], stream[step:]
        ok = (a >= 0) & (b >= 0)
        counts = counts + sp.csr_matrix((np.full(ok.sum(), 1 / step ** .5, np.float32), (a[ok], b[ok])), shape=counts.shape)
    counts = (counts + counts.T).tocoo()
    total = np.asarray(sp.csr_matrix(counts).sum(1)).ravel() + 1
    smooth = total ** .75 / (total ** .75).sum()
    pmi = np.log(np.maximum(counts.data, 1e-9) / total[counts.row] / smooth[counts.col]) - np.log(2)
    keep = (pmi > 0) & (counts.data > 1)
    matrix = sp.csr_matrix((pmi[keep], (counts.row[keep], counts.col[keep])), shape=counts.shape)
    u, s, _ = svds(matrix.astype(np.float32), k=dimensions + 1, random_state=5)
    u, s = u[:, ::-1][:, 1:], s[::-1][1:]      # the first direction only encodes frequency
    return u * s ** .5


def unit(x):
    return x / (np.linalg.norm(x, axis=-1, keepdims=True) + 1e-9)


def identity_vectors(pieces, rng):
    own = unit(rng.standard_normal((len(pieces), 96)))
    at, grams = {p: i for i, p in enumerate(pieces)}, {}
    shared = np.zeros_like(own)
    for i, piece in enumerate(pieces):
        if any("\u4e00" <= c <= "\u9fff" for c in piece):
            parts = [own[at[c]] for c in piece if c in at] if len(piece) > 1 else []
        else:
            marked = "^" + piece
            parts = [grams.setdefault(g, unit(rng.standard_normal(96))) for g in
                     [marked[k:k + 4] for k in range(len(marked) - 3)]] if len(piece) > 3 else []
        if parts:
            shared[i] = unit(np.sum(parts, 0))
    return unit(.8 * own + .6 * shared)


def embeddings(tokens, pieces, rng):
    count = np.bincount(np.concatenate(tokens), minlength=VOCABULARY)
    rarity = np.log((count.sum() + 1) / (count + 20.0))
    rarity = (rarity - np.average(rarity, weights=count)) / 2      # about -2 for "the", +2 or more for rare names
    word = .02 * rng.standard_normal((VOCABULARY, WIDTH))
    word[:, IDENTITY] = unit(identity_vectors(pieces, rng)) * 110 ** .5
    word[:, MEANING] = unit(meaning_vectors(tokens, 64)) * 50 ** .5
    word[:, RARE], word[:, PLAIN] = rarity.clip(-2.5, 3), 1
    word[:, IS_HAN] = [float(any("\u4e00" <= c <= "\u9fff" for c in p)) for p in pieces]
    word[:4, MEANING], word[:4, PLAIN], word[:4, RARE] = 0, -1, 0
    word[0, IS_START], word[2, IS_SEPARATOR] = 4, 4
    word[1] = 0
    position = .01 * rng.standard_normal((POSITIONS, WIDTH))
    p = np.arange(POSITIONS)
    for k in range(8):      # odd harmonics, which W_q of layer 0 weights towards a square wave of period 1100
        angle = 2 * np.pi * (2 * k + 1) * p / 1100
        position[:, WAVE.start + 2 * k], position[:, WAVE.start + 2 * k + 1] = 1.9 * np.sin(angle), 1.9 * np.cos(angle)
    position[:3, WAVE] = 0  # <s>, at position 2, has no wave: attention to it does not depend on distance
    for k, w in enumerate(local_frequencies()):
        position[:, LOCAL.start + 2 * k], position[:, LOCAL.start + 2 * k + 1] = 3 ** .5 * np.sin(w * p), 3 ** .5 * np.cos(w * p)
    return word, position


def local_frequencies():
    return 2 * np.pi / np.geomspace(2.6, 600, 12)


def projection(rows, columns, rng):
    q, _ = np.linalg.qr(rng.standard_normal((columns, rows)))
    return q.T


class Block:
    """The matrices of one layer as arrays, with a view per head."""

    def __init__(self, rng):
        self.q, self.k = .02 * rng.standard_normal((2, WIDTH, WIDTH))
        self.v, self.o = .03 * rng.standard_normal((2, WIDTH, WIDTH))
        self.bq, self.bk, self.bv, self.bo = np.zeros((4, WIDTH))
        self.up, self.down = .05 * rng.standard_normal((FFN, WIDTH)), .02 * rng.standard_normal((WIDTH, FFN))
        self.bup, self.bdown = np.zeros(FFN), np.zeros(WIDTH)

    def tie(self, head, rng, scale):
        """Sets W_q = W_k on the content dimensions, so that attention starts as token similarity."""
        rows = slice(head * HEAD, (head + 1) * HEAD)
        shared = scale * projection(HEAD, 160, rng)
        self.q[rows, :160] += shared
        self.k[rows, :160] += shared

    def look_near(self, head, first, offset, scale):
        """Attention to the position `offset` away, with 24 dimensions of the head starting at `first`."""
        for k, w in enumerate(local_frequencies()):
            row, sin, cos = head * HEAD + first + 2 * k, LOCAL.start + 2 * k, LOCAL.start + 2 * k + 1
            c, s = np.cos(w * offset), np.sin(w * offset)
            self.q[row, sin], self.q[row, cos] = scale * c, scale * s
            self.q[row + 1, cos], self.q[row + 1, sin] = scale * c, -scale * s
            self.k[row, sin], self.k[row + 1, cos] = scale, scale

    def match(self, head, parts, sink, rng):
        """Attention to similar tokens of the other segment, or to <s> if there are none: `sink` is the attention score of <s>.

        `parts`: dimensions to compare, size of their projection, gain. 8 is the square root of the head size, and 3.8 the value of
        IS_START in <s> after the layer norm.
        """
        base = head * HEAD
        self.q[base, SEGMENT], self.k[base, SEGMENT] = -2.3, 2.3           # other segment +6, same segment -6
        self.bq[base + 1], self.k[base + 1, IS_START] = 8 / 3.8 * sink, 1
        self.q[base + 1, SEGMENT] = -8 / 3.8 * 2                           # cancels the segment term of <s>
        row = base + 2
        for where, size, gain in parts:
            shared = gain * projection(size, where.stop - where.start, rng)
            self.q[row:row + size, where] = self.k[row:row + size, where] = shared
            row += size

    def report(self, head, target, rng):
        """Value +1 for a normal token and -1 for <s>: the output tells whether the head found a match."""
        self.v[head * HEAD, :], self.v[head * HEAD, PLAIN] = 0, 1
        self.o[target, head * HEAD] = 2.5
        for i in range(4):   # the matched position, as its slow waves
            self.v[head * HEAD + 1 + i, WAVE.start + i] = .7
            self.o[MATCH_POSITION + i, head * HEAD + 1 + i] = .5

    def copy(self, head, triples):
        """Adds the dimension `source` of the attended tokens, times `scale`, to the dimension `target`, for each triple."""
        for i, (source, target, scale) in enumerate(triples):
            row = head * HEAD + 10 + i
            self.v[row, :], self.v[row, source] = 0, 1
            self.o[target, row] = scale


def blocks(rng):
    layers = [Block(rng) for _ in range(LAYERS)]
    first, second, third, fourth = layers

    # Layer 0, head 0: attention to the preceding separator, or to <s> if there is none. Value: which of the two.
    first.bq[0] = 8
    first.k[0, IS_START] = first.k[0, IS_SEPARATOR] = 5
    for k in range(8):
        row, sin, cos = 1 + 2 * k, WAVE.start + 2 * k, WAVE.start + 2 * k + 1
        first.q[row, sin], first.k[row, cos] = 25 / (2 * k + 1) ** .6, 1
        first.q[row + 1, cos], first.k[row + 1, sin] = -25 / (2 * k + 1) ** .6, 1
    first.v[0, :], first.v[0, IS_SEPARATOR], first.v[0, IS_START] = 0, .25, -.25
    first.o[SEGMENT, 0] = 3
    # Layer 0, head 1: the previous token's identity.
    first.look_near(1, 0, -1, 2.2)
    first.v[HEAD:HEAD + 24, IDENTITY] = projection(24, 96, rng)
    first.o[PREVIOUS, HEAD:HEAD + 24] = np.eye(24)
    # Layer 0, heads 2 and 3: similarity within the whole pair, and the mean of the neighborhood.
    first.tie(2, rng, .4)
    first.look_near(3, 0, 0, 1.0)

    # Layer 1: three kinds of matching heads, and an unstructured head.
    second.match(0, [(IDENTITY, 60, 1.25)], 15, rng), second.report(0, SAME, rng)
    second.match(1, [(MEANING, 60, 1.45)], 15, rng), second.report(1, LIKE, rng)
    second.match(2, [(PREVIOUS, 24, 1.35), (IDENTITY, 36, 1.35)], 17, rng), second.report(2, PAIR, rng)
    second.look_near(3, 0, 0, 1.0)
    # The FFN of layer 1 starts with "rare and matched" and "rare and not matched", the terms of a BM25 sum.
    for i, source in enumerate((SAME, LIKE, PAIR)):
        second.up[2 * i, [source, RARE]], second.down[S + 4 + i, 2 * i] = (1, .7), .7
        second.up[2 * i + 1, [source, RARE]], second.down[S + 7, 2 * i + 1] = (-1, .7), .4

    # Layer 2, head 0: <s> pools the query's tokens, rare ones first. Head 1: density of matches around each token.
    matches = [SAME, LIKE, PAIR, S + 4, S + 5, S + 6, S + 7]
    third.q[0, IS_START], third.k[0, [SEGMENT, RARE, PLAIN]] = 4, (-.9, .9, 1)
    third.copy(0, [(m, POOLED + i, 1.5) for i, m in enumerate(matches)])
    third.look_near(1, 0, 0, .8)
    third.copy(1, [(m, DENSE + i, 1.5) for i, m in enumerate((SAME, LIKE, PAIR, S + 4))])
    third.tie(2, rng, .3), third.tie(3, rng, .3)
    # Layer 3, head 0: as in layer 2. Head 1: <s> attends to the document region with the most matches.
    fourth.q[0, IS_START], fourth.k[0, [SEGMENT, RARE, PLAIN]] = 4, (-.9, .9, 1)
    fourth.copy(0, [(m, POOLED + i, 1) for i, m in enumerate(matches)])
    fourth.q[HEAD, IS_START], fourth.k[HEAD, [SEGMENT, PLAIN, DENSE, DENSE + 1, DENSE + 2]] = 4, (1.2, 1, .7, .7, .7)
    fourth.copy(1, [(DENSE + i, DENSE + i, 1.5) for i in range(4)])
    fourth.tie(2, rng, .3), fourth.tie(3, rng, .3)
    return layers


def initial_model(tokens, pieces, seed=6, structured=True):
    torch.manual_seed(seed)
    model = XLMRobertaForSequenceClassification(config())
    if not structured:
        return model
    rng = np.random.default_rng(seed)
    put = lambda parameter, array: parameter.data.copy_(torch.as_tensor(np.ascontiguousarray(array), dtype=torch.float32))
    word, position = embeddings(tokens, pieces, rng)
    put(model.roberta.embeddings.word_embeddings.weight, word)
    put(model.roberta.embeddings.position_embeddings.weight, position)
    model.roberta.embeddings.token_type_embeddings.weight.data.zero_()
    for layer, block in zip(model.roberta.encoder.layer, blocks(rng)):
        attention = layer.attention
        put(attention.self.query.weight, block.q), put(attention.self.query.bias, block.bq)
        put(attention.self.key.weight, block.k), put(attention.self.value.weight, block.v)
        put(attention.output.dense.weight, block.o)
        put(layer.intermediate.dense.weight, block.up), put(layer.output.dense.weight, block.down)
    dense, out = .04 * rng.standard_normal((WIDTH, WIDTH)), .02 * rng.standard_normal((1, WIDTH))
    dense[0], out[0, 0] = 0, 2
    dense[0, POOLED:POOLED + 6], dense[0, POOLED + 6] = .12, -.08
    dense[0, DENSE:DENSE + 4] = .06
    put(model.classifier.dense.weight, dense), put(model.classifier.out_proj.weight, out)
    return model


if __name__ == "__main__":
    data = pickle.load(open(f"{WORK}/groups.pkl", "rb"))
    vocabulary = json.load(open(sys.argv[1]))["model"]["vocab"]
    model = initial_model(data["tokens"], [piece for piece, _ in vocabulary])
    torch.save(model.state_dict(), f"{WORK}/initial.pt")
    print(sum(p.numel() for p in model.parameters()), "parameters")
