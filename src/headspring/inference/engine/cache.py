"""Who owns which page: tables, reference counts, and an index of prefixes.

    tokens    0 … 31 │ 32 … 63 │ 64 … 70            PAGE = 32
    table     page 4 │ page 9  │ page 2             one list a group of layers
    index     (root, tokens) → n₁    (n₁, tokens) → n₂      full pages only

Layers that see everything share one table; those with a sliding window of the same width another, from which pages are dropped
when the window has passed them. A page is *referenced* by tables, or *cached* (nobody's, but known by what it holds, the one
unused longest given away first), or *free*.

A page is found by the serial number of the page before it and by its own 32 tokens, both compared: nothing is hashed to
something shorter, so no two prefixes can be taken for each other (CVE-2025-25183 was that). Serial numbers are never given
twice, and an entry whose predecessor is gone cannot be reached. The first page's predecessor is the job's scope: another
client's key, or another edit of the activations, is another root. Pages are given back last one first, so that beginnings live
longest.

Where layers have a state beside pages, a prefix ends at a page that has a snapshot of it (`snapshots`).

Forks share all pages. The last one, which may have room, is copied by whoever writes to it while others hold it.

This file knows numbers and no tensors: what is in the pages is the runner's.
"""

import math
from collections import OrderedDict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from headspring.inference.engine.beside import Snapshot
from headspring.inference.engine.sequence import Sequence
from headspring.inference.engine.snapshots import Snapshots
from headspring.models.ragged import PAGE

GONE = -1  # in a table: the window has passed this page


@dataclass(frozen=True)
class Group:
    """Layers that share a table: the width of their window, None where they see everything, and how many pages there are."""

    window: int | None
    num_pages: int

    def most_pages(self, tokens: int, chunk: int) -> int:
        """Pages that a sequence of `tokens` tokens holds at its worst, when `chunk` of them are written at a time."""
        if self.window is not None:
            tokens = min(tokens, self.window + chunk + PAGE)
        return math.ceil(tokens / PAGE)


@dataclass(frozen=True)
class Copy:
    """Page `target` of a group is to become what `source` is, before anything is written."""

    group: int
    source: int
    target: int


class Pool:
    """The pages of one group."""

    def __init__(self, num_pages: int):
        self.references = [0] * num_pages
        self.free = list(range(num_pages - 1, -1, -1))
        self.cached: OrderedDict[int, None] = OrderedDict()  # the one unused longest first
        self.nodes: dict[int, Node] = {}  # of pages that the index knows

    @property
    def available(self) -> int:
        """Pages that can be taken."""
        return len(self.free) + len(self.cached)

    def take(self, group: int) -> tuple[int, "Node | None"]:
        """A page for one owner, and the node of the index that just lost it, if one did."""
        lost = None
        if self.free:
            page = self.free.pop()
        else:
            page, _ = self.cached.popitem(last=False)
            lost = self.nodes.pop(page)
            lost.pages[group] = GONE
        self.references[page] = 1
        return page, lost

    def hold(self, page: int) -> None:
        """One owner more."""
        self.cached.pop(page, None)
        self.references[page] += 1

    def release(self, page: int) -> None:
        """One owner less."""
        self.references[page] -= 1
        assert self.references[page] >= 0
        if self.references[page] == 0:
            if page in self.nodes:
                self.cached[page] = None
            else:
                self.free.append(page)


Key = tuple[Hashable, tuple[Hashable, ...]]  # what comes before a page, and its tokens


@dataclass(slots=True)
class Node:
    """A full page of the index, `end` tokens after the beginning: its pages by group, some of which may be gone."""

    serial: int
    key: Key
    end: int
    pages: list[int]
    snapshot: Snapshot | None = None


class Cache:
    """The books of all pages; of snapshots too, where prefixes need them."""

    def __init__(self, groups: list[Group], sharing: bool = True, snapshots: Snapshots | None = None):
        self.groups, self.sharing, self.snapshots = groups, sharing, snapshots
        self.pools = [Pool(group.num_pages) for group in groups]
        self.index: dict[Key, Node] = {}
        self.serial = 0
        self.hits = 0  # tokens that did not have to be computed

    # ---- taking and giving back

    def reserve(self, sequence: Sequence, count: int) -> list[Copy] | None:
        """Room for `count` tokens after those computed. What must be copied first; None where pages lack."""
        have, want = len(sequence.tables[0]) if sequence.tables else 0, math.ceil((sequence.computed + count) / PAGE)
        if not sequence.tables:
            sequence.tables = [[] for _ in self.groups]
        first = sequence.computed // PAGE  # the first page that is written to
        shared = [
            (number, page)
            for number, table in enumerate(sequence.tables)
            for page in table[first:]
            if page != GONE and self.pools[number].references[page] > 1
        ]
        if have >= want and not shared:
            return []
        for number, pool in enumerate(self.pools):
            if want - have + sum(which == number for which, _ in shared) > pool.available:
                return None
        copies = [self._own(sequence, number, page) for number, page in shared]
        for number, table in enumerate(sequence.tables):
            table.extend(self._take(number) for _ in range(want - have))
        return copies

    def has_room(self, sequence: Sequence, chunk: int) -> bool:
        """Whether there are pages for all tokens that a sequence has, when `chunk` of them are written at a time."""
        for number, (group, pool) in enumerate(zip(self.groups, self.pools, strict=True)):
            held = sum(page != GONE for page in sequence.tables[number]) if sequence.tables else 0
            if group.most_pages(len(sequence.tokens), chunk) - held > pool.available:
                return False
        return True

    def _own(self, sequence: Sequence, number: int, page: int) -> Copy:
        """Give a sequence a page of its own in the place of one that others hold too."""
        table = sequence.tables[number]
        mine = self._take(number)
        table[table.index(page)] = mine
        self.pools[number].release(page)
        return Copy(number, page, mine)

    def _take(self, number: int) -> int:
        page, lost = self.pools[number].take(number)
        if lost is not None and all(page == GONE for page in lost.pages):
            del self.index[lost.key]
            if self.snapshots is not None:
                self.snapshots.drop(lost)
        return page

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """The child holds what the parent does."""
        child.tables, child.nodes, child.computed = (
            [list(table) for table in parent.tables],
            list(parent.nodes),
            parent.computed,
        )
        for pool, table in zip(self.pools, child.tables, strict=False):
            for page in table:
                if page != GONE:
                    pool.hold(page)

    def shorten(self, sequence: Sequence, length: int) -> None:
        """Forget what was computed after the first `length` tokens. Pages that others may read are not written to again: one
        that goes back further than its last full page gives everything back."""
        if length < len(sequence.nodes) * PAGE:
            return self.release(sequence)
        self._drop_after(sequence, math.ceil(length / PAGE))
        sequence.computed = length

    def release(self, sequence: Sequence) -> None:
        """Give everything back."""
        self._drop_after(sequence, 0)
        sequence.tables, sequence.nodes, sequence.computed = [], [], 0
        sequence.state = sequence.snapshot = None

    def _drop_after(self, sequence: Sequence, kept: int) -> None:
        for pool, table in zip(self.pools, sequence.tables, strict=False):
            while len(table) > kept:
                if (page := table.pop()) != GONE:
                    pool.release(page)

    # ---- prefixes

    def match(self, sequence: Sequence) -> None:
        """Give a sequence that holds nothing the pages of the longest known beginning of its tokens, its last token left out:
        what comes next is read from the hidden state of that one."""
        assert not sequence.tables and not sequence.computed
        if not self.sharing or not self.index:
            return
        found = self._known(sequence)
        sequence.stops.add(len(found) * PAGE)  # where it leaves what is known, others may too
        while found and not self._goes_on(found):
            found.pop()
        if not found:
            return
        if self.snapshots is not None:
            self.snapshots.use(found[-1])
            sequence.snapshot = found[-1].snapshot
        sequence.tables = [[node.pages[number] for node in found] for number in range(len(self.groups))]
        sequence.nodes = [node.serial for node in found]
        sequence.computed = len(found) * PAGE
        for number, (group, pool) in enumerate(zip(self.groups, self.pools, strict=True)):
            table, passed = sequence.tables[number], self._passed(group, sequence.computed)
            table[:passed] = [GONE] * passed
            for page in table[passed:]:
                pool.hold(page)

    def _known(self, sequence: Sequence) -> list[Node]:
        """The nodes of its full pages, up to the first that the index does not have."""
        found: list[Node] = []
        before: Hashable = sequence.job.scope
        for start in range(0, len(sequence.tokens) - PAGE, PAGE):
            node = self.index.get((before, sequence.contents(start, start + PAGE)))
            if node is None:
                break
            found.append(node)
            before = node.serial
        return found

    def _goes_on(self, found: list[Node]) -> bool:
        """Whether all is there that a token after these nodes needs."""
        folded = self.snapshots is not None and found[-1].snapshot is None
        return not folded and all(self._covers(found, number) for number in range(len(self.groups)))

    def _covers(self, found: list[Node], number: int) -> bool:
        """Whether a group still has the pages that a token after these nodes looks at."""
        passed = self._passed(self.groups[number], len(found) * PAGE)
        return all(node.pages[number] != GONE for node in found[passed:])

    @staticmethod
    def _passed(group: Group, computed: int) -> int:
        """Pages at the beginning that no token from place `computed` on looks at."""
        return 0 if group.window is None else max(0, computed - group.window + 1) // PAGE

    def until_stop(self, sequence: Sequence, count: int) -> int:
        """Of `count` tokens to be computed, those up to where a snapshot should be kept."""
        if self.snapshots is None:
            return count
        return min([count, *(stop - sequence.computed for stop in sequence.stops if stop > sequence.computed)])

    def settle(self, sequence: Sequence) -> None:
        """After a step: enter pages that have become full into the index, and drop those that windows have passed."""
        node = None
        while self.sharing and (len(sequence.nodes) + 1) * PAGE <= sequence.computed:
            node = self._enter(sequence)
        if node is not None and self.snapshots is not None and node.end == sequence.computed and node.end in sequence.stops:
            self.snapshots.keep(node, sequence)
        for number, (group, table) in enumerate(zip(self.groups, sequence.tables, strict=False)):
            for place in range(self._passed(group, sequence.computed) - 1, -1, -1):
                if table[place] == GONE:
                    break  # and so are those before it
                self.pools[number].release(table[place])
                table[place] = GONE

    def _enter(self, sequence: Sequence) -> Node:
        place = len(sequence.nodes)
        before: Hashable = sequence.nodes[-1] if place else sequence.job.scope
        end = (place + 1) * PAGE
        key = before, sequence.contents(end - PAGE, end)
        node = self.index.get(key)
        if node is None:
            self.serial += 1
            node = self.index[key] = Node(self.serial, key, end, [GONE] * len(self.groups))
        for number, pool in enumerate(self.pools):
            page = sequence.tables[number][place]
            if node.pages[number] == GONE and page != GONE and page not in pool.nodes:
                node.pages[number] = page  # else somebody computed the same at the same time, and this copy stays unknown
                pool.nodes[page] = node
        sequence.nodes.append(node.serial)
        return node

    # ---- accounts

    @property
    def used(self) -> int:
        """Pages that sequences hold."""
        return sum(group.num_pages - pool.available for group, pool in zip(self.groups, self.pools, strict=True))

    @property
    def total(self) -> int:
        return sum(group.num_pages for group in self.groups)

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Assert that every page is free, cached, or referenced exactly as often as tables name it."""
        sequences = list(sequences)
        for number, (group, pool) in enumerate(zip(self.groups, self.pools, strict=True)):
            counted = [0] * group.num_pages
            for sequence in sequences:
                for page in sequence.tables[number] if sequence.tables else ():
                    if page != GONE:
                        counted[page] += 1
            assert counted == pool.references, "pages are held by nobody, or by somebody unknown"
            unused = [*pool.free, *pool.cached]
            assert sorted(unused) == [page for page, count in enumerate(counted) if not count], "a page is lost or given twice"
            assert all(page in pool.nodes for page in pool.cached) and not any(page in pool.nodes for page in pool.free)
            for page, node in pool.nodes.items():
                assert node.pages[number] == page and self.index[node.key] is node
        if self.snapshots is not None:
            self.snapshots.check(self.index)
        for sequence in sequences:
            assert sequence.snapshot is None or sequence.snapshot.length == sequence.computed, "it begins from another place"
            assert 0 <= sequence.computed <= len(sequence.tokens)
            assert all(len(table) == math.ceil(sequence.computed / PAGE) for table in sequence.tables) or sequence.running
            assert len(sequence.nodes) * PAGE <= sequence.computed
