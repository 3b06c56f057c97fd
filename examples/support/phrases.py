"""What a lot of phrases is. The two lots are in training_phrases.py and heldout_phrases.py.

Hollin & Wren, the house, is invented: a workshop that makes, hires out and mends stringed instruments.
Both lots say the same kinds of things in different words; held-out rows use the second alone, so a model
that only remembered training sentences scores badly there. All of it was written for this project.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Phrases:
    """One lot of names, things and sentences; `{thing}` is the instrument and `{name}` the customer.

    A message is made of one problem, and mostly of one tone, one haste, one aside and one signature. The
    problem decides the category, the tone the sentiment, the haste the urgency; asides decide nothing.
    An empty tone or haste leaves the sentence out, which reads as neutral and as normal.
    """

    names: tuple[str, ...]
    things: tuple[str, ...]
    problems: dict[str, tuple[str, ...]]
    tones: dict[str, tuple[str, ...]]
    hastes: dict[str, tuple[str, ...]]
    asides: tuple[str, ...]
    signatures: tuple[str, ...]
