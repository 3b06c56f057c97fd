"""The check of a job's sample prompts against a base's template and context, before training."""

from collections.abc import Sequence
from pathlib import Path

from luthier.core.errors import InvalidValueError
from luthier.data.rendering.chat_template import ChatTemplate
from luthier.data.rendering.tokenizer import Tokenizer


def check_sample_prompts(prompts: Sequence[str], base_folder: Path, *, max_tokens: int) -> None:
    """Render each prompt as a user's message, as it is rendered again whenever the model answers it.

    An answer needs at least one token of the base's context, `max_tokens`.

    Raises:
        InvalidValueError: for the first prompt that the template refuses or that leaves no room for an
            answer; `param` is `training.sample_prompts.<index>`.
        BaseUnavailableError: when the base has no template or tokenizer that can be read.
    """
    if not prompts:
        return
    template, tokenizer = ChatTemplate.load(base_folder), Tokenizer.load(base_folder)
    for index, prompt in enumerate(prompts):
        param = f"training.sample_prompts.{index}"
        try:
            text = template.render([{"role": "user", "content": prompt}], add_generation_prompt=True)
        except InvalidValueError as error:
            raise InvalidValueError(f"{param}: {error.message}", param=param) from error
        num_tokens = len(tokenizer.encode(text))
        if num_tokens >= max_tokens:
            raise InvalidValueError(
                f"{param}: it has {num_tokens} tokens with the base's template, and the base's context of "
                f"{max_tokens} must hold an answer too. Shorten it.",
                param=param,
            )
