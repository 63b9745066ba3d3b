"""What the data stage knows about each document without its text: some hundred bytes each, by column."""

from collections import Counter

from headspring.data.store import KEEP, Row


class Ledger:
    """Columns in reading order. `bytes_read` is what the source gave, `bytes` what masks and line rules left of it."""

    def __init__(self) -> None:
        self.id: list[str] = []
        self.source: list[str] = []
        self.group: list[str] = []
        self.bytes_read: list[int] = []
        self.bytes: list[int] = []
        self.decision: list[str] = []
        self.reason: list[str] = []
        self.cluster: list[str | None] = []
        self.survivor: list[str | None] = []

    def __len__(self) -> int:
        return len(self.id)

    def add(self, row: Row, bytes_read: int) -> int:
        """Enter a document; returns its number."""
        document = row.document
        self.id.append(document.id)
        self.source.append(document.source)
        self.group.append(document.split_group)
        self.bytes_read.append(bytes_read)
        self.bytes.append(len(document.text.encode("utf-8", "surrogatepass")))
        self.decision.append(row.decision)
        self.reason.append(row.reason)
        self.cluster.append(None)
        self.survivor.append(None)
        return len(self.id) - 1

    def remove(self, index: int, decision: str, reason: str, survivor: str | None = None) -> None:
        """Turn a kept document into a removed one."""
        assert self.decision[index] == KEEP
        self.decision[index], self.reason[index], self.survivor[index] = decision, reason, survivor

    def most_frequent_decision(self) -> tuple[str, int]:
        return Counter(self.decision).most_common(1)[0]
