// Has a gateway call a tool, through the unmodified client; prints the calls, plain and streamed, as JSON.
import OpenAI from "openai";

const [baseURL, apiKey] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const parameters = {
  type: "object",
  properties: { place: { enum: ["Oslo", "Rome"] } },
  required: ["place"],
  additionalProperties: false,
};
const asked = {
  model: "tiny",
  messages: [{ role: "user", content: "What is the weather?" }],
  tools: [{ type: "function", function: { name: "weather", parameters } }],
  tool_choice: "required",
  max_tokens: 120,
};
const plain = await client.chat.completions.create(asked);
const runner = client.chat.completions.stream(asked);
const final = await runner.finalChatCompletion();
console.log(JSON.stringify([plain, final].map((one) => ({ reason: one.choices[0].finish_reason, calls: one.choices[0].message.tool_calls }))));
