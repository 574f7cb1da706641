"""Asking an OpenAI-compatible chat server: exchange.py one POST, reply.py what counts as an answer,
outage.py when the server fails, requests.py many of them, cache.py answers kept on disk, client.py
questions and texts."""

from reasonrl.chat.client import ChatClient
from reasonrl.chat.outage import Patience

__all__ = ["ChatClient", "Patience"]
