"""Pages are shared by equal beginnings of one model alone, and used again when nobody needs them."""

from luthier.inference.engine.block_pool import Chain, PagePool

TOKENS = list(range(100, 120))


def fill(pool: PagePool, model: str, tokens: list[int]) -> Chain:
    chain = pool.start(model, tokens)
    assert pool.extend(chain, len(tokens))
    pool.name(chain, tokens, len(tokens))
    return chain


def test_an_equal_beginning_of_one_model_is_shared_and_that_of_another_is_not() -> None:
    pool = PagePool(20, page_size=4)
    first = fill(pool, "a", TOKENS)
    again = pool.start("a", [*TOKENS[:10], 1, 2, 3])
    assert again.pages == first.pages[:2] and again.num_named == 2
    assert pool.start("b", TOKENS).pages == []
    # The last token is left to be run, though its page is known.
    assert pool.start("a", TOKENS).pages == first.pages[:4]


def test_what_nobody_uses_is_shared_until_its_room_is_wanted_the_end_of_a_text_first() -> None:
    pool = PagePool(5, page_size=4)
    first = fill(pool, "a", TOKENS)
    pages = list(first.pages)
    assert not pool.extend(Chain(None), 1)
    pool.release(first)
    assert pool.num_free == 5
    other = Chain(None)
    assert pool.extend(other, 8)
    assert other.pages == [pages[4], pages[3]]
    assert pool.start("a", TOKENS).pages == pages[:3]


def test_a_page_in_use_by_two_is_free_when_both_have_left() -> None:
    pool = PagePool(5, page_size=4)
    one = fill(pool, "a", TOKENS)
    two = pool.start("a", TOKENS)
    pool.release(one)
    assert pool.num_free == 1
    pool.release(two)
    assert pool.num_free == 5


def test_a_text_that_two_ran_at_the_same_time_is_kept_once() -> None:
    pool = PagePool(10, page_size=4)
    one, two = pool.start("a", TOKENS), pool.start("a", TOKENS)
    for chain in (one, two):
        assert pool.extend(chain, len(TOKENS))
        pool.name(chain, TOKENS, len(TOKENS))
    assert set(one.pages).isdisjoint(two.pages)
    assert pool.start("a", TOKENS).pages == one.pages[:4]
    pool.release(two)
    assert pool.num_free == 5


def test_a_model_that_left_shares_nothing_with_one_of_its_name() -> None:
    pool = PagePool(10, page_size=4)
    chain, other = fill(pool, "a", TOKENS), fill(pool, "b", TOKENS)
    pool.forget("a")
    assert pool.start("a", TOKENS).pages == []
    assert pool.start("b", TOKENS).pages == other.pages[:4]
    pool.release(chain)
    assert pool.num_free == 5


def test_nothing_is_shared_between_owners() -> None:
    pool = PagePool(20, page_size=4)
    ours = pool.start("a", TOKENS, owner="ours")
    assert pool.extend(ours, len(TOKENS))
    pool.name(ours, TOKENS, len(TOKENS))
    assert pool.start("a", TOKENS, owner="theirs").pages == []
    assert pool.start("a", TOKENS, owner="ours").pages == ours.pages[:4]
    pool.forget("a")
    assert pool.start("a", TOKENS, owner="ours").pages == []
