"""What the benchmarks compute from their measurements."""

import fnmatch
import statistics
from dataclasses import replace

import grimp
import numpy as np
import pytest

from benchmarks import results_file
from benchmarks.machine import Shape, _name_processor, step_flops
from benchmarks.results_file import ResultsFile
from benchmarks.train.growth import cut_to_length, fit, repeat, summarise, with_largest_step_of
from benchmarks.train.pairs import compare_losses, median_interval
from benchmarks.train.workload import Workload
from luthier.core.specs import BaseFacts
from luthier.data.prepare.prepared_rows import join_rows

# SmolLM2-135M-Instruct, from its config.json: 9 heads and 3 key/value heads of 64.
SMOLLM2 = Shape(layers=30, hidden=576, intermediate=1536, query=576, key_value=192, vocabulary=49152)
ROWS = {"num_tokens": 1000, "num_supervised": 400, "num_rows": 10}
LORA = {"type": "lora", "rank": 8}


def test_body_embedding_and_norms_are_all_weights_of_the_model():
    norms = 2 * 30 * 576 + 576
    assert SMOLLM2.body_weights + 49152 * 576 + norms == 134_515_008


def test_a_lora_step_counts_four_per_frozen_weight_and_six_per_trained_one():
    # 2,442,240: parameters of rank 8 on all linear layers (shared with the documentation of methods).
    expected = 4 * SMOLLM2.body_weights * 1000 + 4 * 49152 * 576 * 400 + 6 * 2_442_240 * 1000
    assert step_flops(SMOLLM2, LORA, **ROWS) == expected


def test_full_tuning_counts_six_per_weight_and_prompt_tuning_its_virtual_tokens():
    full = step_flops(SMOLLM2, {"type": "full"}, **ROWS)
    prefix = step_flops(SMOLLM2, {"type": "prefix"}, **ROWS)
    prompt = step_flops(SMOLLM2, {"type": "prompt", "num_virtual_tokens": 20}, **ROWS)
    assert full == pytest.approx(1.5 * prefix)
    assert prompt - prefix == 4 * SMOLLM2.body_weights * 20 * 10


def test_the_fit_finds_the_curve_that_made_the_times():
    times = {length: 2e-3 * length + 3e-6 * length**2 for length in (128, 256, 384, 512)}
    assert fit(times, (128, 256, 384)) == pytest.approx((2e-3, 3e-6))


def test_growth_is_outside_the_bars_when_ten_times_the_rows_cost_more_a_token():
    def run(seconds: float, tokens: int, rows: int) -> dict[str, float]:
        sizes = {"num_tokens": tokens, "num_rows": rows, "largest_step_tokens": 100}
        return {"seconds": seconds, "memory_bytes": 10**9, **sizes}

    lengths = {
        f"length {length}": run(32 * 2e-3 * length, 32 * length, 32) for length in (128, 256, 384, 512)
    }
    even = {"rows x1": run(10, 1000, 10), "rows x10": run(101, 10_000, 100), **lengths}
    steep = {**even, "rows x10": run(120, 10_000, 100)}
    assert summarise([even])["is_within_bars"]
    assert not summarise([steep])["is_within_bars"]


def test_few_rows_are_put_in_an_order_whose_largest_step_is_that_of_the_many(tmp_path):
    lengths = np.random.default_rng(5).integers(20, 90, 96)
    tokens = [np.arange(row, row + length, dtype=np.int32) for row, length in enumerate(lengths)]
    rows = join_rows(tokens, [row >= 0 for row in tokens], list(range(1, 97)))
    few = Workload(rows, BaseFacts.model_construct(), tmp_path, 8, 1, 1, "cpu", tmp_path / "rows.npz")
    many = replace(few, rows=repeat(rows, 10))
    found = with_largest_step_of(many, few)
    largest = [max(one.computed_tokens_of_steps()) for one in (many, found)]
    assert largest[1] == pytest.approx(largest[0], rel=2e-3)
    assert found == replace(few, seed=found.seed)
    longer = replace(few, rows=cut_to_length(rows, 100, 16))
    with pytest.raises(SystemExit, match="No order of 96 rows"):
        with_largest_step_of(longer, few)


def test_rows_cut_to_a_length_keep_tokens_and_mask_together():
    tokens = [np.arange(5, dtype=np.int32), np.arange(5, 9, dtype=np.int32)]
    rows = join_rows(tokens, [row % 2 == 0 for row in tokens], [1, 2])
    cut = cut_to_length(rows, 6, 4)
    assert cut.lengths.tolist() == [6, 6, 6, 6]
    assert (cut.supervised == (cut.tokens % 2 == 0)).all()


def test_the_interval_holds_the_median_and_is_within_the_values():
    values = [2.9, 3.0, 3.1, 3.2, 9.0]
    found = median_interval(values)
    assert found.median == statistics.median(values)
    assert min(values) <= found.low <= found.median <= found.high <= max(values)
    assert found == median_interval(values)


def test_losses_agree_only_within_the_noise_of_bf16():
    def pair(peer: list[float]) -> dict[str, dict[str, list[float]]]:
        return {"ours": {"losses": [4.0, 3.0]}, "peer": {"losses": peer}}

    assert compare_losses([pair([4.01, 3.01])], [4.0, 3.0])["agree"]
    assert not compare_losses([pair([4.3, 2.7])], [4.0, 3.0])["agree"]
    assert "agree" not in compare_losses([pair([4.0, 3.0])], None)


def test_of_losses_that_differ_the_summary_says_whose_are_those_of_float32():
    pairs = [{"ours": {"losses": [4.0, 3.0]}, "peer": {"losses": [4.2, 3.2]}}]
    found = compare_losses(pairs, [4.01, 3.0])
    assert (found["agree"], found["is_exact"]) == (False, True)
    assert found["gap_to_exact"] == pytest.approx({"ours": 0.005, "peer": 0.195})
    assert not compare_losses(pairs, [4.2, 3.2])["is_exact"]


def test_what_a_measurements_code_leaves_out_no_training_run_loads():
    graph = grimp.build_graph("luthier", "luthier_cpu")
    loaded = graph.find_upstream_modules("luthier.training.run")
    # Registered by an entry point.
    loaded |= graph.find_upstream_modules("luthier_cpu.training.accelerator")
    assert {"luthier.training.loop.loop", "luthier_cpu.training.llama"} <= loaded
    paths = [name.replace(".", "/") + ".py" for name in loaded]
    for pattern in results_file._NOT_TRAINING:
        assert not fnmatch.filter(paths, pattern)
        assert list(results_file.ROOT.glob(pattern)), "the pattern names nothing"


def test_a_stopped_measurement_continues_and_other_code_begins_again(tmp_path):
    machine = {"processor": "one"}
    first = ResultsFile(tmp_path / "train.json", machine, fresh=False)
    first.row("lora", "print-1")["pairs"] = [1, 2]
    first.save()
    assert ResultsFile(first.path, machine, fresh=False).row("lora", "print-1")["pairs"] == [1, 2]
    assert "pairs" not in ResultsFile(first.path, machine, fresh=False).row("lora", "print-2")
    with pytest.raises(SystemExit, match="is of another machine"):
        ResultsFile(first.path, {"processor": "two"}, fresh=False)
    assert "pairs" not in ResultsFile(first.path, {"processor": "two"}, fresh=True).row("lora", "print-1")


@pytest.mark.parametrize(
    ("info", "name"),
    [
        (
            "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n",
            "AMD EPYC (family 25, model 17)",
        ),
        ("processor\t: 0\nmodel name\t: Some: one\n", "Some: one"),
        ("processor\t: 0\nBogoMIPS\t: 50.00\n", "?"),
    ],
)
def test_processors_of_one_name_are_distinguished(info, name):
    assert _name_processor(info) == name
