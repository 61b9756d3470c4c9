// Asks a gateway what test_openai_clients.py names, through the unmodified client; prints one JSON object.
import OpenAI from "openai";

const [baseURL, apiKey] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const chat = { model: "tiny", messages: [{ role: "user", content: "Where is the red boat?" }], max_tokens: 8 };
const create = (options) => client.chat.completions.create({ ...chat, ...options });
const schema = {
  type: "object",
  properties: { colour: { enum: ["red", "blue"] }, count: { type: "integer", minimum: 0, maximum: 9 } },
  required: ["colour", "count"],
  additionalProperties: false,
};

async function failure(promise) {
  try {
    await promise;
    return null;
  } catch (error) {
    return { kind: error.constructor.name, status: error.status, code: error.code, param: error.param };
  }
}

async function streamed(options) {
  const out = { text: "", roles: [], reasons: [], usage: null };
  for await (const chunk of await create({ stream: true, stream_options: { include_usage: true }, ...options })) {
    for (const choice of chunk.choices) {
      out.text += choice.delta.content ?? "";
      if (choice.delta.role) out.roles.push(choice.delta.role);
      if (choice.finish_reason) out.reasons.push(choice.finish_reason);
    }
    out.usage = chunk.usage ?? out.usage;
  }
  return out;
}

const out = {};
const plain = await create({});
out.plain = { text: plain.choices[0].message.content, usage: plain.usage };
out.streamed = await streamed({});
const told = await create({ logprobs: true, top_logprobs: 2 });
out.logprobs = told.choices[0].logprobs.content.map((one) => one.top_logprobs.length);
out.choices = (await create({ n: 3, temperature: 1.2, seed: 7 })).choices.map((one) => one.message.content);
const shaped = { type: "json_schema", json_schema: { name: "boat", strict: true, schema } };
out.schema = JSON.parse((await create({ response_format: shaped, max_tokens: 60 })).choices[0].message.content);
const completion = await client.completions.create({ model: "tiny", prompt: "The red boat", max_tokens: 6, logprobs: 1 });
out.completion = { text: completion.choices[0].text, tokens: completion.choices[0].logprobs.tokens.length };
out.models = [];
for await (const model of client.models.list()) out.models.push(model.id);
out.errors = {
  badRequest: await failure(create({ temperature: 9 })),
  notFound: await failure(create({ model: "gpt-4" })),
  authentication: await failure(new OpenAI({ baseURL, apiKey: "nonsense", maxRetries: 0 }).models.list()),
};
const controller = new AbortController();
let aborted = 0;
for await (const _ of await client.chat.completions.create({ ...chat, max_tokens: 400, stream: true }, { signal: controller.signal })) {
  aborted += 1;
  if (aborted === 3) controller.abort();
}
out.aborted = aborted;
console.log(JSON.stringify(out));
