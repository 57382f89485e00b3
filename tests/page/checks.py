"""The checks, and the pictures. A check is a function whose name is a sentence about the pages."""

import json
import re
import subprocess
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlparse

from webdriver import CONTROL, END, ENTER, ESCAPE, HOME, LEFT, RIGHT, SHIFT, TAB

EXAMPLE = Path(__file__).resolve().parent.parent.parent / "assets" / "example.txt"
EXAMPLE_DOCUMENTS = 6
# The best chunk of the example has the answer to its query.
ANSWER = "wake everyone at once and go outside"
MAX_PAGE_BYTES = 60_000
DESKTOP = (1280, 860)
PHONE = (390, 844)
AXE_TAGS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]

ALL = []


def check(function):
    ALL.append(function)
    return function


class Context:
    """What a check uses: the browser, the servers, and steps that several checks have in common."""

    def __init__(self, browser, servers, axe, work):
        self.browser, self.servers, self.axe, self.work = browser, servers, axe, work
        self.expected_errors = []
        self.scripts = []

    def reset(self):
        self.browser.screen(*DESKTOP)
        self.browser.open("about:blank")
        self.browser.console()

    def open(self, url=None, path="/", documents=EXAMPLE_DOCUMENTS):
        """Opens a page with an empty history of requests, and waits for its content."""
        self.browser.open((url or self.servers.open) + path)
        if path == "/":
            self.wait_for_documents(documents)
        else:
            self.browser.wait("return document.querySelectorAll('.operations section').length > 3", "the reference is empty")

    def wait_for_documents(self, number):
        script = "return document.querySelector('#run').textContent.startsWith(`Rank ${arguments[0]} `)"
        self.browser.wait(script, f"the form does not have {number} documents", number)

    def open_and_load_models(self, url=None):
        self.open(url)
        self.browser.wait("return document.querySelector('#model').value", "no models")

    def rank(self, press=None):
        """Ranks, by the button or by `press`, and waits for the ranking."""
        self.browser.js("document.querySelector('#status').textContent = ''")
        press() if press else self.browser.click("#run")
        self.browser.wait("return document.querySelector('#status').textContent.includes(' ranked in ')", "no ranking")
        self.browser.wait("return document.getAnimations().every((animation) => animation.playState !== 'running')", "movement")

    def fill(self, query, documents, separator="blank"):
        """Replaces the content of the form."""
        self.browser.click("#clear")
        self.browser.type("#query", query)
        script = """
            const [documents, separator] = arguments;
            document.querySelector("#separator").value = separator;
            const area = document.querySelector("#documents");
            area.value = documents;
            area.dispatchEvent(new Event("input", { bubbles: true }));
        """
        self.browser.js(script, documents, separator)

    def add_file(self, name, content):
        path = self.work / name
        path.write_bytes(content)
        self.browser.type("#file-input", str(path))

    def on_new_document(self, script):
        """Runs a script before those of the page, on each page of this check."""
        added = self.browser.cdp("Page.addScriptToEvaluateOnNewDocument", source=f"(() => {{ {script} }})();")
        self.scripts.append(added["identifier"])

    def remove_scripts(self):
        for identifier in self.scripts:
            self.browser.cdp("Page.removeScriptToEvaluateOnNewDocument", identifier=identifier)

    def check_console(self):
        """No error and no violation of the Content-Security-Policy was reported, apart from those the check expects."""
        for message in self.browser.console():
            assert any(expected in message for expected in self.expected_errors), f"console: {message}"

    def problems(self):
        return self.browser.text("#problem")

    def violations(self):
        """Violations of axe-core's rules on the present page."""
        self.browser.js(self.axe + "; window.axe = axe;")
        script = """
            return axe.run(document, { runOnly: arguments[0] }).then(({ violations, passes }) => ({
              passes: passes.length,
              violations: violations.map(({ id, help, nodes }) => `${id}: ${help}: ${nodes.map((node) => node.html.slice(0, 120)).join(" | ")}`),
            }));
        """
        result = self.browser.js(script, AXE_TAGS)
        assert result["passes"] > 10, "axe-core has checked nothing"
        return result["violations"]


def api(url, body, key=None):
    """The answer of the API itself, and its headers."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    with urllib.request.urlopen(urllib.request.Request(url + "/v1/rerank", json.dumps(body).encode(), headers)) as response:
        return json.load(response), response.headers


def shown_body(browser):
    """The request that the curl command on the page would send."""
    browser.js("document.querySelector('[value=curl]').click()")
    command = browser.js("return document.querySelector('#snippet').textContent")
    return json.loads(command.split("<<'JSON'\n")[1].removesuffix("\nJSON"))


def spans(text, chunk):
    """The text of a chunk. Python's strings count code points, as the API does."""
    return text[chunk["start"] : chunk["end"]]


# The page itself


@check
def pages_weigh_less_than_60_kb_and_load_from_this_server_only(test):
    for path in ("/", "/docs"):
        test.open(path=path)
        script = """
            const entries = [...performance.getEntriesByType("navigation"), ...performance.getEntriesByType("resource")];
            return entries.map(({ name }) => name);
        """
        loaded = test.browser.js(script)
        assert all(name.startswith(test.servers.open) for name in loaded), loaded
        files = [name for name in loaded if not urlparse(name).path.startswith(("/v1/", "/openapi.json"))]
        assert len(files) >= 4, files
        total = sum(len(urllib.request.urlopen(name).read()) for name in files)
        assert 10_000 < total < MAX_PAGE_BYTES, f"{path}: {total} bytes"


@check
def inline_scripts_and_other_hosts_are_blocked(test):
    test.open()
    test.expected_errors = ["Content Security Policy", "Content-Security-Policy"]
    script = """
        const inline = document.createElement("script");
        inline.textContent = "window.injected = true";
        document.body.append(inline);
        return fetch("http://127.0.0.2:9/").then(() => "sent", (error) => `${error} ${window.injected}`);
    """
    assert test.browser.js(script).endswith(" undefined"), "an inline script has run"
    assert any("connect-src" in message for message in test.browser.console()), "the request was not blocked by the policy"


# Searching


@check
def the_example_is_ranked_with_one_click_as_the_api_ranks_it(test):
    test.open_and_load_models()
    assert "not ranked yet" in test.browser.text("#results-title")
    body = shown_body(test.browser)
    assert body["documents"][-1] == EXAMPLE.read_text() and body["return_chunks"] == "all"
    test.rank()
    answer, _ = api(test.servers.open, body)
    shown = test.browser.js("""
        return [...document.querySelectorAll("#list > li")].map((li) => ({
          name: li.querySelector(".name").textContent,
          score: Number(li.querySelector(".score").lastChild.textContent),
          bar: new DOMMatrix(getComputedStyle(li.querySelector(".bar i")).transform).a,
        }));
    """)
    names = [f"Document {i + 1}" for i in range(5)] + ["hut-handbook.txt"]
    results = answer["results"]
    assert [row["name"] for row in shown] == [names[result["index"]] for result in results]
    for row, result in zip(shown, results, strict=True):
        assert abs(row["score"] - result["relevance_score"]) < 1e-3 and abs(row["bar"] - result["relevance_score"]) < 1e-3, (row, result)
    assert shown[0]["name"] == "hut-handbook.txt"
    assert "best first" in test.browser.text("#results-title")


@check
def timings_tokens_chunks_and_truncation_are_shown(test):
    test.open_and_load_models()
    body = shown_body(test.browser)
    test.rank()
    answer, headers = api(test.servers.open, body)
    chunks = sum(len(result["chunks"]) for result in answer["results"])
    stats = "dict = Object.fromEntries([...document.querySelectorAll('#stats > div')].map((row) => [...row.children].map((cell) => cell.textContent)))"
    shown = test.browser.js(f"let {stats}; return dict")
    assert shown["Tokens"] == f"{answer['usage']['total_tokens']:,}" and shown["Chunks"] == str(chunks), shown
    assert shown["Truncated"] == "nothing" and "query=0, documents=0, chunks=0" in headers["x-rerankd-truncated"]
    assert all(shown[name].endswith(("ms", "s")) for name in ("Total", "Tokenize", "Queue", "Inference")), shown
    # A query beyond its share of the window is truncated.
    test.fill("alarm " * 600, "one\n\ntwo")
    test.rank()
    assert test.browser.js(f"let {stats}; return dict")["Truncated"] == "the query"


@check
def the_form_says_that_it_has_changed_since_the_ranking(test):
    test.open_and_load_models()
    test.rank()
    assert not test.browser.count(".stale")
    test.browser.type("#query", " Please.")
    assert test.browser.count(".stale")
    test.rank()
    assert not test.browser.count(".stale")


@check
def documents_may_be_paragraphs_lines_or_a_json_array(test):
    test.open_and_load_models()
    for text, separator, expected in [
        ("one\n\ntwo\nlines\n \n\nthree\n", "blank", ["one", "two\nlines", "three"]),
        ("one\n\ntwo\nlines", "line", ["one", "two", "lines"]),
        (' ["a\\n\\nb", {"text": "c"}] ', "blank", ["a\n\nb", "c"]),
        ("[draft] one\n\n[1, 2]", "blank", ["[draft] one", "[1, 2]"]),
    ]:
        test.fill("q", text, separator)
        test.wait_for_documents(len(expected))
        assert shown_body(test.browser)["documents"] == expected


@check
def text_in_documents_is_never_markup(test):
    test.open_and_load_models()
    hostile = "<img src=x onerror='window.injected = true'><b>bold</b> \"quoted\" $(touch x) `id`"
    test.fill("bold <i>query</i>", hostile + "\n\nanother")
    test.add_file("<s>name.txt", (hostile * 60).encode())
    test.wait_for_documents(3)
    test.rank()
    assert not test.browser.count("img, #list b:not(.detail b), s, #results i:not(.bar i)")
    assert test.browser.js("return window.injected ?? null") is None
    assert hostile in test.browser.text("#list")


@check
def a_thousand_documents_are_ranked_and_shown_in_parts(test):
    test.open_and_load_models()
    test.fill("number seven", "\n".join(f"The number of this line is {i}." for i in range(1000)), "line")
    test.wait_for_documents("1,000")
    test.rank()
    assert test.browser.count("#list > li") == 20
    test.browser.click("#more")
    assert test.browser.count("#list > li") == 70
    body = shown_body(test.browser)
    assert len(body["documents"]) == 1000


# Files


@check
def text_files_become_documents_and_other_files_are_refused(test):
    test.open_and_load_models()
    test.add_file("notes.md", "# Notes\n\nThe alarm is white — 警报。".encode())
    test.wait_for_documents(EXAMPLE_DOCUMENTS + 1)
    assert shown_body(test.browser)["documents"][-1] == "# Notes\n\nThe alarm is white — 警报。"
    for name, content in [("picture.png", b"\x89PNG\r\n\x1a\n\0\0"), ("latin.txt", "Grüße".encode("latin-1")), ("nul.txt", b"a\0b"), ("empty.txt", b"\n")]:
        test.add_file(name, content)
        test.browser.wait("return document.querySelector('#files-error').textContent.includes(arguments[0])", f"{name} is accepted", name)
    assert test.browser.count("#files li") == 2
    test.browser.click("#files li:last-child button")
    test.wait_for_documents(EXAMPLE_DOCUMENTS)


@check
def files_can_be_dropped_anywhere(test):
    test.open_and_load_models()
    drop = """
        const transfer = new DataTransfer();
        for (const [name, text] of arguments[0]) transfer.items.add(new File([text], name));
        for (const type of ["dragover", "drop"]) {
          document.querySelector("#results").dispatchEvent(new DragEvent(type, { dataTransfer: transfer, bubbles: true, cancelable: true }));
        }
    """
    test.browser.js(drop, [["a.txt", "first"], ["b.log", "second"]])
    test.wait_for_documents(EXAMPLE_DOCUMENTS + 2)
    assert shown_body(test.browser)["documents"][-2:] == ["first", "second"]
    assert not test.browser.count(".dropping")


# Long documents


@check
def a_long_document_shows_its_chunks_and_the_best_one_in_context(test):
    test.open_and_load_models()
    body = shown_body(test.browser)
    test.rank()
    answer, _ = api(test.servers.open, body)
    [result] = [result for result in answer["results"] if result["index"] == EXAMPLE_DOCUMENTS - 1]
    chunks = result["chunks"]
    assert len(chunks) > 3 and result["chunk"] in chunks
    options = test.browser.js("""
        return [...document.querySelectorAll("#list .first .strip [role=option]")].map((option) => ({
          label: option.ariaLabel, selected: option.ariaSelected, heat: Number(option.style.getPropertyValue("--heat")), width: option.offsetWidth,
          color: getComputedStyle(option).backgroundColor,
        }));
    """)
    assert len(options) == len(chunks)
    best = chunks.index(result["chunk"])
    for i, (option, chunk) in enumerate(zip(options, chunks)):
        assert option["label"].startswith(f"Chunk {i + 1} of {len(chunks)}, score {chunk['relevance_score']:.3f}"[:-1]), option
        assert option["label"].endswith(", the best") == (i == best) and option["selected"] == str(i == best).lower()
        assert abs(option["heat"] - chunk["relevance_score"]) < 1e-9 and option["width"] > 10
    coldest = min(range(len(chunks)), key=lambda i: chunks[i]["relevance_score"])
    assert options[best]["color"] != options[coldest]["color"]
    marked = test.browser.js("return document.querySelector('.first mark').textContent")
    assert marked == spans(EXAMPLE.read_text(), result["chunk"]) and ANSWER in marked
    # The answer is in view, and the text around the chunk is there.
    in_view = """
        const [pane, text] = [document.querySelector(".first .pane"), arguments[0]];
        const range = document.createRange();
        for (const node of pane.querySelector("mark").childNodes) {
          const at = node.textContent.indexOf(text);
          if (at >= 0) range.setStart(node.firstChild ?? node, at);
        }
        const [inner, outer] = [range.getBoundingClientRect(), pane.getBoundingClientRect()];
        return inner.top >= outer.top && inner.top < outer.bottom - 20;
    """
    assert test.browser.js(in_view, ANSWER), "the answer is not in view"
    pane = test.browser.js("return document.querySelector('.first .pane').textContent")
    assert len(pane) > len(marked) + 1000
    test.browser.click(".first .entry > .link")
    assert test.browser.js("return document.querySelector('.first .pane').textContent") == EXAMPLE.read_text()


@check
def each_chunk_can_be_chosen_with_keys_and_pointer(test):
    test.open_and_load_models()
    body = shown_body(test.browser)
    test.rank()
    answer, _ = api(test.servers.open, body)
    chunks = answer["results"][0]["chunks"]
    text = EXAMPLE.read_text()

    def chosen():
        mark = test.browser.js("return document.querySelector('.first mark').textContent")
        [index] = [i for i, chunk in enumerate(chunks) if spans(text, chunk) == mark]
        detail = test.browser.text(".first .detail")
        assert f"Chunk {index + 1} of {len(chunks)}" in detail and f"{chunks[index]['relevance_score']:.3f}"[:-1] in detail, detail
        assert test.browser.js("return document.querySelector('.first [aria-selected=true]').tabIndex") == 0
        assert test.browser.count(".first [role=option][tabindex='0']") == 1
        return index

    test.browser.js("document.querySelector('.first [aria-selected=true]').focus()")
    for key, expected in [(HOME, 0), (RIGHT, 1), (RIGHT, 2), (LEFT, 1), (END, len(chunks) - 1), (RIGHT, len(chunks) - 1)]:
        test.browser.keys(key)
        assert chosen() == expected, key
    test.browser.click(".first [role=option]:nth-child(2)")
    assert chosen() == 1


@check
def chunks_are_marked_right_in_text_beyond_the_basic_plane(test):
    test.open_and_load_models()
    text = "😀 𝒜 " * 400 + EXAMPLE.read_text() + " 🏔" * 300
    test.fill("carbon monoxide alarm", "short")
    test.add_file("emoji.txt", text.encode())
    test.wait_for_documents(2)
    test.rank()
    answer, _ = api(test.servers.open, shown_body(test.browser))
    [result] = [result for result in answer["results"] if result["index"] == 1]
    assert spans(text, result["chunk"]) == test.browser.js("return document.querySelector('#list mark').textContent")
    assert result["chunk"]["start"] > 0


@check
def what_was_not_read_of_a_document_is_shown(test):
    url = test.servers.start("short", "--max-document-chars", "4000")
    test.open_and_load_models(url)
    test.rank()
    assert "1 document" in test.browser.text("#stats .warn")
    widths = test.browser.js("return [...document.querySelector('.strip').children].map((part) => [part.className, part.offsetWidth])")
    assert [name for name, _ in widths] == ["chunks", "unread"], widths
    share = widths[1][1] / (widths[0][1] + widths[1][1])
    assert abs(share - (1 - 4000 / len(EXAMPLE.read_text()))) < 0.02, widths
    test.servers.stop_last()


@check
def answers_of_servers_without_chunks_are_shown(test):
    test.on_new_document("""
        const { fetch } = window;
        window.fetch = async (...request) => {
          const response = await fetch(...request);
          if (request[0] !== "v1/rerank") return response;
          const answer = await response.json();
          for (const result of answer.results) delete result.chunks;
          delete answer.results[window.keptChunks ?? 0].chunk;
          return new Response(JSON.stringify(answer), response);
        };
    """)
    test.open_and_load_models()
    test.rank()
    assert test.browser.count("#list > li") == EXAMPLE_DOCUMENTS and not test.browser.count(".strip, mark")
    assert test.browser.text(".first .text").startswith("HANDBOOK")
    # Only the best chunk, as with `return_chunks: true`.
    test.browser.js("window.keptChunks = 5")
    test.rank()
    assert not test.browser.count(".strip") and ANSWER in test.browser.text(".first mark")


@check
def an_instruction_can_be_given_to_models_that_take_one(test):
    test.open_and_load_models()
    assert not test.browser.is_visible("#instruction")
    test.on_new_document("""
        const { fetch } = window;
        window.fetch = async (...request) => {
          const response = await fetch(...request);
          if (request[0] !== "v1/models") return response;
          const { data } = await response.json();
          return Response.json({ data: [...data, { ...data[0], id: "mini", takes_instruction: true }] });
        };
    """)
    test.open_and_load_models()
    assert not test.browser.is_visible("#instruction")
    test.browser.js("document.querySelector('#model').value = 'mini'; document.querySelector('#model').dispatchEvent(new Event('change'))")
    test.browser.type("#instruction", "Prefer safety.")
    body = shown_body(test.browser)
    assert (body["model"], body["instruction"]) == ("mini", "Prefer safety.")
    test.rank()
    test.browser.js("document.querySelector('#model').value = 'rerankd-mini'; document.querySelector('#model').dispatchEvent(new Event('change'))")
    assert not test.browser.is_visible("#instruction") and "instruction" not in shown_body(test.browser)


# Errors


@check
def an_empty_form_says_what_is_missing(test):
    test.open_and_load_models()
    test.browser.click("#clear")
    assert test.browser.focused() == "query"
    assert test.browser.js("return document.querySelector('.empty p').offsetWidth") > 250
    test.browser.click("#run")
    assert test.browser.text("#query-error") and test.browser.text("#documents-error")
    assert test.browser.focused() == "query"
    test.browser.type("#query", "alarm")
    assert not test.browser.is_visible("#query-error")
    test.browser.click("#run")
    assert test.browser.focused() == "documents"
    test.browser.click(".empty button")
    test.wait_for_documents(EXAMPLE_DOCUMENTS)
    test.rank()


@check
def errors_of_the_server_are_shown_in_its_words(test):
    test.open_and_load_models()
    test.expected_errors = ["status of 400"]
    test.fill("q", "\n".join(map(str, range(test.servers.MAX_DOCUMENTS + 1))), "line")
    test.wait_for_documents("1,001")
    try:
        api(test.servers.open, shown_body(test.browser))
        raise AssertionError("the server accepts the request")
    except urllib.error.HTTPError as error:
        message = json.load(error)["message"]
    test.browser.click("#run")
    test.browser.wait("return document.querySelector('#problem').textContent", "no problem is shown")
    assert message in test.problems() and "400" in test.problems()
    assert not test.browser.count("#problem button"), "the same request would fail again"
    assert test.browser.js("return document.querySelector('#problem').getAttribute('role')") == "alert"
    test.fill("q", "one\n\ntwo")
    test.rank()
    assert test.problems() == ""


@check
def an_overload_says_when_to_try_again(test):
    test.on_new_document("""
        const { fetch } = window;
        window.fetch = (...request) =>
          request[0] === "v1/rerank" && !window.isIdle
            ? Promise.resolve(Response.json({ message: "too busy" }, { status: 503, headers: { "retry-after": "7" } }))
            : fetch(...request);
    """)
    test.open_and_load_models()
    test.browser.click("#run")
    test.browser.wait("return document.querySelector('#problem').textContent", "no problem is shown")
    assert "too busy" in test.problems() and "7 s" in test.problems()
    test.browser.js("window.isIdle = true")
    test.rank(lambda: test.browser.click("#problem button"))
    assert test.problems() == ""


@check
def a_server_that_is_gone_is_reported(test):
    url = test.servers.start("gone")
    test.open_and_load_models(url)
    test.servers.stop_last()
    test.expected_errors = ["ERR_CONNECTION"]
    test.browser.click("#run")
    test.browser.wait("return document.querySelector('#problem').textContent", "no problem is shown")
    assert "does not answer" in test.problems() and test.browser.count("#problem button")
    assert test.browser.text("#run").startswith("Rank")


@check
def a_slow_request_shows_progress_and_escape_cancels_it(test):
    test.on_new_document("""
        const { fetch } = window;
        window.fetch = (...request) => {
          if (request[0] !== "v1/rerank" || window.isFast) return fetch(...request);
          return new Promise((_, reject) => request[1].signal.addEventListener("abort", () => reject(request[1].signal.reason)));
        };
    """)
    test.open_and_load_models()
    test.browser.click("#run")
    test.browser.wait("return document.querySelector('#progress').checkVisibility()", "no progress")
    assert test.browser.text("#run") == "Cancel" and "6 documents" in test.browser.text("#progress")
    test.browser.keys(ESCAPE)
    test.browser.wait("return !document.querySelector('#progress').checkVisibility()", "not cancelled")
    assert test.browser.text("#run").startswith("Rank") and test.problems() == ""
    assert test.browser.text("#status") == "Cancelled."
    test.browser.js("window.isFast = true")
    test.rank()


# Keys


@check
def a_key_is_asked_for_and_a_wrong_one_refused(test):
    test.expected_errors = ["status of 401"]
    test.open(test.servers.closed)
    test.browser.wait("return document.querySelector('#key').checkVisibility()", "no field for the key")
    assert "needs a key" in test.browser.text("#key-error") and "model" not in shown_body(test.browser)
    test.browser.type("#key", "wrong")
    test.browser.click("#run")
    test.browser.wait("return document.querySelector('#key-error').textContent.includes('refuses')", "a wrong key is not refused")
    assert test.browser.focused() == "key" and not test.browser.count("#list .first")
    test.browser.js("document.querySelector('#key').value = ''")
    test.browser.type("#key", test.servers.KEY + TAB)
    test.browser.wait("return document.querySelector('#model').value", "no models with the right key")
    assert test.browser.text("#key-error") == ""
    test.rank()
    assert test.browser.text(".first .name") == "hut-handbook.txt"


@check
def the_key_is_in_no_address_no_storage_and_no_code(test):
    test.expected_errors = ["status of 401"]
    test.open(test.servers.closed)
    test.browser.wait("return document.querySelector('#key').checkVisibility()", "no field for the key")
    test.browser.type("#key", test.servers.KEY + TAB)
    test.browser.wait("return document.querySelector('#model').value", "no models with the right key")
    test.rank()
    places = test.browser.js("""
        const code = ["curl", "python", "javascript"].map((language) => {
          document.querySelector(`[value=${language}]`).click();
          return document.querySelector("#snippet").textContent;
        });
        const requests = performance.getEntriesByType("resource").map(({ name }) => name);
        return [location.href, document.cookie, JSON.stringify(localStorage), JSON.stringify(sessionStorage),
          JSON.stringify(history.state), document.documentElement.outerHTML, ...requests, ...code];
    """)
    assert len(places) > 10 and not any(test.servers.KEY in place for place in places)
    assert all("RERANKD_API_KEY" in code for code in places[-3:]), places[-3:]
    # A form without names cannot put its fields into an address.
    assert not test.browser.count("form[action], form [name]:not([name=language])")
    test.browser.open(test.browser.url())
    test.browser.wait("return document.querySelector('#key').checkVisibility()", "no field for the key")
    assert test.browser.js("return document.querySelector('#key').value") == ""


# Code


@check
def the_code_on_the_page_gives_the_ranking_on_the_page(test):
    test.open_and_load_models()
    test.fill("it's \"quoted\" $HOME `id` \\n", "an apple's core\n\nquoted \\ text \u2028 😀\n\nJSON\nEOF")
    test.rank()
    order = [int(name.split()[1]) - 1 for name in test.browser.js("return [...document.querySelectorAll('.name')].map((name) => name.textContent)")]
    for language, command in [("curl", ["bash"]), ("python", ["python3", "-"]), ("javascript", ["node", "--input-type=module", "-"])]:
        test.browser.js("document.querySelector(`[value=${arguments[0]}]`).click()", language)
        code = test.browser.js("return document.querySelector('#snippet').textContent")
        assert "RERANKD_API_KEY" not in code, "this server needs no key"
        done = subprocess.run(command, input=code, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{language}: {done.stderr}"
        if language == "curl":
            found = [result["index"] for result in json.loads(done.stdout)["results"]]
        else:
            found = [int(line.split()[0]) for line in done.stdout.splitlines()]
        assert found == order, f"{language}: {done.stdout}"


@check
def copy_copies_the_code(test):
    test.open_and_load_models()
    for has_clipboard in (True, False):
        test.browser.js("""
            window.copied = null;
            const writeText = (text) => (arguments[0] ? (window.copied = text) : Promise.reject(new Error("no clipboard")));
            Object.defineProperty(navigator, "clipboard", { value: { writeText }, configurable: true });
            document.execCommand = () => (window.copied = document.activeElement.value);
        """, has_clipboard)
        test.browser.click("#copy")
        test.browser.wait("return window.copied === document.querySelector('#snippet').textContent", "not copied")


# Everyone


@check
def narrow_screens_have_no_horizontal_scrolling(test):
    for width in (PHONE[0], 320):
        test.browser.screen(width, PHONE[1])
        for path in ("/", "/docs"):
            test.open(path=path)
            if path == "/":
                test.browser.wait("return document.querySelector('#model').value", "no models")
                test.rank()
                top = test.browser.js("return document.querySelector('#results').getBoundingClientRect().top")
                assert top < PHONE[1] / 2, "the results are not in view"
            sizes = test.browser.js("return [document.documentElement.scrollWidth, innerWidth]")
            assert sizes[0] <= sizes[1] == width, f"{path} at {width}: {sizes}"


@check
def dark_and_light_follow_the_system(test):
    lightness = "const rgb = getComputedStyle(document.body)[arguments[0]].match(/[\\d.]+/g).map(Number); return rgb[0] + rgb[1] + rgb[2]"
    for path in ("/", "/docs"):
        for is_dark in (False, True):
            test.browser.screen(*DESKTOP, dark=is_dark)
            test.open(path=path)
            paper, ink = (test.browser.js(lightness, name) for name in ("backgroundColor", "color"))
            assert (paper < 200 and ink > 600) if is_dark else (paper > 700 and ink < 200), (path, is_dark, paper, ink)


@check
def everything_works_with_the_keyboard_alone(test):
    test.open_and_load_models()
    test.browser.keys(TAB)
    assert test.browser.focused() == "a.skip", test.browser.focused()
    reached = []
    for _ in range(60):
        test.browser.keys(TAB)
        reached.append(test.browser.focused())
        if reached[-1] == "snippet":
            break
    form = [name for name in reached if name in ("query", "separator", "documents", "file-input", "clear", "model", "run", "snippet")]
    assert form == ["query", "separator", "documents", "file-input", "clear", "model", "run", "snippet"], reached
    outline = "return getComputedStyle(document.activeElement).outlineStyle"
    assert test.browser.js(outline) != "none", "the focus is not visible"
    # Enter in the query ranks; Shift with Enter is a new line; Control with Enter ranks from the documents.
    test.browser.js("document.querySelector('#query').focus()")
    test.browser.keys(ENTER, hold=SHIFT)
    assert "\n" in test.browser.js("return document.querySelector('#query').value")
    test.rank(lambda: test.browser.keys(ENTER))
    test.browser.js("document.querySelector('#documents').focus()")
    test.rank(lambda: test.browser.keys(ENTER, hold=CONTROL))
    # From the button to the chosen chunk, to another chunk, to the text, and to its button.
    test.browser.js("document.querySelector('#run').focus()")
    test.browser.keys(TAB, TAB)
    assert test.browser.js("return document.activeElement.getAttribute('aria-label')").endswith("the best")
    test.browser.keys(RIGHT)
    assert not test.browser.js("return document.activeElement.getAttribute('aria-label')").endswith("the best")
    test.browser.keys(TAB)
    assert test.browser.js("return document.activeElement.className").startswith("pane")
    test.browser.keys(TAB, ENTER)
    assert test.browser.js("return document.activeElement.getAttribute('aria-expanded')") == "true"


@check
def the_ranking_is_announced(test):
    test.open_and_load_models()
    test.rank()
    said = test.browser.js("return document.querySelector('[role=status]').textContent")
    assert said.startswith("6 documents ranked in ") and "Best: hut-handbook.txt, score 0.9" in said, said


@check
def nothing_moves_for_those_who_ask_for_less_motion(test):
    test.browser.cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-reduced-motion", "value": "reduce"}])
    test.open_and_load_models()
    test.browser.js("document.startViewTransition = () => { throw new Error('a transition') }")
    test.rank()
    assert test.browser.js("return document.getAnimations().length") == 0


@check
def axe_finds_nothing_on_any_page_in_any_state(test):
    test.expected_errors = ["status of 401", "status of 400"]

    def clean(state):
        found = test.violations()
        assert not found, f"{state}: {'; '.join(found)}"

    for is_dark in (False, True):
        for size in (DESKTOP, PHONE):
            name = f"{'dark' if is_dark else 'light'} {size[0]}"
            test.browser.screen(*size, dark=is_dark)
            test.open_and_load_models()
            clean(f"{name}, example")
            test.rank()
            clean(f"{name}, ranking")
            test.browser.click("#clear")
            test.browser.click("#run")
            clean(f"{name}, empty form")
            test.open(test.servers.closed)
            test.browser.type("#key", "wrong" + TAB)
            test.browser.wait("return document.querySelector('#key-error').textContent.includes('refuses')", "a wrong key is not refused")
            clean(f"{name}, wrong key")
            test.open(path="/docs")
            test.browser.js("document.querySelectorAll('details').forEach((details) => (details.open = true))")
            clean(f"{name}, reference")
    test.browser.js("document.body.insertAdjacentHTML('beforeend', '<button></button>')")
    assert test.violations(), "axe-core finds a button without a name"


# The reference


@check
def the_reference_has_every_path_field_and_status(test):
    test.open(path="/docs")
    with urllib.request.urlopen(test.servers.open + "/openapi.json") as response:
        contract = json.load(response)
    shown = test.browser.js("""
        return [...document.querySelectorAll(".operations section")].map((section) => [
          section.querySelector("h2").textContent, [...section.querySelectorAll("tbody th code")].map((code) => code.textContent),
        ]);
    """)
    shown = dict(shown)
    operations = [(method.upper(), path, details) for path, methods in contract["paths"].items() for method, details in methods.items()]
    assert len(operations) > 8
    for method, path, details in operations:
        names = shown[f"{method} {path}"]
        assert set(details["responses"]) <= set(names), (path, names)
    schemas = contract["components"]["schemas"]
    for path, schema in [("/v1/rerank", "RerankBody"), ("/v1/rerank", "TextsBody"), ("/v1/ranking", "PassagesBody"), ("/v1/reranking", "InputBody"), ("/v1/score", "TextPairsBody")]:
        assert set(schemas[schema]["properties"]) <= set(shown[f"POST {path}"]), schema
    assert "results[].relevance_score" in shown["POST /v1/rerank"] and "error.type" in shown["Errors"]
    assert list(shown)[0] == "POST /v1/rerank"
    text = test.browser.js("return document.querySelector('.operations').textContent")
    strange = re.search(r".{0,50}(undefined|\[object|\bNaN\b)", text)
    assert not strange, strange.group()
    headings = test.browser.js("return [...document.querySelectorAll('.operations h3')].map((heading) => heading.textContent)")
    assert "Request with documents" in headings and "Request with texts" in headings, headings


@check
def the_examples_of_the_reference_work(test):
    test.open(path="/docs")
    examples = test.browser.js("return [...document.querySelectorAll('.operations pre')].map((pre) => pre.textContent)")
    assert len(examples) > 8
    for example in examples:
        done = subprocess.run(["bash"], input=example.replace("curl ", "curl --silent --fail-with-body ", 1), capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and done.stdout, f"{example}: {done.stdout}"
    test.open(test.servers.closed, path="/docs")
    examples = test.browser.js("return [...document.querySelectorAll('.operations pre')].map((pre) => pre.textContent)")
    assert any("RERANKD_API_KEY" in example for example in examples)


# Pictures


def screenshots(browser, servers, folder):
    test = Context(browser, servers, "", folder)
    for name, size, is_dark, scale in [("light", DESKTOP, False, 1.5), ("dark", DESKTOP, True, 1.5), ("phone", PHONE, False, 2)]:
        browser.screen(*size, dark=is_dark, scale=scale)
        test.open_and_load_models(servers.open)
        settle(browser)
        browser.screenshot(folder / f"{name}-example.webp")
        test.rank()
        settle(browser)
        browser.screenshot(folder / f"{name}.webp")
        browser.js("document.querySelector('#code').scrollIntoView({ behavior: 'instant' })")
        settle(browser)
        browser.screenshot(folder / f"{name}-code.webp")
        test.open(servers.open, path="/docs")
        settle(browser)
        browser.screenshot(folder / f"{name}-reference.webp")


def settle(browser):
    """Waits for fonts and for the end of all movement."""
    browser.js("return document.fonts.ready.then(() => new Promise((done) => setTimeout(done, 500)))")
