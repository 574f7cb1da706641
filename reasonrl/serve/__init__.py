"""`reasonrl serve`: listener.py connections, queue.py work in batches, scorers.py what is served,
protocols.py the JSON of each host, app.py the routes, metrics.py the counts."""

from reasonrl.serve.app import App, run
from reasonrl.serve.listener import Limits

__all__ = ["App", "Limits", "run"]
