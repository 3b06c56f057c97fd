"""Prompt tuning: trained input vectors before the embedded sequence (Lester et al. 2021, arXiv 2104.08691).

The vectors are what the first layer reads, after any scaling that the base does to its own embeddings.
The least parameters of all methods, and slow to learn from a random start: vectors of real tokens begin
where the base can read. PEFT holds them: what is saved loads in PEFT. They do not depend on the request, so
an artifact becomes keys and values once, and serves as the cached start of a sequence.
"""

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, field_validator

from luthier.core.cost_model import MethodCost
from luthier.core.shapes import BaseShape
from luthier.core.specs import BaseFacts
from luthier.methods._peft import attach_peft
from luthier.methods._virtual import (
    InitText,
    NumVirtualTokens,
    VirtualTokenMethod,
    check_init_text,
    resolve_num_tokens,
)
from luthier.methods.base import Attached, MethodParams, ServedParts, Start, Workload, resolved

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


# However many rows there are.
_AUTO_TOKENS = 100


class PromptParams(MethodParams):
    """The `tuning` object of a prompt-tuning job."""

    type: Literal["prompt"] = "prompt"
    num_virtual_tokens: NumVirtualTokens = Field("auto", description="Input vectors put before the sequence.")
    init: Literal["vocabulary", "text", "random"] = Field(
        "vocabulary",
        description="What they start as: the vectors of tokens drawn from those that the training rows use "
        '("vocabulary"), those of `init_text` ("text"), or random numbers.',
    )
    init_text: InitText = Field(
        None, description='The text of init "text", repeated or cut to length.', validate_default=True
    )

    _init_text_fits = field_validator("init_text")(check_init_text)


class Prompt(VirtualTokenMethod):
    """Trained input vectors before the embedded sequence, held by PEFT."""

    name: ClassVar[str] = "prompt"
    title: ClassVar[str] = "Prompt tuning: trained input vectors before the sequence"
    Params: ClassVar[type[MethodParams]] = PromptParams
    shaping_params: ClassVar[frozenset[str]] = frozenset({"num_virtual_tokens"})
    peft_type: ClassVar[str] = "PROMPT_TUNING"
    most_auto_tokens: ClassVar[int] = _AUTO_TOKENS
    # What moves is so little that it is slow: on labels nine passes gave three times the accuracy that three
    # did (docs/methods.md).
    auto_passes: ClassVar[int] = 3

    def resolve(self, params: PromptParams, workload: Workload) -> PromptParams:
        """Replace "auto".

        As many tokens as in the paper, 100, at most an eighth of the context: 20 were measured to learn less
        on every task (docs/methods.md).

        Raises:
            InvalidValueError: when the virtual tokens fill the whole context.
        """
        num_tokens = resolve_num_tokens(params, workload, _AUTO_TOKENS)
        return params.model_copy(update={"num_virtual_tokens": num_tokens})

    def base_learning_rate(self, params: PromptParams, *, base: BaseFacts) -> float:  # noqa: ARG002
        """Return the peak rate: far above LoRA's, for the few vectors must move a long way.

        The paper's 0.3 is measured on a small base; for wider ones, of which nothing was, it is a third.
        """
        return 0.3 if base.hidden_size <= 1024 else 0.1

    def cost(self, params: PromptParams, shape: BaseShape) -> MethodCost:
        """Return the vectors, which run before every row as tokens do."""
        num_tokens = resolved(params.num_virtual_tokens)
        count = num_tokens * shape.hidden_size
        return MethodCost(num_parameters=count, num_saved=count, num_virtual_tokens=num_tokens)

    def attach(self, causal_lm: "PreTrainedModel", params: PromptParams, start: Start) -> Attached:
        """Put PEFT's encoder beside the base, with its first values as `init` says."""
        import torch
        from peft import PromptTuningConfig

        from luthier.methods._virtual_tensors import ADAPTER, check_base

        num_tokens = resolved(params.num_virtual_tokens)
        check_base(causal_lm, num_tokens)
        config = PromptTuningConfig(
            task_type="CAUSAL_LM",
            base_model_name_or_path=start.base_id,
            num_virtual_tokens=num_tokens,
            token_dim=causal_lm.get_input_embeddings().embedding_dim,
        )
        # A base with dropout draws in training.
        torch.manual_seed(start.seed)
        attached = attach_peft(causal_lm, config)
        with torch.no_grad():
            first_ND = _first_values(causal_lm, params, start)
            attached.model.prompt_encoder[ADAPTER].embedding.weight.copy_(first_ND)
        return attached

    def read_parts(self, folder: Path, shape: BaseShape) -> ServedParts | None:
        from luthier.methods._virtual_tensors import read_vectors

        return ServedParts(embeddings_ND=read_vectors(folder, shape.hidden_size))

    def hidden_states(self, attached: Attached, token_ids_BT: "torch.Tensor") -> "torch.Tensor":
        """Run the layers over vectors and sequence, and leave out the vectors' own results."""
        import torch

        from luthier.methods._virtual_tensors import check_length

        check_length(attached, token_ids_BT)
        causal_lm = attached.causal_lm
        virtual_ND = self.virtual_embeddings(attached)
        embedded_BTD = causal_lm.get_input_embeddings()(token_ids_BT)
        virtual_BND = virtual_ND.to(embedded_BTD.dtype).expand(len(embedded_BTD), -1, -1)
        joined_BTD = torch.cat([virtual_BND, embedded_BTD], dim=1)
        body = causal_lm.base_model
        return body(inputs_embeds=joined_BTD, use_cache=False).last_hidden_state[:, len(virtual_ND) :]

    def virtual_embeddings(self, attached: Attached) -> "torch.Tensor":
        """Return the vectors, [n, hidden size] in the base's type."""
        from luthier.methods._virtual_tensors import encoded

        return encoded(attached).to(attached.causal_lm.dtype)


def _first_values(causal_lm: "PreTrainedModel", params: PromptParams, start: Start) -> "torch.Tensor":
    """Return [virtual tokens, hidden size] on the base's device."""
    import torch

    from luthier.methods._virtual_tensors import text_token_ids

    num_tokens = resolved(params.num_virtual_tokens)
    embed = causal_lm.get_input_embeddings()
    # Drawn on the CPU, so that the device does not decide the numbers.
    generator = torch.Generator().manual_seed(start.seed)
    if params.init == "text":
        token_ids = text_token_ids(start, params.init_text or "", num_tokens)
    else:
        known = sorted({int(token) for example in start.examples for token in example})
        if not known or params.init == "random":
            known = list(range(embed.num_embeddings))
        num_rounds = -(-num_tokens // len(known))
        drawn = [torch.randperm(len(known), generator=generator) for _ in range(num_rounds)]
        token_ids = [known[i] for i in torch.cat(drawn)[:num_tokens].tolist()]
    real_ND = embed(torch.tensor(token_ids, device=causal_lm.device)).float()
    if params.init == "random":
        # As large as real ones, in random directions.
        noise_ND = torch.randn(real_ND.shape, generator=generator)
        return noise_ND.to(real_ND.device) * real_ND.std()
    return real_ND


METHOD = Prompt()
