"""Second phase: trains the fitted student end to end, on pairs that the teacher scores and on groups with a right answer.

    rank.py TEACHER OUT --start FIT.safetensors --steps N

A step has passages (a query, its passage and harder ones: the teacher's states, scores and the gold passage are the targets) and groups of short
texts (everyday.py: the first text is right). Two processes train copies of the model and average them every few steps,
which needs little communication on a busy machine. The schedule counts steps. OUT/state.pt has all that is needed to resume.
"""
import argparse, json, os, pickle, random, tempfile, time
import numpy as np, torch, torch.distributed as dist, torch.nn.functional as F
from safetensors.torch import load_file
from common import additive, chunks, teacher_model, tensors
from model import Bert

WORK = os.environ.get("MINI_WORK", "./work")
HERE = os.path.dirname(os.path.abspath(__file__))
MIX = {"written-en": 5, "written-zh": 5, "definition": 2.5, "word": 1.5, "synonym": 1.5, "synonym-zh": 2, "gloss": 1, "same": .7}


class Data:
    def __init__(self, seed):
        data = pickle.load(open(f"{WORK}/groups.pkl", "rb"))
        self.tokens, same = data["tokens"], data["words"]
        train = [g for g in data["groups"] if not g["held_out"]]
        self.passages = {lang: [g for g in train if g["lang"] == lang] for lang in ("en", "zh")}
        self.held_out = {lang: [g for g in data["groups"] if g["held_out"] and g["lang"] == lang and g["kind"] == "question"][:25] for lang in ("en", "zh")}
        self.short = {}
        for kind, q, docs in pickle.load(open(f"{WORK}/everyday.pkl", "rb")):
            self.short.setdefault(kind, []).append((q, docs))
        self.short["same"] = [(q, docs[:6]) for q, docs in same]
        self.rng = random.Random(seed)
        self.order = {k: [] for k in self.short}

    def passage_group(self, longest=170, documents=4):
        r = self.rng
        g = r.choice(self.passages["zh" if r.random() < .35 else "en"])
        longest = r.choice([longest, longest, longest, longest // 2, longest // 4, 2 * longest])
        docs = []
        for k in [0] + r.sample(range(1, len(g["documents"])), documents - 1):
            d = np.concatenate([self.tokens[i][a:b] for i, a, b in g["documents"][k]])
            docs.append(d[:longest] if k or len(d) <= longest else self.window(g["query"], d, longest))
        return g["query"], docs, g["lang"]

    @staticmethod
    def window(query, d, longest):
        """The window of the gold passage with the most tokens of the query."""
        hit = np.isin(d, query).astype(int)
        sums = np.convolve(hit, np.ones(longest, int), "valid")
        at = int(sums.argmax())
        return d[at:at + longest]

    def short_group(self):
        kind = self.rng.choices(list(MIX), MIX.values())[0]
        if not self.order[kind]:
            self.order[kind] = self.rng.sample(self.short[kind], len(self.short[kind]))
        return (kind, *self.order[kind].pop())


@torch.no_grad()
def teacher_pass(teacher, batch):
    ids, types, positions, mask = batch
    x, states, bias = teacher.embed(ids, types, positions), [], additive(mask)
    for i, layer in enumerate(teacher.layers):
        x = layer(x, bias)
        if i % 2:
            states.append(x)
    return states, teacher.head(x[:, 0])


def student_pass(student, batch):
    ids, types, positions, mask = batch
    x, states, bias = student.embed(ids, types, positions), [], additive(mask)
    for layer in student.layers:
        x = layer(x, bias)
        states.append(x)
    return states, student.head(x[:, 0])


def score(student, flat, teacher=None, budget=3000):
    """Logits of (query, document) pairs. With a teacher also its logits, and the relative error of the student's states."""
    order = sorted(range(len(flat)), key=lambda i: len(flat[i][0]) + len(flat[i][1]))
    total, logits, wanted, hidden = sum(len(q) + len(d) for q, d in flat), [], [], torch.zeros(())
    for part in chunks([flat[i] for i in order], budget):
        batch = tensors(part)
        with torch.autocast("cpu", torch.bfloat16):
            own, mine = student_pass(student, batch)
            states, scores = teacher_pass(teacher, batch) if teacher else ([], mine)
        mask, share = batch[3], sum(len(q) + len(d) for q, d in part) / total
        for s, t in zip(own, states):
            t = t[mask].float()
            hidden = hidden + share / len(own) * (s[mask].float() - t).square().mean() / t.var(0).mean()
        logits.append(mine.float()), wanted.append(scores.float())
    back = torch.empty(len(flat), dtype=torch.long)
    back[torch.tensor(order)] = torch.arange(len(flat))
    return torch.cat(logits)[back], torch.cat(wanted)[back], hidden


def passages_loss(student, teacher, groups, weight_hidden):
    """English: divergence from the teacher's ranking and error of its logits. Both languages: cross-entropy of the gold passage."""
    n = len(groups[0][1])
    logits, wanted, hidden = score(student, [(q, d) for q, docs, _ in groups for d in docs], teacher)
    logits, wanted = logits.view(-1, n), wanted.view(-1, n)
    english = torch.tensor([lang == "en" for *_, lang in groups])
    gold = F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long), reduction="none")
    kl = F.kl_div(logits.log_softmax(1), (wanted / 1.5).softmax(1), reduction="none").sum(1)
    square = (logits - wanted).square().mean(1) / 20
    loss = torch.where(english, .5 * kl + .3 * gold + .3 * square, gold).mean()
    right = (logits[:, 0] > logits[:, 1:].max(1)[0]).float()
    return loss + weight_hidden * hidden, hidden.item(), right.mean().item()


def short_loss(student, teacher, groups, weight_hidden):
    """Cross-entropy of the right text, and a small binary term that calibrates the sigmoid."""
    losses, right = [], {}
    logits, _, hidden = score(student, [(q, d) for _, q, docs in groups for d in docs], teacher)
    for (kind, _, _), s in zip(groups, logits.split([len(g[2]) for g in groups])):
        wanted = torch.zeros(len(s))
        wanted[0] = 1
        loss = F.cross_entropy(s[None], torch.zeros(1, dtype=torch.long), label_smoothing=.03)
        losses.append(loss + .1 * F.binary_cross_entropy_with_logits(s / 2, wanted))
        right.setdefault(kind, []).append(float(s.argmax() == 0))
    return torch.stack(losses).mean() + weight_hidden * hidden, {k: np.mean(v) for k, v in right.items()}


def short_scores(student, groups):
    """Logits of each group's documents."""
    return score(student, [(q, d) for q, docs in groups for d in docs])[0].split([len(docs) for _, docs in groups])


@torch.inference_mode()
def evaluate(student, tokenizer, data):
    """recall@1 on the development questions and on held-out passages."""
    out, encode = {}, lambda texts: [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)]
    for name in ("dev.en", "dev.zh"):
        topics = [json.loads(line) for line in open(f"{HERE}/../eval/{name}.jsonl")]
        groups = [(encode([t["query"]])[0], encode(t["positive"] + t["negative"])) for t in topics]
        out[name] = round(np.mean([float(s[0] > s[1:].max()) for s in short_scores(student, groups)]), 3)
    for lang, part in data.held_out.items():
        groups = [(g["query"], [np.concatenate([data.tokens[i][a:b] for i, a, b in d])[:200] for d in g["documents"][:5]]) for g in part]
        out["held-out " + lang] = round(np.mean([float(s[0] > s[1:].max()) for s in short_scores(student, groups)]), 3)
    return out


def train(rank, args, store):
    torch.set_num_threads(1)
    if args.processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=args.processes)
    from tokenizers import Tokenizer
    tokenizer = Tokenizer.from_file(args.tokenizer)
    teacher = teacher_model(args.teacher)
    student = Bert(len(teacher.bert["embeddings"].word_embeddings.weight))
    table = student.bert["embeddings"].word_embeddings.weight
    student.bert["embeddings"].word_embeddings.sparse = True        # an update touches only the rows of its tokens
    rest = [p for p in student.parameters() if p is not table]
    optimizers = [torch.optim.AdamW(rest, lr=args.lr, betas=(.9, .98), weight_decay=0, fused=True),
                  torch.optim.SparseAdam([table], lr=args.lr, betas=(.9, .98))]
    start = 0
    if os.path.exists(f"{args.out}/state.pt"):
        state = torch.load(f"{args.out}/state.pt", weights_only=False)
        student.load_state_dict(state["model"]), [o.load_state_dict(v) for o, v in zip(optimizers, state["optimizers"])]
        start = state["step"]
    else:
        student.load_state_dict(load_file(args.start))
    data = Data(1000 * start + rank)
    parameters = list(student.parameters())
    began, cpu, window, seen = time.time(), time.process_time(), [], 0
    if rank == 0 and not start:
        print("start", evaluate(student, tokenizer, data), flush=True)
    for step in range(start, args.steps):
        rate = args.lr * min((step + 1) / 10, 1, (args.steps - step) / args.decay)
        for o, factor in zip(optimizers, (1, args.table)):
            for g in o.param_groups:
                g["lr"] = rate * factor
        passages, tokens = [], 0
        while tokens < args.budget * args.passages:
            passages.append(data.passage_group())
            tokens += sum(len(passages[-1][0]) + len(d) + 3 for d in passages[-1][1])
        groups = []
        while tokens < args.budget:
            groups.append(data.short_group())
            tokens += sum(len(groups[-1][1]) + len(d) + 3 for d in groups[-1][2])
        student.zero_grad(set_to_none=True)
        loss, hidden, right = passages_loss(student, teacher, passages, args.hidden)
        loss.backward()
        recall = {}
        if groups:
            short, recall = short_loss(student, teacher if step % args.teach == 0 else None, groups, args.hidden)
            short.backward()
            recall["loss"] = short.item()
        torch.nn.utils.clip_grad_norm_(rest, 2.0)
        for o in optimizers:
            o.step()
        seen += tokens
        window.append(dict(loss=loss.item(), hidden=hidden, passages=right, **{"short " + k: v for k, v in recall.items()}))
        last = step + 1 == args.steps
        if args.processes > 1 and ((step + 1) % args.average == 0 or last):
            flat = torch.cat([p.data.flatten() for p in parameters])
            dist.all_reduce(flat)
            flat /= args.processes
            for p, v in zip(parameters, flat.split([p.numel() for p in parameters])):
                p.data.copy_(v.view_as(p))
        if rank == 0 and (step + 1) % 10 == 0:
            names = sorted({k for w in window[-20:] for k in w})
            shown = " ".join(f"{k} {np.mean([w[k] for w in window[-20:] if k in w]):.3f}" for k in names)
            print(f"step {step + 1} lr {rate:.1e} {shown} | {seen * args.processes / 1e6:.2f}M tokens, cpu {time.process_time() - cpu:.0f} s, {time.time() - began:.0f} s", flush=True)
        if rank == 0 and ((step + 1) % args.every == 0 or last):
            print(f"step {step + 1}", evaluate(student, tokenizer, data), flush=True)
            os.makedirs(args.out, exist_ok=True)
            torch.save(dict(model=student.state_dict(), optimizers=[o.state_dict() for o in optimizers], step=step + 1), f"{args.out}/state.tmp")
            os.replace(f"{args.out}/state.tmp", f"{args.out}/state.pt")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher"), parser.add_argument("out")
    parser.add_argument("--start", help="fitted weights")
    parser.add_argument("--tokenizer", default=f"{WORK}/tokenizer.json")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--budget", type=int, default=2500, help="tokens per process and step")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--table", type=float, default=2, help="learning rate of the token table, relative")
    parser.add_argument("--hidden", type=float, default=2, help="weight of the states' error")
    parser.add_argument("--teach", type=int, default=4, help="short texts have the states' error in one step of so many")
    parser.add_argument("--decay", type=int, default=100, help="steps of falling learning rate at the end")
    parser.add_argument("--passages", type=float, default=.45, help="share of passages in the tokens")
    parser.add_argument("--average", type=int, default=8)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    os.makedirs(args.out, exist_ok=True)
    store = tempfile.mktemp(dir=WORK)
    torch.multiprocessing.spawn(train, (args, store), args.processes) if args.processes > 1 else train(0, args, store)


if __name__ == "__main__":
    main()
