"""Writes one checkpoint of random weights, and converts it to the graphs of ONNX Runtime and OpenVINO.

    python prepare.py FOLDER SHAPE ENGINE...

FOLDER becomes a Hugging Face checkpoint (config.json, tokenizer.json, model.safetensors in f32) with workloads.json,
reference.json (transformers' logits of workload b in f32) and graphs/. Existing files are kept, except workloads.json.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any, Iterator

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

import workloads
from workloads import END, MASK, PADDING, START, UNKNOWN, Shape

# Calibration uses random ids, not the measured pairs. For random weights that is enough.
CALIBRATION_PAIRS = 16
CALIBRATION_TOKENS = 128


def main() -> None:
    folder, shape_name, engines = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    shape = workloads.SHAPES[shape_name]
    torch.set_num_threads(2)
    folder.mkdir(parents=True, exist_ok=True)
    workloads.write(shape, folder / "workloads.json")
    if not (folder / "reference.json").exists():
        step(f"{shape_name}: checkpoint and reference")
        write_checkpoint(shape, folder)
        write_reference(folder)
    graphs = folder / "graphs"
    graphs.mkdir(exist_ok=True)
    for path, needed_by, make in [
        (graphs / "openvino.xml", "openvino-", write_openvino),
        (graphs / "openvino-w8a8.xml", "openvino-w8a8", write_openvino_w8a8),
        (graphs / "fused.onnx", "onnxruntime-", write_onnx),
        (graphs / "fused-int8.onnx", "onnxruntime-int8", write_onnx_int8),
    ]:
        if any(engine.startswith(needed_by) for engine in engines) and not path.exists():
            step(f"{shape_name}: {path.name}")
            make(shape, folder, path)


def step(message: str) -> None:
    print(f"preparing {message} ...", file=sys.stderr, flush=True)


# The checkpoint and its reference logits.


def write_checkpoint(shape: Shape, folder: Path, device: str = "cpu") -> None:
    common = {
        "vocab_size": workloads.VOCABULARY,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.feed_forward,
        "max_position_embeddings": shape.positions,
        "pad_token_id": PADDING,
        "bos_token_id": START,
        "eos_token_id": END,
        "num_labels": 1,
    }
    with torch.device(device):
        if shape.kind == "modernbert":
            config = ModernBertConfig(
                **common,
                cls_token_id=START,
                sep_token_id=END,
                classifier_pooling=shape.pooling,
                local_attention=2 * workloads.LOCAL_DISTANCE,
            )
            model = ModernBertForSequenceClassification(config)
        else:
            config = XLMRobertaConfig(**common, type_vocab_size=1, layer_norm_eps=1e-5)
            model = XLMRobertaForSequenceClassification(config)
    randomize(model, device)
    model.save_pretrained(folder)
    write_tokenizer(folder)


def randomize(model: nn.Module, device: str) -> None:
    """Draws weights so large that every part of the model affects the logit and an error anywhere is visible.

    The usual standard deviation of 0.02 would give flat attention and almost equal logits for all pairs.
    """
    dice = torch.Generator(device).manual_seed(0)

    def drawn(weight: Tensor) -> Tensor:
        return torch.randn(weight.shape, generator=dice, device=device)

    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if "LayerNorm" in name or "norm" in name:
                weight.copy_(drawn(weight) * 0.1 + name.endswith("weight"))
            elif "embeddings" in name:
                weight.copy_(drawn(weight))
            elif weight.dim() == 2:
                gain = 1.5 if ".query." in name or ".key." in name else 1.0
                # The residuals of a pre-norm model add up.
                gain *= 0.3 if name.endswith(".Wo.weight") else 1.0
                weight.copy_(drawn(weight) * (gain / math.sqrt(weight.shape[1])))
            else:
                weight.copy_(drawn(weight) * 0.1)


def write_tokenizer(folder: Path) -> None:
    """One word per token: `w5` is id 5. This is cheaper than real tokenization, to the advantage of sentence-transformers."""
    special = {"<s>": START, "<pad>": PADDING, "</s>": END, "<unk>": UNKNOWN, "<mask>": MASK}
    vocabulary = special | {f"w{token}": token for token in range(len(special), workloads.VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", START), ("</s>", END)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_max_length=workloads.WINDOW,
    ).save_pretrained(folder)


@torch.inference_mode()
def write_reference(folder: Path) -> None:
    """Writes the logits of workload b from transformers, each pair scored alone."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    pairs = workloads.read(folder / "workloads.json")["b"]
    logits = [model(input_ids=torch.tensor([ids])).logits.item() for ids in pairs]
    (folder / "reference.json").write_text(json.dumps(logits))


# The graphs: a module that exporters handle well, with the checkpoint's tensors.


class Graph(nn.Module):
    """The same computation as in transformers, without control flow that depends on the input's shape.

    `fused_attention` exports attention as one operation, for which OpenVINO has a kernel. ONNX Runtime's optimizer needs
    the separate operations to fuse them itself.
    """

    def __init__(self, shape: Shape, folder: Path, fused_attention: bool) -> None:
        super().__init__()
        self.shape = shape
        self.fused_attention = fused_attention
        for name, tensor in load_file(folder / "model.safetensors").items():
            self.register_parameter(name.replace(".", "/"), nn.Parameter(tensor, requires_grad=False))

    def weights(self, name: str) -> tuple[Tensor, Tensor]:
        return self._parameters[f"{name}.weight".replace(".", "/")], self._parameters[f"{name}.bias".replace(".", "/")]

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, *self.weights(name))

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (self.shape.hidden,), *self.weights(name), eps=1e-5)

    def embedding(self, ids: Tensor, name: str) -> Tensor:
        return F.embedding(ids, self._parameters[f"roberta.embeddings.{name}_embeddings.weight".replace(".", "/")])

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        positions = torch.cumsum(attention_mask, 1) * attention_mask + PADDING
        x = self.embedding(input_ids, "word") + self.embedding(positions, "position")
        x = x + self.embedding(torch.zeros(1, 1, dtype=torch.long), "token_type")
        x = self.norm(x, "roberta.embeddings.LayerNorm")
        bias = (1.0 - attention_mask[:, None, None, :].float()) * -1e9
        for layer in range(self.shape.layers):
            x = self.layer(x, bias, f"roberta.encoder.layer.{layer}")
        pooled = torch.tanh(self.linear(x[:, 0], "classifier.dense"))
        return self.linear(pooled, "classifier.out_proj")

    def layer(self, x: Tensor, bias: Tensor, name: str) -> Tensor:
        query, key, value = (self.heads(x, f"{name}.attention.self.{part}") for part in ("query", "key", "value"))
        if self.fused_attention:
            context = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        else:
            scale = math.sqrt(self.shape.hidden // self.shape.heads)
            context = torch.softmax(query @ key.transpose(2, 3) / scale + bias, -1) @ value
        context = context.transpose(1, 2).reshape(x.shape[0], x.shape[1], self.shape.hidden)
        x = self.norm(self.linear(context, f"{name}.attention.output.dense") + x, f"{name}.attention.output.LayerNorm")
        inner = F.gelu(self.linear(x, f"{name}.intermediate.dense"))
        return self.norm(self.linear(inner, f"{name}.output.dense") + x, f"{name}.output.LayerNorm")

    def heads(self, x: Tensor, name: str) -> Tensor:
        split = (x.shape[0], x.shape[1], self.shape.heads, self.shape.hidden // self.shape.heads)
        return self.linear(x, name).view(split).transpose(1, 2)


class ModernGraph(Graph):
    """ModernBERT. Windows are masks: the engines have no operation for them."""

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.tensor(f"{name}.weight"))

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (self.shape.hidden,), self.tensor(f"{name}.weight"), eps=1e-5)

    def tensor(self, name: str) -> Tensor:
        return self._parameters[name.replace(".", "/")]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = F.embedding(input_ids, self.tensor("model.embeddings.tok_embeddings.weight"))
        x = self.norm(x, "model.embeddings.norm")
        positions = torch.cumsum(torch.ones_like(input_ids[:1]), 1)[0] - 1
        mask = (1.0 - attention_mask[:, None, None, :].float()) * -1e9
        distance = (positions[:, None] - positions[None, :]).abs()
        window = (distance > workloads.LOCAL_DISTANCE).float() * -1e9
        half = self.shape.hidden // self.shape.heads // 2
        exponents = torch.arange(half, dtype=torch.float32) / half
        angles = {base: positions[:, None].float() / base**exponents for base in (160000.0, 10000.0)}
        rotary = {base: (angle.cos(), angle.sin()) for base, angle in angles.items()}
        for layer in range(self.shape.layers):
            local = self.shape.is_local(layer)
            name = f"model.layers.{layer}"
            normed = self.norm(x, f"{name}.attn_norm") if layer else x
            bias = mask + window if local else mask
            x = x + self.attention(normed, bias, rotary[10000.0 if local else 160000.0], name)
            gate, value = self.linear(self.norm(x, f"{name}.mlp_norm"), f"{name}.mlp.Wi").chunk(2, -1)
            x = x + self.linear(F.gelu(gate) * value, f"{name}.mlp.Wo")
        x = self.norm(x, "model.final_norm")
        if self.shape.pooling == "mean":
            weight = attention_mask[:, :, None].float()
            pooled = (x * weight).sum(1) / weight.sum(1)
        else:
            pooled = x[:, 0]
        pooled = self.norm(F.gelu(self.linear(pooled, "head.dense")), "head.norm")
        return F.linear(pooled, self.tensor("classifier.weight"), self.tensor("classifier.bias"))

    def attention(self, x: Tensor, bias: Tensor, rotary: tuple[Tensor, Tensor], name: str) -> Tensor:
        split = (x.shape[0], x.shape[1], self.shape.heads, self.shape.hidden // self.shape.heads)
        parts = self.linear(x, f"{name}.attn.Wqkv").chunk(3, -1)
        query, key, value = (part.view(split).transpose(1, 2) for part in parts)
        query, key = rotated(query, *rotary), rotated(key, *rotary)
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        context = context.transpose(1, 2).reshape(x.shape[0], x.shape[1], self.shape.hidden)
        return self.linear(context, f"{name}.attn.Wo")


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def example() -> dict[str, Tensor]:
    ids = torch.randint(5, workloads.VOCABULARY, (2, 16))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def write_openvino(shape: Shape, folder: Path, path: Path) -> None:
    import openvino

    kind = ModernGraph if shape.kind == "modernbert" else Graph
    graph = kind(shape, folder, fused_attention=True).eval()
    with torch.inference_mode():
        model = openvino.convert_model(graph, example_input=example())
    for port, name in zip(model.inputs, example(), strict=True):
        port.get_tensor().set_names({name})
    openvino.save_model(model, path, compress_to_fp16=False)


def write_openvino_w8a8(shape: Shape, folder: Path, path: Path) -> None:
    """NNCF's post-training quantization for transformers with SmoothQuant: 8-bit weights and activations."""
    import nncf
    import openvino

    model = openvino.Core().read_model(folder / "graphs" / "openvino.xml")
    samples = list(calibration())
    quantized = nncf.quantize(
        model, nncf.Dataset(samples), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(samples)
    )
    openvino.save_model(quantized, path, compress_to_fp16=False)


def calibration() -> Iterator[dict[str, Any]]:
    dice = torch.Generator().manual_seed(1)
    for _ in range(CALIBRATION_PAIRS):
        ids = torch.randint(5, workloads.VOCABULARY, (1, CALIBRATION_TOKENS), generator=dice)
        ids[0, 0], ids[0, -1] = START, END
        yield {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()}


def write_onnx(shape: Shape, folder: Path, path: Path) -> None:
    """Exports, then runs ONNX Runtime's transformer optimizer, which fuses attention, GELU and residual connections."""
    from onnxruntime.transformers import optimizer

    plain = path.with_name("plain.onnx")
    inputs = example()
    axes = {name: {0: "pairs", 1: "tokens"} for name in inputs}
    with torch.inference_mode():
        torch.onnx.export(
            Graph(shape, folder, fused_attention=False).eval(),
            tuple(inputs.values()),
            plain,
            input_names=list(inputs),
            output_names=["logits"],
            dynamic_axes=axes | {"logits": {0: "pairs"}},
            opset_version=17,
            dynamo=False,
        )
    fused = optimizer.optimize_model(
        str(plain), model_type="bert", num_heads=shape.heads, hidden_size=shape.hidden, opt_level=0
    )
    counts = fused.get_fused_operator_statistics()
    print(f"  fused: { {name: count for name, count in counts.items() if count} }", file=sys.stderr)
    if counts.get("Attention", 0) + counts.get("MultiHeadAttention", 0) != shape.layers:
        sys.exit("the optimizer has not fused every attention, so ONNX Runtime would appear slower than it is")
    fused.save_model_to_file(str(path))
    plain.unlink()


def write_onnx_int8(shape: Shape, folder: Path, path: Path) -> None:
    """Dynamic quantization with one scale per output channel. Embeddings stay f32: a lookup costs almost nothing."""
    from onnx import TensorProto
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        folder / "graphs" / "fused.onnx",
        path,
        op_types_to_quantize=["MatMul", "Attention"],
        per_channel=True,
        weight_type=QuantType.QInt8,
        # Shape inference does not know the output types of ONNX Runtime's fused nodes.
        extra_options={"MatMulConstBOnly": True, "DefaultTensorType": TensorProto.FLOAT},
    )


if __name__ == "__main__":
    main()
