"""Which pages of keys and values belong to whom, and which may be used again. Numbers only, no tensors.

A full page is known by what is in it: the model, all tokens before it, and its own. Whoever comes with the
same beginning shares the page; when nobody needs it any longer it stays until its room is wanted.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

# A page's content: the number of the content before it (or the model), and its own tokens.
_Content = tuple[Hashable, tuple[int, ...]]


@dataclass(eq=False)
class Chain:
    """The pages of one sequence; `beginning` names what its first `num_named` hold, None when unknown."""

    beginning: Hashable
    pages: list[int] = field(default_factory=list)
    num_named: int = 0


class PagePool:
    """Pages by number.

    Args:
        page_size: tokens of each.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self._page_size = page_size
        # Pages without content; those that have no memory yet are taken last, the lowest numbers first.
        self._blank: list[int] = []
        self._cold = list(range(num_pages - 1, -1, -1))
        self._max_warm = num_pages
        self._num_users = [0] * num_pages
        self._by_content: dict[_Content, int] = {}
        self._content_of: dict[int, _Content] = {}
        self._number_of: dict[int, int] = {}
        self._next_number = 0
        # Pages that nobody uses and whose content is known, the one unused for longest first.
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Pages that can be had now."""
        return self.num_unused + self.num_growing

    @property
    def num_unused(self) -> int:
        """Pages that have memory, and nobody uses."""
        return len(self._blank) + len(self._idle)

    @property
    def num_warm(self) -> int:
        """Pages that have memory."""
        return self.num_pages - len(self._cold)

    @property
    def num_growing(self) -> int:
        """Pages that have no memory, and may take some."""
        return max(0, self._max_warm - self.num_warm)

    def limit_warm(self, max_warm: int) -> list[int]:
        """Let no more pages have memory, from now on.

        Args:
            max_warm: how many; those in use keep theirs.

        Returns:
            The pages whose memory nobody needs any more.
        """
        self._max_warm = min(max_warm, self.num_pages)
        cooled: list[int] = []
        while self.num_warm > self._max_warm and self.num_unused:
            page = self._blank.pop() if self._blank else self._evict()
            self._cold.append(page)
            cooled.append(page)
        return cooled

    def start(self, model: Hashable, tokens: Sequence[int], *, owner: str = "") -> Chain:
        """Begin a sequence with the pages that are known to hold its beginning.

        Args:
            model: what decides keys and values beside the tokens.
            tokens: the sequence; its last token is left to be run.
            owner: whose it is; pages are shared between sequences of one owner alone.

        Returns:
            Its chain, whose pages are all full.
        """
        chain = Chain((model, owner))
        for end in range(self._page_size, len(tokens), self._page_size):
            content = (chain.beginning, tuple(tokens[end - self._page_size : end]))
            page = self._by_content.get(content)
            if page is None:
                break
            self._use(page)
            chain.pages.append(page)
            chain.beginning = self._number_of[page]
            chain.num_named += 1
        return chain

    def extend(self, chain: Chain, num_tokens: int) -> bool:
        """Give a sequence pages for a number of tokens in all.

        Args:
            num_tokens: tokens that it shall have room for.

        Returns:
            False when there are too few, and nothing has changed.
        """
        missing = -(-num_tokens // self._page_size) - len(chain.pages)
        if missing <= 0:
            return True
        if missing > self.num_free:
            return False
        for _ in range(missing):
            page = self._next_free()
            self._num_users[page] = 1
            chain.pages.append(page)
        return True

    def name(self, chain: Chain, tokens: Sequence[int], num_done: int) -> None:
        """Let others share the pages that are full by now.

        Args:
            tokens: its tokens.
        """
        while chain.beginning is not None and (chain.num_named + 1) * self._page_size <= num_done:
            begin = chain.num_named * self._page_size
            content = (chain.beginning, tuple(tokens[begin : begin + self._page_size]))
            page = chain.pages[chain.num_named]
            if content in self._by_content:
                # Somebody else ran the same tokens meanwhile: what follows here can't be named after these.
                chain.beginning = None
                return
            self._by_content[content] = page
            self._content_of[page] = content
            self._number_of[page] = self._next_number
            chain.beginning = self._next_number
            self._next_number += 1
            chain.num_named += 1

    def release(self, chain: Chain) -> None:
        """Give a sequence's pages back; those whose content is known stay until their room is wanted."""
        # The last first: what follows a page leaves before it does.
        for page in reversed(chain.pages):
            self._num_users[page] -= 1
            if self._num_users[page] > 0:
                continue
            if page in self._content_of:
                self._idle[page] = None
            else:
                self._blank.append(page)
        chain.pages.clear()

    def forget(self, model: Hashable) -> None:
        """Let no later sequence share what belongs to a model, whose name may come to mean other weights."""
        gone: set[Hashable] = set()
        # A page's number is higher than that of the page before it, so that one pass in order finds all.
        for page in sorted(self._number_of, key=self._number_of.__getitem__):
            before = self._content_of[page][0]
            if before in gone or (isinstance(before, tuple) and before[0] == model):
                gone.add(self._number_of[page])
                self._unname(page)
                if page in self._idle:
                    del self._idle[page]
                    self._blank.append(page)

    def _use(self, page: int) -> None:
        self._num_users[page] += 1
        self._idle.pop(page, None)

    def _next_free(self) -> int:
        if self._blank:
            return self._blank.pop()
        return self._cold.pop() if self.num_growing else self._evict()

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        self._unname(page)
        return page

    def _unname(self, page: int) -> None:
        del self._by_content[self._content_of.pop(page)]
        del self._number_of[page]
