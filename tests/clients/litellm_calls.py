"""litellm's file and fine-tuning calls as a client; prints what it saw as one JSON object."""

import json
import os
import time

import litellm

TO = {
    "custom_llm_provider": "openai",
    "api_base": os.environ["OPENAI_BASE_URL"],
    "api_key": os.environ["OPENAI_API_KEY"],
}


def main() -> None:
    """Upload, tune, look on, cancel another job."""
    with open(os.environ["ROWS"], "rb") as stream:  # noqa: PTH123
        file = litellm.create_file(file=stream, purpose="fine-tune", **TO)
    job = litellm.create_fine_tuning_job(model="tiny-llama", training_file=file.id, **TO)
    deadline = time.monotonic() + 120
    while job.status not in ("succeeded", "failed", "cancelled") and time.monotonic() < deadline:
        time.sleep(0.2)
        job = litellm.retrieve_fine_tuning_job(fine_tuning_job_id=job.id, **TO)
    other = litellm.create_fine_tuning_job(model="tiny-llama", training_file=file.id, **TO)
    cancelled = litellm.cancel_fine_tuning_job(fine_tuning_job_id=other.id, **TO)
    listed = litellm.list_fine_tuning_jobs(limit=1, **TO)
    reported = {
        "status": job.status,
        "model": job.fine_tuned_model,
        "cancelled": cancelled.status,
        "jobs": [one.id for one in listed],
        "made": [other.id, job.id],
    }
    print(json.dumps(reported))


main()
