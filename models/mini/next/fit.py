"""First phase: fits the student to the teacher's activations, layer after layer.

    fit.py TEACHER OUT [--tokens 60000]

The input of both models is a query and a window of a passage. The teacher reads Chinese through the embeddings of each Chinese
token's English gloss. Student layer i stands for the teacher's layers 2i and 2i + 1. Its input is the student's own state. Each of
its matrices is the least-squares map (ridge regression) from what the student has at that point to the activations of the
teacher's layer 2i + 1: queries, keys, values, state after attention, feed-forward network, output.
The embedding tables start at random and are fitted by gradient descent to those of the teacher.
"""
import argparse, os, time
import torch, torch.nn.functional as F
from safetensors.torch import save_file
from common import Pairs, additive, chunks, teacher_model, tensors
from model import Bert

LAMBDA = 1e-3       # ridge, relative to the mean variance of the inputs


class Ridge:
    """Least squares y = W x + b over rows that are added in parts."""
    def __init__(self):
        self.xx = self.xy = None

    def add(self, x, y):
        x = torch.cat([x.float(), torch.ones(len(x), 1)], 1)
        xx, xy = x.T @ x, x.T @ y.float()
        self.xx, self.xy = (xx, xy) if self.xx is None else (self.xx + xx, self.xy + xy)

    def solve(self, linear):
        n = len(self.xx) - 1
        penalty = torch.eye(n + 1) * (self.xx.diagonal()[:n].mean() * LAMBDA)
        penalty[n, n] = 0
        solution = torch.linalg.solve(self.xx.double() + penalty.double(), self.xy.double()).float()
        linear.weight.data.copy_(solution[:n].T), linear.bias.data.copy_(solution[n])


class Scale:
    """Least squares of a layer norm's weight and bias, for each dimension alone."""
    def __init__(self):
        self.sums = 0

    def add(self, x, y):
        x, y = F.layer_norm(x.float(), x.shape[-1:]), y.float()
        self.sums = self.sums + torch.stack([torch.full_like(x[0], len(x)), x.sum(0), y.sum(0), (x * x).sum(0), (x * y).sum(0)])

    def solve(self, norm):
        n, x, y, xx, xy = self.sums
        weight = (xy / n - x * y / n ** 2) / (xx / n - (x / n) ** 2 + 1e-4)
        norm.weight.data.copy_(weight), norm.bias.data.copy_((y - weight * x) / n)


def heads(x, n):
    return x.view(*x.shape[:2], n, -1).transpose(1, 2)


def attend(q, k, v, bias, n):
    q, k, v = (heads(x, n) for x in (q, k, v))
    scores = torch.matmul(q * q.shape[-1] ** -.5, k.transpose(2, 3)) + bias.to(q.dtype)
    return torch.matmul(scores.softmax(-1), v).transpose(1, 2).flatten(2)


def fit_embeddings(student, teacher, steps=300):
    """Gradient descent of each table to the teacher's, from random values."""
    own, target = student.bert["embeddings"], teacher.bert["embeddings"]
    for (name, p), (_, t) in zip(own.named_parameters(), target.named_parameters()):
        optimizer = torch.optim.Adam([p], lr=.02, betas=(.5, .9), fused=True)
        for step in range(steps if len(p) < 1000 else steps // 3):
            optimizer.param_groups[0]["lr"] = .02 * (1 - step / (steps if len(p) < 1000 else steps // 3))
            p.grad = p.detach() - t
            optimizer.step()
        print(name, f"relative error {((p - t).square().sum() / t.square().sum()).item():.5f}", flush=True)
        p.grad = None


@torch.no_grad()
def fit_layer(layer, first, second, batches, own, reference):
    """Fits `layer` to the teacher's layers `first` and `second`. Replaces `own` and `reference`, the states before and after."""
    n = layer.heads
    linear = layer.attention["self"]
    inside = []
    fits = {name: Ridge() for name in linear}
    for k, (*_, mask) in enumerate(batches):
        bias, x = additive(mask), reference[k]
        x = first(x, bias)
        theirs = second.attention["self"]
        signals = {name: theirs[name](x) for name in linear}
        mixed = attend(*(signals[name] for name in ("query", "key", "value")), bias, n)
        out = second.attention["output"]
        sum1 = out["dense"](mixed) + x
        middle = out["LayerNorm"](sum1)
        before = second.intermediate["dense"](middle)
        sum2 = second.output["dense"](F.gelu(before)) + middle
        reference[k] = second.output["LayerNorm"](sum2)
        inside.append((sum1[mask], middle[mask], before[mask], sum2[mask], reference[k][mask]))
        for name in linear:
            fits[name].add(own[k][mask], signals[name][mask])
    for name in linear:
        fits[name].solve(linear[name])
    out, fit = layer.attention["output"], Ridge()
    mixed = [attend(*(linear[name](own[k]) for name in ("query", "key", "value")), additive(b[3]), n) for k, b in enumerate(batches)]
    for k, (*_, mask) in enumerate(batches):
        fit.add(mixed[k][mask], inside[k][0] - own[k][mask])
    fit.solve(out["dense"])
    fit, sums = Scale(), [out["dense"](m) + x for m, x in zip(mixed, own)]
    for k, (*_, mask) in enumerate(batches):
        fit.add(sums[k][mask], inside[k][1])
    fit.solve(out["LayerNorm"])
    middle, fit = [out["LayerNorm"](s) for s in sums], Ridge()
    for k, (*_, mask) in enumerate(batches):
        fit.add(middle[k][mask], inside[k][2])
    fit.solve(layer.intermediate["dense"])
    fit, hidden = Ridge(), [F.gelu(layer.intermediate["dense"](m)) for m in middle]
    for k, (*_, mask) in enumerate(batches):
        fit.add(hidden[k][mask], inside[k][3] - middle[k][mask])
    fit.solve(layer.output["dense"])
    fit = Scale()
    for k, (*_, mask) in enumerate(batches):
        fit.add((layer.output["dense"](hidden[k]) + middle[k])[mask], inside[k][4])
    fit.solve(layer.output["LayerNorm"])
    errors = []
    for k, (*_, mask) in enumerate(batches):
        own[k] = layer(own[k], additive(mask))
        errors.append((own[k] - reference[k])[mask].square().mean() / reference[k][mask].var(0).mean())
    return torch.stack(errors).mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher"), parser.add_argument("out")
    parser.add_argument("--tokens", type=int, default=60000)
    args = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(11)
    teacher = teacher_model(args.teacher)
    student = Bert(len(teacher.bert["embeddings"].word_embeddings.weight))
    fit_embeddings(student, teacher)
    pairs, batches, seen = Pairs(3), [], 0
    while seen < args.tokens:
        for part in chunks(pairs.batch(4096), 4096):
            batches.append(tensors(part))
            seen += batches[-1][3].sum().item()
    print(f"{seen} tokens in {sum(len(b[0]) for b in batches)} pairs", flush=True)
    with torch.no_grad():
        reference = [teacher.embed(*b[:3]) for b in batches]
        own = [student.embed(*b[:3]) for b in batches]
        for i, layer in enumerate(student.layers):
            began = time.process_time()
            error = fit_layer(layer, teacher.layers[2 * i], teacher.layers[2 * i + 1], batches, own, reference)
            print(f"layer {i}: relative error {error:.3f}, {time.process_time() - began:.0f} s of CPU time", flush=True)
        mine, theirs = torch.cat([x[:, 0] for x in own]), torch.cat([x[:, 0] for x in reference])
        fit, pooler = Ridge(), student.bert["pooler"]["dense"]
        fit.add(mine, teacher.bert["pooler"]["dense"](theirs))
        fit.solve(pooler)
        logits, fit = teacher.head(theirs), Ridge()
        fit.add(torch.tanh(pooler(mine)), logits[:, None])
        fit.solve(student.classifier)
        ours = student.head(mine)
        print(f"logits: relative error {((ours - logits).square().mean() / logits.var()).item():.3f}, correlation {torch.corrcoef(torch.stack([ours, logits]))[0, 1].item():.3f}", flush=True)
    os.makedirs(args.out, exist_ok=True)
    save_file({k: v.contiguous() for k, v in student.state_dict().items()}, f"{args.out}/fit.safetensors")


if __name__ == "__main__":
    main()
