"""Two English collections from Debian packages that no training step reads: questions of FAQs, each with its answer among all answers.

    collections.py OUT

`programming`: perl-doc's perlfaq and the FAQ of python3-doc. `debian`: debian-faq. Written in BEIR format for `rerankd eval`.
"""
import glob, html, json, os, re, sys
W = os.environ.get("MINI_WORK", "./work")


def squeeze(s):
    return re.sub(r"\s+", " ", s).strip()


def perl():
    for path in sorted(glob.glob(f"{W}/eval/perl-doc/usr/share/perl/*/pod/perlfaq?.pod")):
        for part in re.split(r"^=head2 ", open(path, encoding="utf-8", errors="replace").read(), flags=re.M)[1:]:
            title, _, body = part.partition("\n")
            body = re.split(r"^=head1", body, flags=re.M)[0]
            clean = lambda t: re.sub(r"[A-Z]<+ ?(.*?) ?>+", r"\1", t)
            body = squeeze(clean(re.sub(r"^=\w+.*$|X<[^>]*>", " ", body, flags=re.M)))
            title = squeeze(clean(re.sub(r"X<[^>]*>", "", title)))
            if len(body) > 80:
                yield title, body


def pages(pattern, heading):
    for path in sorted(glob.glob(pattern)):
        text = open(path, encoding="utf-8", errors="replace").read()
        for part in re.split(heading, text)[1:]:
            title, _, body = part.partition("</h")
            body = re.split(r"<h[123]\b|<div class=\"(?:clearer|sphinxsidebar|navfooter)", body)[0]
            strip = lambda t: squeeze(html.unescape(re.sub(r"<[^>]+>", " ", t)))
            title = re.sub(r"^[\d.\s\u00a0]+|[¶#]", "", strip(title)).strip()
            body = strip(body.partition(">")[2])
            if len(body) > 80 and len(title) > 8:
                yield title, body


def write(name, entries):
    out = f"{sys.argv[1]}/{name}"
    os.makedirs(f"{out}/qrels", exist_ok=True)
    seen = {}
    for q, d in entries:
        seen.setdefault(q, d)
    with open(f"{out}/corpus.jsonl", "w") as c, open(f"{out}/queries.jsonl", "w") as q, open(f"{out}/qrels/test.tsv", "w") as r:
        r.write("query-id\tcorpus-id\tscore\n")
        for i, (question, answer) in enumerate(seen.items()):
            c.write(json.dumps(dict(_id=f"d{i}", title="", text=answer)) + "\n")
            q.write(json.dumps(dict(_id=f"q{i}", text=question)) + "\n")
            r.write(f"q{i}\td{i}\t1\n")
    print(name, len(seen), "questions;", *list(seen)[:4], sep="\n   ")


write("programming", [*perl(), *pages(f"{W}/eval/python3.11-doc/usr/share/doc/python3.11/html/faq/[dglpew]*.html", r"<h3>(?=<a|[A-Z])")])
write("debian", pages(f"{W}/eval/debian-faq/usr/share/doc/debian/FAQ/*.en.html", r"<h[23][^>]*>"))
