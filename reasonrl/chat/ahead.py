"""Work that another thread does while this one goes on: begun now, taken later."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from reasonrl.records import InputError, ScorerDown

T = TypeVar("T")


class Ahead(Generic[T]):
    """`result()` waits for the work; what it raised is raised there, as often as it is asked."""

    def __init__(self, work: Callable[[], T]):
        self._work, self._found = work, []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._found.append(self._work())
        except BaseException as error:
            self._error = error  # whoever asks for the result gets it
            if not isinstance(error, InputError | ScorerDown):
                raise

    def wait(self) -> None:
        self._thread.join()

    @property
    def failed(self) -> bool:
        """Whether it came to nothing; waits for it."""
        self.wait()
        return self._error is not None

    def result(self) -> T:
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._found[0]
