"""Settings that a careful person would write by hand: three a method, from papers and PEFT's own examples.

They run on the same engine, rows, epochs and batch size as "auto" does, so steps are equal and only the
settings differ. That this engine's steps equal Trainer's with PEFT is held by its own tests.
"""

from dataclasses import dataclass
from typing import Any

AUTO = "auto"


@dataclass(frozen=True)
class Recipe:
    """Named settings of one method.

    `tuning` is the request's object; a value "{description}" stands for the task's own description.
    `source` says where the settings come from.
    """

    name: str
    tuning: dict[str, Any]
    learning_rate: float
    source: str
    weight_decay: float = 0.0

    def tuning_for(self, description: str) -> dict[str, Any]:
        """Return the request's object for a task."""
        return {
            name: description if value == "{description}" else value for name, value in self.tuning.items()
        }


RECIPES: dict[str, tuple[Recipe, ...]] = {
    "lora": (
        Recipe(
            "r8-2e-4",
            {"type": "lora", "rank": 8, "alpha": 16.0, "target_modules": "all-linear"},
            2e-4,
            "QLoRA's rate for small models (arXiv 2305.14314), all linear layers, alpha twice the rank",
        ),
        Recipe(
            "r16-5e-4",
            {"type": "lora", "rank": 16, "alpha": 32.0, "target_modules": "all-linear"},
            5e-4,
            "PEFT's method comparison, r16 on all linear layers (there 3e-4), faster for a small base",
        ),
        Recipe(
            "r32-qv-1e-4",
            {"type": "lora", "rank": 32, "alpha": 64.0, "target_modules": ["q_proj", "v_proj"]},
            1e-4,
            "PEFT's method comparison, r32 on PEFT's default layers, weight decay 0.1",
            weight_decay=0.1,
        ),
    ),
    "prefix": (
        Recipe(
            "random20-1e-2",
            {"type": "prefix", "num_virtual_tokens": 20, "init": "random"},
            1e-2,
            "PEFT's prefix-tuning guide: 20 tokens, random",
        ),
        Recipe(
            "text50-5e-3",
            {"type": "prefix", "num_virtual_tokens": 50, "init": "text", "init_text": "{description}"},
            5e-3,
            "PEFT's method comparison: 50 tokens from the keys and values of a description",
        ),
        Recipe(
            "projected10-5e-5",
            {
                "type": "prefix",
                "num_virtual_tokens": 10,
                "init": "random",
                "projection": True,
                "projection_dim": 512,
            },
            5e-5,
            "Li & Liang 2021 (arXiv 2101.00190), table-to-text: a projection, rates of 5e-5 to 8e-5",
        ),
    ),
    "prompt": (
        Recipe(
            "text8-3e-2",
            {"type": "prompt", "num_virtual_tokens": 8, "init": "text", "init_text": "{description}"},
            3e-2,
            "PEFT's prompt-tuning guide: 8 tokens from a description",
        ),
        Recipe(
            "vocabulary100-0.3",
            {"type": "prompt", "num_virtual_tokens": 100, "init": "vocabulary"},
            0.3,
            "Lester et al. 2021 (arXiv 2104.08691): 100 sampled tokens, rate 0.3 (there with Adafactor)",
        ),
        Recipe(
            "vocabulary20-1e-3",
            {"type": "prompt", "num_virtual_tokens": 20, "init": "vocabulary"},
            1e-3,
            "PEFT's method comparison: sampled tokens, rate 1e-3, weight decay 0.1",
            weight_decay=0.1,
        ),
    ),
    "adapter": (
        Recipe(
            "houlsby64-1e-3",
            {"type": "adapter", "bottleneck_dim": 64, "placement": "houlsby"},
            1e-3,
            "Houlsby et al. 2019 (arXiv 1902.00751): width 64, rates up to 3e-3",
        ),
        Recipe(
            "pfeiffer36-1e-4",
            {"type": "adapter", "bottleneck_dim": 36, "placement": "pfeiffer"},
            1e-4,
            "Pfeiffer et al. 2020 (arXiv 2005.00247): a sixteenth of the hidden size, rate 1e-4",
        ),
        Recipe(
            "houlsby256-3e-4",
            {"type": "adapter", "bottleneck_dim": 256, "placement": "houlsby"},
            3e-4,
            "Houlsby et al. 2019: width 256, rate 3e-4",
        ),
    ),
    "full": (
        Recipe("5e-5", {"type": "full"}, 5e-5, "the default rate of transformers' Trainer"),
        Recipe("2e-5", {"type": "full"}, 2e-5, "the usual rate of instruction tuning (Alpaca)"),
        Recipe(
            "1e-5", {"type": "full"}, 1e-5, "PEFT's method comparison, weight decay 0.1", weight_decay=0.1
        ),
    ),
}


def find_recipe(method: str, name: str) -> Recipe | None:
    """Return a method's recipe by its name, or None when it has none of that name."""
    return next((recipe for recipe in RECIPES.get(method, ()) if recipe.name == name), None)
