"""Trains the Unigram tokenizer (16,000 lower-cased pieces, English and Chinese) and writes its three files.

There is no word-start marker: text is split at spaces and punctuation. "apple" is the same piece everywhere, and a Chinese
word is the same piece in mid-sentence and after a comma. This helps a model that matches tokens.
"""
import collections, json, os, random, sys
import jieba
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

WORK, OUT = os.environ.get("MINI_WORK", "./work"), sys.argv[1]
VOCABULARY, HAN_CHARACTERS, OTHER_CHARACTERS = 16000, 4000, 140
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]


def main():
    rng = random.Random(2)
    rows = [json.loads(line) for line in open(f"{WORK}/passages.jsonl")]
    rng.shuffle(rows)
    budget = {"en": 16_000_000, "zh": 7_000_000}
    texts = []
    for row in rows:
        if budget[row["lang"]] > 0:
            budget[row["lang"]] -= len(row["text"])
            # With segmented Chinese no piece crosses a word boundary. At run time the text is not segmented.
            texts.append(" ".join(jieba.cut(row["text"])) if row["lang"] == "zh" else row["text"])

    normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    texts = [normalizer.normalize_str(t) for t in texts]
    count = collections.Counter(c for t in texts for c in t)
    is_han = lambda c: "\u4e00" <= c <= "\u9fff"
    keep = {c for c, _ in [x for x in count.most_common() if is_han(x[0])][:HAN_CHARACTERS]}
    keep |= {c for c, _ in [x for x in count.most_common() if not is_han(x[0])][:OTHER_CHARACTERS]}
    texts = ["".join(c if c in keep else " " for c in t) for t in texts]   # rare characters get no piece; later they are <unk>

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    trainer = trainers.UnigramTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL, unk_token="<unk>",
                                      max_piece_length=12, n_sub_iterations=2, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    os.makedirs(OUT, exist_ok=True)
    tokenizer.save(f"{OUT}/tokenizer.json")
    names = dict(bos_token="<s>", cls_token="<s>", eos_token="</s>", sep_token="</s>", pad_token="<pad>", unk_token="<unk>")
    json.dump(names, open(f"{OUT}/special_tokens_map.json", "w"), indent=1)
    json.dump(dict(tokenizer_class="PreTrainedTokenizerFast", model_max_length=512, model_input_names=["input_ids", "attention_mask"],
                   **names), open(f"{OUT}/tokenizer_config.json", "w"), indent=1)
    print("vocabulary", tokenizer.get_vocab_size())
    for text in ("Which NFL team represented the AFC at Super Bowl 50?", "Apple", "黑豹队的防守丢了多少分？", "中华人民共和国成立于1949年。"):
        print(tokenizer.encode(text).tokens)
    lengths = {lang: [len(tokenizer.encode(r["text"]).ids) / len(r["text"]) for r in rows[:4000] if r["lang"] == lang] for lang in ("en", "zh")}
    print({lang: round(sum(x) / len(x), 3) for lang, x in lengths.items()}, "tokens per character")


if __name__ == "__main__":
    main()
