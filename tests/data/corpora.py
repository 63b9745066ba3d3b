"""Small corpora and a byte tokenizer for the tests of shards, packing and their inverse."""

import json
from pathlib import Path

import numpy as np

from headspring.data.shards import TokensConfig, TokenShards, write_tokens
from headspring.data.store import Row, write_documents
from headspring.text.documents import Document


class ByteTokenizer:
    """Every byte is a token; `bos`, `eos` and `pad` are 0, 1, 2, or absent."""

    def __init__(self, control: bool = True, vocab_size: int = 259):
        self.control, self.vocab_size = control, vocab_size
        self.bos_id, self.eos_id, self.pad_id = (0, 1, 2) if control else (None, None, None)

    def encode_batch_with_spans(self, texts):
        return [self.encode_with_spans(text) for text in texts]

    def encode_with_spans(self, text):
        ids = np.frombuffer(text.encode(), np.uint8).astype(np.int64) + 3
        starts = np.arange(len(ids))
        return ids, np.stack([starts, starts + 1], axis=1)

    def token_bytes(self, token):
        return bytes([token - 3]) if token >= 3 else b""

    def save(self, folder):
        (Path(folder) / "tokenizer.json").write_text(json.dumps([self.control, self.vocab_size]))


class WordTokenizer(ByteTokenizer):
    """Words between spaces; the spaces belong to no token, so that spans have gaps."""

    def encode_with_spans(self, text):
        spans, start = [], 0
        for word in text.split(" "):
            if word:
                spans.append((start, start + len(word.encode())))
            start += len(word.encode()) + 1
        return np.array([3 + (a * 31) % 200 for a, _ in spans], np.int64), np.array(spans, np.int64).reshape(-1, 2)


def document(text, source="a", path=""):
    return Document(text=text, source=source, kind="prose", path=path or source)


def corpus(lengths, source="a", alphabet="abcdé "):
    """Documents with the given numbers of characters, all different."""
    return [
        document("".join(alphabet[(n * 7 + i * i + i) % len(alphabet)] for i in range(length)), source, f"{source}/{n}")
        for n, length in enumerate(lengths)
    ]


def make_shards(folder, rows, tokenizer=None, config=None):
    """Token shards of some documents or rows, through the real document store."""
    folder = Path(folder)
    write_documents(rows, folder / "data", scores=())
    write_tokens(config or TokensConfig(), folder / "data", tokenizer or ByteTokenizer(), folder / "tokens")
    return TokenShards(folder / "tokens")


def rows(documents, split="train"):
    return [Row(document, split) for document in documents]
