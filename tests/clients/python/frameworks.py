"""Other clients: `post` of the OpenAI SDK, agno, Mixedbread's older SDK."""

import openai
from agno.knowledge.document import Document
from agno.knowledge.reranker.cohere import CohereReranker
from agno.knowledge.reranker.infinity import InfinityReranker
from cohere import Client
from mixedbread_ai.client import MixedbreadAI
from mixedbread_ai.core.api_error import ApiError
from seed import DOCUMENTS, QUERY, check


def with_openai(server, model, top_n, texts):
    client = openai.OpenAI(api_key=server.key, base_url=f"{server.url}/v1", max_retries=0)
    question = {"model": model, "query": QUERY, "documents": DOCUMENTS, "top_n": top_n, "return_documents": texts}
    answer = client.post("/rerank", cast_to=object, body=question)
    return [(one["index"], one["relevance_score"], one["document"]["text"] if texts else None) for one in answer["results"]]


def with_openai_models(server, model, top_n, texts):
    """Looks up the model before the request, as gateways do."""
    client = openai.OpenAI(api_key=server.key, base_url=f"{server.url}/v1", max_retries=0)
    assert model in [one.id for one in client.models.list()] or model == "no-such-model"
    return with_openai(server, client.models.retrieve(model).id, top_n, texts)


def with_old_mixedbread(server, model, top_n, texts):
    wanted = {} if top_n is None else {"top_k": top_n}
    answer = MixedbreadAI(api_key=server.key, base_url=server.url).reranking(
        model=model, query=QUERY, input=DOCUMENTS, return_input=texts, request_options={"max_retries": 0}, **wanted
    )
    return [(one.index, one.score, one.input) for one in answer.data]


def agno_rank(reranker):
    documents = [Document(content=text, id=str(i)) for i, text in enumerate(DOCUMENTS)]
    ranked = reranker.rerank(QUERY, documents)
    return [(int(one.id), one.reranking_score, one.content) for one in ranked]


def with_agno_cohere(server, model, top_n, texts):
    client = Client(api_key=server.key, base_url=server.url)
    return agno_rank(CohereReranker(cohere_client=client, model=model, top_n=top_n))


def with_agno_infinity(server, model, top_n, texts):
    return agno_rank(InfinityReranker(url=server.url, api_key=server.key, model=model, top_n=top_n))


OF_OPENAI = {"wrong_key": openai.AuthenticationError, "overload": openai.InternalServerError}
check("openai.OpenAI().post", "openai", with_openai, **OF_OPENAI, unknown_model=openai.BadRequestError)
check("openai.OpenAI().models", "openai", with_openai_models, **OF_OPENAI, unknown_model=openai.NotFoundError)
check(
    "mixedbread_ai.MixedbreadAI",
    "mixedbread-ai",
    with_old_mixedbread,
    wrong_key=ApiError,
    unknown_model=ApiError,
    overload=ApiError,
)
SWALLOWED = dict.fromkeys(["wrong key", "unknown model", "overload"], "logs the error and returns the documents unchanged")
for name, rank in (("CohereReranker", with_agno_cohere), ("InfinityReranker", with_agno_infinity)):
    check(
        f"agno {name}", "agno", rank, wrong_key=None, unknown_model=None, overload=None, not_offered=SWALLOWED
    )
