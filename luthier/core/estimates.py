"""What is measured of a base on a machine, and what a method tells of its cost: the ground of an estimate.

A training child measures a `Calibration` (luthier.training.calibrate), each method tells its own `MethodCost`
(luthier.methods), and luthier.core.pricing adds them up for a job's rows. Nothing here needs torch.
"""

from dataclasses import dataclass

from luthier.core.specs import Frozen

# The longest row on which checkpoints are proved (luthier.training.assemble).
MAX_PROOF_TOKENS = 512


@dataclass(frozen=True)
class MethodCost:
    """A method's own part of a cost, by formula.

    `variant` names the measured constants that hold for these parameters, a key of `Method.probes`.
    `num_parameters` are trained, `num_saved` are in an artifact, `num_token_parameters` of the trained ones
    are multiplied with every token. `num_virtual_tokens` run before each row as tokens do,
    `num_virtual_keys` are only seen by them.
    """

    variant: str
    num_parameters: int
    num_saved: int
    num_token_parameters: int = 0
    num_virtual_tokens: int = 0
    num_virtual_keys: int = 0
    uses_peft: bool = True


class VariantConstants(Frozen):
    """What one variant of a method costs on a base.

    Per part of a batch: `part_seconds`, and `layer_seconds` for each layer; `token_layer_seconds` for each
    token in each layer. `head_seconds` per supervised token. `step_seconds` per step; `parameter_seconds` and
    `adding_seconds` per trained parameter: of an update, and of every further part of the step.
    `num_token_parameters` is that of the probe, scaled to all layers. `attached_layer_bytes` come with the
    method and the fast path's copies, `token_layer_bytes` stay until the backward pass, `token_bytes` are in
    use beside them for a moment.
    """

    path: str
    num_token_parameters: int
    part_seconds: float
    layer_seconds: float
    token_layer_seconds: float
    head_seconds: float
    step_seconds: float
    parameter_seconds: float
    adding_seconds: float
    attach_layer_seconds: float
    attached_layer_bytes: float
    token_layer_bytes: float
    token_bytes: float


class Calibration(Frozen):
    """Everything that a probe measured of one base on one machine.

    `reference` is the variant that trains almost nothing: what the others add is told by their difference
    from it. `pair_seconds` is per token, layer and position that the token sees, `short_pair_seconds` the
    same in rows that attend as short ones do. `scoring_*` are passes without gradients,
    `plain_scoring_seconds` per token and layer on the plain path, `decode_*` per token of an answer.
    `first_*_seconds` are taken once by compiled kernels. `loaded_bytes` is the peak of loading above
    `imports_bytes`, `resident_bytes` what stays of it. `general_lengths` are the bundled text's rows.
    `is_cold` says that something was done that later runs find done.
    """

    device: str
    precision: str
    num_threads: int
    max_part_tokens: int
    bytes_per_number: int
    probe_tokens: int
    probe_row_tokens: int
    reference: str
    variants: dict[str, VariantConstants]
    short_pair_seconds: float
    pair_seconds: float
    scoring_part_seconds: float
    scoring_layer_seconds: float
    scoring_seconds: float
    scoring_head_seconds: float
    plain_scoring_seconds: float
    decode_seconds: float
    decode_layer_seconds: float
    import_seconds: float
    peft_seconds: float
    read_seconds: float
    first_forward_seconds: float
    first_backward_seconds: float
    attach_seconds: float
    written_byte_seconds: float
    imports_bytes: int
    loaded_bytes: int
    resident_bytes: int
    general_lengths: list[int]
    is_cold: bool
    probe_seconds: float
