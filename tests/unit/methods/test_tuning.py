"""The `tuning` object of a request: what is accepted, what is refused, what "auto" becomes."""

import subprocess
import sys

import pytest

from luthier.core.errors import (
    InvalidTypeError,
    InvalidValueError,
    UnknownParameterError,
    UnsupportedValueError,
)
from luthier.core.specs import Hyperparameters, TrainingOptions, TrainingSpec
from luthier.methods import discover
from luthier.methods._tuning import check_tuning, resolve_spec, row_limit
from tests.tiny import make_facts

BASE = make_facts(context_length=512)


def spec(**changes: object) -> TrainingSpec:
    return TrainingSpec.model_validate({"base_id": "b", "tuning": check_tuning({}), "seed": 1, **changes})


def resolve(given: TrainingSpec, num_rows: int = 240) -> TrainingSpec:
    return resolve_spec(given, base=BASE, num_rows=num_rows, num_tokens=num_rows * 90, num_threads=2)


def test_an_empty_object_is_lora_with_auto_kept():
    tuning = check_tuning({})
    assert tuning["type"] == "lora"
    assert tuning["rank"] == tuning["alpha"] == tuning["dropout"] == "auto"
    assert tuning["target_modules"] == "all-linear"


def test_a_checked_object_checks_to_itself():
    tuning = check_tuning({"type": "lora", "rank": 4, "target_modules": ["q_proj"]})
    assert check_tuning(tuning) == tuning


@pytest.mark.parametrize(
    ("tuning", "advice"),
    [
        ({"rnak": 8}, "Did you mean 'rank'?"),
        ({"type": "prompt", "rank": 8}, "Leave it out."),
        ({"colour": 1}, "Leave it out."),
    ],
)
def test_an_unknown_field_is_refused_with_those_that_its_method_has(tuning, advice):
    with pytest.raises(UnknownParameterError) as caught:
        check_tuning(tuning)
    fields = discover()[str(tuning.get("type", "lora"))].Params.model_json_schema()["properties"]
    assert f"{advice} This type of tuning takes: {', '.join(fields)}." in caught.value.message


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("colour", 1, UnknownParameterError),
        *[("type", value, InvalidValueError) for value in ("magic", 3)],
        *[("rank", value, InvalidValueError) for value in (0, 257, "many")],
        *[("rank", value, InvalidTypeError) for value in ([8], True)],
        *[("alpha", float(value), InvalidValueError) for value in ("nan", "inf")],
        ("dropout", 1.0, InvalidValueError),
        *[("target_modules", value, InvalidValueError) for value in ("(", [])],
        ("quantization", "nf4", UnsupportedValueError),
    ],
)
def test_a_bad_parameter_is_refused_by_its_name(field, value, error):
    with pytest.raises(error) as caught:
        check_tuning({field: value})
    assert caught.value.param == f"tuning.{field}"


def test_resolving_leaves_no_auto():
    resolved = resolve(spec())
    assert resolved.is_resolved
    assert resolved.base == BASE
    assert resolved.num_threads == 2
    assert resolved.training.max_length == 512
    assert resolved.training.learning_rate is not None


def test_a_multiplier_scales_the_methods_rate_and_a_given_rate_wins():
    single = resolve(spec()).training.learning_rate
    double = resolve(spec(hyperparameters=Hyperparameters(learning_rate_multiplier=2.0)))
    assert double.training.learning_rate == pytest.approx(2 * single)
    given = resolve(spec(training=TrainingOptions(learning_rate=0.25)))
    assert given.training.learning_rate == 0.25


def test_given_numbers_stay():
    asked = spec(
        tuning=check_tuning({"rank": 5, "alpha": 3, "dropout": 0.25}),
        hyperparameters=Hyperparameters(n_epochs=7, batch_size=3),
    )
    resolved = resolve(asked)
    assert (resolved.tuning["rank"], resolved.tuning["alpha"], resolved.tuning["dropout"]) == (5, 3, 0.25)
    assert (resolved.hyperparameters.n_epochs, resolved.hyperparameters.batch_size) == (7, 3)


@pytest.mark.parametrize("field", ["n_epochs", "batch_size", "learning_rate_multiplier"])
def test_hyperparameters_out_of_range_are_refused(field):
    values = {"n_epochs": (0, 51), "batch_size": (0, 257), "learning_rate_multiplier": (0, -1.0)}
    for value in values[field]:
        with pytest.raises(InvalidValueError) as caught:
            resolve(spec(hyperparameters=Hyperparameters(**{field: value})))
        assert caught.value.param == f"hyperparameters.{field}"


def test_more_rows_mean_fewer_epochs_and_larger_batches():
    resolved = [resolve(spec(), num_rows=n).hyperparameters for n in (10, 240, 3_000, 100_000)]
    epochs, sizes = [h.n_epochs for h in resolved], [h.batch_size for h in resolved]
    assert epochs == sorted(epochs, reverse=True) and epochs[0] > epochs[-1]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]


def test_prompt_tuning_takes_more_passes_than_the_others_by_itself():
    for num_rows in (10, 240, 3_000, 100_000):
        specs = [spec(tuning=check_tuning({"type": name})) for name in ("lora", "prefix", "prompt")]
        lora, prefix, prompt = [resolve(one, num_rows).hyperparameters.n_epochs for one in specs]
        assert prompt == 3 * lora == 3 * prefix
    given = spec(tuning=check_tuning({"type": "prompt"}), hyperparameters=Hyperparameters(n_epochs=2))
    assert resolve(given).hyperparameters.n_epochs == 2


def test_every_method_has_a_schema_that_names_its_type():
    for name, method in discover().items():
        schema = method.Params.model_json_schema()
        assert schema["properties"]["type"]["const"] == name
        assert schema["additionalProperties"] is False
    assert "lora" in discover()


def test_methods_are_known_without_torch():
    code = (
        "import sys, luthier.methods as m, luthier.methods._tuning as t; t.check_tuning({});"
        "[one.Params.model_json_schema() for one in m.discover().values()];"
        "sys.exit(int(any(n in sys.modules for n in ('torch', 'transformers', 'peft'))))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("tuning", "asked", "expected"),
    [
        ({}, None, 512),
        ({}, 100, 100),
        ({"type": "prompt", "num_virtual_tokens": 100}, None, 412),
        ({"type": "prefix", "num_virtual_tokens": 100}, 500, 412),
        ({"type": "prefix", "num_virtual_tokens": 100}, 300, 300),
        # The most that "auto" takes, for how many rows there are is not known yet: an eighth of 512.
        ({"type": "prompt"}, None, 448),
        ({"type": "prefix"}, None, 448),
    ],
)
def test_virtual_tokens_take_their_room_from_the_longest_row(tuning, asked, expected):
    given = spec(tuning=check_tuning(tuning), training={"max_length": asked})
    assert row_limit(given, BASE) == expected
    assert resolve(given).training.max_length == expected


def test_virtual_tokens_that_leave_no_room_for_a_row_are_refused():
    given = spec(tuning=check_tuning({"type": "prompt", "num_virtual_tokens": 512}))
    with pytest.raises(InvalidValueError, match="no room") as caught:
        row_limit(given, BASE)
    assert caught.value.param == "tuning.num_virtual_tokens"
