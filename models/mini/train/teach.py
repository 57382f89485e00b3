"""Lets the teacher (ms-marco-MiniLM-L-12-v2) score English groups: the gold cut, hard negatives and a random one.

    python teach.py TEACHER_DIR TOKENIZER_DIR --groups 1600

The teacher is many times larger than the student, so this is a budget question: passages are cut to at most 80 of
the student's tokens. Linear layers run in int8, which the teacher's published weights came in anyway.
"""
import argparse, json, os, pickle, random, time
import numpy as np, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from train import Groups, NEGATIVES, WORK

GENERAL = ("question", "question", "question", "keywords", "title")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher"), parser.add_argument("tokenizer_dir"), parser.add_argument("--groups", type=int, default=1600)
    args = parser.parse_args()
    torch.set_num_threads(2)
    data = pickle.load(open(f"{WORK}/groups.pkl", "rb"))
    rows = [json.loads(line) for line in open(f"{WORK}/passages.jsonl")]
    groups = Groups(21, args.tokenizer_dir)
    rng = random.Random(22)
    general = {"wiki-summaries", "wiki-pages", "news", "factbook", "anarchism", "foldoc"}
    english = [g for g in groups.train if g["lang"] == "en" and g["kind"] in GENERAL and rows[g["positive"]]["source"] in general
               and len(g["hard"]) >= 4 and len(g["query"]) >= 3]
    rng.shuffle(english)

    tokenizer = AutoTokenizer.from_pretrained(args.teacher, model_max_length=512)
    teacher = AutoModelForSequenceClassification.from_pretrained(args.teacher, attn_implementation="sdpa").eval()
    teacher = torch.ao.quantization.quantize_dynamic(teacher, {torch.nn.Linear}, dtype=torch.qint8)

    def window(passage, key, length):
        """A cut as (text for the teacher, ids for the student)."""
        ids, offsets = data["tokens"][passage], data["offsets"][passage]
        n = min(length, len(ids))
        start = 0
        if len(ids) > n:
            start = rng.randint(0, len(ids) - n) if key is None else max(0, min(key[0] - rng.randint(0, n // 3), len(ids) - n))
        return rows[passage]["text"][offsets[start][0]:offsets[start + n - 1][1]], ids[start:start + n].astype(np.int32)

    taught, began = [], time.time()
    pool = groups.by_lang["en"]
    for start in range(0, min(args.groups, len(english)), 20):
        batch = []
        for g in english[start:start + 20]:
            length = rng.choice([40, 60, 80])
            negatives = rng.sample(g["hard"], min(3, len(g["hard"]))) + g["near"][:1]
            while len(negatives) < NEGATIVES:
                other = int(pool[rng.randrange(len(pool))])
                negatives += [other] if len(data["tokens"][other]) > 15 else []
            batch.append((g, [window(g["positive"], g["key"], length)] + [window(i, None, length) for i in negatives[:NEGATIVES]]))
        pairs = [(g["text"], text) for g, cuts in batch for text, _ in cuts]
        order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][1]))
        scores = np.zeros(len(pairs), np.float32)
        with torch.inference_mode():
            for k in range(0, len(order), 40):
                part = order[k:k + 40]
                inputs = tokenizer([pairs[i] for i in part], padding=True, truncation="only_second", max_length=200, return_tensors="pt")
                scores[part] = teacher(**inputs).logits[:, 0].numpy()
        for (g, cuts), s in zip(batch, scores.reshape(-1, NEGATIVES + 1)):
            taught.append(dict(query=g["query"], documents=[ids for _, ids in cuts], scores=s))
        if start % 200 == 180:
            gold = np.mean([t["scores"].argmax() == 0 for t in taught])
            print(f"{len(taught)} groups, teacher ranks our gold first in {gold:.3f}, {time.time() - began:.0f} s", flush=True)
            pickle.dump(taught, open(f"{WORK}/teacher.part", "wb"))
    os.replace(f"{WORK}/teacher.part", f"{WORK}/teacher.pkl")


if __name__ == "__main__":
    main()
