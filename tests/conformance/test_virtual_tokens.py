"""What prefix and prompt tuning promise beyond what every method does: what they start as, and their room."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, DeepseekV3Config, DynamicCache, MambaConfig, PreTrainedConfig

from luthier.core.errors import InvalidValueError
from luthier.methods import Start, discover
from luthier.methods._virtual import ANSWER
from tests.tiny_methods import LLAMA, ROWS, Bench, Case, batch, rows_of, train
from tests.tiny_shapes import NUM_POSITIONS, SHAPES

ROOT = Path(__file__).resolve().parents[2]
TEXT = "the sky is blue"
NUM_TOKENS = 9
NAMES = ["prefix", "prompt"]


def virtual(bench: Bench, shape: str = LLAMA, **tuning: Any) -> tuple[Any, torch.Tensor]:
    """Attach with nine virtual tokens and return the attached model and PEFT's own vectors."""
    case = Case(shape, {"num_virtual_tokens": NUM_TOKENS, **tuning})
    _, attached = bench.attach(case)
    return attached, attached.model.get_prompt_embedding_to_save("default")


def keys_and_values(bench: Bench, shape: str, token_ids: list[int]) -> list[torch.Tensor]:
    """Run the base over tokens and return its cache: the keys, then the values of each layer."""
    cache = DynamicCache()
    with torch.no_grad():
        bench.load(shape)(input_ids=torch.tensor([token_ids]), past_key_values=cache, use_cache=True)
    return [part[0] for layer in cache.layers for part in (layer.keys, layer.values)]


def text_ids(bench: Bench, shape: str = LLAMA) -> list[int]:
    """Return the text's tokens, repeated and cut to nine."""
    found = bench.start(Case(shape, {"type": "prompt"})).tokenize(TEXT)
    return (found * NUM_TOKENS)[:NUM_TOKENS]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_prefix_starts_as_the_keys_and_values_of_the_first_rows(bench: Bench, shape: str) -> None:
    attached, _ = virtual(bench, shape, type="prefix")
    first_rows = [token for row in rows_of(ROWS) for token in row][:NUM_TOKENS]
    found = discover()["prefix"].virtual_key_values(attached)
    expected = keys_and_values(bench, shape, first_rows)
    for part, expected_part in zip(itertools.chain(*found), expected, strict=True):
        assert torch.equal(part, expected_part)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_after_its_own_beginning_reads_as_if_it_were_whole(bench: Bench, shape: str) -> None:
    """The positions are right: prefix of the first nine tokens, then the rest, is the whole row."""
    row = rows_of(ROWS)[0]
    tokens = torch.tensor([row])
    for name in NAMES:
        case = Case(shape, {"type": name, "num_virtual_tokens": NUM_TOKENS, "init": "text", "init_text": "x"})
        method, params = case.settle()
        start = Start(0, case.base_id, tokenize=lambda text: row)
        attached = method.attach(bench.load(shape), params, start)
        with torch.no_grad():
            expected = bench.load(shape)(input_ids=tokens).logits[:, NUM_TOKENS:]
            assert torch.allclose(method.logits(attached, tokens[:, NUM_TOKENS:]), expected, atol=1e-5)


@pytest.mark.parametrize("projection", [False, True])
def test_a_prefix_starts_as_its_text_with_a_projection_too(bench: Bench, projection: bool) -> None:
    _, found = virtual(bench, type="prefix", init="text", init_text=TEXT, projection=projection)
    expected = keys_and_values(bench, LLAMA, text_ids(bench))
    for number, part in enumerate(found.unflatten(1, (len(expected), -1)).unbind(1)):
        assert torch.equal(part, expected[number].transpose(0, 1).flatten(1))


def test_a_prefix_may_start_at_zero_or_at_small_random_numbers(bench: Bench) -> None:
    _, zeros = virtual(bench, type="prefix", init="zeros")
    assert not zeros.any()
    _, random = virtual(bench, type="prefix", init="random")
    assert 0.015 < random.std() < 0.025


@pytest.mark.parametrize("shape", SHAPES)
def test_a_prompt_starts_as_what_the_first_layer_reads_of_its_text(bench: Bench, shape: str) -> None:
    """Scaled where the base scales its embeddings."""
    _, found = virtual(bench, shape, type="prompt", init="text", init_text=TEXT)
    with torch.no_grad():
        expected = bench.load(shape).get_input_embeddings()(torch.tensor(text_ids(bench, shape)))
    assert torch.equal(found, expected)


def test_a_prompt_starts_as_tokens_that_the_rows_use_and_the_seed_picks(bench: Bench) -> None:
    case = Case(LLAMA, {"type": "prompt", "num_virtual_tokens": NUM_TOKENS})
    table = bench.load(LLAMA).get_input_embeddings().weight
    used = {token for row in rows_of(ROWS) for token in row}
    picks = []
    for seed in (1, 2):
        _, attached = bench.attach(case, seed=seed)
        vectors = attached.model.get_prompt_embedding_to_save("default")
        picks.append([int((table == vector).all(dim=1).nonzero()[0, 0]) for vector in vectors])
        assert len(set(picks[-1])) == NUM_TOKENS
        assert set(picks[-1]) <= used
    assert picks[0] != picks[1]


def test_a_random_prompt_is_as_large_as_real_tokens(bench: Bench) -> None:
    _, found = virtual(bench, type="prompt", init="random")
    table = bench.load(LLAMA).get_input_embeddings().weight
    assert found.std().item() == pytest.approx(table.std().item(), rel=0.2)


def test_a_projection_is_dropped_on_saving(bench: Bench, tmp_path: Path) -> None:
    case = Case(LLAMA, {"type": "prefix", "projection": True})
    job_model = bench.trained(case, 2)
    job_model.method.save(job_model.attached, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["prefix_projection"] is False
    again = job_model.method.load(bench.load(LLAMA), tmp_path)
    assert not hasattr(again.model.prompt_encoder["default"], "transform")


@pytest.mark.parametrize("name", NAMES)
def test_what_paths_of_their_own_need_is_differentiable(bench: Bench, name: str) -> None:
    method, attached = bench.attach(Case(LLAMA, {"type": name}))
    embeddings, pairs = method.virtual_embeddings(attached), method.virtual_key_values(attached)
    assert (embeddings is None) == (name == "prefix")
    assert (pairs is None) == (name == "prompt")
    found = [embeddings] if embeddings is not None else [part for pair in pairs or [] for part in pair]
    sum(part.square().sum() for part in found).backward()
    assert all(value.grad.any() for _, value in attached.named_trained_parameters())


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
@pytest.mark.parametrize("name", NAMES)
def test_virtual_tokens_must_leave_room_for_a_real_one(bench: Bench, shape: str, name: str) -> None:
    bench.attach(Case(shape, {"type": name, "num_virtual_tokens": NUM_POSITIONS - 1}))
    with pytest.raises(InvalidValueError, match=str(NUM_POSITIONS)) as caught:
        Case(shape, {"type": name, "num_virtual_tokens": NUM_POSITIONS}).settle()
    assert caught.value.param == "tuning.num_virtual_tokens"
    method, params = Case(shape, {"type": name}).settle()
    params = params.model_copy(update={"num_virtual_tokens": NUM_POSITIONS})
    with pytest.raises(InvalidValueError) as caught:
        method.attach(bench.load(shape), params, bench.start(Case(shape, {"type": name})))
    assert caught.value.param == "tuning.num_virtual_tokens"


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
@pytest.mark.parametrize("name", NAMES)
def test_rows_pushed_out_of_the_context_stop_with_a_reason(bench: Bench, shape: str, name: str) -> None:
    method, attached = bench.attach(Case(shape, {"type": name, "num_virtual_tokens": NUM_TOKENS}))
    fits = torch.full((1, NUM_POSITIONS - NUM_TOKENS), 5)
    too_long = torch.full((1, NUM_POSITIONS - NUM_TOKENS + 1), 5)
    for run in (method.logits, method.hidden_states):
        assert torch.isfinite(run(attached, fits)).all()
        with pytest.raises(InvalidValueError, match=str(NUM_POSITIONS - NUM_TOKENS)) as caught:
            run(attached, too_long)
        assert caught.value.param == "tuning.num_virtual_tokens"


EXAMPLES, TEXTS = {"type": "prefix"}, [{"type": name, "init": "text", "init_text": TEXT} for name in NAMES]


@pytest.mark.parametrize(
    ("tuning", "param"), [(EXAMPLES, "tuning.init"), *((text, "tuning.init_text") for text in TEXTS)]
)
def test_a_start_without_rows_or_tokens_is_refused(bench: Bench, tuning: dict[str, Any], param: str) -> None:
    method, params = Case(LLAMA, tuning).settle()
    with pytest.raises(InvalidValueError) as caught:
        method.attach(bench.load(LLAMA), params, Start(1, "tiny-llama", tokenize=lambda text: []))
    assert caught.value.param == param


@pytest.mark.parametrize("name", NAMES)
def test_a_bf16_base_learns_in_float32(bench: Bench, name: str) -> None:
    case = Case(LLAMA, {"type": name})
    job_model = bench.job_model(case, dtype=torch.bfloat16)
    losses = train(job_model, case, 6)
    assert losses[-1] < losses[0]
    assert job_model.logits(batch(0)).dtype == torch.bfloat16


# Keys wider than values: multi-head latent attention.
_LATENT = DeepseekV3Config(
    vocab_size=300,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    q_lora_rank=16,
    kv_lora_rank=8,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=12,
    first_k_dense_replace=2,
    n_routed_experts=4,
    n_group=1,
    topk_group=1,
)
_RECURRENT = MambaConfig(vocab_size=300, hidden_size=48, num_hidden_layers=2, state_size=8)


@pytest.mark.parametrize(
    ("config", "name", "reason"),
    [
        (_LATENT, "prefix", "shape"),
        (_RECURRENT, "prefix", "recurrent"),
        (_RECURRENT, "prompt", "recurrent"),
    ],
    ids=["latent attention", "recurrent, prefix", "recurrent, prompt"],
)
def test_a_base_whose_layers_keep_something_else_is_refused(
    bench: Bench, config: PreTrainedConfig, name: str, reason: str
) -> None:
    case = Case(LLAMA, {"type": name})
    method, params = case.settle()
    with pytest.raises(InvalidValueError, match=reason) as caught:
        method.attach(AutoModelForCausalLM.from_config(config).eval(), params, bench.start(case))
    assert caught.value.param == "tuning.type"


@pytest.mark.parametrize("name", NAMES)
def test_the_answer_of_the_card_is_the_trained_models(bench: Bench, tmp_path: Path, name: str) -> None:
    job_model = bench.trained(Case(LLAMA, {"type": name}), 2)
    job_model.method.save(job_model.attached, tmp_path)
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(bench.bases[LLAMA]), str(tmp_path)
    )
    scope: dict[str, Any] = {"torch": torch}
    exec(ANSWER, scope)
    tokens = first = batch(1).token_ids_BT[:, :5]
    with torch.no_grad():
        found = scope["answer"](loaded.eval(), first, 8)
        for _ in range(8):
            following = job_model.method.logits(job_model.attached, tokens)[:, -1:].argmax(-1)
            tokens = torch.cat([tokens, following], dim=1)
        own = scope["answer"](bench.load(LLAMA), first, 8)
    assert torch.equal(found, tokens)
    assert not torch.equal(found, own)


def test_the_cards_and_the_document_hold_one_answer() -> None:
    assert ANSWER in (ROOT / "docs" / "methods.md").read_text()
    assert all(ANSWER in discover()[name].loading for name in NAMES)
