// The main path of a program written for OpenAI's Node package; prints what it saw as one JSON object.
import fs from "node:fs";
import OpenAI from "openai";

const client = new OpenAI();
const file = await client.files.create({
  file: fs.createReadStream(process.env.ROWS),
  purpose: "fine-tune",
});
await client.files.waitForProcessing(file.id);
let job = await client.fineTuning.jobs.create({
  model: "gpt-4o-mini-2024-07-18",
  training_file: file.id,
  suffix: "mine",
  seed: 1,
  hyperparameters: { n_epochs: 1, batch_size: "auto" },
});
const deadline = Date.now() + 120000;
while (!["succeeded", "failed", "cancelled"].includes(job.status) && Date.now() < deadline) {
  await new Promise((resolve) => setTimeout(resolve, 200));
  job = await client.fineTuning.jobs.retrieve(job.id);
}
const events = await client.fineTuning.jobs.listEvents(job.id, { limit: 2 });
const checkpoints = await client.fineTuning.jobs.checkpoints.list(job.id);
const table = await (await client.files.content(job.result_files[0])).text();
const other = await client.fineTuning.jobs.create({ model: "tiny-llama", training_file: file.id });
const cancelled = await client.fineTuning.jobs.cancel(other.id);
let refused = "";
try {
  await client.fineTuning.jobs.create({ model: "no-such-model", training_file: file.id });
} catch (error) {
  refused = error instanceof OpenAI.BadRequestError ? error.code : String(error);
}
const names = [];
for await (const model of client.models.list()) names.push(model.id);
const jobs = [];
for await (const one of client.fineTuning.jobs.list({ limit: 1 })) jobs.push(one.id);
console.log(
  JSON.stringify({
    version: "node",
    status: job.status,
    model: job.fine_tuned_model,
    checkpoint: checkpoints.data[0].fine_tuned_model_checkpoint,
    last_event: events.data[0].message,
    num_steps: table.trimEnd().split("\n").length - 1,
    is_listed: names.includes(job.fine_tuned_model),
    jobs,
    made: [other.id, job.id],
    cancelled: cancelled.status,
    refused,
    deleted: [
      (await client.models.delete(job.fine_tuned_model)).deleted,
      (await client.files.delete(file.id)).deleted,
    ],
  }),
);
