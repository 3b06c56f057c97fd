// Chats and completions of a program written for OpenAI's Node package; prints what it saw as one JSON object.
import OpenAI from "openai";

const client = new OpenAI();
const asked = {
  model: "tiny-llama",
  messages: [{ role: "user", content: "the sky" }],
  temperature: 0,
  max_tokens: 12,
};
const tool = {
  type: "function",
  function: { name: "go", parameters: { type: "object", additionalProperties: false } },
};
const calling = { ...asked, model: "tiny-tools", max_tokens: 80, tools: [tool], tool_choice: "required" };
const schema = {
  type: "object",
  properties: { colour: { enum: ["red", "blue"] } },
  required: ["colour"],
  additionalProperties: false,
};

const whole = await client.chat.completions.create(asked);
const text = whole.choices[0].message.content;
// The package's own helper puts the chunks together, and minds what is missing in them.
const runner = client.chat.completions.stream({ ...asked, stream_options: { include_usage: true } });
const streamed = await runner.finalChatCompletion();
const stopped = await client.chat.completions.create({ ...asked, stop: [text.slice(5, 8)] });
const rated = await client.chat.completions.create({ ...asked, logprobs: true, top_logprobs: 3 });
const parsed = await client.chat.completions.parse({
  ...asked,
  max_tokens: 60,
  response_format: { type: "json_schema", json_schema: { name: "colour", schema, strict: true } },
});
const called = await client.chat.completions.create(calling);
const calls = await client.chat.completions.stream(calling).finalChatCompletion();
const prompts = { model: "tiny-llama", prompt: ["the sky", "a"], temperature: 0, max_tokens: 5 };
const texts = await client.completions.create({ ...prompts, logprobs: 2 });
const textsStreamed = ["", ""];
for await (const chunk of await client.completions.create({ ...prompts, stream: true })) {
  textsStreamed[chunk.choices[0].index] += chunk.choices[0].text;
}
const scored = await client.completions.create({ ...prompts, max_tokens: 0, logprobs: 1, echo: true });
const responded = await client.responses.create({
  model: "tiny-llama",
  input: "the sky",
  temperature: 0,
  max_output_tokens: 16,
});
let refused;
try {
  await client.chat.completions.create({ ...asked, model: "no-such-model" });
} catch (error) {
  refused = error instanceof OpenAI.NotFoundError ? [error.status, error.code, !!error.requestID] : String(error);
}
const content = rated.choices[0].logprobs.content;
console.log(
  JSON.stringify({
    version: "node",
    whole: text,
    reason: whole.choices[0].finish_reason,
    usage: [whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens],
    streamed: streamed.choices[0].message.content,
    streamed_usage: streamed.usage.total_tokens,
    stopped: stopped.choices[0].message.content,
    bytes: content.flatMap((item) => item.bytes),
    num_top: content.map((item) => item.top_logprobs.length),
    parsed: JSON.parse(parsed.choices[0].message.content).colour,
    called: [
      called.choices[0].message.tool_calls[0].function.name,
      called.choices[0].message.tool_calls[0].function.arguments,
      calls.choices[0].message.tool_calls[0].function.arguments,
    ],
    texts: texts.choices.map((choice) => choice.text),
    texts_streamed: textsStreamed,
    rated: texts.choices.map((choice) => choice.logprobs.tokens.join("")),
    scored: scored.choices.map((choice) => choice.logprobs.token_logprobs),
    responded: responded.output_text,
    refused,
  }),
);
