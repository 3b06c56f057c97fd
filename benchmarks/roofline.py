"""The work of a training step that computes every row whole, in floating-point operations.

Counted as Kaplan et al. 2020 (arXiv 2001.08361, section 2.1) do: a weight costs 2 operations a token forward
(one multiplication, one addition), 2 for the gradient of its input, 2 for its own gradient. A frozen weight
has no gradient of its own, so it costs 4 (Hu et al. 2021, arXiv 2106.09685, section 4.2, gives the reason).
Attention's scores, norms and activations are left out. Tokens that rows share are counted in every row, as
peers compute them: a trainer that computes them once is given the work it saved, so its share of the peak is
that of useful work (Workload.num_computed_tokens says how many tokens really run).
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama-like model; `query` and `key_value` are heads times head size."""

    layers: int
    hidden: int
    intermediate: int
    query: int
    key_value: int
    vocabulary: int

    @property
    def linear_layers(self) -> list[tuple[int, int]]:
        """Inputs and outputs of every linear layer of one block."""
        return [
            (self.hidden, self.query),
            (self.hidden, self.key_value),
            (self.hidden, self.key_value),
            (self.query, self.hidden),
            (self.hidden, self.intermediate),
            (self.hidden, self.intermediate),
            (self.intermediate, self.hidden),
        ]

    @property
    def body_weights(self) -> int:
        """Weights of all linear layers, the output layer not among them."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linear_layers)


def step_flops(
    shape: Shape, tuning: dict[str, Any], *, num_tokens: int, num_supervised: int, num_rows: int
) -> float:
    """Return the operations of one pass over some rows, forward and backward.

    Args:
        shape: the model.
        tuning: the method and its resolved parameters.
        num_tokens: real tokens of the rows.
        num_supervised: tokens that are predicted; only these need the output layer.
        num_rows: the rows.

    Returns:
        `4 N T + 4 V d S` for a frozen base of N weights in its body, T tokens and S supervised ones, plus 6
        for every trained weight and token; virtual tokens of prompt tuning run through the body too.
    """
    kind = tuning["type"]
    head = shape.vocabulary * shape.hidden * num_supervised
    if kind == "full":
        return 6.0 * (shape.body_weights * num_tokens + head)
    frozen = 4.0 * (shape.body_weights * num_tokens + head)
    if kind == "lora":
        pairs = shape.layers * sum(inputs + outputs for inputs, outputs in shape.linear_layers)
        return frozen + 6.0 * tuning["rank"] * pairs * num_tokens
    if kind == "adapter":
        per_block = 2 if tuning["placement"] == "houlsby" else 1
        width = tuning["bottleneck_dim"]
        return frozen + 6.0 * shape.layers * per_block * 2 * shape.hidden * width * num_tokens
    if kind == "prompt":
        return frozen + 4.0 * shape.body_weights * tuning["num_virtual_tokens"] * num_rows
    return frozen
