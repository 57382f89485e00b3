"""Haystack's rankers. They return the caller's documents, ordered and with scores."""

from cohere.errors import BadRequestError, ServiceUnavailableError, UnauthorizedError
from haystack import Document
from haystack.utils import Secret
from haystack_integrations.components.rankers.cohere import CohereRanker
from haystack_integrations.components.rankers.huggingface_api import HuggingFaceTEIRanker
from haystack_integrations.components.rankers.jina import JinaRanker
from haystack_integrations.components.rankers.nvidia import NvidiaRanker
from seed import DOCUMENTS, QUERY, check

OWN_DOCUMENTS = {"return_documents": "returns the caller's documents"}


def rank_with(ranker):
    documents = [Document(id=str(i), content=text) for i, text in enumerate(DOCUMENTS)]
    ranked = ranker.run(query=QUERY, documents=documents)["documents"]
    return [(int(one.id), one.score, one.content) for one in ranked]


def count(top_n):
    return top_n or len(DOCUMENTS)


def cohere(server, model, top_n, texts):
    key = Secret.from_token(server.key)
    return rank_with(CohereRanker(model=model, api_base_url=server.url, api_key=key, top_k=count(top_n)))


def jina(server, model, top_n, texts):
    key = Secret.from_token(server.key)
    return rank_with(JinaRanker(model=model, base_url=f"{server.url}/v1/rerank", api_key=key, top_k=count(top_n)))


def nvidia(server, model, top_n, texts):
    key = Secret.from_token(server.key)
    return rank_with(NvidiaRanker(model=model, api_url=f"{server.url}/v1", api_key=key, top_k=count(top_n)))


def tei(server, model, top_n, texts):
    key = Secret.from_token(server.key)
    return rank_with(HuggingFaceTEIRanker(url=server.url, token=key, top_k=count(top_n), max_retries=1))


check(
    "Haystack CohereRanker",
    "cohere-haystack",
    cohere,
    wrong_key=UnauthorizedError,
    unknown_model=BadRequestError,
    overload=ServiceUnavailableError,
    not_offered=OWN_DOCUMENTS,
)
check(
    "Haystack JinaRanker",
    "jina-haystack",
    jina,
    wrong_key=RuntimeError,
    unknown_model=RuntimeError,
    overload=RuntimeError,
    not_offered=OWN_DOCUMENTS,
)
check(
    "Haystack NvidiaRanker",
    "nvidia-haystack",
    nvidia,
    wrong_key=Exception,
    unknown_model=Exception,
    overload=Exception,
    not_offered=OWN_DOCUMENTS,
    logits=True,
)
check(
    "Haystack HuggingFaceTEIRanker",
    "huggingface-api-haystack",
    tei,
    wrong_key=RuntimeError,
    unknown_model=RuntimeError,
    overload=RuntimeError,
    not_offered=OWN_DOCUMENTS | {"unknown model": "this request format has no model field"},
)
