"""The sums of an estimate: more work takes more time and memory, and constants are those of training."""

import itertools
from dataclasses import replace

import pytest

from luthier.core import allocator, estimates, pricing
from luthier.core.estimates import Calibration, MethodCost, VariantConstants
from luthier.core.pricing import Part, Price, Pricing, Scoring, Work
from luthier.modeling import fused_attention
from luthier.training import assemble, loop, loss, samples

_FROZEN = VariantConstants(
    path="fused",
    num_token_parameters=0,
    part_seconds=0.01,
    layer_seconds=0.005,
    token_layer_seconds=4e-5,
    head_seconds=3e-4,
    step_seconds=3e-4,
    parameter_seconds=0.0,
    adding_seconds=0.0,
    attach_layer_seconds=0.001,
    attached_layer_bytes=7e6,
    token_layer_bytes=11_500,
    token_bytes=23_000,
)
_LORA = _FROZEN.model_copy(
    update={
        "num_token_parameters": 4_884_480,
        "token_layer_seconds": 5e-5,
        "parameter_seconds": 2e-9,
        "adding_seconds": 1e-10,
        "attached_layer_bytes": 8e6,
        "token_layer_bytes": 13_100,
    }
)
_CALIBRATION = Calibration(
    device="cpu",
    precision="bfloat16",
    num_threads=2,
    max_part_tokens=1553,
    bytes_per_number=2,
    probe_tokens=260,
    probe_row_tokens=65,
    reference="prompt",
    variants={"prompt": _FROZEN, "lora": _LORA, "prefix": _FROZEN, "full": _LORA},
    short_pair_seconds=1.4e-7,
    pair_seconds=1.4e-7,
    scoring_part_seconds=0.005,
    scoring_layer_seconds=0.004,
    scoring_seconds=1.6e-5,
    scoring_head_seconds=1.8e-4,
    plain_scoring_seconds=3.5e-5,
    decode_seconds=0.007,
    decode_layer_seconds=0.001,
    import_seconds=0.07,
    peft_seconds=0.13,
    read_seconds=0.3,
    first_forward_seconds=0.5,
    first_backward_seconds=0.02,
    attach_seconds=0.1,
    written_byte_seconds=2e-9,
    imports_bytes=520_000_000,
    loaded_bytes=812_000_000,
    resident_bytes=274_000_000,
    general_lengths=[100] * 40,
    is_cold=False,
    probe_seconds=2.0,
)


def _lora(rank: int) -> MethodCost:
    # 305,280 parameters a rank: the sum of inputs and outputs over SmolLM2-135M's linear layers.
    count = 305_280 * rank
    return MethodCost(variant="lora", num_parameters=count, num_saved=count, num_token_parameters=count)


def _work(num_rows: int, num_tokens: int, *, rows_a_part: int = 4, parts_a_step: int = 1) -> Work:
    part = Part(rows_a_part, num_tokens, rows_a_part * num_tokens // 2)
    num_steps = num_rows // (rows_a_part * parts_a_step)
    return Work(
        steps=[[part] * parts_a_step] * num_steps,
        scale=1.0,
        num_steps=num_steps,
        num_epochs=1,
        scored=[Part(8, 100, 792)] * 5,
        num_prompts=0,
        longest=num_tokens,
        save_every_steps=None,
    )


def _price(
    cost: MethodCost,
    work: Work,
    *,
    is_whole_model: bool = False,
    calibration: Calibration = _CALIBRATION,
) -> Price:
    return Pricing(
        calibration,
        cost,
        num_layers=30,
        hidden_size=576,
        vocabulary_size=49152,
        artifact_bytes=4 * cost.num_saved,
        is_whole_model=is_whole_model,
    ).price(work)


def test_more_rows_take_more_time_and_no_more_memory() -> None:
    few, many = _price(_lora(16), _work(80, 100)), _price(_lora(16), _work(800, 100))
    first = _CALIBRATION.first_backward_seconds
    assert many.seconds.train - first == pytest.approx(10 * (few.seconds.train - first))
    assert many.peak_memory_bytes == few.peak_memory_bytes
    assert many.seconds.load == few.seconds.load


def test_a_job_that_goes_on_scores_one_model_more_and_reads_a_whole_one_twice() -> None:
    work = _work(80, 100)
    more = replace(work, num_first_answered=2, num_read=2, once=[Scoring(work.scored)])
    fresh, further = _price(_lora(16), work), _price(_lora(16), more)
    # One epoch: two evaluations become three.
    assert further.seconds.evaluate == pytest.approx(1.5 * fresh.seconds.evaluate)
    assert further.seconds.load == pytest.approx(fresh.seconds.load + _CALIBRATION.read_seconds)
    assert further.seconds.train == fresh.seconds.train


def test_longer_rows_take_more_time_and_more_memory() -> None:
    prices = [_price(_lora(16), _work(80, length)) for length in (300, 500, 900)]
    for short, long in itertools.pairwise(prices):
        assert long.seconds.train > short.seconds.train
        assert long.peak_memory_bytes > short.peak_memory_bytes


def test_a_higher_rank_takes_more_of_everything() -> None:
    prices = [_price(_lora(rank), _work(80, 400)) for rank in (1, 8, 64, 256)]
    for low, high in itertools.pairwise(prices):
        assert high.seconds.train > low.seconds.train
        assert high.seconds.save > low.seconds.save
        assert high.peak_memory_bytes > low.peak_memory_bytes


def test_virtual_tokens_and_keys_cost_and_tokens_cost_more() -> None:
    prompt = MethodCost(variant="prompt", num_parameters=11_520, num_saved=11_520)
    bare = _price(prompt, _work(80, 400))
    with_tokens = _price(replace(prompt, num_virtual_tokens=20), _work(80, 400))
    prefix = MethodCost(variant="prefix", num_parameters=11_520, num_saved=11_520, num_virtual_keys=20)
    with_keys = _price(prefix, _work(80, 400))
    assert bare.seconds.train < with_keys.seconds.train < with_tokens.seconds.train
    assert with_tokens.peak_memory_bytes > bare.peak_memory_bytes


def test_a_whole_model_needs_its_optimizer_and_its_gradients() -> None:
    num_parameters = 134_515_008
    full = MethodCost(
        variant="full", num_parameters=num_parameters, num_saved=num_parameters, uses_peft=False
    )
    whole = _price(full, _work(80, 100), is_whole_model=True)
    lora = _price(_lora(16), _work(80, 100))
    # Two averages and what bf16 leaves out of the masters, and gradients in bf16: 12 bytes a number.
    assert whole.peak_memory_bytes - lora.peak_memory_bytes > 10 * num_parameters
    in_parts = _price(full, _work(80, 100, parts_a_step=2), is_whole_model=True)
    # The second part turns gradients into float32.
    assert in_parts.peak_memory_bytes - whole.peak_memory_bytes == 2 * num_parameters


def test_tokens_that_all_rows_begin_with_are_paid_for_once_on_the_fast_path_alone() -> None:
    part = Part(8, 100, 300, num_shared=40)
    assert part.num_tokens("fused") == 40 + 8 * 60
    assert part.num_tokens("fused", 20) == 20 + 40 + 8 * 60
    assert part.num_tokens("plain", 20) == 8 * 120
    work = _work(80, 100)
    steps = [[replace(part, num_shared=40) for part in step] for step in work.steps]
    assert (
        _price(_lora(16), replace(work, steps=steps)).seconds.train
        < 0.8 * _price(_lora(16), work).seconds.train
    )


@pytest.mark.parametrize(
    ("part", "path", "is_short"),
    [
        (Part(4, 160, 80), "fused", True),
        (Part(4, 161, 80), "fused", False),
        # What rows share is a row of its own, and the rest another, on the fast path alone.
        (Part(4, 200, 80, num_shared=120), "fused", True),
        (Part(4, 200, 80, num_shared=170), "fused", False),
        (Part(4, 200, 80, num_shared=120), "plain", False),
        (Part(4, 160, 80), "plain", True),
    ],
)
def test_keys_are_priced_as_rows_of_their_length_attend(part: Part, path: str, is_short: bool) -> None:
    variants = {name: one.model_copy(update={"path": path}) for name, one in _CALIBRATION.variants.items()}
    same = _CALIBRATION.model_copy(update={"variants": variants})
    work = replace(_work(80, 100), steps=[[part]] * 10)
    seconds = [
        _price(_lora(16), work, calibration=same.model_copy(update={name: 1e-6})).seconds.train
        for name in ("short_pair_seconds", "pair_seconds")
    ]
    assert (seconds[0] > seconds[1]) is is_short


def test_a_job_needs_at_least_what_loading_its_base_takes() -> None:
    tiny = _price(_lora(1), _work(8, 1, rows_a_part=1))
    assert tiny.peak_memory_bytes >= _CALIBRATION.imports_bytes + _CALIBRATION.loaded_bytes


def test_save_points_and_answers_take_their_time() -> None:
    work = _work(800, 100)
    plain = _price(_lora(16), work)
    every_step = _price(_lora(16), replace(work, save_every_steps=1))
    assert every_step.seconds.save > plain.seconds.save
    answered = _price(_lora(16), replace(work, num_prompts=2))
    # Two answers of 64 tokens by base and tuned model, each token through 30 layers.
    extra = 2 * 2 * 64 * (0.007 + 30 * 0.001)
    assert answered.seconds.evaluate - plain.seconds.evaluate == pytest.approx(extra)


def test_more_epochs_are_evaluated_more_often() -> None:
    work = _work(80, 100)
    once, thrice = _price(_lora(16), work), _price(_lora(16), replace(work, num_epochs=3, scale=3.0))
    # The base and each epoch.
    assert thrice.seconds.evaluate == pytest.approx(2 * once.seconds.evaluate)


def test_a_checkpoint_is_proved_and_written_and_the_result_is_written_alone() -> None:
    work, dear = _work(80, 100), _CALIBRATION.model_copy(update={"plain_scoring_seconds": 1.0})
    once, thrice = (_price(_lora(16), one, calibration=dear) for one in (work, replace(work, num_epochs=3)))
    # With a pass on the plain path that takes most of it: six for each proof, three when the result is read.
    passes = 30 * (32 + 100)
    reading = 3 * 30 * 32
    assert once.seconds.save == pytest.approx(3 * passes + reading, rel=0.01)
    assert thrice.seconds.save == pytest.approx(3 * 3 * passes + reading, rel=0.01)
    slow = _CALIBRATION.model_copy(update={"written_byte_seconds": 1.0})
    once, thrice = (_price(_lora(16), one, calibration=slow) for one in (work, replace(work, num_epochs=3)))
    artifact_bytes = 4 * _lora(16).num_saved
    assert once.seconds.save == pytest.approx(2 * artifact_bytes, rel=0.01)
    assert thrice.seconds.save == pytest.approx(4 * artifact_bytes, rel=0.01)


def test_what_the_fast_path_copied_is_given_back_and_parameters_are_counted_all_the_same() -> None:
    work = _work(80, 100)
    plain = _price(_lora(16), work)
    variants = {
        name: one.model_copy(update={"attached_layer_bytes": one.attached_layer_bytes + 5e6})
        for name, one in _CALIBRATION.variants.items()
    }
    copied = _CALIBRATION.model_copy(update={"variants": variants})
    assert _price(_lora(16), work, calibration=copied).peak_memory_bytes == plain.peak_memory_bytes
    # A reading below the reference's, by its noise.
    low = variants["lora"].model_copy(update={"attached_layer_bytes": 1e6})
    noisy = _CALIBRATION.model_copy(update={"variants": variants | {"lora": low}})
    peaks = [_price(_lora(rank), work, calibration=noisy).peak_memory_bytes for rank in (64, 256)]
    # Each with its two averages and its gradient.
    assert peaks[1] - peaks[0] >= 15 * (_lora(256).num_parameters - _lora(64).num_parameters)


def test_the_constants_are_those_of_training() -> None:
    assert pricing._MAX_CHUNK_LOGITS == loss.MAX_CHUNK_LOGITS
    assert pricing._SAVE_POINT_SECONDS == loop.SAVE_POINT_SECONDS
    assert pricing.KEPT_TOKENS == fused_attention._MAX_KEPT_TOKENS
    assert pricing._SAVE_COST_FACTOR == loop._SAVE_COST_FACTOR
    assert pricing._MAX_ANSWER_TOKENS == samples.MAX_NEW_TOKENS
    assert pricing._SHORT_PROOF_TOKENS == assemble._NUM_SAMPLE_TOKENS
    assert estimates.MAX_PROOF_TOKENS == assemble._NUM_LONG_SAMPLE_TOKENS
    assert pricing._MAPPED_BLOCK_BYTES == allocator._MAX_HEAP_BLOCK_BYTES
