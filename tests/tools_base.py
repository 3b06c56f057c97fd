"""The tiny base once more, under another name and with a chat template that has tools, and a client of it."""

import json
from pathlib import Path

import openai

from luthier.bases.catalogue import FACTS_NAME
from luthier.core.inference import ModelTarget
from luthier.core.specs import BaseFacts
from tests.tiny import build_tiny_base

TOOLS_BASE_ID = "tiny-tools"
WITH_TOOLS = ModelTarget(model="my-tools", base_id=TOOLS_BASE_ID, project_id="proj_1")
# Definitions of tools are long where a token is a letter or two.
_CONTEXT_LENGTH = 1024
# Calls as Hermes' kind of models writes them, and the answers of tools as such.
TOOLS_TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{{ tools | tojson }}{{ '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}{% if not loop.first %}{{ '\n' }}{% endif %}"
    '{{ \'<tool_call>\n{"name": "\' + c.function.name + \'", "arguments": \' }}'
    "{{ c.function.arguments | tojson }}{{ '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def open_tools_client(sdk: openai.OpenAI, bases_dir: Path) -> openai.OpenAI:
    """Write the base and return the SDK's client of it."""
    folder = build_tiny_base(bases_dir / TOOLS_BASE_ID)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": _CONTEXT_LENGTH}))
    facts = BaseFacts.model_validate_json((folder / FACTS_NAME).read_bytes())
    facts = facts.model_copy(update={"id": TOOLS_BASE_ID, "context_length": _CONTEXT_LENGTH})
    (folder / FACTS_NAME).write_text(facts.model_dump_json())
    (folder / "chat_template.jinja").write_text(TOOLS_TEMPLATE)
    return sdk.with_options(default_headers=WITH_TOOLS.to_headers())
