// SDKs of vendors: Cohere, Voyage, Mixedbread, Together.

import Mixedbread from "@mixedbread/sdk";
import { Cohere, CohereClient, CohereClientV2 } from "cohere-ai";
import Together from "together-ai";
import { VoyageAIClient, VoyageAIError } from "voyageai";
import { check, DOCUMENTS, QUERY } from "./seed.mjs";

const OF_COHERE = {
  wrongKey: [Cohere.UnauthorizedError, 401],
  unknownModel: [Cohere.BadRequestError, 400],
  overload: [Cohere.ServiceUnavailableError, 503],
};

async function cohereV1(server, model, topN, texts) {
  const client = new CohereClient({ token: server.key, baseUrl: server.url, maxRetries: 0 });
  const { results } = await client.rerank({ model, query: QUERY, documents: DOCUMENTS, topN, returnDocuments: texts });
  return results.map((one) => ({ index: one.index, score: one.relevanceScore, text: one.document?.text }));
}

async function cohereV2(server, model, topN) {
  const client = new CohereClientV2({ token: server.key, baseUrl: server.url, maxRetries: 0 });
  const { results } = await client.rerank({ model, query: QUERY, documents: DOCUMENTS, topN });
  return results.map((one) => ({ index: one.index, score: one.relevanceScore }));
}

async function voyage(server, model, topK, texts) {
  const client = new VoyageAIClient({ apiKey: server.key, baseUrl: `${server.url}/v1`, maxRetries: 0 });
  const { data } = await client.rerank({ model, query: QUERY, documents: DOCUMENTS, topK, returnDocuments: texts });
  return data.map((one) => ({ index: one.index, score: one.relevanceScore, text: one.document }));
}

async function mixedbread(server, model, topK, texts) {
  const client = new Mixedbread({ apiKey: server.key, baseURL: server.url, maxRetries: 0 });
  const { data } = await client.rerank({ model, query: QUERY, input: DOCUMENTS, top_k: topK, return_input: texts });
  return data.map((one) => ({ index: one.index, score: one.score, text: one.input }));
}

async function together(server, model, topN, texts) {
  const client = new Together({ apiKey: server.key, baseURL: `${server.url}/v1`, maxRetries: 0 });
  const question = { model, query: QUERY, documents: DOCUMENTS, top_n: topN, return_documents: texts };
  const { results } = await client.rerank.create(question);
  return results.map((one) => ({ index: one.index, score: one.relevance_score, text: one.document?.text }));
}

const noTexts = { return_documents: "v2 has no such parameter" };
await check("CohereClient", "cohere-ai", cohereV1, OF_COHERE);
await check("CohereClientV2", "cohere-ai", cohereV2, { ...OF_COHERE, notOffered: noTexts });
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
await check("Together", "together-ai", together, {
  wrongKey: [Together.AuthenticationError, 401],
  unknownModel: [Together.BadRequestError, 400],
  overload: [Together.InternalServerError, 503],
});
