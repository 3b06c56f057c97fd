"""Print the lowest versions that pyproject.toml allows, as constraints for pip."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
for requirement in [*project["dependencies"], *extras["torch"], *extras["local"]]:
    name, bound, version = re.match(r"([\w.-]+)(?:\[[\w,]+\])?([>=]=)([\w.]+)", requirement).groups()
    # torch is the machine's own choice of a build.
    if name != "torch":
        print(f"{name}=={version}")
