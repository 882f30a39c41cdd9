"""kvserve: a conversation server for local language models that never prefills a token twice."""

__version__ = "0.1.0"
