"""Scores English groups with the teacher (ms-marco-MiniLM-L-12-v2): all eight documents of a group, at the length that the student sees.

    python teach.py TEACHER_DIR --minutes 12

The teacher costs about two thirds of a training step per token, so its time is limited, and it scores only
questions about prose. All other groups, and those not reached in time, are trained without teacher scores. Scores are stored by the group's index in groups.pkl.
"""
import argparse, json, os, pickle, time
import numpy as np, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

WORK = os.environ.get("MINI_WORK", "./work")
PROSE = {"wiki-summaries", "wiki-pages", "news", "factbook", "anarchism", "handbook"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher"), parser.add_argument("--minutes", type=float, default=12)
    args = parser.parse_args()
    torch.set_num_threads(2)
    data = pickle.load(open(f"{WORK}/groups.pkl", "rb"))
    rows = [json.loads(line) for line in open(f"{WORK}/passages.jsonl")]
    groups, offsets = data["groups"], data["offsets"]
    chosen = [k for k, g in enumerate(groups) if g["source"] in PROSE and g["kind"] == "question" and not g["held_out"]]

    tokenizer = AutoTokenizer.from_pretrained(args.teacher, model_max_length=512)
    teacher = AutoModelForSequenceClassification.from_pretrained(args.teacher, attn_implementation="sdpa", dtype=torch.bfloat16).eval()

    def text(document):
        return " ".join(rows[i]["text"][offsets[i][a][0]:offsets[i][b - 1][1]] for i, a, b in document if b > a)

    taught, began = {}, time.time()
    for start in range(0, len(chosen), 16):
        if time.time() - began > 60 * args.minutes:
            break
        batch = chosen[start:start + 16]
        pairs = [(groups[k]["text"], text(d)) for k in batch for d in groups[k]["documents"]]
        encoded = [tokenizer(q, d, truncation="only_second", max_length=512) for q, d in pairs]
        order = sorted(range(len(pairs)), key=lambda i: len(encoded[i]["input_ids"]))
        scores = np.zeros(len(pairs), np.float32)
        with torch.inference_mode():
            for k in range(0, len(order), 16):
                part = order[k:k + 16]
                inputs = tokenizer.pad([encoded[i] for i in part], return_tensors="pt")
                scores[part] = teacher(**inputs).logits[:, 0].float().numpy()
        taught.update(zip(batch, scores.reshape(len(batch), -1)))
        if start // 16 % 15 == 14:
            gold = np.mean([s.argmax() == 0 for s in taught.values()])
            print(f"{len(taught)} groups, teacher ranks the gold passage first in {gold:.3f}, {time.time() - began:.0f} s", flush=True)
            pickle.dump(taught, open(f"{WORK}/teacher.part", "wb"))
    pickle.dump(taught, open(f"{WORK}/teacher.part", "wb"))
    os.replace(f"{WORK}/teacher.part", f"{WORK}/teacher.pkl")


if __name__ == "__main__":
    main()
