"""Groups of short texts for the second phase: a query, a text that answers it in other words, and texts that only share a word with it.

    everyday.py TOKENIZER

Sources: written/ (questions and answers written for this training), WordNet (words, definitions, synonyms), CC-CEDICT (words and
glosses, words with the same gloss). None of the questions of ../eval is used: a written pair that resembles one of them is left out.
"""
import collections, glob, json, os, pickle, random, re, sys
import jieba
from tokenizers import Tokenizer

WORK, HERE = os.environ.get("MINI_WORK", "./work"), os.path.dirname(os.path.abspath(__file__))
rng = random.Random(5)
HAN = re.compile("[\u4e00-\u9fff]")
FUNCTION = set("a an the of to in on for is are was were do does did how what why when where who which i my you your it its be will with and or at by from that this not as can should me so if have has".split())


def words(text):
    if HAN.search(text):
        return [w for w in jieba.cut(text) if HAN.match(w)]
    return re.findall(r"[a-z0-9]+", text.lower())


def sentences():
    """Short sentences of the passages, by language."""
    pool = {"en": [], "zh": []}
    for line in open(f"{WORK}/passages.jsonl"):
        row = json.loads(line)
        if row["lang"] == "en":
            if row["source"] == "wordnet":
                pool["en"] += [x.strip(' "') for x in row["text"].split('; "')[1:] if len(x.split()) > 3]
                continue
            if row["source"] not in ("wiki-summaries", "news", "gnome", "foldoc", "debian-packages", "devil", "anarchism", "factbook") or rng.random() < .5:
                continue
            parts = re.split(r"(?<=[a-z][.!?])\s+", row["text"])
            pool["en"] += [p for p in parts if 4 <= len(p.split()) <= 18][:4]
        elif row["source"] in ("reviews", "peoples-daily", "news-segmented", "gnome"):
            parts = re.split("[。！？；]|，" if row["source"] == "reviews" else "[。！？；]", row["text"])
            pool["zh"] += [p.strip(" ，") for p in parts if 6 <= len(p) <= 28][:3]
    for lang in pool:
        pool[lang] = list(dict.fromkeys(pool[lang]))
        rng.shuffle(pool[lang])
        pool[lang] = pool[lang][:60000]
    return pool


class Pool:
    def __init__(self, texts):
        self.texts, self.index = texts, collections.defaultdict(list)
        for i, t in enumerate(texts):
            for w in set(words(t)):
                self.index[w].append(i)

    def sharing(self, query, n, avoid=""):
        """Texts that share a word with the query; mostly a rare one, sometimes a function word."""
        found = [w for w in dict.fromkeys(words(query)) if w in self.index]
        content = [w for w in found if w not in FUNCTION and len(self.index[w]) < len(self.texts) / 50]
        out, not_words = [], set(words(avoid)) - set(words(query)) - FUNCTION
        for _ in range(6 * n):
            source = content if content and rng.random() < .75 else found
            if not source or len(out) == n:
                break
            t = self.texts[rng.choice(self.index[rng.choice(source)])]
            if t not in out and t != avoid and len(not_words & set(words(t))) < 2:
                out.append(t)
        while len(out) < n:
            out.append(rng.choice(self.texts))
        return out


def written():
    held = [json.loads(l)["query"] for p in glob.glob(f"{HERE}/../eval/*.jsonl") for l in open(p)]
    grams = lambda t: set(words(t)) - FUNCTION
    out = []
    for path in sorted(glob.glob(f"{HERE}/written/*.txt")):
        for line in open(path):
            q, a = line.rstrip("\n").split("|")
            g = grams(q)
            if any(len(g & grams(h)) >= max(1, .6 * len(g | grams(h))) for h in held):
                print("left out:", q)
                continue
            out.append((q, a))
    return out


def wordnet():
    """(names, definition) of synsets, and their category."""
    for path in sorted(glob.glob(f"{WORK}/deb/wordnet-base/usr/share/wordnet/data.*")):
        for line in open(path, encoding="latin-1"):
            if line[:1].isdigit() and " | " in line:
                head, gloss = line.split(" | ", 1)
                part = head.split()
                names = [re.sub(r"\(.*?\)", "", w).replace("_", " ") for w in part[4:4 + 2 * int(part[3], 16):2]]
                yield names, gloss.split('; "')[0].split("; ")[0].strip(), part[1], part[2]


def main():
    tokenizer = Tokenizer.from_file(sys.argv[1])
    pool = {lang: Pool(texts) for lang, texts in sentences().items()}
    print({k: len(p.texts) for k, p in pool.items()}, flush=True)
    groups = []
    add = lambda kind, query, documents: groups.append((kind, query, documents))
    pairs = written()
    by = {"en": [p for p in pairs if not HAN.search(p[0])], "zh": [p for p in pairs if HAN.search(p[0])]}
    print("written", {k: len(v) for k, v in by.items()}, flush=True)
    answers = {lang: Pool([a for _, a in part]) for lang, part in by.items()}
    for lang, part in by.items():
        for repeat in range(6):
            for q, a in part:
                add("written-" + lang, q, [a] + pool[lang].sharing(q, 2, a) + answers[lang].sharing(q, 1, a) + [rng.choice(part)[1] for _ in range(2)])
    vocabulary = tokenizer.get_vocab()
    common = lambda w: w.islower() and w.isalpha() and vocabulary.get(w, 10 ** 9) < 14000
    synsets = list(wordnet())
    useful = [s for s in synsets if any(common(n) for n in s[0]) and 3 <= len(s[1].split()) <= 16]
    siblings = collections.defaultdict(list)
    for s in useful:
        siblings[s[2]].append(s)
    for names, gloss, kind, pos in rng.sample(useful, 6000):
        name = rng.choice([n for n in names if common(n)])
        if name in words(gloss):
            continue
        others = [rng.choice(siblings[kind])[1] for _ in range(2)]
        if rng.random() < .5:
            q = rng.choice(["{}", "what is {}", "what does {} mean", "meaning of {}", "{} definition", "define {}"]).format(name)
            add("definition", q, [gloss] + pool["en"].sharing(name, 2, gloss) + others)
        else:
            answer = lambda n: rng.choice(["{}", "{}", "It is called {}.", "a {}", "The word is {}."]).format(n)
            wrong = [rng.choice([n for n in rng.choice(siblings[kind])[0] if n.isalpha()] or [name + "s"]) for _ in range(2)]
            if name not in wrong:
                add("word", gloss, [answer(name)] + [answer(w) for w in wrong] + pool["en"].sharing(gloss, 2, name))
    for names, gloss, kind, pos in rng.sample([s for s in useful if sum(common(n) for n in s[0]) > 1], 4000):
        a, b = rng.sample([n for n in names if common(n)], 2)
        if a[:4] == b[:4]:
            continue
        wrong = [rng.choice([n for n in rng.choice(siblings[kind])[0] if common(n)] or ["thing"]) for _ in range(3)]
        if not set(wrong) & set(names):
            add("synonym", a, [b] + wrong + pool["en"].sharing(a, 1))
    glosses = json.load(open(f"{WORK}/glosses.json"))["glosses"]
    same, chinese = collections.defaultdict(list), [w for w in glosses if glosses[w] and len(w) > 1]
    for w in chinese:
        for g in glosses[w]:
            same[g].append(w)
    sharing = collections.defaultdict(list)
    for w in chinese:
        for c in w:
            sharing[c].append(w)
    for g in rng.sample([g for g in same if len(same[g]) > 1], 4000):
        a, b = rng.sample(same[g], 2)
        wrong = [rng.choice(sharing[rng.choice(a)]) for _ in range(3)] + [rng.choice(chinese)]
        if not set(wrong) & set(same[g]):
            add("synonym-zh", a, [b] + wrong)
    for w in rng.sample(chinese, 2500):
        g = rng.choice(glosses[w])
        wrong = [rng.choice(glosses[rng.choice(sharing[rng.choice(w)])]) for _ in range(2)] + [rng.choice(glosses[rng.choice(chinese)])]
        if g in wrong:
            continue
        if rng.random() < .5:
            add("gloss", w, [g] + wrong)
        else:
            add("gloss", g, [w] + [rng.choice(sharing[rng.choice(w)]) for _ in range(2)] + [rng.choice(chinese)])
    encode = lambda texts: [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)]
    flat = encode([t for g in groups for t in (g[1], *g[2])])
    at, out = 0, []
    for kind, q, docs in groups:
        ids = flat[at:at + 1 + len(docs)]
        at += 1 + len(docs)
        if all(ids):
            out.append((kind, ids[0][:40], [d[:60] for d in ids[1:]]))
    print(collections.Counter(g[0] for g in out), flush=True)
    for kind in dict.fromkeys(g[0] for g in groups):
        for g in rng.sample([g for g in groups if g[0] == kind], 2):
            print("  ", *g, sep=" | ", flush=True)
    pickle.dump(out, open(f"{WORK}/everyday.pkl", "wb"))


if __name__ == "__main__":
    main()
