"""The `rerankers` package with its hosted providers, each with the URL of the tested server."""

from rerankers import Reranker
from seed import DOCUMENTS, QUERY, check


def provider(name, path):
    def rank(server, model, top_n, texts):
        ranker = Reranker(model, model_type="APIRanker", api_provider=name, api_key=server.key, url=server.url + path)
        ranked = ranker.rank(QUERY, DOCUMENTS, doc_ids=list(range(len(DOCUMENTS))))
        results = ranked.results if top_n is None else ranked.top_k(top_n)
        return [(one.doc_id, one.score, one.text) for one in results]

    return rank


# The package ignores the HTTP status and looks for results in the error's JSON: a dictionary key is missing.
NO_RESULTS = (KeyError, TypeError)
for name, path in (
    ("cohere", "/v1/rerank"),
    ("jina", "/v1/rerank"),
    ("voyage", "/v1/rerank"),
    ("mixedbread.ai", "/v1/reranking"),
    ("text-embeddings-inference", "/rerank"),
):
    check(
        f"rerankers ({name})",
        "rerankers",
        provider(name, path),
        wrong_key=NO_RESULTS,
        unknown_model=NO_RESULTS,
        overload=NO_RESULTS,
        not_offered=None,
    )
