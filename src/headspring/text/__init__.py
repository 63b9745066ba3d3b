"""The nouns that every room shares: documents, sources, chat messages."""
