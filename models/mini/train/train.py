"""Trains rerankd-mini from the structured initial weights.

A group is a query with eight documents, mostly whole passages: the positive first, then seven negatives. The loss over a
group's logits is a sum: the cross-entropy of the softmax; a small binary term, which calibrates the sigmoid; and, for groups
with teacher scores, the divergence from the teacher's softmax.
Document positions are sometimes shifted by a random gap, so that short passages train all positions.
A second run with --start and --pools continues with the groups of pools.py, whose teacher scores are made from BM25's.
Every step also has a few groups of single words. They cost almost nothing; without them "apple" does not match "apple".

The encoder runs in bfloat16; the head and the weights are f32. Two single-threaded processes average their gradients once
per step. On a shared machine this is faster than two threads that synchronize in every matrix multiplication.
"""
import argparse, json, math, os, pickle, random, shutil, tempfile, time
from safetensors.torch import load_file, save_file
import numpy as np, torch, torch.distributed as dist, torch.nn.functional as F
from transformers import XLMRobertaForSequenceClassification
import initialise

WORK = os.environ.get("MINI_WORK", "./work")
NEGATIVES, TOKEN_BUDGET, WORD_GROUPS = 7, 6000, 6     # the budget is per process and step
HELD_OUT = {"en": 240, "zh": 100}     # questions for the evaluation at each checkpoint


class Groups:
    def __init__(self, seed, tokenizer_dir, rank=0, processes=1, pools=False):
        data = pickle.load(open(f"{WORK}/groups.pkl", "rb"))
        self.tokens, self.words = data["tokens"], data["words"]
        path = f"{WORK}/teacher.pkl"
        teacher_scores = pickle.load(open(path, "rb")) if os.path.exists(path) else {}
        for k, scores in teacher_scores.items():
            data["groups"][k]["teacher"] = scores
        self.held_out = {lang: [g for g in data["groups"] if g["held_out"] and g["lang"] == lang and g["kind"] == "question"][:n]
                         for lang, n in HELD_OUT.items()}
        train = [g for g in data["groups"] if not g["held_out"]]
        train += [g for g in train if "teacher" in g]       # groups with teacher scores occur twice
        self.rng = random.Random(seed)
        if pools:       # second phase: three in four from the pools, the rest from the first phase
            pooled = pickle.load(open(f"{WORK}/pools.pkl", "rb"))
            old = [g for g in train if "teacher" in g or self.rng.random() < .1]
            train = pooled + self.rng.sample(old, len(pooled) // 3)
        self.rng.shuffle(train)
        # Short passages come first, because matching is learned fastest on them.
        size = lambda g: sum(b - a for d in g["documents"] for _, a, b in d)
        short = [] if pools else [g for g in train if size(g) < 110 * (NEGATIVES + 1)][:3000]
        chosen = set(map(id, short))
        self.train = (short + [g for g in train if id(g) not in chosen])[rank::processes]
        self.at, self.with_teacher = 0, len(teacher_scores)
        self.rng = random.Random(seed + rank)
        pieces = json.load(open(f"{tokenizer_dir}/tokenizer.json"))["model"]["vocab"]
        self.han_words = [i for i, (p, _) in enumerate(pieces) if len(p) > 1 and all("\u4e00" <= c <= "\u9fff" for c in p)]

    def documents(self, group):
        return [np.concatenate([self.tokens[i][a:b] for i, a, b in d]) for d in group["documents"]]

    def chinese_word(self):
        """A query of one word. Each document is one word, alone or between two context words that all documents share."""
        words = self.rng.sample(self.han_words, NEGATIVES + 1)
        around = self.rng.choice([[], [], self.rng.sample(self.han_words, 2)])
        return [words[0]], [around[:1] + [w] + around[1:] for w in words]

    def batch(self):
        """Passage groups up to the token budget, then word groups: queries, documents, teacher scores (NaN if none), tokens."""
        queries, docs, teacher, tokens = [], [], [], 0
        while tokens < TOKEN_BUDGET:
            g = self.train[self.at % len(self.train)]
            self.at += 1
            queries.append(g["query"])
            docs += self.documents(g)
            teacher.append(g.get("teacher", np.full(NEGATIVES + 1, np.nan)))
            tokens += sum(map(len, docs[-NEGATIVES - 1:])) + (NEGATIVES + 1) * (len(g["query"]) + 4)
        for query, documents in self.rng.sample(self.words, WORD_GROUPS * 2 // 3) + [self.chinese_word() for _ in range(WORD_GROUPS // 3)]:
            queries.append(query)
            docs += documents
        return queries, docs, torch.tensor(np.array(teacher), dtype=torch.float32), tokens


def pair_tensors(pairs, rng, shift):
    """<s> query </s></s> document </s>, with positions from 2.

    With probability `shift` a random gap is added to the document's positions.
    """
    ids, positions = [], []
    for query, document in pairs:
        head = [0, *map(int, query), 2, 2]
        tail = [*map(int, document[:511 - len(head)]), 2]
        room = 514 - 2 - len(head) - len(tail)
        gap = rng.randint(0, room) if len(document) > 8 and room > 0 and rng.random() < shift else 0
        start = 2 + len(head) + gap
        ids.append(head + tail)
        positions.append([*range(2, 2 + len(head)), *range(start, start + len(tail))])
    longest = max(map(len, ids))
    pad = lambda rows: torch.tensor([r + [1] * (longest - len(r)) for r in rows])
    ids = pad(ids)
    return ids, (ids != 1).long(), pad(positions)


def logits(model, queries, documents, rng, shift=0.0, batch_tokens=6000):
    """Scores all pairs in batches of similar length, because padding costs as much as text."""
    per_query = len(documents) // len(queries)
    pairs = [(queries[i // per_query], d) for i, d in enumerate(documents)]
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
    parts, batch = [], []
    for i in order + [None]:
        size = 0 if i is None else len(pairs[i][0]) + len(pairs[i][1]) + 4
        if batch and (i is None or size * (len(batch) + 1) > batch_tokens or size > 2 * len(pairs[batch[0]][1]) + 40):
            ids, mask, positions = pair_tensors([pairs[j] for j in batch], rng, shift)
            with torch.autocast("cpu", torch.bfloat16):
                hidden = model.roberta(input_ids=ids, attention_mask=mask, position_ids=positions)[0]
            parts.append(model.classifier(hidden[:, :1].float())[:, 0])
            batch = []
        batch.append(i)
    out = torch.cat(parts)
    back = torch.empty(len(pairs), dtype=torch.long)
    back[torch.tensor(order)] = torch.arange(len(pairs))
    return out[back].view(len(queries), per_query)


def group_loss(scores, teacher):
    """Passage groups come first, with a row of `teacher` each. The word groups after them have a third of the weight."""
    n = len(teacher)
    gold = torch.zeros(len(scores), dtype=torch.long)
    loss = F.cross_entropy(scores, gold, label_smoothing=.02, reduction="none")
    target = torch.zeros_like(scores)
    target[:, 0] = 1
    scored = torch.zeros(len(scores), dtype=torch.bool)
    scored[:n] = ~teacher[:, 0].isnan()
    if scored.any():
        wanted = teacher[scored[:n]]
        divergence = F.kl_div(scores[scored].log_softmax(1), (wanted / 2).softmax(1), reduction="none").sum(1)
        loss = loss.masked_scatter(scored, .4 * loss[scored] + divergence)
        target[scored] = torch.sigmoid(wanted / 2)
    weight = torch.full_like(scores, 1 / NEGATIVES)
    weight[:, 0] = 1
    loss = loss + .15 * F.binary_cross_entropy_with_logits(scores, target, weight, reduction="none").mean(1)
    importance = torch.ones(len(scores))
    importance[n:] = 1 / 3
    return (loss * importance).sum() / importance.sum()


@torch.inference_mode()
def held_out_recall(model, groups):
    """Share of held-out questions whose positive passage is ranked first of eight, with BM25's share for comparison."""
    model.eval()
    rng, out = random.Random(9), {}
    for lang, held_out in groups.held_out.items():
        right = []
        for start in range(0, len(held_out), 10):
            part = held_out[start:start + 10]
            scores = logits(model, [g["query"] for g in part], [d for g in part for d in groups.documents(g)], rng)
            right += (scores[:, 0] > scores[:, 1:].max(1)[0]).tolist()
        out[lang] = f"{np.mean(right):.3f} (BM25 {np.mean([g['bm25'] for g in held_out]):.3f})"
    model.train()
    return out


def save(model, out, tokenizer_dir):
    """f16 weights with the published tensor names, config and tokenizer."""
    half = {k: v.detach().clone().half().contiguous() for k, v in model.state_dict().items() if "position_ids" not in k}
    os.makedirs(out, exist_ok=True)
    save_file(half, f"{out}/model.safetensors", metadata={"format": "pt"})
    config = {k: v for k, v in model.config.to_dict().items() if k in (
        "architectures", "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
        "hidden_act", "max_position_embeddings", "type_vocab_size", "layer_norm_eps", "pad_token_id", "bos_token_id", "eos_token_id",
        "hidden_dropout_prob", "attention_probs_dropout_prob", "position_embedding_type", "initializer_range", "classifier_dropout")}
    config.update(id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0}, dtype="float16", torch_dtype="float16")
    json.dump(config, open(f"{out}/config.json", "w"), indent=2, sort_keys=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if os.path.abspath(tokenizer_dir) != os.path.abspath(out):
            shutil.copy(f"{tokenizer_dir}/{name}", f"{out}/{name}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer_dir"), parser.add_argument("out")
    parser.add_argument("--minutes", type=float, default=60, help="length of the schedule, in wall time")
    parser.add_argument("--end", type=float, default=1, help="fraction of the schedule at which to stop, if a later phase continues")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--muon", action="store_true", help="Muon for the encoder's matrices, AdamW for the rest")
    parser.add_argument("--start", help="model folder to continue from, with a new optimizer")
    parser.add_argument("--pools", action="store_true", help="train on the groups of pools.py, mixed with some of the first phase")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--every", type=float, default=12, help="minutes between checkpoints")
    args = parser.parse_args()
    store = tempfile.mktemp(dir=WORK)
    torch.multiprocessing.spawn(train, (args, store), args.processes)


def make_optimizers(model, args):
    matrices = [p for n, p in model.named_parameters() if args.muon and "encoder" in n and p.ndim == 2]
    chosen = set(map(id, matrices))
    rest = [p for p in model.parameters() if id(p) not in chosen]
    adamw = torch.optim.AdamW([dict(params=[p for p in rest if p.ndim > 1], weight_decay=.01),
                               dict(params=[p for p in rest if p.ndim < 2], weight_decay=0)], lr=args.lr, betas=(.9, .98), fused=True)
    return [adamw] + ([torch.optim.Muon(matrices, lr=args.lr, weight_decay=.01, adjust_lr_fn="match_rms_adamw")] if matrices else [])


def train(rank, args, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=args.processes)
    groups = Groups(args.seed, args.tokenizer_dir, rank, args.processes, args.pools)
    model = XLMRobertaForSequenceClassification(initialise.config())
    model.load_state_dict(load_file(f"{args.start}/model.safetensors") if args.start else torch.load(f"{WORK}/initial.pt"))
    model.set_attn_implementation("sdpa")
    model.train()
    parameters = list(model.parameters())
    optimizers = make_optimizers(model, args)
    if rank == 0:
        print(f"{sum(p.numel() for p in parameters)} parameters, {args.processes} x {len(groups.train)} groups, {groups.with_teacher} with teacher scores", flush=True)
    began = saved = time.time()
    window, groups_seen, tokens_seen, step = [], 0, 0, 0
    while True:
        clock = torch.tensor([(time.time() - began) / 60 / args.minutes, time.time() - saved])
        dist.broadcast(clock, 0)
        progress = clock[0].item()
        if progress >= args.end:
            break
        rate = args.lr * min((step + 1) / 50, .01 + .99 * .5 * (1 + math.cos(math.pi * progress)))
        for optimizer in optimizers:
            for part in optimizer.param_groups:
                part["lr"] = rate
        queries, documents, teacher, tokens = groups.batch()
        scores = logits(model, queries, documents, groups.rng, shift=.15)
        loss = group_loss(scores, teacher)
        model.zero_grad(set_to_none=True)
        loss.backward()
        passage_scores = scores[:len(teacher)]
        hit = (passage_scores[:, 0] > passage_scores[:, 1:].max(1)[0]).float().mean()
        numbers = torch.tensor([loss.item(), hit.item(), len(teacher), tokens])
        flat = torch.cat([p.grad.flatten() for p in parameters] + [numbers])
        dist.all_reduce(flat)
        flat /= args.processes
        for p, grad in zip(parameters, flat.split([p.numel() for p in parameters] + [4])):
            p.grad = grad.view_as(p)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        window.append(flat[-4:-2].tolist())
        groups_seen, tokens_seen = groups_seen + flat[-2].item() * args.processes, tokens_seen + flat[-1].item() * args.processes
        if rank == 0 and step % 20 == 0:
            loss, hit = np.mean(window[-50:], axis=0)
            print(f"step {step} at {progress:.3f} lr {rate:.1e} loss {loss:.3f} recall@1 {hit:.3f} groups {groups_seen:.0f} "
                  f"tokens {tokens_seen / 1e6:.2f}M {tokens_seen / (time.time() - began):.0f}/s {time.time() - began:.0f} s", flush=True)
        if clock[1] > 60 * args.every:
            saved = time.time()
            if rank == 0:
                checkpoint(model, groups, args, step)
    if rank == 0:
        checkpoint(model, groups, args, step)
    dist.destroy_process_group()


def checkpoint(model, groups, args, step):
    print(f"step {step} held-out recall@1", held_out_recall(model, groups), flush=True)
    save(model, args.out, args.tokenizer_dir)


if __name__ == "__main__":
    main()
