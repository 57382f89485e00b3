// `rerank` of the Vercel AI SDK with its providers.

import { createCohere } from "@ai-sdk/cohere";
import { createTogetherAI } from "@ai-sdk/togetherai";
import { APICallError, rerank } from "ai";
import { createVoyage } from "voyage-ai-provider";
import { check, DOCUMENTS, QUERY } from "./seed.mjs";

const PROVIDERS = [
  ["cohere", "@ai-sdk/cohere", createCohere, "/v2"],
  ["togetherai", "@ai-sdk/togetherai", createTogetherAI, "/v1"],
  ["voyage", "voyage-ai-provider", createVoyage, "/v1"],
];

for (const [name, packageName, create, path] of PROVIDERS) {
  const rank = async (server, model, topN) => {
    const provider = create({ apiKey: server.key, baseURL: server.url + path });
    const question = { model: provider.reranking(model), query: QUERY, documents: DOCUMENTS, topN, maxRetries: 0 };
    const { ranking } = await rerank(question);
    return ranking.map((one) => ({ index: one.originalIndex, score: one.score, text: one.document }));
  };
  await check(`Vercel AI SDK (${name})`, packageName, rank, {
    wrongKey: [APICallError, 401],
    unknownModel: [APICallError, 400],
    overload: [APICallError, 503],
  });
}
