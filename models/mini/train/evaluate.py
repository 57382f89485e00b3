"""Evaluates on XQuAD (a question against its gold paragraph and 9 others) and on a few everyday examples.

    python evaluate.py MODEL_DIR XQUAD_DIR [--questions N] [--teacher TEACHER_DIR]

Two sets of negatives: 9 random ones, and the 9 that BM25 ranks highest. BM25's recall@1 is the baseline.
XQuAD is used for evaluation only. Pairs are truncated to 512 tokens; the document is shortened.
"""
import argparse, json, math, random, re, time
import numpy as np, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

EXAMPLES = [
    ("Apple", ["apple", "banana", "fruit", "vegetable"]),
    ("What is the capital of France?", ["Paris is the capital and largest city of France.", "Berlin is the capital of Germany.",
                                        "France won the football match.", "Cheese is made from milk."]),
    ("how do I boil an egg", ["Put the egg into boiling water for eight minutes.", "The hen lays an egg every day.",
                              "Water boils at 100 degrees.", "The train leaves at noon."]),
    ("cheap hotel near the station", ["A low-cost hotel, five minutes from the railway station.", "The station was built in 1890.",
                                      "Our restaurant serves fresh fish.", "The museum is closed on Mondays."]),
    ("苹果", ["苹果", "香蕉", "水果", "蔬菜"]),
    ("中国的首都是哪里？", ["北京是中国的首都。", "东京是日本的首都。", "中国有五千年的历史。", "今天天气很好。"]),
    ("怎么做西红柿炒鸡蛋", ["先把鸡蛋打散，再把西红柿切成小块下锅翻炒。", "鸡蛋含有丰富的蛋白质。", "火车站离这里不远。", "他买了一本新书。"]),
]


def load_xquad(folder, lang):
    paragraphs, questions = [], []
    for article in json.load(open(f"{folder}/xquad.{lang}.json", encoding="utf-8"))["data"]:
        for paragraph in article["paragraphs"]:
            questions += [(qa["question"], len(paragraphs)) for qa in paragraph["qas"]]
            paragraphs.append(paragraph["context"])
    return paragraphs, questions


def terms(text):
    """Words; for Chinese, single characters and character pairs."""
    han = re.findall(r"[\u4e00-\u9fff]", text)
    return re.findall(r"[a-z0-9]+", text.lower()) + han + [a + b for a, b in zip(han, han[1:])]


class Bm25:
    def __init__(self, documents, k1=1.2, b=.75):
        self.tf = [{} for _ in documents]
        for tf, document in zip(self.tf, documents):
            for t in terms(document):
                tf[t] = tf.get(t, 0) + 1
        lengths = [sum(tf.values()) for tf in self.tf]
        self.norm = [k1 * (1 - b + b * n * len(lengths) / sum(lengths)) for n in lengths]
        df = {}
        for tf in self.tf:
            for t in tf:
                df[t] = df.get(t, 0) + 1
        self.idf = {t: math.log(1 + (len(documents) - n + .5) / (n + .5)) for t, n in df.items()}
        self.k1 = k1

    def scores(self, query):
        return [sum(self.idf[t] * tf[t] * (self.k1 + 1) / (tf[t] + norm) for t in terms(query) if t in tf)
                for tf, norm in zip(self.tf, self.norm)]


class Scorer:
    def __init__(self, folder):
        self.model = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder, model_max_length=512)
        self.tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True

    @torch.inference_mode()
    def logits(self, pairs, batch=64):
        encoded = [self.tokenizer(q, d, truncation="only_second", max_length=512) for q, d in pairs]
        order = sorted(range(len(pairs)), key=lambda i: len(encoded[i]["input_ids"]))
        out = np.zeros(len(pairs))
        for start in range(0, len(order), batch):
            rows = order[start:start + batch]
            inputs = self.tokenizer.pad([encoded[i] for i in rows], return_tensors="pt")
            out[rows] = self.model(**inputs).logits[:, 0].numpy()
        return out


def candidates(paragraphs, questions, bm25, seed):
    """For each question two lists, gold first: with 9 random negatives, and with the 9 that BM25 ranks highest."""
    rng, sets = random.Random(seed), []
    for question, gold in questions:
        others = [i for i in range(len(paragraphs)) if i != gold]
        scores = bm25.scores(question)
        hardest = sorted(others, key=lambda i: -scores[i])[:9]
        sets.append((question, [gold] + rng.sample(others, 9), [gold] + hardest, scores))
    return sets


def recall_at_1(scores):
    scores = np.asarray(scores)
    return float((scores[:, 0] > scores[:, 1:].max(1)).mean())     # a tie counts as a miss


def xquad(scorer, folder, lang, n, teacher=None, hard=True, teacher_questions=100):
    paragraphs, questions = load_xquad(folder, lang)
    questions = random.Random(7).sample(questions, min(n, len(questions)))
    sets = candidates(paragraphs, questions, Bm25(paragraphs), seed=8)
    for name, which in (("9 random", 1), ("9 BM25-hardest", 2)):
        if which == 2 and not hard:
            continue
        pairs = [(s[0], paragraphs[i]) for s in sets for i in s[which]]
        began = time.time()
        scores = scorer.logits(pairs)
        line = f"XQuAD-{lang} {name:14} n={len(sets)}: rerankd-mini {recall_at_1(scores.reshape(-1, 10)):.4f}"
        line += f"  BM25 {recall_at_1([[s[3][i] for i in s[which]] for s in sets]):.4f}"
        if teacher and lang == "en":
            first = pairs[:10 * teacher_questions]
            line += f"  first {teacher_questions}: rerankd-mini {recall_at_1(scores[:10 * teacher_questions].reshape(-1, 10)):.4f}"
            line += f"  teacher {recall_at_1(teacher.logits(first).reshape(-1, 10)):.4f}"
        print(line + f"  [{time.time() - began:.0f} s]", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model"), parser.add_argument("xquad")
    parser.add_argument("--questions", type=int, default=1190)
    parser.add_argument("--teacher")
    parser.add_argument("--teacher-questions", type=int, default=100)
    parser.add_argument("--languages", nargs="+", default=["en", "zh"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only-random", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    scorer = Scorer(args.model)
    teacher = Scorer(args.teacher) if args.teacher else None
    for query, documents in EXAMPLES:
        logits = scorer.logits([(query, d) for d in documents])
        print(query, "|", "  ".join(f"{d}: {1 / (1 + math.exp(-x)):.3f}" for d, x in zip(documents, logits)))
    for lang in args.languages:
        xquad(scorer, args.xquad, lang, args.questions, teacher, not args.only_random, args.teacher_questions)


if __name__ == "__main__":
    main()
