"""What fit.py and rank.py share: the teacher, and batches of pairs."""
import json, os, pickle, random
import numpy as np, torch
from safetensors.torch import load_file
from model import Bert

WORK = os.environ.get("MINI_WORK", "./work")
BUDGET = 4096       # tokens of a batch


def teacher_model(folder):
    """The teacher with an embedding table for the student's vocabulary: Chinese tokens get the mean of their gloss's embeddings."""
    from tokenizers import Tokenizer
    info = json.load(open(f"{WORK}/glosses.json"))
    weights = load_file(f"{folder}/model.safetensors")
    weights = {k: v for k, v in weights.items() if "position_ids" not in k}
    name = "bert.embeddings.word_embeddings.weight"
    old = weights[name]
    table = torch.zeros(info["size"], old.shape[1])
    table[:info["first"]] = old[info["teacher_ids"]]
    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    tokenizer.no_padding()
    norm, mean = old[2000:20000].norm(dim=1).median(), old[2000:20000].mean(0)
    stop = set(tokenizer.encode("a an the of to in on sb sth one's one", add_special_tokens=False).ids)
    noise = torch.Generator().manual_seed(5)
    characters = {}
    for i, token in enumerate(info["chinese"]):
        parts = []
        for k, sense in enumerate(info["glosses"][token]):
            ids = tokenizer.encode(sense, add_special_tokens=False).ids
            ids = [t for t in ids if t not in stop] or ids
            parts.append((old[ids].mean(0), (1, .4)[k]))
        if not parts and len(token) > 1:
            parts = [(characters[c], 1) for c in token if c in characters]
        if parts:
            v = sum(p * w for p, w in parts) / sum(w for _, w in parts)
        else:
            v = mean + torch.randn(old.shape[1], generator=noise) * norm * .5 / 384 ** .5
        own = torch.randn(old.shape[1], generator=noise) * norm * .3 / 384 ** .5       # so that synonyms differ
        v = v - mean
        v = mean + v * (norm / (v.norm() + 1e-6)) * .9 + own
        table[info["first"] + i] = v
        if len(token) == 1:
            characters[token] = v
    table[-1] = old[100]
    weights[name] = table
    model = Bert(len(table), layers=12)
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)


class Pairs:
    """Batches of (query, window of a document), of similar length."""
    def __init__(self, seed):
        data = pickle.load(open(f"{WORK}/groups.pkl", "rb"))
        self.tokens = data["tokens"]
        train = [g for g in data["groups"] if not g["held_out"]]
        self.groups = {lang: [g for g in train if g["lang"] == lang] for lang in ("en", "zh")}
        self.rng = random.Random(seed)
        path = f"{WORK}/short.pkl"
        self.short = pickle.load(open(path, "rb")) if os.path.exists(path) else []

    def pair(self, longest):
        r = self.rng
        if self.short and r.random() < .5:
            q, d = r.choice(self.short)
            return q[:40], d[:longest]
        g = r.choice(self.groups["zh" if r.random() < .3 else "en"])
        doc = r.choice(g["documents"]) if r.random() < .6 else g["documents"][0]
        doc = np.concatenate([self.tokens[i][a:b] for i, a, b in doc])
        size = min(len(doc), longest)
        at = r.randint(0, len(doc) - size)
        return g["query"][:40], doc[at:at + size]

    def batch(self, budget=None):
        budget = budget or BUDGET
        longest = self.rng.choice([12, 16, 24, 24, 32, 40, 48, 64, 96, 128, 200, 320])
        pairs, total = [], 0
        while total < budget:
            q, d = self.pair(longest)
            pairs.append((q, d))
            total += len(q) + len(d) + 3
        return pairs


def tensors(pairs, rng=None):
    """[CLS] query [SEP] document [SEP]: ids, types, positions, mask; padded to the longest."""
    rows = [[2, *map(int, q), 3, *map(int, d), 3] for q, d in pairs]
    longest = max(map(len, rows))
    ids = torch.tensor([r + [0] * (longest - len(r)) for r in rows])
    types = torch.tensor([[0] * (len(q) + 2) + [1] * (longest - len(q) - 2) for q, _ in pairs])
    mask = torch.tensor([[True] * len(r) + [False] * (longest - len(r)) for r in rows])
    return ids, types, torch.arange(longest).expand_as(ids), mask


def chunks(pairs, budget):
    """Batches of similar length, because padding costs as much as text."""
    pairs = sorted(pairs, key=lambda p: len(p[0]) + len(p[1]))
    out, part = [], []
    for p in pairs:
        size = len(p[0]) + len(p[1]) + 3
        if part and (size * (len(part) + 1) > budget or size > 1.25 * (len(part[0][0]) + len(part[0][1])) + 12):
            out.append(part)
            part = []
        part.append(p)
    return out + [part]


def additive(mask):
    return ((~mask)[:, None, None].float() * -1e4).bfloat16()
