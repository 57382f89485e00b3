// Vendors' SDKs: Cohere (versions 8 and 7), Voyage, Mixedbread (two packages), Together; and `post` of the OpenAI SDK.

import Mixedbread from "@mixedbread/sdk";
import { MixedbreadAIClient, MixedbreadAIError } from "@mixedbread-ai/sdk";
import * as cohere8 from "cohere-ai";
import * as cohere7 from "cohere-ai-7";
import OpenAI from "openai";
import Together from "together-ai";
import { VoyageAIClient, VoyageAIError } from "voyageai";
import { check, DOCUMENTS, QUERY } from "./seed.mjs";

const cohereV1 = (sdk) => async (server, model, topN, texts) => {
  const client = new sdk.CohereClient({ token: server.key, environment: server.url });
  const request = { model, query: QUERY, documents: DOCUMENTS, topN, returnDocuments: texts };
  const { results } = await client.rerank(request, { maxRetries: 0 });
  return results.map((one) => ({ index: one.index, score: one.relevanceScore, text: one.document?.text }));
};

const cohereV2 = (sdk) => async (server, model, topN) => {
  const client = new sdk.CohereClientV2({ token: server.key, environment: server.url });
  const { results } = await client.rerank({ model, query: QUERY, documents: DOCUMENTS, topN }, { maxRetries: 0 });
  return results.map((one) => ({ index: one.index, score: one.relevanceScore }));
};

async function voyage(server, model, topK, texts) {
  const client = new VoyageAIClient({ apiKey: server.key, baseUrl: `${server.url}/v1`, maxRetries: 0 });
  // The client reads `data`, which the server adds if the request has one of Voyage's own fields, such as topK.
  const options = { topK: topK ?? DOCUMENTS.length, returnDocuments: texts };
  const { data } = await client.rerank({ model, query: QUERY, documents: DOCUMENTS, ...options });
  return data.map((one) => ({ index: one.index, score: one.relevanceScore, text: one.document }));
}

async function mixedbread(server, model, topK, texts) {
  const client = new Mixedbread({ apiKey: server.key, baseURL: server.url, maxRetries: 0 });
  const { data } = await client.rerank({ model, query: QUERY, input: DOCUMENTS, top_k: topK, return_input: texts });
  return data.map((one) => ({ index: one.index, score: one.score, text: one.input }));
}

async function oldMixedbread(server, model, topK, texts) {
  const client = new MixedbreadAIClient({ apiKey: server.key, environment: server.url });
  const request = { model, query: QUERY, input: DOCUMENTS, topK, returnInput: texts };
  const { data } = await client.reranking(request, { maxRetries: 0 });
  return data.map((one) => ({ index: one.index, score: one.score, text: one.input }));
}

async function openai(server, model, topN, texts) {
  const client = new OpenAI({ apiKey: server.key, baseURL: `${server.url}/v1`, maxRetries: 0 });
  const body = { model, query: QUERY, documents: DOCUMENTS, top_n: topN, return_documents: texts };
  const { results } = await client.post("/rerank", { body });
  return results.map((one) => ({ index: one.index, score: one.relevance_score, text: one.document?.text }));
}

async function together(server, model, topN, texts) {
  const client = new Together({ apiKey: server.key, baseURL: `${server.url}/v1`, maxRetries: 0 });
  const request = { model, query: QUERY, documents: DOCUMENTS, top_n: topN, return_documents: texts };
  const { results } = await client.rerank.create(request);
  return results.map((one) => ({ index: one.index, score: one.relevance_score, text: one.document?.text }));
}

for (const [packageName, sdk] of [
  ["cohere-ai", cohere8],
  ["cohere-ai-7", cohere7],
]) {
  const errors = {
    wrongKey: [sdk.Cohere.UnauthorizedError, 401],
    unknownModel: [sdk.Cohere.BadRequestError, 400],
    overload: [sdk.Cohere.ServiceUnavailableError, 503],
  };
  await check("CohereClient", packageName, cohereV1(sdk), errors);
  const notOffered = { return_documents: "v2 has no such parameter" };
  await check("CohereClientV2", packageName, cohereV2(sdk), { ...errors, notOffered });
}
await check("VoyageAIClient", "voyageai", voyage, {
  wrongKey: [VoyageAIError, 401],
  unknownModel: [VoyageAIError, 400],
  overload: [VoyageAIError, 503],
});
await check("Mixedbread", "@mixedbread/sdk", mixedbread, {
  wrongKey: [Mixedbread.AuthenticationError, 401],
  unknownModel: [Mixedbread.BadRequestError, 400],
  overload: [Mixedbread.InternalServerError, 503],
});
await check("MixedbreadAIClient", "@mixedbread-ai/sdk", oldMixedbread, {
  wrongKey: [MixedbreadAIError, 401],
  unknownModel: [MixedbreadAIError, 400],
  overload: [MixedbreadAIError, 503],
});
await check("OpenAI().post", "openai", openai, {
  wrongKey: [OpenAI.AuthenticationError, 401],
  unknownModel: [OpenAI.BadRequestError, 400],
  overload: [OpenAI.InternalServerError, 503],
});
await check("Together", "together-ai", together, {
  wrongKey: [Together.AuthenticationError, 401],
  unknownModel: [Together.BadRequestError, 400],
  overload: [Together.InternalServerError, 503],
});
