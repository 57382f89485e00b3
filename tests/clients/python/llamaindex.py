"""LlamaIndex' rerank postprocessors. They return the caller's nodes, ordered and with scores."""

import os

import mixedbread
from cohere.errors import BadRequestError, ServiceUnavailableError, UnauthorizedError
from httpx import HTTPStatusError
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.postprocessor.cohere_rerank import CohereRerank
from llama_index.postprocessor.jinaai_rerank import JinaRerank
from llama_index.postprocessor.mixedbreadai_rerank import MixedbreadAIRerank
from llama_index.postprocessor.nvidia_rerank import NVIDIARerank
from llama_index.postprocessor.siliconflow_rerank import SiliconFlowRerank
from llama_index.postprocessor.tei_rerank import TextEmbeddingInference
from llama_index.postprocessor.xinference_rerank import XinferenceRerank
from seed import DOCUMENTS, QUERY, check, not_possible

OWN_NODES = {"return_documents": "returns the caller's nodes"}


def rank_with(postprocessor):
    nodes = [NodeWithScore(node=TextNode(text=text, id_=str(i)), score=0.0) for i, text in enumerate(DOCUMENTS)]
    ranked = postprocessor.postprocess_nodes(nodes, query_str=QUERY)
    return [(int(node.node_id), node.score, node.text) for node in ranked]


def count(top_n):
    return top_n or len(DOCUMENTS)


def siliconflow(server, model, top_n, texts):
    return rank_with(
        SiliconFlowRerank(
            model=model, base_url=f"{server.url}/v1/rerank", api_key=server.key, top_n=count(top_n), return_documents=texts
        )
    )


def cohere(server, model, top_n, texts):
    return rank_with(
        CohereRerank(model=model, base_url=server.url, api_key=server.key, top_n=count(top_n), max_retries=1)
    )


def jina(server, model, top_n, texts):
    return rank_with(JinaRerank(model=model, base_url=f"{server.url}/v1", api_key=server.key, top_n=count(top_n)))


def tei(server, model, top_n, texts):
    return rank_with(TextEmbeddingInference(base_url=server.url, auth_token=f"Bearer {server.key}", top_n=count(top_n)))


def tei_raw_key(server, model, top_n, texts):
    return rank_with(TextEmbeddingInference(base_url=server.url, auth_token=server.key, top_n=count(top_n)))


def xinference(server, model, top_n, texts):
    return rank_with(XinferenceRerank(model=model, base_url=server.url, top_n=count(top_n)))


def nvidia(server, model, top_n, texts):
    return rank_with(
        NVIDIARerank(model=model, base_url=f"{server.url}/v1", api_key=server.key, top_n=count(top_n))
    )


def mixedbread_ai(server, model, top_n, texts):
    # It has no parameter for the URL; its SDK reads this variable.
    os.environ["MIXEDBREAD_BASE_URL"] = server.url
    return rank_with(MixedbreadAIRerank(model=model, api_key=server.key, top_n=count(top_n), max_retries=0))


# SiliconFlowRerank and JinaRerank raise RuntimeError with the answer if it has no `results`.
OF_RESULTS = {"wrong_key": RuntimeError, "unknown_model": RuntimeError, "overload": RuntimeError}
# TextEmbeddingInference ignores the HTTP status; then its check of the answer's length fails.
OF_TEI = {"wrong_key": AssertionError, "unknown_model": AssertionError, "overload": (AssertionError, TypeError)}
NO_MODEL = {"unknown model": "this request format has no model field"}

check("LlamaIndex SiliconFlowRerank", "llama-index-postprocessor-siliconflow-rerank", siliconflow, **OF_RESULTS)
check(
    "LlamaIndex CohereRerank",
    "llama-index-postprocessor-cohere-rerank",
    cohere,
    wrong_key=UnauthorizedError,
    unknown_model=BadRequestError,
    overload=ServiceUnavailableError,
    not_offered=OWN_NODES,
)
check("LlamaIndex JinaRerank", "llama-index-postprocessor-jinaai-rerank", jina, **OF_RESULTS, not_offered=OWN_NODES)
for name, rank in (("Bearer", tei), ("key alone", tei_raw_key)):
    check(
        f"LlamaIndex TextEmbeddingInference ({name})",
        "llama-index-postprocessor-tei-rerank",
        rank,
        **OF_TEI,
        not_offered=OWN_NODES | NO_MODEL,
    )
check(
    "LlamaIndex XinferenceRerank",
    "llama-index-postprocessor-xinference-rerank",
    xinference,
    wrong_key=Exception,
    unknown_model=Exception,
    overload=Exception,
    not_offered=OWN_NODES,
    keyless=True,
)
check(
    "LlamaIndex NVIDIARerank",
    "llama-index-postprocessor-nvidia-rerank",
    nvidia,
    wrong_key=HTTPStatusError,
    unknown_model=ValueError,
    overload=HTTPStatusError,
    not_offered=OWN_NODES,
    logits=True,
)
check(
    "LlamaIndex MixedbreadAIRerank",
    "llama-index-postprocessor-mixedbreadai-rerank",
    mixedbread_ai,
    wrong_key=mixedbread.AuthenticationError,
    unknown_model=mixedbread.BadRequestError,
    overload=mixedbread.InternalServerError,
    not_offered=OWN_NODES,
)
not_possible("LlamaIndex VoyageAIRerank", "llama-index-postprocessor-voyageai-rerank", "the host is fixed: no base URL")
