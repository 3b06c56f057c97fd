"""Tune and call a model with the official SDK; OPENAI_BASE_URL and OPENAI_API_KEY say where.

python examples/quickstart.py [MODEL]
"""

import sys
import time
from pathlib import Path

from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam

model = sys.argv[1] if len(sys.argv) > 1 else "gpt-4o-mini-2024-07-18"
client = OpenAI()

training_file = client.files.create(
    file=Path(__file__).parent / "support" / "train.jsonl", purpose="fine-tune"
)
job = client.fine_tuning.jobs.create(
    model=model,
    training_file=training_file.id,
    suffix="quickstart",
    method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1}}},
)
print("job", job.id, "on", job.model)

seen: set[str] = set()
while job.finished_at is None:
    time.sleep(2)
    job = client.fine_tuning.jobs.retrieve(job.id)
    events = client.fine_tuning.jobs.list_events(job.id, limit=100).data
    for event in reversed(events):
        if event.id not in seen:
            print(event.message)
            seen.add(event.id)
if job.status != "succeeded" or job.fine_tuned_model is None:
    sys.exit(f"{job.status}: {job.error.message if job.error else ''}")

for checkpoint in client.fine_tuning.jobs.checkpoints.list(job.id):
    print("checkpoint", checkpoint.step_number, checkpoint.fine_tuned_model_checkpoint)

messages: list[ChatCompletionMessageParam] = [
    {"role": "system", "content": "You answer letters for Hollin & Wren, a violin workshop."},
    {"role": "user", "content": "The neck of my mandolin is loose, and I play tonight. Signed, Orla"},
]
chat = client.chat.completions.create(
    model=job.fine_tuned_model, messages=messages, max_tokens=96, temperature=0
)
print(chat.choices[0].message.content)

stream = client.chat.completions.create(
    model=job.fine_tuned_model, messages=messages, max_tokens=96, stream=True
)
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
print()

print("deleted:", client.models.delete(job.fine_tuned_model).deleted)
print("deleted:", client.files.delete(training_file.id).deleted)
