"""Blocks are shared by equal beginnings of one model alone, and used again when no sequence needs them."""

from luthier.inference.engine.block_pool import BlockPool, BlockTable

TOKENS = list(range(100, 120))


def fill(pool: BlockPool, model: str, tokens: list[int], owner: str = "") -> BlockTable:
    table = pool.start(model, tokens, owner=owner)
    assert pool.extend(table, len(tokens))
    pool.cache_full_blocks(table, tokens, len(tokens))
    return table


def test_an_equal_beginning_of_one_model_is_shared_and_that_of_another_is_not():
    pool = BlockPool(20, block_size=4)
    first = fill(pool, "a", TOKENS)
    again = pool.start("a", [*TOKENS[:10], 1, 2, 3])
    assert again.blocks == first.blocks[:2] and again.num_cached == 2
    assert pool.start("b", TOKENS).blocks == []
    # The last token is left to be run, though its block is known.
    assert pool.start("a", TOKENS).blocks == first.blocks[:4]


def test_an_unused_block_is_shared_until_its_room_is_wanted_the_end_of_a_text_first():
    pool = BlockPool(5, block_size=4)
    first = fill(pool, "a", TOKENS)
    blocks = list(first.blocks)
    assert not pool.extend(BlockTable(None), 1)
    pool.release(first)
    assert pool.num_free == 5
    other = BlockTable(None)
    assert pool.extend(other, 8)
    assert other.blocks == [blocks[4], blocks[3]]
    assert pool.start("a", TOKENS).blocks == blocks[:3]


def test_a_block_in_use_by_two_is_free_when_both_have_left():
    pool = BlockPool(5, block_size=4)
    one = fill(pool, "a", TOKENS)
    two = pool.start("a", TOKENS)
    pool.release(one)
    assert pool.num_free == 1
    pool.release(two)
    assert pool.num_free == 5


def test_a_text_that_two_ran_at_the_same_time_is_kept_once():
    pool = BlockPool(10, block_size=4)
    one, two = pool.start("a", TOKENS), pool.start("a", TOKENS)
    for table in (one, two):
        assert pool.extend(table, len(TOKENS))
        pool.cache_full_blocks(table, TOKENS, len(TOKENS))
    assert set(one.blocks).isdisjoint(two.blocks)
    assert pool.start("a", TOKENS).blocks == one.blocks[:4]
    pool.release(two)
    assert pool.num_free == 5


def test_a_model_that_left_shares_nothing_with_one_of_its_name():
    pool = BlockPool(10, block_size=4)
    table, other = fill(pool, "a", TOKENS), fill(pool, "b", TOKENS)
    pool.forget("a")
    assert pool.start("a", TOKENS).blocks == []
    assert pool.start("b", TOKENS).blocks == other.blocks[:4]
    pool.release(table)
    assert pool.num_free == 5


def test_nothing_is_shared_between_owners():
    pool = BlockPool(20, block_size=4)
    ours = fill(pool, "a", TOKENS, owner="ours")
    assert pool.start("a", TOKENS, owner="theirs").blocks == []
    assert pool.start("a", TOKENS, owner="ours").blocks == ours.blocks[:4]
    pool.forget("a")
    assert pool.start("a", TOKENS, owner="ours").blocks == []
