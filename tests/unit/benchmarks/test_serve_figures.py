"""What the serving benchmark computes from its measurements."""

import pytest

from benchmarks.machine import Shape
from benchmarks.serve.figures import agreement, percentile, slope, uniform_picks, zipf_picks
from benchmarks.serve.limits import Limits, Work, best_tokens_per_second

# SmolLM2-135M-Instruct, from its config.json.
SMOLLM2 = Shape(layers=30, hidden=576, intermediate=1536, query=576, key_value=192, vocabulary=49152)
LIMITS = Limits(copy_gigabytes_per_second=54.0, read_gigabytes_per_second=59.0, gemm_bf16_gflops=411.0)


def test_a_percentile_is_between_its_neighbours():
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([1.0, 2.0], 0.99) == pytest.approx(1.99)
    assert percentile([7.0], 0.99) == 7.0


def test_agreement_counts_until_answers_differ_and_what_is_equal_after():
    found = agreement([[1, 2, 3, 4], [5, 6]], [[1, 2, 9, 4], [7, 6]])
    assert found == {"first_token": 0.5, "leading": 0.25, "equal": pytest.approx(4 / 6)}
    # An answer that is missing agrees with nothing.
    assert agreement([[]], [[1, 2]]) == {"first_token": 0.0, "leading": 0.0, "equal": 0.0}


def test_zipf_wants_the_first_model_most_and_uniform_wants_all_alike():
    zipf = zipf_picks(10_000, 100, seed=1)
    uniform = uniform_picks(10_000, 100, seed=1)
    # 1 over the hundredth harmonic number, 5.187.
    assert zipf.count(0) / 10_000 == pytest.approx(1 / 5.187, abs=0.02)
    assert uniform.count(0) / 10_000 == pytest.approx(0.01, abs=0.005)
    assert zipf == zipf_picks(10_000, 100, seed=1)


def test_the_slope_of_a_line_is_found():
    assert slope([1, 2, 4], [10, 13, 19]) == pytest.approx(3.0)


def test_the_limit_is_the_smaller_of_bytes_and_products():
    alone = best_tokens_per_second(Work(SMOLLM2, 1, 64, 128, 0, 0), LIMITS)
    many = best_tokens_per_second(Work(SMOLLM2, 16, 64, 128, 0, 0), LIMITS)
    # 134.5 million weights, two bytes and two operations each; 128 cached tokens of 23,040 bytes.
    assert alone["steps"] == alone["bytes"] == pytest.approx(59e9 / 271.9e6, rel=0.01)
    assert many["steps"] == many["products"] == pytest.approx(411e9 / 269e6, rel=0.01)
    assert many["run"] < many["steps"]


def test_distinct_adapters_lower_both_limits():
    # 4,884,480: parameters of rank 16 on all linear layers.
    weights = 16 * 4_884_480
    bare = best_tokens_per_second(Work(SMOLLM2, 16, 64, 128, 0, 0), LIMITS)
    tuned = best_tokens_per_second(Work(SMOLLM2, 16, 64, 128, weights, weights), LIMITS)
    assert tuned["bytes"] < bare["bytes"]
    assert tuned["products"] == pytest.approx(bare["products"] / 1.036, rel=0.01)
