"""What was made for a measurement: published artifacts as our server and the peers name them."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Published:
    """A tuned model: its method, its artifact in our storage and the same files for a peer.

    `num_bytes` are those of its weights' file.
    """

    name: str
    kind: str
    prefix: str
    digest: str
    folder: Path
    num_bytes: int
    num_parameters: int
