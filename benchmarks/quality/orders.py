"""The strict-JSON task: letters that order something become one object of a fixed schema.

Every word list is in orders_words.py, the schema in scores.py; nothing depends on anything but the seed.
"""

import calendar
import json
import random
from typing import Any

from benchmarks.quality.orders_words import HELDOUT, NUMBER_WORDS, TRAINING, Words
from benchmarks.quality.scores import ORDER_SCHEMA, score_orders
from benchmarks.quality.task import Question, Row, Task

SYSTEM = (
    "Turn the order into one JSON object and write nothing else. Keys: customer, item (in the singular), "
    "quantity, unit_price, deliver_on (YYYY-MM-DD), express, and colour and note where they are given."
)
MAX_NEW_TOKENS = 96
_SEED = 20_417
_OPTIONAL_SHARE = 0.4


def make_orders(num_rows: int, num_questions: int) -> Task:
    """Make the task.

    Args:
        num_rows: training rows.
        num_questions: held-out rows, from the held-out words only.

    Returns:
        The task, always the same for the same numbers.
    """
    rows = _make_rows(TRAINING, num_rows, random.Random(_SEED))
    questions = _make_rows(HELDOUT, num_questions, random.Random(_SEED + 1))
    return Task(
        name="orders",
        title="strict JSON: letters to orders",
        metrics=("fields", "exact", "valid"),
        description="Read a letter that orders something and write the order as one JSON object.",
        rows=tuple(rows),
        questions=tuple(Question(row.prompt, (row.answer,)) for row in questions),
        max_new_tokens=MAX_NEW_TOKENS,
        score=score_orders,
    )


def _make_rows(words: Words, num_rows: int, chance: random.Random) -> list[Row]:
    rows: list[Row] = []
    seen: set[str] = set()
    while len(rows) < num_rows:
        letter, order = _letter(words, chance)
        if letter in seen:
            continue
        seen.add(letter)
        rows.append(Row((("system", SYSTEM), ("user", letter)), json.dumps(order)))
    return rows


def _letter(words: Words, chance: random.Random) -> tuple[str, dict[str, Any]]:
    customer = f"{chance.choice(words.first_names)} {chance.choice(words.last_names)}"
    singular, plural = chance.choice(words.items)
    quantity, quantity_said = _quantity(chance)
    price, price_said = _price(chance)
    deliver_on, date_said = _date(words, chance)
    is_express = chance.random() < 0.5
    order: dict[str, Any] = {
        "customer": customer,
        "item": singular,
        "quantity": quantity,
        "unit_price": price,
        "deliver_on": deliver_on,
        "express": is_express,
    }
    request = chance.choice(words.requests).format(
        quantity=quantity_said, item=singular if quantity == 1 else plural, price=price_said
    )
    more = [
        chance.choice(words.dates).format(date=date_said),
        chance.choice(words.express if is_express else words.patient),
    ]
    if chance.random() < _OPTIONAL_SHARE:
        order["colour"] = chance.choice(words.colours)
        more.append(chance.choice(words.colours_said).format(colour=order["colour"]))
    if chance.random() < _OPTIONAL_SHARE:
        order["note"] = chance.choice(words.notes)
        more.append(chance.choice(words.notes_said).format(note=order["note"]))
    chance.shuffle(more)
    sentences = [request, *more]
    sentences.insert(
        chance.choice((0, 0, len(sentences))), chance.choice(words.openings).format(customer=customer)
    )
    text = " ".join(sentence for sentence in sentences if sentence)
    return text[0].upper() + text[1:], {
        name: order[name] for name in ORDER_SCHEMA["properties"] if name in order
    }


def _quantity(chance: random.Random) -> tuple[int, str]:
    if chance.random() < 0.3:
        return chance.choice(list(NUMBER_WORDS.items()))
    quantity = chance.choice((1, *(chance.randint(2, 20) for _ in range(3)), chance.randint(21, 400)))
    return quantity, str(quantity)


def _price(chance: random.Random) -> tuple[int | float, str]:
    currency = chance.choice(("{} euros", "{} dollars", "${}", "{} EUR"))
    if chance.random() < 0.4:
        whole = chance.randint(2, 180)
        return whole, currency.format(whole)
    cents = chance.randint(101, 19_999)
    # Written with two decimals as prices are; JSON has no trailing zero to keep.
    return cents / 100 if cents % 100 else cents // 100, currency.format(f"{cents / 100:.2f}")


def _date(words: Words, chance: random.Random) -> tuple[str, str]:
    year, number, day = chance.randint(2026, 2031), chance.randint(1, 12), chance.randint(1, 28)
    said = chance.choice(words.date_forms).format(
        day=day, number=number, month=calendar.month_name[number], year=year
    )
    return f"{year}-{number:02d}-{day:02d}", said
