"""SDKs of vendors and other servers: Voyage, Mixedbread, Together, Xinference, Infinity."""

import mixedbread
import together
import voyageai
from infinity_client.api.default import rerank as infinity_rerank
from infinity_client.client import AuthenticatedClient
from infinity_client.errors import UnexpectedStatus
from infinity_client.models import RerankInput
from seed import DOCUMENTS, QUERY, check
from xinference_client import RESTfulClient


def with_voyage(server, model, top_n, texts):
    client = voyageai.Client(api_key=server.key, base_url=f"{server.url}/v1", max_retries=0)
    answer = client.rerank(QUERY, DOCUMENTS, model=model, top_k=top_n)
    return [(one.index, one.relevance_score, one.document) for one in answer.results]


def with_mixedbread(server, model, top_n, texts):
    client = mixedbread.Mixedbread(api_key=server.key, base_url=server.url, max_retries=0)
    wanted = {} if top_n is None else {"top_k": top_n}
    answer = client.rerank(model=model, query=QUERY, input=DOCUMENTS, return_input=texts, **wanted)
    return [(one.index, one.score, one.input) for one in answer.data]


def with_together(server, model, top_n, texts):
    client = together.Together(api_key=server.key, base_url=f"{server.url}/v1", max_retries=0)
    wanted = {} if top_n is None else {"top_n": top_n}
    answer = client.rerank.create(model=model, query=QUERY, documents=DOCUMENTS, return_documents=texts, **wanted)
    return [(one.index, one.relevance_score, one.document.text if texts else None) for one in answer.results]


def with_xinference(server, model, top_n, texts):
    answer = RESTfulClient(server.url, api_key=server.key).get_model(model).rerank(DOCUMENTS, QUERY, top_n, return_documents=texts)
    return [(one["index"], one["relevance_score"], one["document"]["text"] if texts else None) for one in answer["results"]]


def with_infinity(server, model, top_n, texts):
    client = AuthenticatedClient(base_url=server.url, token=server.key, raise_on_unexpected_status=True)
    wanted = {} if top_n is None else {"top_n": top_n}
    question = RerankInput(query=QUERY, documents=DOCUMENTS, model=model, return_documents=texts, **wanted)
    answer = infinity_rerank.sync(client=client, body=question)
    return [(one.index, one.relevance_score, one.document if texts else None) for one in answer.results]


check(
    "voyageai.Client",
    "voyageai",
    with_voyage,
    wrong_key=voyageai.error.AuthenticationError,
    unknown_model=voyageai.error.InvalidRequestError,
    overload=voyageai.error.ServiceUnavailableError,
)
check(
    "mixedbread.Mixedbread",
    "mixedbread",
    with_mixedbread,
    wrong_key=mixedbread.AuthenticationError,
    unknown_model=mixedbread.BadRequestError,
    overload=mixedbread.InternalServerError,
)
check(
    "together.Together",
    "together",
    with_together,
    wrong_key=together.AuthenticationError,
    unknown_model=together.BadRequestError,
    overload=together.InternalServerError,
)
check(
    "xinference_client.RESTfulClient",
    "xinference-client",
    with_xinference,
    wrong_key=RuntimeError,
    unknown_model=RuntimeError,
    overload=RuntimeError,
)
check(
    "infinity_client",
    "infinity-client",
    with_infinity,
    wrong_key=UnexpectedStatus,
    unknown_model=UnexpectedStatus,
    overload=UnexpectedStatus,
    not_offered={"return_documents": "expects documents as strings; the server returns objects, which other clients expect"},
)
