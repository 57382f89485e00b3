// LangChain's document compressors. They return the caller's documents, ordered and with scores.

import { CohereRerank } from "@langchain/cohere";
import { Document } from "@langchain/core/documents";
import { Cohere, CohereClient } from "cohere-ai";
import { check, DOCUMENTS, QUERY } from "./seed.mjs";

async function cohere(server, model, topN = DOCUMENTS.length) {
  const client = new CohereClient({ token: server.key, environment: server.url, maxRetries: 0 });
  const documents = DOCUMENTS.map((text, place) => new Document({ pageContent: text, metadata: { place } }));
  const ranked = await new CohereRerank({ client, model, topN }).compressDocuments(documents, QUERY);
  return ranked.map((one) => ({ index: one.metadata.place, score: one.metadata.relevanceScore, text: one.pageContent }));
}

await check("LangChain.js CohereRerank", "@langchain/cohere", cohere, {
  wrongKey: [Cohere.UnauthorizedError, 401],
  unknownModel: [Cohere.BadRequestError, 400],
  overload: [Cohere.ServiceUnavailableError, 503],
});
