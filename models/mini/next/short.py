"""Short pairs for the fit: written questions with right and wrong answers, words and definitions, titles and sentences, two sentences of a text.

    short.py TOKENIZER
"""
import glob, json, os, pickle, random, re, sys
from tokenizers import Tokenizer

WORK, HERE = os.environ.get("MINI_WORK", "./work"), os.path.dirname(os.path.abspath(__file__))
HAN = re.compile("[\u4e00-\u9fff]")
rng = random.Random(1)


def written():
    lines = [line.rstrip("\n").split("|") for path in sorted(glob.glob(f"{HERE}/written/*.txt")) for line in open(path)]
    for part in ([p for p in lines if not HAN.search(p[0])], [p for p in lines if HAN.search(p[0])]):
        for question, answer in part:
            yield from [(question, answer), (question, rng.choice(part)[1]), (rng.choice(part)[0], answer)] * 3


def from_passage(row):
    if row["source"] == "wordnet":
        definition, *examples = row["text"].partition(": ")[2].split('; "')
        yield rng.choice(["{}", "what is {}", "{} meaning", "define {}"]).format(row["title"]), definition
        if examples:
            yield examples[0].strip('"; '), definition
    elif row["source"] in ("gcide", "foldoc", "wiki-summaries", "debian-packages", "devil") and row["title"]:
        sentences = re.split(r"(?<=[.!?])\s", row["text"])
        yield (row["title"], row["text"][:200]) if rng.random() < .5 else (sentences[0][:160], rng.choice(sentences)[:160])
    elif row["lang"] == "zh" and (row["source"] == "reviews" or rng.random() < .4):
        marks = "[。！？，；]" if row["source"] == "reviews" else "[。！？；]"
        sentences = [s for s in re.split(marks, row["text"]) if len(s) > 4]
        if len(sentences) > 1:
            yield rng.choice(sentences)[:30], rng.choice(sentences)[:60]


def main():
    tokenizer = Tokenizer.from_file(sys.argv[1])
    pairs = [*written()]
    for line in open(f"{WORK}/passages.jsonl"):
        pairs += from_passage(json.loads(line))
    encode = lambda texts: [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)]
    encoded = zip(encode([a for a, _ in pairs]), encode([b for _, b in pairs]))
    out = [(a, b) for a, b in encoded if a and b]
    pickle.dump(out, open(f"{WORK}/short.pkl", "wb"))
    print(f"{len(out)} short pairs")


if __name__ == "__main__":
    main()
