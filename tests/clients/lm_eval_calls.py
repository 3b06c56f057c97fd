"""lm-eval's two clients of OpenAI's endpoints; prints what they made of texts as one JSON object.

Environment: OPENAI_BASE_URL, OPENAI_API_KEY, TOKENIZER (a folder), CASES (JSON: pairs of context and
continuation).
"""

import json
import os
from importlib.metadata import version

from lm_eval.api.instance import Instance
from lm_eval.models.api_models import JsonChatStr
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

URL = os.environ["OPENAI_BASE_URL"]
CASES = [tuple(case) for case in json.loads(os.environ["CASES"])]


def ask(kind: str, *arguments: object) -> Instance:
    """Return a request as tasks make it."""
    return Instance(kind, {}, arguments, 0)


def main() -> None:
    """Score texts and make some, by token ids and by texts."""
    reported = {"version": version("lm-eval"), "scored": [], "rolled": [], "made": []}
    for tokenized, batch_size, concurrent in ((True, 1, 1), (True, 4, 1), (False, 1, 1), (True, 2, 3)):
        model = LocalCompletionsAPI(
            model="tiny-llama",
            base_url=f"{URL}/completions",
            tokenizer_backend="huggingface",
            tokenizer=os.environ["TOKENIZER"],
            tokenized_requests=tokenized,
            batch_size=batch_size,
            num_concurrent=concurrent,
            max_length=200,
            max_retries=1,
        )
        reported["scored"].append(model.loglikelihood([ask("loglikelihood", *case) for case in CASES]))
        rolling = [ask("loglikelihood_rolling", "".join(case)) for case in CASES]
        reported["rolled"].append(model.loglikelihood_rolling(rolling))
        options = {"until": ["e"], "max_gen_toks": 12, "do_sample": False}
        asked = [ask("generate_until", context, options) for context, _ in CASES if context]
        reported["made"].append(model.generate_until(asked))
    chat = LocalChatCompletion(model="tiny-llama", base_url=f"{URL}/chat/completions", max_retries=1)
    messages = JsonChatStr(json.dumps([{"role": "user", "content": "the sky"}]))
    options = {"until": ["never there"], "max_gen_toks": 12, "do_sample": False}
    reported["chatted"] = chat.generate_until([ask("generate_until", messages, options)])
    print(json.dumps(reported))


main()
