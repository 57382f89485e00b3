"""Applications that cannot be run here: each function sends what the application sends and reads what it reads.

The sources are the applications' own code: Milvus (internal/util/function/models), Weaviate (modules/reranker-transformers),
Elasticsearch (x-pack inference, huggingface), TiDB autoflow and vLLM (score API), LibreChat (agents, search rerankers), and the
Fetch standard for browsers.
"""

import json
import urllib.error
import urllib.request

from seed import DOCUMENTS, MODEL, QUERY, check

ORIGIN = "https://app.example"
LIBRECHAT_MODEL = "jina-reranker-v2-base-multilingual"


class Refused(Exception):
    """The status is not 2xx. The text is what the application shows of the response."""


def send(server, path, body=None, method=None, headers=None, read_error=lambda error: error["error"]["message"]):
    """Returns the response's headers and JSON. `read_error` finds the message in an error's JSON as the application does."""
    headers = {"content-type": "application/json", "authorization": f"Bearer {server.key}", **(headers or {})}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(server.url + path, data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            content = response.read()
            return response.headers, json.loads(content) if content else None
    except urllib.error.HTTPError as error:
        message = read_error(json.load(error))
        assert isinstance(message, str), f"the application expects a text: {message!r}"
        raise Refused(message) from error


def best_first(scores):
    return sorted(scores, key=lambda one: -one[1])


def milvus_vllm(server, model, top_n, texts):
    """Sends no model, sorts by index, and needs every document."""
    _, answer = send(server, "/rerank", {"query": QUERY, "documents": DOCUMENTS}, read_error=lambda error: error["message"])
    results = sorted(answer["results"], key=lambda one: one["index"])
    assert [one["index"] for one in results] == list(range(len(DOCUMENTS)))
    return best_first([(one["index"], one["relevance_score"], None) for one in results])


def text_error(error):
    return error["error"]


def milvus_tei(server, model, top_n, texts):
    body = {"query": QUERY, "texts": DOCUMENTS, "truncate": True, "truncation_direction": "Right"}
    _, answer = send(server, "/rerank", body, read_error=text_error)
    assert all(set(one) == {"index", "score"} for one in answer)
    return best_first([(one["index"], one["score"], None) for one in answer])


def elasticsearch(server, model, top_n, texts):
    """Refuses a result with a key that it does not know."""
    body = {"query": QUERY, "texts": DOCUMENTS, "return_text": texts, **({} if top_n is None else {"top_n": top_n})}
    _, answer = send(server, "/rerank", body, read_error=text_error)
    assert all(set(one) <= {"index", "score", "relevance_score", "text", "document"} for one in answer)
    return [(one["index"], one["score"], one.get("text")) for one in answer]


def weaviate(server, model, top_n, texts):
    """Asks two paths at its start; finds each document by its text."""
    send(server, "/.well-known/ready", method="GET")
    _, meta = send(server, "/meta", method="GET", read_error=text_error)
    assert isinstance(meta, dict)
    _, answer = send(server, "/rerank", {"query": QUERY, "documents": DOCUMENTS, "property": ""}, read_error=text_error)
    scores = {one["document"]: one["score"] for one in answer["scores"]}
    return best_first([(i, scores[text], None) for i, text in enumerate(DOCUMENTS)])


def score_api(server, model, top_n, texts):
    body = {"model": model, "text_1": QUERY, "text_2": DOCUMENTS}
    _, answer = send(server, "/v1/score", body)
    assert answer["object"] == "list" and all(one["object"] == "score" for one in answer["data"])
    return best_first([(one["index"], one["score"], None) for one in answer["data"]])


def librechat(server, model, top_n, texts):
    """Jina's format with one fixed model name, which the server knows by `--alias`."""
    model = LIBRECHAT_MODEL if model == MODEL else model
    body = {"model": model, "query": QUERY, "top_n": top_n, "documents": DOCUMENTS, "return_documents": True}
    _, answer = send(server, "/v1/rerank", body)
    return [(one["index"], one["relevance_score"], one["document"]["text"]) for one in answer["results"]]


def browser(server, model, top_n, texts):
    """A page of another origin: the preflight request carries no key."""
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    preflight, _ = send(server._replace(key=""), "/v1/rerank", method="OPTIONS", headers={"origin": ORIGIN, **asked})
    assert preflight["access-control-allow-origin"] == ORIGIN
    assert {"authorization", "content-type"} <= set(preflight["access-control-allow-headers"].lower().split(","))
    assert "POST" in preflight["access-control-allow-methods"]
    body = {"model": model, "query": QUERY, "documents": DOCUMENTS, "top_n": top_n, "return_documents": texts}
    headers, answer = send(server, "/v1/rerank", body, headers={"origin": ORIGIN})
    assert headers["access-control-allow-origin"] == ORIGIN
    return [(one["index"], one["relevance_score"], one["document"]["text"] if texts else None) for one in answer["results"]]


NO_MODEL = {"unknown model": "it sends no model"}
NO_TOP_N = {"top_n": "it has no such setting"}
NO_TEXTS = {"return_documents": "it does not ask for texts"}
ALL = dict(wrong_key=Refused, unknown_model=Refused, overload=Refused)
check("Milvus, vLLM provider", None, milvus_vllm, **ALL, not_offered=NO_MODEL | NO_TOP_N | NO_TEXTS)
check("Milvus, TEI provider", None, milvus_tei, **ALL, not_offered=NO_MODEL | NO_TOP_N | NO_TEXTS)
check("Elasticsearch hugging_face", None, elasticsearch, **ALL, not_offered=NO_MODEL)
check("Weaviate reranker-transformers", None, weaviate, **ALL, not_offered=NO_MODEL | NO_TOP_N | NO_TEXTS)
check("TiDB autoflow, vLLM score API", None, score_api, **ALL, not_offered=NO_TOP_N | NO_TEXTS)
check("LibreChat", None, librechat, **ALL)
check("browser page (CORS)", None, browser, **ALL)
