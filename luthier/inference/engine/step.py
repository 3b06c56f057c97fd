"""A lane's rows, and what is read from a step's logits about them."""

from dataclasses import dataclass, replace

import torch

from luthier.inference import sampler
from luthier.inference.drafts import Drafter
from luthier.inference.engine.block_pool import Chain
from luthier.inference.engine.sequence import Choice, Sequence
from luthier.inference.scoring import score_stretch
from luthier.modeling.logits import Logits
from luthier.modeling.packed_adapter import PackedAdapter
from luthier.modeling.packed_work import Stretch

# Prompt tokens of one step: what they add to the time between two tokens of everybody else is what a small
# model takes for them.
MAX_PROMPT_TOKENS = 256
# Tokens of a prompt, or of what is left of one, that are run at once.
MAX_SHORT_TOKENS = 64
# And those of a step's stretch of a prompt of which more are left. Who comes beside it waits for the end of
# the stretch, so they are few, and fewer the more they attend to: no more than so many pairs of a token and
# what it sees, but as many as kernels take at a time.
MAX_LONG_TOKENS = 32
_MAX_LONG_PAIRS, _FEWEST = 1 << 16, 16


def most_of_long(num_done: int) -> int:
    """Return how many tokens of a long prompt are run at once behind so many."""
    fitting = _MAX_LONG_PAIRS // (num_done + 1) // _FEWEST * _FEWEST
    return max(_FEWEST, min(MAX_LONG_TOKENS, fitting))


@dataclass(eq=False, slots=True)
class Row:
    """A sequence that has pages.

    `tokens` are its virtual ones, as negative numbers, its prompt and its answer; the first `num_done` of
    them are in its pages.
    """

    sequence: Sequence
    adapter: PackedAdapter | None
    tokens: list[int]
    chain: Chain
    num_done: int
    num_passed_over: int = 0
    # Whether its pages were taken from it, or given back.
    has_left: bool = False
    _drafter: Drafter | None = None

    @property
    def num_left(self) -> int:
        """Tokens that are still to be run; 1 while it answers."""
        return len(self.tokens) - self.num_done

    def add(self, token_id: int) -> None:
        """Take the next token of the answer."""
        self.tokens.append(token_id)
        if self._drafter is not None:
            self._drafter.add(token_id)

    @property
    def drafter(self) -> Drafter:
        """What guesses its next tokens, made when something is to be guessed for the first time."""
        if self._drafter is None:
            self._drafter = Drafter(self.tokens)
        return self._drafter


# The rows of a step, and of each the tokens that it runs.
Work = list[tuple[Row, Stretch]]


def next_stretch(row: Row, count: int) -> Stretch:
    """Return so many of the tokens that a row is still to run."""
    end = row.num_done + count
    return Stretch(
        row.tokens[row.num_done : end],
        row.num_done,
        row.chain.pages,
        None if row.adapter is None else row.adapter.described,
        end == len(row.tokens),
        row.sequence.wants_prompt_scores,
    )


@torch.inference_mode()
def score_prompts(work: Work, logits: Logits) -> Logits:
    """Tell the rows that want it of their prompts, and return the logits that answers go on from."""
    last, end = [], 0
    for row, stretch in work:
        begin, end = end, end + stretch.num_logits
        if stretch.wants_all_logits:
            num_virtual = 0 if row.adapter is None else row.adapter.num_virtual_tokens
            score_stretch(row.sequence, stretch.first - num_virtual, logits.held_RV[begin:end].float())
        if stretch.wants_logits:
            last.append(end - 1)
    return Logits(logits.held_RV[last], [logits.best[row] for row in last])


def with_guesses(stretch: Stretch, guesses: list[int]) -> Stretch:
    """Return a row's last token with guesses of those after it, each to be checked by the one before."""
    tokens = [*stretch.tokens, *guesses]
    return replace(stretch, tokens=tokens, num_first_logits=len(guesses), by_rows=True)


def take_guesses(row: Row, stretch: Stretch, choice: Choice, logits: Logits, place: int) -> int:
    """Go on with the choices after guesses, as long as these are what was chosen.

    Args:
        row: who guessed; it has taken the first choice.
        stretch: its last token and the guesses after it.

    Returns:
        How many guesses were right.
    """
    num_right = 0
    for guess in stretch.tokens[1:]:
        if row.sequence.is_done or choice.token_id != guess:
            break
        (choice,) = sampler.choose(logits, [row.sequence], [place + num_right + 1])
        if row.sequence.is_done:
            break
        num_right += 1
        row.sequence.accept(choice)
        row.add(choice.token_id)
    row.num_done += num_right
    return num_right
