"""The paged runner: any mix of adapters in one batch gives what transformers and PEFT give for each alone."""

import random
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BloomConfig,
    Llama4TextConfig,
    MambaConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen3NextConfig,
    T5Config,
)

from luthier.core.errors import ArtifactCorruptError, SelfCheckError
from luthier.core.shapes import read_shape
from luthier.inference.runners.paged import PagedProvider, PagedRunner
from luthier.methods import Attached, Method
from luthier.methods.base import ServedParts
from luthier.modeling.protocols import (
    AdapterId,
    AdapterSource,
    ScheduledBatch,
    TokenChunk,
    UnsupportedAdapterError,
)
from tests.tiny import VOCAB_SIZE
from tests.tiny_methods import Bench, Case
from tests.tiny_shapes import SERVED_SHAPES, build_shape

FAMILIES = list(SERVED_SHAPES)
BLOCK_SIZE, NUM_BLOCKS = 4, 400
# Two tokens whose logits are nearer in the reference may change places.
NEAR = 1e-4
_WINDOW = 24
_ANYWHERE: dict[str, dict[str, Any]] = {
    "lora": {"type": "lora", "rank": 4, "target_modules": "attention"},
    "rslora": {"type": "lora", "rank": 9, "target_modules": "attention", "use_rslora": True},
    "dora": {"type": "lora", "rank": 4, "target_modules": "attention", "use_dora": True},
    "houlsby": {"type": "adapter", "bottleneck_dim": 6},
    "pfeiffer": {"type": "adapter", "bottleneck_dim": 12, "placement": "pfeiffer", "activation": "relu"},
    "parallel": {"type": "adapter", "bottleneck_dim": 8, "placement": "parallel", "activation": "tanh"},
    "prefix": {"type": "prefix", "num_virtual_tokens": 5, "init": "random"},
    "long-prefix": {"type": "prefix", "num_virtual_tokens": _WINDOW + 7},
    "prompt": {"type": "prompt", "num_virtual_tokens": 4, "init": "random"},
    "long-prompt": {"type": "prompt", "num_virtual_tokens": _WINDOW + 6, "init": "random"},
}
_WITH_EXPERTS = {"qwen3-moe", "gpt-oss"}
# All linear layers, where none of them are experts.
_DENSE: dict[str, dict[str, Any]] = {
    "lora": {"type": "lora", "rank": 4},
    "mlp": {"type": "lora", "rank": 3, "target_modules": "mlp"},
    "dora": {"type": "lora", "rank": 4, "use_dora": True},
}


@dataclass
class Artifact:
    """A tuned model on disk, as a runner gets it, and as transformers with PEFT runs it."""

    source: AdapterSource
    method: Method
    reference: Attached


@dataclass
class Family:
    """A tiny base in a runner with adapters of every kind, and the same one by one."""

    runner: PagedRunner
    base: Attached
    artifacts: dict[str, Artifact]
    ids: dict[str, AdapterId] = field(default_factory=dict)
    num_passes: int = 0

    def __post_init__(self) -> None:
        def count(*_: object) -> None:
            self.num_passes += 1

        self.runner._model.base_model.register_forward_hook(count)

    def add(self, name: str) -> None:
        self.ids[name] = self.runner.add_adapter(self.artifacts[name].source).adapter

    @torch.no_grad()
    def expected(self, name: str | None, token_ids: list[int]) -> torch.Tensor:
        """Return the logits after every token, [T, V], by transformers and PEFT."""
        ids_1T = torch.tensor([token_ids])
        if name is None:
            return self.base.causal_lm(input_ids=ids_1T).logits[0]
        one = self.artifacts[name]
        return one.method.logits(one.reference, ids_1T)[0]

    def num_virtual(self, name: str | None) -> int:
        """Virtual tokens that precede every sequence of an artifact."""
        parts = None if name is None else self.artifacts[name].source.parts
        return 0 if parts is None else parts.num_virtual_tokens


def make_runner(model: Any) -> PagedRunner:
    return PagedRunner(model, max_cache_tokens=(NUM_BLOCKS - 1) * BLOCK_SIZE, block_size=BLOCK_SIZE)


def make_artifact(bench: Bench, shape: str, tuning: dict[str, Any], folder: Path, seed: int) -> Artifact:
    """Attach a method, change what it trains at random, save it and load it again."""
    method, attached = bench.attach(Case(shape, tuning))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, value in attached.named_trained_parameters():
            value.add_(torch.randn(value.shape, generator=generator) * 0.15)
    folder.mkdir(parents=True)
    method.save(attached, folder)
    source = AdapterSource(folder, method.read_parts(folder, read_shape(bench.bases[shape])))
    return Artifact(source, method, method.load(bench.load(shape), folder))


@pytest.fixture(scope="module")
def served_bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("served")
    return Bench({name: build_shape(folder / name, name) for name in FAMILIES})


@pytest.fixture(scope="module")
def families(served_bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Family]:
    folder, found = tmp_path_factory.mktemp("artifacts"), {}
    for shape in FAMILIES:
        tunings = _ANYWHERE | ({} if shape in _WITH_EXPERTS else _DENSE)
        artifacts = {
            name: make_artifact(served_bench, shape, tuning, folder / shape / name, seed)
            for seed, (name, tuning) in enumerate(tunings.items())
        }
        model, base = served_bench.load(shape), served_bench.load(shape)
        found[shape] = Family(make_runner(model), Attached(base, base), artifacts)
        for name in artifacts:
            found[shape].add(name)
    return found


class Sequence:
    """A sequence as a scheduler keeps it: its tokens, its blocks, and how much of it has run."""

    def __init__(self, family: Family, name: str | None, prompt: list[int], num_new: int) -> None:
        self.family, self.name, self.prompt, self.num_new = family, name, prompt, num_new
        self.virtual = [-1 - index for index in range(family.num_virtual(name))]
        self.new: list[int] = []
        # The greedy token after that many real tokens.
        self.found: dict[int, int] = {}
        self.table: list[int] = []
        self.num_run = 0

    @property
    def tokens(self) -> list[int]:
        """All that has to run before the next token is known."""
        return [*self.virtual, *self.prompt, *self.new]

    @property
    def is_done(self) -> bool:
        return len(self.new) == self.num_new

    def next_chunk(self, draw: random.Random, free: list[int]) -> TokenChunk:
        rest = self.tokens[self.num_run :]
        size = len(rest) if draw.random() < 0.3 else draw.randint(1, len(rest))
        chunk = rest[:size]
        while len(self.table) * BLOCK_SIZE < self.num_run + size:
            self.table.append(free.pop(draw.randrange(len(free))))
        num_virtual = sum(token < 0 for token in chunk)
        logits_from = draw.randint(num_virtual, size) if draw.random() < 0.3 else size
        if size == len(rest):
            logits_from = min(logits_from, size - 1)
        adapter = None if self.name is None else self.family.ids[self.name]
        return TokenChunk(chunk, self.num_run, list(self.table), adapter, logits_from)

    def take(self, chunk: TokenChunk, greedy: list[int]) -> None:
        self.num_run += len(chunk.token_ids)
        for place, token in enumerate(greedy, self.num_run - len(greedy)):
            self.found[place + 1 - len(self.virtual)] = token
        if self.num_run == len(self.tokens):
            self.new.append(greedy[-1])

    def share(self, other: "Sequence") -> None:
        """Begin with the full blocks of another sequence of the same model that have run."""
        num_tokens = min(other.num_run, len(self.tokens) - 1) // BLOCK_SIZE * BLOCK_SIZE
        same = 0
        while same < num_tokens and self.tokens[same] == other.tokens[same]:
            same += 1
        num_blocks = same // BLOCK_SIZE
        self.table, self.num_run = other.table[:num_blocks], num_blocks * BLOCK_SIZE

    def restart(self) -> None:
        """Lose all blocks, as a preempted sequence does."""
        self.table, self.num_run = [], 0

    def check(self) -> int:
        """Compare every greedy token with the reference's; return how many were compared."""
        real = [*self.prompt, *self.new]
        logits_TV = self.family.expected(self.name, real)
        top = logits_TV.topk(2)
        compared = 0
        for place, token in self.found.items():
            first, second = top.values[place - 1].tolist()
            if first - second > NEAR:
                assert token == int(top.indices[place - 1, 0]), (self.name, place, first - second)
                compared += 1
        return compared


def run_mix(family: Family, seed: int) -> Counter[str]:
    """Run a random mix of sequences in random chunks, blocks and batches, and compare all of it."""
    draw = random.Random(seed)
    names = [None, *family.artifacts]
    free = list(range(NUM_BLOCKS))
    moved = draw.choice(list(family.artifacts))
    family.runner.remove_adapter(family.ids[moved])
    family.add(moved)
    started: list[Sequence] = []
    for _ in range(draw.randint(3, 9)):
        prompt = [draw.randrange(3, VOCAB_SIZE) for _ in range(draw.randint(1, 40))]
        name = draw.choice(names)
        if started and draw.random() < 0.4:
            name = started[-1].name
            prompt = started[-1].prompt[: draw.randint(1, len(started[-1].prompt))] + prompt[:8]
        started.append(Sequence(family, name, prompt, draw.randint(1, 6)))
    while running := [one for one in started if not one.is_done]:
        chosen = draw.sample(running, draw.randint(1, len(running)))
        for one in chosen:
            others = [other for other in started if other is not one and other.name == one.name]
            if not one.num_run and others:
                one.share(draw.choice(others))
            elif one.num_run and draw.random() < 0.05:
                one.restart()
        chunks = [one.next_chunk(draw, free) for one in chosen]
        num_passes = family.num_passes
        greedy = family.runner.execute(ScheduledBatch(chunks)).greedy()
        # None where all of it is a stored prefix.
        assert family.num_passes <= num_passes + 1
        for one, chunk in zip(chosen, chunks, strict=True):
            one.take(chunk, greedy[: chunk.num_logit_rows])
            greedy = greedy[chunk.num_logit_rows :]
        assert not greedy
    compared: Counter[str] = Counter()
    for one in started:
        compared[str(one.name)] += one.check()
    return compared


@pytest.mark.parametrize("shape", FAMILIES)
def test_any_mix_gives_what_each_model_gives_alone(families: dict[str, Family], shape: str) -> None:
    assert PagedProvider().refusal(families[shape].base.causal_lm) is None
    compared: Counter[str] = Counter()
    for seed in range(8):
        compared += run_mix(families[shape], seed)
    assert len(compared) > len(families[shape].artifacts) // 2
    assert compared.total() > 150


@pytest.mark.full
def test_three_hundred_mixes(families: dict[str, Family]) -> None:
    compared: Counter[str] = Counter()
    for seed in range(300):
        compared += run_mix(families[FAMILIES[seed % len(FAMILIES)]], 1000 + seed)
    assert compared.keys() == {"None", *_ANYWHERE, *_DENSE}
    assert min(compared.values()) > 100


@pytest.mark.parametrize("shape", FAMILIES)
@pytest.mark.parametrize("name", [None, *_ANYWHERE])
def test_logits_are_those_of_the_reference(families: dict[str, Family], shape: str, name: str | None) -> None:
    family = families[shape]
    one = Sequence(family, name, [7 * place % 290 + 3 for place in range(40)], 1)
    table = random.Random(3).sample(range(NUM_BLOCKS), -(-len(one.tokens) // BLOCK_SIZE))
    adapter = None if name is None else family.ids[name]
    chunk = TokenChunk(one.tokens, 0, table, adapter, len(one.virtual))
    found_TV = family.runner.execute(ScheduledBatch([chunk])).rows(range(40))
    expected_TV = family.expected(name, one.prompt)
    assert (found_TV - expected_TV).abs().max() < 1e-4
    if name is not None:
        assert (expected_TV - family.expected(None, one.prompt)).abs().max() > 0.01


def test_a_fully_tuned_model_runs_in_a_runner_of_its_own_beside_the_base(
    families: dict[str, Family], served_bench: Bench, tmp_path: Path
) -> None:
    method, attached = served_bench.attach(Case("qwen3", {"type": "full"}))
    with torch.no_grad():
        for _, value in attached.named_trained_parameters():
            value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    method.save(attached, tmp_path)
    tuned, reference = (method.load(served_bench.load("qwen3"), tmp_path) for _ in range(2))
    own = Family(make_runner(tuned.causal_lm), reference, {})
    pair = [Sequence(family, None, [9, 40, 77], 8) for family in (families["qwen3"], own)]
    for one in (one for _ in range(8) for one in pair):
        rest = one.tokens[one.num_run :]
        one.table = [7, 4, 2]
        chunk = TokenChunk(rest, one.num_run, one.table, None, len(rest) - 1)
        one.take(chunk, one.family.runner.execute(ScheduledBatch([chunk])).greedy())
    assert all(one.check() >= 8 for one in pair)
    assert pair[0].new != pair[1].new


@torch.no_grad()
def test_results_that_are_not_finite_change_no_other_sequence(
    families: dict[str, Family], served_bench: Bench, tmp_path: Path
) -> None:
    """Nor through the blocks that they leave behind."""
    artifact = make_artifact(served_bench, "qwen3", _DENSE["lora"], tmp_path / "huge", 0)
    for part in artifact.source.parts.low_ranks:
        part.b_OR[:] = 1e30
    family = families["qwen3"]
    runner = family.runner
    adapter = runner.add_adapter(artifact.source).adapter
    tokens = [11, 12, 13, 14, 15, 16]
    broken = TokenChunk(tokens, 0, [3, 5], adapter, 5)
    for name in (None, "lora", "houlsby"):
        expected_V = family.expected(name, tokens)[-1]
        other = None if name is None else family.ids[name]
        for table in ([1, 2], [5, 3]):
            chunk = TokenChunk(tokens, 0, table, other, 5)
            beside = [broken, chunk] if table == [1, 2] else [chunk]
            logits = runner.execute(ScheduledBatch(beside))
            assert logits.greedy()[-1] == int(expected_V.argmax())
            assert (logits.rows([len(beside) - 1])[0] - expected_V).abs().max() < 1e-4
            if len(beside) == 2:
                assert logits.greedy()[0] == -1
                drawn = logits.draw([0, 1], temperatures=[1.0] * 2, top_p=[1.0] * 2, points=[0.5] * 2)
                assert drawn[0] is None
    runner.remove_adapter(adapter)
    artifact.source.parts.low_ranks[0].b_OR[0, 0] = torch.nan
    with pytest.raises(SelfCheckError, match="not finite"):
        runner.add_adapter(artifact.source)


def test_tokens_are_drawn_at_points_of_the_mass(families: dict[str, Family]) -> None:
    chunk = TokenChunk([11, 12, 13], 0, [0], None, 0)
    logits = families["qwen3"].runner.execute(ScheduledBatch([chunk]))
    masses_V = (logits.rows([2])[0].double() / 0.7).softmax(-1)
    sums_V = masses_V.cumsum(-1)
    likeliest, ids = masses_V.sort(descending=True)
    num_nucleus = int((likeliest.cumsum(-1) < 0.6).sum()) + 1
    nucleus_V = likeliest[:num_nucleus].cumsum(-1) / likeliest[:num_nucleus].sum()
    for point in (0.0, 0.3, 0.77, 0.9999):
        drawn = logits.draw([2, 2], temperatures=[0.7] * 2, top_p=[1.0, 0.6], points=[point] * 2)
        assert drawn == [int((sums_V <= point).sum()), int(ids[(nucleus_V <= point).sum()])]
    assert logits.draw([1], temperatures=[0.7], top_p=[1e-9], points=[0.9]) == [logits.greedy()[1]]


def test_what_a_runner_can_not_hold_is_refused_and_leaves_no_trace(
    families: dict[str, Family], served_bench: Bench, tmp_path: Path
) -> None:
    family = families["qwen3-moe"]
    parts = family.artifacts["lora"].source.parts
    tokens = TokenChunk([5, 6, 7], 0, [0], None, 2)
    before_V = family.runner.execute(ScheduledBatch([tokens])).rows([0])
    router = replace(parts.low_ranks[-1], module="model.layers.0.mlp.gate")
    low_ranks = (*parts.low_ranks, router)
    with pytest.raises(UnsupportedAdapterError, match="gate"):
        family.runner.add_adapter(AdapterSource(tmp_path, ServedParts(low_ranks=low_ranks)))
    with pytest.raises(UnsupportedAdapterError):
        family.runner.add_adapter(AdapterSource(tmp_path, None))
    key, value = torch.zeros(2, 3, 12), torch.zeros(2, 3, 12)
    for unfit in (
        ServedParts(key_values=((key, value),)),
        ServedParts(embeddings_ND=torch.zeros(2, 47)),
        ServedParts(low_ranks=(replace(parts.low_ranks[0], b_OR=torch.zeros(7, 4)),)),
    ):
        with pytest.raises(ArtifactCorruptError):
            family.runner.add_adapter(AdapterSource(tmp_path, unfit))
    assert torch.equal(family.runner.execute(ScheduledBatch([tokens])).rows([0]), before_V)


_SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=2), "interface"),
        (MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4), "recurrent"),
        (T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=32, num_layers=2, num_heads=2), "encoder"),
        (
            Llama4TextConfig(
                **_SMALL, intermediate_size=32, intermediate_size_mlp=32, head_dim=16, num_local_experts=2
            ),
            "kind",
        ),
        (Qwen3NextConfig(**_SMALL, intermediate_size=32, head_dim=16, num_experts=2), "kind|recurrent"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_models_are_refused_with_a_reason(config: PreTrainedConfig, reason: str) -> None:
    model_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = model_class.from_config(config).eval()
    before = model.config._attn_implementation
    assert re.search(reason, PagedProvider().refusal(model) or "")
    assert model.config._attn_implementation == before


def test_rotary_frequencies_of_long_sequences_change_no_short_one() -> None:
    """A scaling that depends on the longest sequence of a pass is not entered."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "rope_theta": 1e4}
    config = Phi3Config(
        **_SMALL,
        intermediate_size=32,
        max_position_embeddings=512,
        original_max_position_embeddings=64,
        rope_parameters={**rope, "original_max_position_embeddings": 64},
    )
    runner = PagedRunner(AutoModelForCausalLM.from_config(config).eval(), max_cache_tokens=64)
    assert runner.limits.context_length == 64
