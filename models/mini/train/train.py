"""Trains rerankd-mini from the structured start: groups of one positive and five negatives, short passages first.

Loss over a group's logits: cross-entropy of the softmax (gold first), a small binary term that puts the sigmoid in a
sensible place, and, where the teacher has scored the group, the divergence from the teacher's softmax.
A passage is a random cut around the key sentence, and every document of a group is cut to the same length, so that
length tells nothing. Document positions are often moved up by a random gap: short cuts then train all positions.

Two processes of one thread each average their gradients once a step. On a machine that others use too, that loses less
than two threads that wait for each other in every matrix product.
"""
import argparse, json, math, os, pickle, random, shutil, tempfile, time
import numpy as np, torch, torch.distributed as dist, torch.nn.functional as F
from transformers import XLMRobertaForSequenceClassification
import evaluate, initialise

WORK = os.environ.get("MINI_WORK", "./work")
NEGATIVES, TOKEN_BUDGET, HELD_OUT = 5, 4000, 240     # the budget is that of one process and step


class Groups:
    def __init__(self, seed, tokenizer_dir, rank=0, processes=1, word_share=.06):
        self.word_share = word_share
        data = pickle.load(open(f"{WORK}/groups.pkl", "rb"))
        self.tokens, self.words, self.by_lang = data["tokens"], data["words"], data["by_lang"]
        self.tokens = [t.astype(np.int32) for t in self.tokens]
        self.held_out, self.train = data["groups"][:HELD_OUT], data["groups"][HELD_OUT:][rank::processes]
        path = f"{WORK}/teacher.pkl"
        pieces = json.load(open(f"{tokenizer_dir}/tokenizer.json"))["model"]["vocab"]
        self.han_words = [i for i, (p, _) in enumerate(pieces) if len(p) > 1 and all("\u4e00" <= c <= "\u9fff" for c in p)]
        self.taught = pickle.load(open(path, "rb")) if os.path.exists(path) else []
        self.rng, self.at = random.Random(seed + rank), 0

    def cut(self, passage, length, rng, key=None):
        ids = self.tokens[passage]
        if len(ids) <= length:
            return ids
        low, high = 0, len(ids) - length
        if key:      # the cut holds as much of the key sentence as fits
            low, high = max(0, min(key[1] - length, key[0], high)), min(high, max(key[0], key[1] - length))
        start = rng.randint(min(low, high), max(low, high))
        return ids[start:start + length]

    def documents(self, group, length, rng):
        positive = self.cut(group["positive"], length, rng, group["key"])
        negatives = []
        a, b = group["key"]
        whole = self.tokens[group["positive"]]
        if group["kind"] in ("question", "sentence") and len(whole) - (b - a) > 24 and rng.random() < .2:
            rest = np.concatenate([whole[:a], whole[b:]])      # the same passage without the sentence that answers
            start = rng.randint(0, max(0, len(rest) - length))
            negatives.append(rest[start:start + length])
        hard = group["hard"]
        others = rng.sample(hard[:4], min(1, len(hard[:4]))) + rng.sample(hard[4:], min(1, len(hard[4:])))
        others += rng.sample(group["near"], min(1, len(group["near"])))
        pool = self.by_lang[group["lang"]]
        while len(others) + len(negatives) < NEGATIVES:
            other = int(pool[rng.randrange(len(pool))])
            if len(self.tokens[other]) > min(12, length // 3):
                others.append(other)
        return [positive] + (negatives + [self.cut(i, length, rng) for i in others])[:NEGATIVES]

    def next_groups(self, n):
        out = []
        for _ in range(n):
            if self.at % len(self.train) == 0:
                self.rng.shuffle(self.train)
            out.append(self.train[self.at % len(self.train)])
            self.at += 1
        return out

    def chinese_word(self):
        """A word against other words, alone or within two neighbours."""
        words = self.rng.sample(self.han_words, NEGATIVES + 1)
        around = self.rng.choice([[], [], self.rng.sample(self.han_words, 2)])
        return [words[0]], [around[:1] + [w] + around[1:] for w in words]

    def batch(self, progress):
        """Returns queries, documents (six a query) and teacher scores (or None)."""
        rng, dice = self.rng, self.rng.random()
        if dice < self.word_share:
            picked = rng.sample(self.words, 40) + [self.chinese_word() for _ in range(20)]
            return [q for q, _ in picked], [d for _, docs in picked for d in docs], None
        if self.taught and dice < self.word_share + .22:
            length = rng.choice([32, 64, 100])
            n = TOKEN_BUDGET // (6 * (min(length, 90) + 14))
            picked = rng.sample(self.taught, n)
            return [t["query"] for t in picked], [d for t in picked for d in t["documents"]], torch.tensor(
                np.array([t["scores"] for t in picked]), dtype=torch.float32)
        lengths = ([24, 32, 48, 64, 64, 96] if progress < .45 else [32, 64, 96, 128, 192] if progress < .75 else [48, 96, 160, 240, 330])
        length = rng.choice(lengths)
        n = max(3, TOKEN_BUDGET // (6 * (int(length * .85) + 14)))
        picked = self.next_groups(n)
        return [g["query"] for g in picked], [d for g in picked for d in self.documents(g, length, rng)], None


def pair_tensors(pairs, rng, shift):
    """<s> query </s></s> document </s>, and positions from 2 on, the document's moved up where `shift`."""
    ids, positions = [], []
    for query, document in pairs:
        head = [0, *map(int, query), 2, 2]
        tail = [*map(int, document[:511 - len(head)]), 2]
        room = 514 - 2 - len(head) - len(tail)
        gap = rng.randint(0, room) if shift and room > 0 and rng.random() < shift else 0
        start = 2 + len(head) + gap
        ids.append(head + tail)
        positions.append([*range(2, 2 + len(head)), *range(start, start + len(tail))])
    longest = max(map(len, ids))
    pad = lambda rows: torch.tensor([r + [1] * (longest - len(r)) for r in rows])
    ids = pad(ids)
    return ids, (ids != 1).long(), pad(positions)


def logits(model, queries, documents, rng, shift=0.0, chunk_tokens=4000):
    """Scores all pairs, longest first in chunks of like length, since padding is paid for like text."""
    per_query = len(documents) // len(queries)
    pairs = [(queries[i // per_query], d) for i, d in enumerate(documents)]
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
    parts, chunk = [], []
    for i in order + [None]:
        size = 0 if i is None else len(pairs[i][0]) + len(pairs[i][1]) + 4
        if chunk and (i is None or size * (len(chunk) + 1) > chunk_tokens):
            ids, mask, positions = pair_tensors([pairs[j] for j in chunk], rng, shift)
            parts.append(model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, 0])
            chunk = []
        chunk.append(i)
    out = torch.cat(parts)
    back = torch.empty(len(pairs), dtype=torch.long)
    back[torch.tensor(order)] = torch.arange(len(pairs))
    return out[back].view(len(queries), per_query)


def group_loss(scores, teacher):
    gold = torch.zeros(len(scores), dtype=torch.long)
    target = torch.zeros_like(scores)
    if teacher is None:
        loss = F.cross_entropy(scores, gold, label_smoothing=.02)
        target[:, 0] = 1
    else:
        loss = .5 * F.cross_entropy(scores, gold) + F.kl_div(scores.log_softmax(1), (teacher / 2).softmax(1), reduction="batchmean")
        target = torch.sigmoid(teacher / 2)
    weight = torch.full_like(scores, 1 / NEGATIVES)
    weight[:, 0] = 1
    return loss + .15 * F.binary_cross_entropy_with_logits(scores, target, weight)


@torch.inference_mode()
def held_out_recall(model, groups):
    model.eval()
    rng, right = random.Random(9), {"en": [], "zh": []}
    for g in groups.held_out:
        scores = logits(model, [g["query"]], groups.documents(g, 150, rng), rng)[0]
        right[g["lang"]].append(bool(scores[0] > scores[1:].max()))
    model.train()
    return {k: round(sum(v) / len(v), 3) for k, v in right.items()}


def save(model, out, tokenizer_dir):
    """f16 weights with the published tensor names, config and tokenizer."""
    half = {k: v.detach().clone().half().contiguous() for k, v in model.state_dict().items() if "position_ids" not in k}
    os.makedirs(out, exist_ok=True)
    from safetensors.torch import save_file
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
    parser.add_argument("--minutes", type=float, default=60, help="the schedule follows the clock, whatever else the machine does")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--start", help="state dict to go on from, with a fresh optimizer")
    parser.add_argument("--begin", type=float, default=0, help="where in the schedule to begin, 0 to 1")
    parser.add_argument("--end", type=float, default=1, help="and where to end")
    parser.add_argument("--word-share", type=float, default=.06, help="steps that train one-word queries on one-word documents")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--plain", action="store_true", help="start from transformers' own random weights, for comparison")
    parser.add_argument("--xquad", help="folder, for a line of evaluation at each checkpoint")
    parser.add_argument("--every", type=float, default=12, help="minutes between checkpoints")
    args = parser.parse_args()
    store = tempfile.mktemp(dir=WORK)
    torch.multiprocessing.spawn(train, (args, store), args.processes)


def train(rank, args, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=args.processes)
    groups = Groups(args.seed, args.tokenizer_dir, rank, args.processes, args.word_share)
    if args.plain:
        model = initialise.initial_model(None, None, structured=False)
    else:
        model = XLMRobertaForSequenceClassification(initialise.config())
        model.load_state_dict(torch.load(args.start or f"{WORK}/initial.pt"))
    model.set_attn_implementation("sdpa")
    model.train()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW([dict(params=[p for p in parameters if p.ndim > 1], weight_decay=.01),
                                   dict(params=[p for p in parameters if p.ndim < 2], weight_decay=0)], lr=args.lr, betas=(.9, .98), fused=True)
    if rank == 0:
        print(f"{sum(p.numel() for p in parameters)} parameters, {args.processes} x {len(groups.train)} groups, {len(groups.taught)} with teacher scores", flush=True)
    began = saved = time.time()
    window, groups_seen, tokens_seen, step = [], 0, 0, 0
    while True:
        clock = torch.tensor([(time.time() - began) / 60 / args.minutes, time.time() - saved])
        dist.broadcast(clock, 0)
        if clock[0] >= 1:
            break
        progress = args.begin + (args.end - args.begin) * clock[0].item()
        rate = args.lr * min((step + 1) / 30, .02 + .98 * .5 * (1 + math.cos(math.pi * progress)))
        for part in optimizer.param_groups:
            part["lr"] = rate
        queries, documents, teacher = groups.batch(progress)
        scores = logits(model, queries, documents, groups.rng, shift=0 if len(documents[0]) < 4 else .5 if progress < .75 else .2)
        loss = group_loss(scores, teacher)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        hit = (scores[:, 0] > scores[:, 1:].max(1)[0]).float().mean()
        tokens = sum(map(len, documents)) + 6 * sum(map(len, queries)) + 4 * len(documents)
        numbers = torch.tensor([loss.item(), hit.item(), len(queries), tokens])
        flat = torch.cat([p.grad.flatten() for p in parameters] + [numbers])
        dist.all_reduce(flat)
        flat /= args.processes
        for p, grad in zip(parameters, flat.split([p.numel() for p in parameters] + [4])):
            p.grad = grad.view_as(p)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        window.append(flat[-4:-2].tolist())
        groups_seen, tokens_seen = groups_seen + flat[-2].item() * args.processes, tokens_seen + flat[-1].item() * args.processes
        if rank == 0 and step % 20 == 0:
            loss, hit = np.mean(window[-20:], axis=0)
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
    torch.save(model.state_dict(), f"{WORK}/last.pt")
    if args.xquad:      # watched, not trained on
        scorer = evaluate.Scorer(args.out)
        for lang in ("en", "zh"):
            evaluate.xquad(scorer, args.xquad, lang, 50, hard=lang == "en")


if __name__ == "__main__":
    main()
