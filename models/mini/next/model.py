"""The student: BERT for sequence classification with transformers' tensor names, and small enough to read."""
import torch, torch.nn as nn, torch.nn.functional as F


class Embeddings(nn.Module):
    def __init__(self, vocabulary, width, positions):
        super().__init__()
        self.word_embeddings = nn.Embedding(vocabulary, width)
        self.position_embeddings = nn.Embedding(positions, width)
        self.token_type_embeddings = nn.Embedding(2, width)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, ids, types, positions):
        return self.LayerNorm(self.word_embeddings(ids) + self.position_embeddings(positions) + self.token_type_embeddings(types))


def dense(inputs, outputs):
    return nn.ModuleDict({"dense": nn.Linear(inputs, outputs)})


class Layer(nn.Module):
    def __init__(self, width, heads, inner):
        super().__init__()
        self.heads = heads
        self.attention = nn.ModuleDict({
            "self": nn.ModuleDict({n: nn.Linear(width, width) for n in ("query", "key", "value")}),
            "output": nn.ModuleDict({"dense": nn.Linear(width, width), "LayerNorm": nn.LayerNorm(width, eps=1e-12)})})
        self.intermediate = dense(width, inner)
        self.output = nn.ModuleDict({"dense": nn.Linear(inner, width), "LayerNorm": nn.LayerNorm(width, eps=1e-12)})

    def forward(self, x, mask):
        """x: [S, T, C]; mask: [S, 1, 1, T], 0 for tokens and a large negative number for padding."""
        s, t, c = x.shape
        own = self.attention["self"]
        q, k, v = (own[n](x).view(s, t, self.heads, c // self.heads).transpose(1, 2) for n in ("query", "key", "value"))
        # Plain products: on a CPU, the backward pass of torch's fused attention is ten times slower.
        scores = torch.matmul(q * (c // self.heads) ** -.5, k.transpose(2, 3)) + mask
        mixed = torch.matmul(scores.softmax(-1), v).transpose(1, 2).reshape(s, t, c)
        out = self.attention["output"]
        x = out["LayerNorm"](out["dense"](mixed) + x)
        return self.output["LayerNorm"](self.output["dense"](F.gelu(self.intermediate["dense"](x))) + x)


class Bert(nn.Module):
    def __init__(self, vocabulary, width=384, layers=6, heads=12, inner=1536, positions=512):
        super().__init__()
        self.bert = nn.ModuleDict({
            "embeddings": Embeddings(vocabulary, width, positions),
            "encoder": nn.ModuleDict({"layer": nn.ModuleList([Layer(width, heads, inner) for _ in range(layers)])}),
            "pooler": dense(width, width)})
        self.classifier = nn.Linear(width, 1)
        for name, p in self.named_parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=.02)
            elif "LayerNorm" not in name:
                nn.init.zeros_(p)

    @property
    def layers(self):
        return self.bert["encoder"]["layer"]

    def embed(self, ids, types, positions):
        return self.bert["embeddings"](ids, types, positions)

    def head(self, first):
        """Logits [S] of the first tokens' rows [S, C]."""
        return self.classifier(torch.tanh(self.bert["pooler"]["dense"](first)))[:, 0]
