"""`make gpu-day` on the CPU, at a small part of its size."""

import json
import subprocess
import sys
from pathlib import Path

from tests.stack import ROOT


def test_a_gpu_day_runs_small_on_the_cpu_and_reports_every_part(tmp_path: Path) -> None:
    out = tmp_path / "day.json"
    tests = "tests/gpu/test_serving_device.py"
    command = [sys.executable, "-m", "benchmarks.gpu_day", "--scale", "4096", "--threads", "1"]
    subprocess.run([*command, "--tests", tests, "--out", str(out)], cwd=ROOT, check=True, capture_output=True)
    found = json.loads(out.read_text())
    assert found["is_complete"]
    assert found["correctness"]["passed"] >= 3
    assert found["num_parameters"] > 1_000_000
    ours = found["training"]["ours"]
    assert ours["has_all_tokens"]
    assert ours["tokens_per_second"] > 0
    # The model is random and so are its rows: the first loss is the entropy of 501 equal tokens, 6.2.
    assert 5.7 < ours["losses"][0] < 6.8
    served = found["serving"]["paged"]
    assert served["lora"]["tokens_per_second"] > 0
    assert served["base"]["decode_tokens_per_second"] > 0
    for peer in (found["training"]["trl"], found["training"]["unsloth"], found["serving"]["vllm"]):
        assert {"skipped", "failed", "tokens_per_second", "lora"} & peer.keys()
