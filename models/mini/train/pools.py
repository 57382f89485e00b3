"""Builds the groups of the second phase: questions against a small pool of paragraphs, as if a few articles were searched.

    python pools.py TOKENIZER_JSON

A pool has 240 passages, up to five of one document. A group is a question, its gold passage and the seven other passages of
the pool that BM25 over words ranks highest. The question's words are reordered in chunks, some come from a neighboring
sentence, some are dropped, inflected or replaced by synonyms. BM25 is a strong ranker on such a pool. Its scores are the
graded targets: they tell how much of the question each passage covers, whereas a gold label is one bit.
"""
import glob, json, pickle, re, zlib
import numpy as np
from tokenizers import Tokenizer
import groups as rules
from evaluate import Bm25
from groups import NEGATIVES, STOP, TOKENIZER, WORK, rng

POOL, POOLS = 240, {"en": 24, "zh": 6}
SHARE = {"en": [("wiki-pages", 100), ("wiki-summaries", 90), ("anarchism", 20), ("factbook", 15), ("handbook", 8), ("news", 7)],
         "zh": [("peoples-daily", 160), ("news-segmented", 60), ("three-kingdoms", 20)]}


FUNCTION = """the the the the of of of in in to to a a was was is did did and for for by on that were are do does with from as at
what which who when how many have has be it their an his there or""".split()


def irregular_forms():
    """WordNet's irregular forms: "lost" to "lose", "children" to "child"."""
    table = {}
    for path in sorted(glob.glob(f"{WORK}/deb/wordnet-base/usr/share/wordnet/*.exc")):
        for line in open(path, encoding="latin-1"):
            form, base = line.split()[:2]
            table.setdefault(form, base)
    return table


IRREGULAR = irregular_forms()


def base_form(word):
    low = word.lower()
    if low in IRREGULAR:
        return IRREGULAR[low]
    for ending, instead in (("ies", "y"), ("ied", "y"), ("sses", "ss"), ("ing", ""), ("ed", ""), ("s", "")):
        if low.endswith(ending) and len(low) > len(ending) + 3 and not low.endswith("ss"):
            return low[:-len(ending)] + instead
    return word


def scattered_question(sentence, beside, title):
    """Content words of the sentence without the answer, in reordered chunks, among random function words.

    People's questions do not copy the passage's "of the" and "in a". A model trained only on copies would rely on them.
    """
    words = [w for w in re.findall(r"[\w'’.,-]*\w|\S", sentence) if re.search(r"\w", w)]
    if len(words) < 6:
        return rules.english_question(sentence, title)
    at, end = rules.answer_span(words)
    kept = [w for w in words[max(0, at - 12):at] + words[end:end + 10] if w.lower() not in STOP and rng.random() < .85]
    kept = [base_form(w) if rng.random() < .35 else w for w in kept]
    kept = rules.reword(kept, rng.choice([.2, .7, 1.2]))
    if len(kept) > 3 and rng.random() < .6:
        cuts = sorted(rng.sample(range(1, len(kept)), rng.choice([1, 2])))
        chunks = [kept[a:b] for a, b in zip([0] + cuts, cuts + [len(kept)])]
        rng.shuffle(chunks)
        kept = sum(chunks, [])
    kept = kept[:rng.randint(3, 9)]
    if rng.random() < .3:
        others = [w for w in re.findall(r"\w[\w'-]*\w", beside) if w.lower() not in STOP]
        for w in rng.sample(others, min(len(others), rng.choice([1, 1, 2]))):
            kept.insert(rng.randint(0, len(kept)), w)
    if title and rng.random() < .25 and len(title) < 40:
        place = rng.choice([0, len(kept)])
        kept[place:place] = title.split()
    for _ in range(rng.randint(1, 2 + len(kept) * 3 // 4)):
        kept.insert(rng.randint(0, len(kept)), rng.choice(FUNCTION))
    return " ".join([rules.ask_for(words[at])] + kept) + "?"


def pool(rows, by_document, lang):
    """Passages of randomly drawn documents, up to five consecutive ones of each."""
    chosen = []
    for source, n in SHARE[lang]:
        names, part = by_document[lang, source], []
        while len(part) < n:
            passages = rng.choice(names)
            start = rng.randint(0, max(0, len(passages) - 5))
            part += [i for i in passages[start:start + 5] if i not in part]
        chosen += part[:n]
    return chosen


def main():
    tokenizer = Tokenizer.from_file(TOKENIZER)
    rows = [json.loads(line) for line in open(f"{WORK}/passages.jsonl")]
    data = pickle.load(open(f"{WORK}/groups.pkl", "rb"))
    tokens, out = data["tokens"], []
    documents = {}
    for i, row in enumerate(rows):
        if len(tokens[i]) >= 50 and zlib.crc32(row["doc"].encode()) % 40:       # without held-out documents
            documents.setdefault((row["lang"], row["source"]), {}).setdefault(row["doc"], []).append(i)
    by_document = {key: list(docs.values()) for key, docs in documents.items()}
    for lang in ("en", "zh"):
        right = []
        for _ in range(POOLS[lang]):
            members = pool(rows, by_document, lang)
            bm25 = Bm25([rows[i]["text"] for i in members])
            for k, i in enumerate(members):
                text = rows[i]["text"]
                spans = rules.sentence_spans(text, lang)
                at = rng.randrange(len(spans))
                sentence = text[slice(*spans[at])]
                beside = text[slice(*spans[at - 1 if at else min(1, len(spans) - 1)])]
                if lang == "zh":
                    query = rules.chinese_question(sentence)
                else:
                    query = (scattered_question(sentence, beside, rows[i]["title"]) if rng.random() < .8
                             else rules.english_question(sentence, rows[i]["title"]))
                scores = np.array(bm25.scores(query))
                others = [j for j in np.argsort(-scores) if j != k][:NEGATIVES]
                chosen = np.array([k] + others)
                wanted = 9 * scores[chosen] / (scores[chosen].max() + 1e-6) - 9
                wanted[0] = 5
                right.append(scores[k] > scores[others].max())
                ids = tokenizer.encode(query, add_special_tokens=False).ids[:60]
                out.append(dict(lang=lang, kind="pool", query=np.array(ids, np.uint16), text=query, source=rows[i]["source"],
                                documents=[[(int(members[j]), 0, min(rules.LONGEST, len(tokens[members[j]])))] for j in chosen],
                                teacher=wanted.astype(np.float32), held_out=False, bm25=bool(right[-1])))
        print(f"{lang} {len(right)} groups, BM25 ranks the gold first in {np.mean(right):.3f}", flush=True)
        for g in rng.sample([g for g in out if g["lang"] == lang], 15):
            print("  ", g["source"], "|", g["text"][:150], flush=True)
    pickle.dump(out, open(f"{WORK}/pools.pkl", "wb"))


if __name__ == "__main__":
    main()
