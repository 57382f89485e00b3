"""LangChain's document compressors. They return the caller's documents, ordered and with scores."""

import cohere
import voyageai.error
from cohere.errors import BadRequestError, ServiceUnavailableError, UnauthorizedError
from infinity_client.client import AuthenticatedClient
from infinity_client.errors import UnexpectedStatus
from langchain_cohere import CohereRerank
from langchain_community.document_compressors import InfinityRerank, JinaRerank, jina_rerank
from langchain_core.documents import Document
from langchain_nvidia_ai_endpoints import NVIDIARerank
from langchain_voyageai import VoyageAIRerank
from seed import DOCUMENTS, QUERY, check

OWN_DOCUMENTS = {"return_documents": "returns the caller's documents"}


def rank_with(compressor):
    documents = [Document(page_content=text, metadata={"place": i}) for i, text in enumerate(DOCUMENTS)]
    ranked = compressor.compress_documents(documents, QUERY)
    return [(one.metadata["place"], one.metadata["relevance_score"], one.page_content) for one in ranked]


def count(top_n):
    return top_n or len(DOCUMENTS)


def with_cohere(server, model, top_n, texts):
    client = cohere.ClientV2(api_key=server.key, base_url=server.url)
    return rank_with(CohereRerank(client=client, model=model, top_n=count(top_n)))


def with_cohere_url(server, model, top_n, texts):
    return rank_with(
        CohereRerank(cohere_api_key=server.key, base_url=server.url, model=model, top_n=count(top_n))
    )


def with_jina(server, model, top_n, texts):
    # The URL is a constant of the module; users with their own server set it this way.
    jina_rerank.JINA_API_URL = f"{server.url}/v1/rerank"
    return rank_with(JinaRerank(jina_api_key=server.key, model=model, top_n=count(top_n)))


def with_infinity(server, model, top_n, texts):
    client = AuthenticatedClient(base_url=server.url, token=server.key, raise_on_unexpected_status=True)
    # The field `client` is declared as Client, of which AuthenticatedClient is no subclass: model_construct skips that check.
    return rank_with(InfinityRerank.model_construct(client=client, model=model, top_n=count(top_n)))


def with_nvidia(server, model, top_n, texts):
    return rank_with(
        NVIDIARerank(base_url=f"{server.url}/v1", api_key=server.key, model=model, top_n=count(top_n))
    )


def with_voyage(server, model, top_n, texts):
    return rank_with(
        VoyageAIRerank(base_url=f"{server.url}/v1", api_key=server.key, model=model, top_k=top_n)
    )


OF_COHERE = {"wrong_key": UnauthorizedError, "unknown_model": BadRequestError, "overload": ServiceUnavailableError}
check("LangChain CohereRerank(client)", "langchain-cohere", with_cohere, **OF_COHERE, not_offered=OWN_DOCUMENTS)
check("LangChain CohereRerank(base_url)", "langchain-cohere", with_cohere_url, **OF_COHERE, not_offered=OWN_DOCUMENTS)
check(
    "LangChain JinaRerank",
    "langchain-community",
    with_jina,
    wrong_key=RuntimeError,
    unknown_model=RuntimeError,
    overload=RuntimeError,
    not_offered=OWN_DOCUMENTS,
)
check(
    "LangChain InfinityRerank",
    "langchain-community",
    with_infinity,
    wrong_key=UnexpectedStatus,
    unknown_model=UnexpectedStatus,
    overload=UnexpectedStatus,
    not_offered=OWN_DOCUMENTS,
)
check(
    "LangChain NVIDIARerank",
    "langchain-nvidia-ai-endpoints",
    with_nvidia,
    wrong_key=Exception,
    unknown_model=Exception,
    overload=Exception,
    not_offered=OWN_DOCUMENTS,
    logits=True,
)
check(
    "LangChain VoyageAIRerank",
    "langchain-voyageai",
    with_voyage,
    wrong_key=voyageai.error.AuthenticationError,
    unknown_model=voyageai.error.InvalidRequestError,
    overload=voyageai.error.ServiceUnavailableError,
    not_offered=OWN_DOCUMENTS,
)
