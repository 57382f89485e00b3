"""Writes a model folder: weights, config.json and tokenizer.

    export.py WEIGHTS TOKENIZER OUT

WEIGHTS: fit.safetensors or state.pt. All tensors are stored in f16.
"""
import json, os, shutil, sys
import torch
from safetensors.torch import load_file, save_file


def main():
    source, tokenizer, out = sys.argv[1:4]
    weights = load_file(source) if source.endswith(".safetensors") else torch.load(source, weights_only=False)["model"]
    stored = {name: w.half() for name, w in weights.items()}
    os.makedirs(out, exist_ok=True)
    save_file({k: v.contiguous() for k, v in stored.items()}, f"{out}/model.safetensors", metadata={"format": "pt"})
    table = weights["bert.embeddings.word_embeddings.weight"]
    layers = 1 + max(int(n.split(".")[3]) for n in weights if ".layer." in n)
    config = dict(architectures=["BertForSequenceClassification"], attention_probs_dropout_prob=0.1, hidden_act="gelu", hidden_dropout_prob=0.1,
                  hidden_size=table.shape[1], id2label={"0": "LABEL_0"}, initializer_range=0.02, intermediate_size=1536, label2id={"LABEL_0": 0},
                  layer_norm_eps=1e-12, max_position_embeddings=512, model_type="bert", num_attention_heads=12, num_hidden_layers=layers,
                  pad_token_id=0, position_embedding_type="absolute", torch_dtype="float16", type_vocab_size=2, vocab_size=len(table))
    json.dump(config, open(f"{out}/config.json", "w"), indent=2, sort_keys=True)
    special = dict(cls_token="[CLS]", mask_token="[MASK]", pad_token="[PAD]", sep_token="[SEP]", unk_token="[UNK]")
    json.dump(special, open(f"{out}/special_tokens_map.json", "w"), indent=2)
    json.dump(dict(special, model_max_length=512, tokenizer_class="PreTrainedTokenizerFast"), open(f"{out}/tokenizer_config.json", "w"), indent=2)
    if tokenizer != f"{out}/tokenizer.json":
        shutil.copy(tokenizer, f"{out}/tokenizer.json")
    print(f"{sum(w.numel() for w in weights.values())} parameters, {len(table)} ids")


main()
