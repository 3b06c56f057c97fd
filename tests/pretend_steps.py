"""What steps of the paged runner take on the device of tests.pretend; run as a process of its own."""

import itertools
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from luthier.methods.base import BottleneckPart, LowRankPart, ServedParts
from luthier.modeling.protocols import AdapterSource, ScheduledBatch, TokenChunk

# Before the runner is imported, for it changes inference mode.
from tests import pretend  # isort: skip
from luthier.inference.runners.paged import PagedRunner  # isort: skip

HIDDEN, NUM_SEQUENCES = 32, 16
_CONFIG = {
    "vocab_size": 64,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def count_step(kinds: tuple[str, ...], num_adapters: int, num_layers: int) -> dict[str, tuple[int, int]]:
    """Count kernels and blocking reads of steps of 16 sequences, whose adapters are of the kinds in turn.

    Of a step that decodes all, of one that also runs a long prompt, and of reading rows of logits.
    """
    torch.manual_seed(0)
    config = Qwen3Config(**_CONFIG, num_hidden_layers=num_layers)
    with torch.no_grad(), pretend.FusedAttention(), pretend.Pretend():
        model = AutoModelForCausalLM.from_config(config).eval().to(pretend.DEVICE)
        runner = PagedRunner(model, max_cache_tokens=1008)
        added = [
            runner.add_adapter(AdapterSource(Path(), _parts(kind, num_layers)))
            for kind in itertools.islice(itertools.cycle(kinds), num_adapters)
        ]
        using = list(itertools.islice(itertools.cycle(added), NUM_SEQUENCES))
        chunks = []
        for number, info in enumerate(using):
            tokens = [*range(-1, -1 - info.num_virtual_tokens, -1), 5, 6, 7]
            chunks.append(TokenChunk(tokens, 0, [2 * number, 2 * number + 1], info.adapter, len(tokens)))
        runner.execute(ScheduledBatch(chunks))
        decoding = [
            TokenChunk([9], len(chunk.token_ids), chunk.block_table, chunk.adapter, 0) for chunk in chunks
        ]
        prompt = TokenChunk(list(range(3, 43)), 0, [50, 51, 52], None, 39)
        last = runner.execute(ScheduledBatch(decoding))
        return {
            "decode": pretend.count(lambda: runner.execute(ScheduledBatch(decoding)).greedy()),
            "mixed": pretend.count(lambda: runner.execute(ScheduledBatch([*decoding, prompt])).greedy()),
            "rows": pretend.count(lambda: last.rows([0, 3]).cpu()),
            "draw": pretend.count(
                lambda: last.draw([0, 3], temperatures=[1.0] * 2, top_p=[0.5, 1.0], points=[0.1, 0.9])
            ),
        }


def _parts(kind: str, num_layers: int) -> ServedParts:
    blocks = [f"model.layers.{number}" for number in range(num_layers)]
    if kind == "prefix":
        return ServedParts(key_values=tuple((torch.randn(2, 4, 8), torch.randn(2, 4, 8)) for _ in blocks))
    if kind == "prompt":
        return ServedParts(embeddings_ND=torch.randn(3, HIDDEN))
    if kind == "adapter":
        return ServedParts(
            bottlenecks=tuple(
                BottleneckPart(
                    f"{block}.{half}",
                    torch.randn(4, HIDDEN),
                    torch.randn(4),
                    torch.randn(HIDDEN, 4),
                    torch.randn(HIDDEN),
                    "gelu",
                    is_parallel=False,
                )
                for block in blocks
                for half in ("self_attn", "mlp")
            )
        )
    sizes = {"self_attn.q_proj": (32, 32), "self_attn.k_proj": (32, 16), "self_attn.v_proj": (32, 16)}
    sizes |= {"self_attn.o_proj": (32, 32), "mlp.gate_proj": (32, 48), "mlp.up_proj": (32, 48)}
    sizes |= {"mlp.down_proj": (48, 32)}
    return ServedParts(
        low_ranks=tuple(
            LowRankPart(
                f"{block}.{name}",
                torch.randn(4, inputs),
                torch.randn(outputs, 4),
                0.5,
                torch.rand(outputs) if kind == "dora" else None,
            )
            for block in blocks
            for name, (inputs, outputs) in sizes.items()
        )
    )


if __name__ == "__main__":
    print(json.dumps([count_step(*case) for case in json.loads(sys.argv[1])]))
