"""LiteLLM, with each provider that accepts a base URL."""

import litellm
from seed import DOCUMENTS, QUERY, check

litellm.suppress_debug_info = True


def provider(prefix, path):
    def rank(server, model, top_n, texts):
        answer = litellm.rerank(
            model=f"{prefix}/{model}",
            query=QUERY,
            documents=DOCUMENTS,
            # voyage/ reads `data`, which the server adds if the request has one of Voyage's own fields, such as top_k.
            top_n=len(DOCUMENTS) if prefix == "voyage" and top_n is None else top_n,
            return_documents=texts,
            api_key=server.key,
            api_base=server.url + path,
            max_retries=0,
        )
        return [
            (one["index"], one["relevance_score"], one["document"]["text"] if texts else None) for one in answer.results
        ]

    return rank


# Prefix of the model's name, path of the base URL, checks that the provider does not support.
for prefix, path, not_offered in (
    ("cohere", "/v1/rerank", None),
    ("jina_ai", "/v1/rerank", None),
    ("hosted_vllm", "", None),
    ("huggingface", "", {"unknown model": "this request format has no model field"}),
    (
        "infinity",
        "",
        {"return_documents": "expects texts as strings; its requests look like those of cohere/, which expects objects"},
    ),
    ("voyage", "/v1/rerank", None),
    ("together_ai", "/v1", None),
    ("litellm_proxy", "", None),
    ("nvidia_nim", "", None),
    ("nvidia_nim/ranking", "", None),
):
    check(
        f"LiteLLM {prefix}/",
        "litellm",
        provider(prefix, path),
        wrong_key=litellm.AuthenticationError,
        unknown_model=litellm.BadRequestError,
        overload=litellm.ServiceUnavailableError,
        logits=prefix.startswith("nvidia_nim"),
        not_offered=not_offered,
    )
