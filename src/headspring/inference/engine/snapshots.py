"""Which snapshots of folded states are kept: so many bytes, the one unused longest given away first.

    pages     0 ── 1 ── 2 ── 3 ── 4        prompt A          ◆ snapshot: a prompt may begin with pages 0 … here
                   ◆ └─ 5 ── 6             prompt B, which left A after page 1
                             ◆

A snapshot is as large as a hundred tokens of pages or more, and serves prompts that go on from exactly its place. So few places
are worth one (Marconi, arXiv 2411.19379, section 4): the last full page of a prompt, where the same prompt, or the conversation
that follows, goes on; and where a prompt leaves what another one began with, for then a third may leave it there too. A step
reads no further than such a place at once.

A snapshot belongs to a page of the index (`cache.Node`) and goes when that page does.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from headspring.inference.engine.beside import Snapshot
from headspring.inference.engine.sequence import Sequence

if TYPE_CHECKING:
    from headspring.inference.engine.cache import Key, Node

MOST = 1024  # snapshots, however small they are


class Snapshots:
    """Made by `make`, `budget` bytes in all."""

    def __init__(self, make: Callable[[Sequence], Snapshot], budget: int):
        self.make, self.budget = make, budget
        self.bytes = 0
        self.nodes: OrderedDict[int, Node] = OrderedDict()  # that have one, by their serial numbers

    def keep(self, node: "Node", sequence: Sequence) -> None:
        """Let a page that a sequence has just filled have the state of it."""
        if node.snapshot is not None:
            return self.use(node)
        made = self.make(sequence)
        while self.nodes and (self.bytes + made.bytes > self.budget or len(self.nodes) == MOST):
            self.drop(next(iter(self.nodes.values())))
        if made.bytes <= self.budget:
            node.snapshot, self.nodes[node.serial] = made, node
            self.bytes += made.bytes

    def use(self, node: "Node") -> None:
        """Note that a prompt began with it."""
        self.nodes.move_to_end(node.serial)

    def drop(self, node: "Node") -> None:
        """Forget what a page has, if it has one."""
        if node.snapshot is not None:
            self.bytes -= node.snapshot.bytes
            node.snapshot = None
            del self.nodes[node.serial]

    def check(self, index: Mapping["Key", "Node"]) -> None:
        """Assert that each belongs to a page which is known, and is the state at that page's end."""
        assert self.bytes == sum(node.snapshot.bytes for node in self.nodes.values() if node.snapshot is not None)
        assert self.bytes <= self.budget and len(self.nodes) <= MOST
        for node in index.values():
            assert (node.snapshot is not None) == (self.nodes.get(node.serial) is node)
        for node in self.nodes.values():
            assert index[node.key] is node and node.snapshot is not None
            lengths = {node.snapshot.length, *(state.length for state in node.snapshot.layers.values())}
            assert lengths == {node.end}, "a snapshot of another place"
