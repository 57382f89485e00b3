"""Cohere's SDK: its two synchronous clients and the asynchronous one of its v2 API. Runs with the latest version and with version 5."""

import asyncio
from functools import partial

import cohere
from cohere.errors import BadRequestError, ServiceUnavailableError, UnauthorizedError
from seed import DOCUMENTS, QUERY, check

ERRORS = {"wrong_key": UnauthorizedError, "unknown_model": BadRequestError, "overload": ServiceUnavailableError}


def settings(server, path=""):
    return {"api_key": server.key, "base_url": server.url + path}


def question(model, top_n):
    return {"model": model, "query": QUERY, "documents": DOCUMENTS, "top_n": top_n, "request_options": {"max_retries": 0}}


def v1(server, model, top_n, texts):
    answer = cohere.Client(**settings(server)).rerank(**question(model, top_n), return_documents=texts)
    return [(one.index, one.relevance_score, one.document.text if texts else None) for one in answer.results]


def v2(server, model, top_n, texts, path=""):
    answer = cohere.ClientV2(**settings(server, path)).rerank(**question(model, top_n), max_tokens_per_doc=4096)
    return [(one.index, one.relevance_score, None) for one in answer.results]


def v2_async(server, model, top_n, texts):
    async def ask():
        return await cohere.AsyncClientV2(**settings(server)).rerank(**question(model, top_n))

    return [(one.index, one.relevance_score, None) for one in asyncio.run(ask()).results]


NO_TEXTS = {"return_documents": "v2 has no such parameter"}
check("cohere.Client", "cohere", v1, **ERRORS)
check("cohere.ClientV2", "cohere", v2, **ERRORS, not_offered=NO_TEXTS)
for path in ("/v1", "/v2", "/"):
    # The SDK adds the API version to the path; a base URL that already has it also works.
    check(f"cohere.ClientV2, base URL with {path}", "cohere", partial(v2, path=path), **ERRORS, not_offered=NO_TEXTS)
check("cohere.AsyncClientV2", "cohere", v2_async, **ERRORS, not_offered=NO_TEXTS)
