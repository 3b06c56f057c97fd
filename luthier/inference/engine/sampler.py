"""Choosing the next token of each row from its logits.

Legend: `B` rows, `V` vocabulary, `K` tokens that a draw is made from.
"""

import logging
from collections.abc import Sequence as SequenceOf

import numpy as np
import torch

from luthier.core.errors import LuthierError, SelfCheckError
from luthier.inference.engine.error_reporting import log_fault, to_client_error
from luthier.inference.engine.sequence import Choice, Grammar, Sequence
from luthier.modeling.protocols import Logits

_LOG = logging.getLogger(__name__)

# JSON knows no infinity; OpenAI's API says -9999.0 for a token that can't come.
MIN_LOGPROB = -9999.0
# Below it only the likeliest token can come; float32 would take a much smaller one for 0.
_MIN_TEMPERATURE = 1e-5
# Tokens less likely than the likeliest by more are looked at only where the others are too few for `top_p`.
_NUCLEUS_NATS = 10.0
# What runners return for a row that is not finite.
_NOT_FINITE = -1


def choose(logits: Logits, sequences: list[Sequence], places: SequenceOf[int] | None = None) -> list[Choice]:
    """Choose a token for every row.

    A row's choice depends on its own logits, options, grammar and generator only, so a seed gives the same
    answer in any batch on a CPU. On CUDA products depend on the batch, so logits may differ in the last bits,
    and with them a choice between tokens that are nearly as likely.
    A row that can't be chosen for ends its own sequence with an error (its choice then means nothing) and
    no other sequence.

    Args:
        logits: of B rows or more, on any device; left as they are.
        places: which rows of the logits they are, in order; the first B when left out.
    """
    places = range(len(sequences)) if places is None else places
    best = logits.greedy()
    choices = [Choice(best[place]) for place in places]
    if min(best, default=0) != _NOT_FINITE and all(one.is_plainly_greedy for one in sequences):
        return choices
    with torch.inference_mode():
        _choose_others(logits, best, places, sequences, choices)
    return choices


def _choose_others(
    logits: Logits,
    best: SequenceOf[int],
    places: SequenceOf[int],
    sequences: list[Sequence],
    choices: list[Choice],
) -> None:
    """Choose for the rows that are not plainly the likeliest token's, in place."""
    drawn: list[int] = []
    for row, (place, sequence) in enumerate(zip(places, sequences, strict=True)):
        if best[place] == _NOT_FINITE:
            # The greedy choice alone would hide it.
            sequence.fail(SelfCheckError("The model's logits are not finite; the answer was stopped."))
        elif sequence.is_plainly_greedy or sequence.is_done:
            continue
        elif sequence.is_plainly_drawn:
            drawn.append(row)
        else:
            choices[row] = _choose_row(logits, place, sequence, choices[row])
    if drawn:
        _draw_rows(logits, drawn, places, sequences, choices)


def _draw_rows(
    logits: Logits,
    rows: list[int],
    places: SequenceOf[int],
    sequences: list[Sequence],
    choices: list[Choice],
) -> None:
    """Draw the tokens of rows of which nothing else is asked, and put them among the choices."""
    found: list[int | None] = [None] * len(rows)
    points = [_point(sequences[row]) for row in rows]
    try:
        found = logits.draw(
            [places[row] for row in rows],
            temperatures=[_temperature(sequences[row]) for row in rows],
            top_p=[sequences[row].options.top_p for row in rows],
            points=points,
        )
    except Exception as error:  # noqa: BLE001 - whose fault it was is found by drawing each alone
        log_fault(_LOG, "Drawing tokens at once", error)
    for row, token_id, point in zip(rows, found, points, strict=True):
        if token_id is None:
            choices[row] = _choose_row(logits, places[row], sequences[row], choices[row], point)
        else:
            choices[row] = Choice(token_id)


def _choose_row(
    logits: Logits, place: int, sequence: Sequence, best: Choice, point: float | None = None
) -> Choice:
    try:
        logits_V = logits.rows([place])[0]
        token_id = _choose_token(logits_V, sequence, best.token_id, point)
        num_logprobs = sequence.options.num_logprobs
        if num_logprobs is None:
            return Choice(token_id)
        return _with_logprobs([token_id], logits_V[None], num_logprobs)[0]
    except Exception as error:  # noqa: BLE001 - a fault of one row is not one of the others
        sequence.fail(to_client_error(_LOG, "A choice, whose answer ends with an error,", error))
    return best


def _choose_token(logits_V: torch.Tensor, sequence: Sequence, best_id: int, point: float | None) -> int:
    options, grammar = sequence.options, sequence.grammar
    is_changed = bool(options.logit_bias or sequence.token_counts)
    if is_changed:
        logits_V = _weigh(logits_V, sequence)
    if options.temperature == 0.0:
        token_id = int(logits_V.argmax()) if is_changed else best_id
        if grammar is None or grammar.allows(token_id):
            return token_id
    if grammar is not None:
        logits_V = _restrict(logits_V, grammar)
    if options.temperature == 0.0:
        return int(logits_V.argmax())
    return _draw(logits_V, sequence, _point(sequence) if point is None else point)


def _weigh(logits_V: torch.Tensor, sequence: Sequence) -> torch.Tensor:
    """Add `logit_bias` and take the penalties away (OpenAI's API reference, "Frequency and presence
    penalties": from a token's logit, its count times the one and the other if it came at all)."""
    options, device = sequence.options, logits_V.device
    logits_V = logits_V.clone()
    if options.logit_bias:
        if sequence.bias is None:
            ids, values = zip(*options.logit_bias, strict=True)
            values_K = torch.tensor(values, dtype=torch.float32, device=device)
            sequence.bias = torch.tensor(ids, device=device), values_K
        logits_V.index_add_(0, *sequence.bias)
    if sequence.token_counts:
        ids_K = torch.tensor(list(sequence.token_counts), device=device)
        counts_K = torch.tensor(list(sequence.token_counts.values()), device=device)
        logits_V.index_add_(0, ids_K, -(counts_K * options.frequency_penalty + options.presence_penalty))
    return logits_V


def _restrict(logits_V: torch.Tensor, grammar: Grammar) -> torch.Tensor:
    # The model's matrix may have more rows than the tokenizer has tokens; these can't come.
    is_out = np.ones(logits_V.shape[-1], np.bool_)
    mask = grammar.mask()[: len(is_out)]
    is_out[: len(mask)] = ~mask
    if is_out.all():
        raise LuthierError("No token of this model can continue the answer in its format.")
    return logits_V.masked_fill(torch.from_numpy(is_out).to(logits_V.device), -torch.inf)


def _draw(logits_V: torch.Tensor, sequence: Sequence, point: float) -> int:
    # The largest becomes 0 before the division, so that a tiny temperature can't overflow.
    scaled_V = (logits_V - logits_V.max()) / _temperature(sequence)
    if sequence.options.top_p >= 1.0:
        return _invert(torch.softmax(scaled_V, dim=-1), point)
    probs_K, ids_K = _nucleus(scaled_V, sequence.options.top_p)
    return int(ids_K[_invert(probs_K, point)])


def _temperature(sequence: Sequence) -> float:
    return max(sequence.options.temperature, _MIN_TEMPERATURE)


def _point(sequence: Sequence) -> float:
    """Return a uniform float64 of [0, 1) from the sequence's own generator.

    One a token, whatever the vocabulary: a noise for each of its tokens takes milliseconds.
    """
    if sequence.generator is None:
        sequence.generator = torch.Generator()
        if sequence.options.seed is None:
            sequence.generator.seed()
        else:
            sequence.generator.manual_seed(sequence.options.seed)
    return float(torch.rand(1, generator=sequence.generator, dtype=torch.float64))


def _invert(probs_K: torch.Tensor, point: float) -> int:
    """Return the place at which the mass before it passes `point`, a share of the whole mass."""
    mass_K = probs_K.cumsum(dim=-1, dtype=torch.float64)
    place = int(torch.searchsorted(mass_K, point * mass_K[-1], right=True))
    return min(place, len(mass_K) - 1)


def _nucleus(scaled_V: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the fewest likeliest tokens whose mass reaches `top_p`, at least one (Holtzman et al. 2020,
    section 3.1), the likeliest first: probabilities [K] and ids [K]."""
    total = torch.logsumexp(scaled_V, dim=-1)
    ids_K = torch.nonzero(scaled_V > -_NUCLEUS_NATS).squeeze(-1)
    probs_K = (scaled_V[ids_K] - total).exp()
    if float(probs_K.sum()) < top_p:
        ids_K = torch.arange(scaled_V.shape[-1], device=scaled_V.device)
        probs_K = (scaled_V - total).exp()
    # Stable, so that tokens that are alike keep the vocabulary's order.
    probs_K, order_K = probs_K.sort(descending=True, stable=True)
    mass_before_K = probs_K.cumsum(dim=-1, dtype=torch.float64) - probs_K
    num_kept = max(1, int((mass_before_K < top_p).sum()))
    return probs_K[:num_kept], ids_K[order_K[:num_kept]]


@torch.inference_mode()
def score_chunk(sequence: Sequence, first: int, logits_TV: torch.Tensor) -> None:
    """Give a sequence the scores of the prompt's tokens after a chunk's; a failure ends it with an error.

    Args:
        first: position in the prompt of the chunk's first token.
        logits_TV: float32, after each of its tokens; what they say of the answer's first token is not used.
    """
    if sequence.is_done:
        return
    try:
        if not bool(torch.isfinite(logits_TV.max(dim=-1).values).all()):
            raise SelfCheckError("The model's logits are not finite; the answer was stopped.")
        followers = sequence.prompt_ids[first + 1 : first + 1 + len(logits_TV)]
        num_logprobs = sequence.options.num_prompt_logprobs or 0
        choices = _with_logprobs(followers, logits_TV[: len(followers)], num_logprobs)
        if first > 0:
            sequence.take_prompt_choices(first + 1, choices)
        else:
            # Nothing comes before the first token that it could be likely after.
            sequence.take_prompt_choices(0, [Choice(sequence.prompt_ids[0]), *choices])
    except Exception as error:  # noqa: BLE001 - a fault of one row is not one of the others
        sequence.fail(to_client_error(_LOG, "Scoring a prompt, whose answer ends with an error,", error))


def _with_logprobs(token_ids: list[int], logits_TV: torch.Tensor, num_top: int) -> list[Choice]:
    if not token_ids:
        return []
    logprobs_TV = torch.log_softmax(logits_TV, dim=-1).clamp_min(MIN_LOGPROB)
    ids_T1 = torch.tensor(token_ids, device=logits_TV.device).unsqueeze(1)
    own = logprobs_TV.gather(1, ids_T1).squeeze(1).tolist()
    values_TK, ids_TK = logprobs_TV.topk(min(num_top, logprobs_TV.shape[-1]), dim=-1)
    tops = zip(ids_TK.tolist(), values_TK.tolist(), strict=True)
    return [
        Choice(token_id, logprob, tuple(zip(ids, values, strict=True)))
        for token_id, logprob, (ids, values) in zip(token_ids, own, tops, strict=True)
    ]
