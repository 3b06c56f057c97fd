"""What a job will take: a calibration's constants summed over the plan of its rows. Pure arithmetic.

Seconds and bytes are those of the training child. Whoever knows the lengths of the rows asks `Pricing.price`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from luthier.core.estimates import MAX_PROOF_TOKENS, Calibration, MethodCost, VariantConstants
from luthier.core.reports import PhaseSeconds

# The part of the shortest row on which checkpoints are proved (luthier.training.assemble).
_SHORT_PROOF_TOKENS = 32
# From this size on a freed block goes back to the kernel, and is new memory each time (training.allocator).
_MAPPED_BLOCK_BYTES = 32 * 1024**2
# What a run takes with its first steps, and how much the heap grows for one byte of activations: batches
# differ in size, so what one frees fits the next one badly. Measured over steps of 480 and of 1,400 tokens on
# one base. Packing the output layer's weight for a product takes another copy of it.
_FIRST_STEP_BYTES, _HEAP_GROWTH = 80 * 1024**2, 1.1
# Queries that attend at a time: beyond, a query sees about half of the row.
_BLOCK_TOKENS = 256
# As luthier.modeling.fused_attention has it: the longest rows that attend as short ones do. A test holds them
# equal.
KEPT_TOKENS = 160
# As luthier.training has them: logits held at a time, seconds between save points and what these may cost,
# tokens of an answer. A test holds them equal.
_MAX_CHUNK_LOGITS = 12 * 1024 * 1024
_SAVE_POINT_SECONDS = 30.0
_SAVE_COST_FACTOR = 20.0
_MAX_ANSWER_TOKENS = 64


@dataclass(frozen=True)
class Part:
    """Rows that run together: `longest` counts their tokens with padding, `num_supervised` what is scored.

    All rows begin with the same `num_shared` tokens, which the fast path computes once.
    """

    num_rows: int
    longest: int
    num_supervised: int
    num_shared: int = 0

    def num_tokens(self, path: str, num_virtual: int = 0) -> int:
        """Return the tokens that run on a path, virtual ones before the rows too."""
        if path != "fused":
            return self.num_rows * (num_virtual + self.longest)
        return num_virtual + self.num_shared + self.num_rows * (self.longest - self.num_shared)


@dataclass(frozen=True)
class Scoring:
    """Parts that are scored once, `times` over where they are a sample; `is_tuned`: by the tuned model."""

    parts: Sequence[Part]
    times: float = 1.0
    is_tuned: bool = False


@dataclass(frozen=True)
class Work:
    """What a job does: one epoch's steps, each in parts, and what is scored at every evaluation.

    `scale` is epochs' steps over `steps`, where these are a sample. `num_prompts` are answered at every
    evaluation. `longest` is the longest row. `once` is scored before the first step: by the base of a job
    that goes on from a tuned model, which then answers the prompts too and is read where the other one is a
    whole model (`num_first_answered`, `num_read`); and preferences, by what the job starts from.
    `head_scale` is what the loss takes at the output layer, as a multiple of what was measured.
    """

    steps: Sequence[Sequence[Part]]
    scale: float
    num_steps: int
    num_epochs: int
    scored: Sequence[Part]
    num_prompts: int
    longest: int
    save_every_steps: int | None
    num_first_answered: int = 1
    num_read: int = 1
    once: Sequence[Scoring] = ()
    head_scale: float = 1.0


@dataclass(frozen=True)
class Price:
    """Seconds by phase, without tokenising, and the training child's peak memory."""

    seconds: PhaseSeconds
    peak_memory_bytes: int

    @property
    def total_seconds(self) -> float:
        """All phases together."""
        return math.fsum(self.seconds.model_dump().values())


@dataclass(frozen=True)
class Pricing:
    """One job's costs on a calibrated machine."""

    calibration: Calibration
    cost: MethodCost
    num_layers: int
    hidden_size: int
    vocabulary_size: int
    artifact_bytes: int
    is_whole_model: bool

    @property
    def variant(self) -> VariantConstants:
        """The constants of the variant that is asked for."""
        return self.calibration.variants[self.cost.variant]

    @property
    def reference(self) -> VariantConstants:
        """The constants of the variant that trains almost nothing."""
        return self.calibration.variants[self.calibration.reference]

    def price(self, work: Work) -> Price:
        """Add everything up."""
        train = self._train_seconds(work)
        save, point_bytes = self._save_seconds(work), self._save_point_bytes()
        point = point_bytes * self.calibration.written_byte_seconds
        if work.save_every_steps is not None:
            num_points = float(work.num_steps // work.save_every_steps)
        else:
            num_points = math.floor(train / max(_SAVE_POINT_SECONDS, _SAVE_COST_FACTOR * point))
        seconds = PhaseSeconds(
            load=self._load_seconds(work),
            train=train,
            evaluate=self._evaluate_seconds(work),
            save=save + num_points * point,
        )
        return Price(seconds, self._peak_bytes(work))

    # ---- seconds

    def _extra(self, reference: float, variant: float) -> float:
        """Scale what a variant adds to the reference by how much wider than in the probe it is."""
        probed = self.variant.num_token_parameters
        width = self.cost.num_token_parameters / probed if probed else 1.0
        return reference + (variant - reference) * width

    @property
    def _token_layer_seconds(self) -> float:
        variant, reference = self.variant, self.reference
        if variant.path != reference.path:
            # What the plain path costs by itself does not grow with the method's width.
            return variant.token_layer_seconds
        return self._extra(reference.token_layer_seconds, variant.token_layer_seconds)

    def _pairs(self, part: Part) -> float:
        """Return the keys that the part's tokens see beyond those of the probe's rows, all together."""
        longest, num_virtual = part.longest, self.cost.num_virtual_tokens + self.cost.num_virtual_keys
        seen = longest if longest <= _BLOCK_TOKENS else (longest + _BLOCK_TOKENS) / 2
        beyond = seen + num_virtual - self.calibration.probe_row_tokens
        return self._num_tokens(part) * beyond

    def _pair_seconds(self, part: Part) -> float:
        """Return what one of them takes in a layer, by the rows that attend together."""
        shared, num_virtual = part.num_shared, self.cost.num_virtual_tokens
        # On the fast path what rows begin with alike is a row of its own.
        is_parted = self.variant.path == "fused"
        attending = max(num_virtual + shared, part.longest - shared) if is_parted else part.longest
        is_short = attending <= KEPT_TOKENS
        return self.calibration.short_pair_seconds if is_short else self.calibration.pair_seconds

    def _num_tokens(self, part: Part) -> int:
        return part.num_tokens(self.variant.path, self.cost.num_virtual_tokens)

    def _part_seconds(self, part: Part, head_scale: float) -> float:
        variant = self.variant
        per_layer = variant.layer_seconds + self._num_tokens(part) * self._token_layer_seconds
        per_layer += self._pairs(part) * self._pair_seconds(part)
        return (
            variant.part_seconds
            + self.num_layers * max(0.0, per_layer)
            + part.num_supervised * variant.head_seconds * head_scale
        )

    def _train_seconds(self, work: Work) -> float:
        variant, num_parameters = self.variant, self.cost.num_parameters
        total = 0.0
        for parts in work.steps:
            total += math.fsum(self._part_seconds(part, work.head_scale) for part in parts)
            total += variant.step_seconds + num_parameters * (
                variant.parameter_seconds + (len(parts) - 1) * variant.adding_seconds
            )
        first = self.calibration.first_backward_seconds if variant.path == "fused" else 0.0
        return total * work.scale + first

    def _scored_part_seconds(self, part: Part, *, is_tuned: bool = True) -> float:
        constants, slower = self.calibration, 1.0
        num_tokens = self._num_tokens(part) if is_tuned else part.num_tokens(self.reference.path)
        if is_tuned and self.variant.path != self.reference.path:
            slower = self.variant.token_layer_seconds / self.reference.token_layer_seconds
        return (
            constants.scoring_part_seconds
            + self.num_layers * constants.scoring_layer_seconds
            + num_tokens * self.num_layers * constants.scoring_seconds * slower
            + part.num_supervised * constants.scoring_head_seconds
        )

    def _evaluate_seconds(self, work: Work) -> float:
        constants = self.calibration
        scored = (work.num_epochs + 1) * math.fsum(self._scored_part_seconds(part) for part in work.scored)
        for one in work.once:
            parts = (self._scored_part_seconds(part, is_tuned=one.is_tuned) for part in one.parts)
            scored += one.times * math.fsum(parts)
        per_token = constants.decode_seconds + self.num_layers * constants.decode_layer_seconds
        answers = work.num_prompts * _MAX_ANSWER_TOKENS * per_token
        return scored + (work.num_epochs + work.num_first_answered) * answers

    def _load_seconds(self, work: Work) -> float:
        constants, variant = self.calibration, self.variant
        total = constants.import_seconds + work.num_read * constants.read_seconds + constants.attach_seconds
        total += self.num_layers * variant.attach_layer_seconds
        if self.cost.uses_peft:
            total += constants.peft_seconds
        return total + (constants.first_forward_seconds if variant.path == "fused" else 0.0)

    def _pass_seconds(self, num_tokens: int, *, on_plain_path: bool) -> float:
        """Return what a pass over one row takes up to the output layer, without gradients."""
        constants = self.calibration
        per_token = constants.scoring_seconds
        if on_plain_path:
            # A layer's own time is in what was measured for the probe's tokens.
            own = constants.plain_scoring_seconds - constants.scoring_layer_seconds / constants.probe_tokens
            per_token = max(per_token, own)
        return self.num_layers * (constants.scoring_layer_seconds + num_tokens * per_token)

    def _save_seconds(self, work: Work) -> float:
        """Return the seconds of all checkpoints and the result: each step proved, each folder written."""
        constants = self.calibration
        short, long = min(work.longest, _SHORT_PROOF_TOKENS), min(work.longest, MAX_PROOF_TOKENS)
        proof = 0.0
        for num_tokens in (short, long):
            num_run = num_tokens + self.cost.num_virtual_tokens
            # The plain path's states and whole logits, which are also made from the states; the fast path's
            # states; both paths' of a second row, half of which the fast path shares with the first.
            proof += 3 * self._pass_seconds(num_run, on_plain_path=True)
            proof += self._pass_seconds(num_run, on_plain_path=False)
            proof += self._pass_seconds(num_run + num_tokens // 2, on_plain_path=False)
            proof += 2 * (constants.scoring_part_seconds + num_tokens * constants.scoring_head_seconds)
        writing = self.artifact_bytes * constants.written_byte_seconds
        # In the end what was saved is loaded and run, beside the base and the model in memory.
        reading = constants.read_seconds if self.is_whole_model else constants.attach_seconds
        reading += self.num_layers * self.variant.attach_layer_seconds
        reading += 3 * self._pass_seconds(short, on_plain_path=True)
        # The result is the last checkpoint's model, which was proved then.
        return work.num_epochs * (proof + writing) + writing + reading

    # ---- bytes

    def _state_bytes_per_parameter(self) -> float:
        """Return the bytes of a trained number, its two averages, and where needed the rest of its master."""
        size = self.calibration.bytes_per_number
        if self.is_whole_model:
            return 8.0 + (2.0 if size == 2 else 0.0)
        return 12.0

    def _save_point_bytes(self) -> float:
        own = float(self.calibration.bytes_per_number) if self.is_whole_model else 0.0
        return self.cost.num_parameters * (self._state_bytes_per_parameter() + own)

    def _gradient_bytes_per_parameter(self, work: Work) -> float:
        """Return 4, or the weights' own size where no step of a whole model has a second part."""
        has_parts = any(len(parts) > 1 for parts in work.steps)
        return 4.0 if has_parts or not self.is_whole_model else float(self.calibration.bytes_per_number)

    def _part_bytes(self, part: Part) -> float:
        variant, reference = self.variant, self.reference
        if variant.path == reference.path:
            kept = self._extra(reference.token_layer_bytes, variant.token_layer_bytes)
        else:
            kept = variant.token_layer_bytes
        num_tokens = self._num_tokens(part)
        layers = num_tokens * (self.num_layers * kept + variant.token_bytes)
        num_logits = min(part.num_supervised * self.vocabulary_size, _MAX_CHUNK_LOGITS)
        head = (num_logits + 3 * part.num_supervised * self.hidden_size) * self.calibration.bytes_per_number
        return layers + head

    def _proof_bytes(self, work: Work) -> float:
        """Return what a proof takes in blocks that are too large to come from memory that was freed."""
        num_logits = min(work.longest, MAX_PROOF_TOKENS) * self.vocabulary_size
        size = self.calibration.bytes_per_number
        # Two sets of logits, and their float32 copies and gap while they are compared.
        blocks = [size, size, 4, 4, 4] if size == 2 else [size, size, 4]
        return math.fsum(num_logits * one for one in blocks if num_logits * one >= _MAPPED_BLOCK_BYTES)

    def _attached_bytes(self) -> float:
        """Return what lies beside the base before the first step; the method's part grows with its width."""
        variant, reference = self.variant, self.reference
        if variant.path != reference.path:
            return self.num_layers * variant.attached_layer_bytes
        own = self._extra(reference.attached_layer_bytes, variant.attached_layer_bytes)
        # Beside its own few the reference's are the fast path's copies, and what was copied is given back. A
        # difference of two readings may be too small, but not smaller than the parameters.
        least = 0.0 if self.is_whole_model else 4.0 * self.cost.num_parameters
        return max(least, self.num_layers * (own - reference.attached_layer_bytes))

    def _peak_bytes(self, work: Work) -> int:
        constants, on_cpu = self.calibration, self.calibration.device == "cpu"
        num_parameters = self.cost.num_parameters
        resident = constants.imports_bytes + constants.resident_bytes + self._attached_bytes()
        # The parameters themselves are among what is attached.
        states = num_parameters * (self._state_bytes_per_parameter() - (0.0 if self.is_whole_model else 4.0))
        gradients = num_parameters * self._gradient_bytes_per_parameter(work)
        largest = max((self._part_bytes(part) for step in work.steps for part in step), default=0.0)
        head = float(self.vocabulary_size * self.hidden_size * constants.bytes_per_number)
        if self.is_whole_model:
            # In the end the saved model is loaded beside the trained one.
            again = self.cost.num_saved * constants.bytes_per_number
            trained = gradients + largest + max(head, again)
        else:
            heap = (_FIRST_STEP_BYTES + largest * _HEAP_GROWTH) if on_cpu else largest
            trained = heap + max(gradients + (head if on_cpu else 0.0), self._proof_bytes(work))
        loading = constants.imports_bytes + constants.loaded_bytes
        return int(max(loading, resident + states + trained))
