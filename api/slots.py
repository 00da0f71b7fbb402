"""Things of which an API process has only so many at once: streams of events, downloads, bytes of bodies.

In: how many there may be. Out: one of them, or the refusal of the request (503 with `Retry-After`).
"""

import threading

from fastapi import HTTPException

from api.errors import RETRY_S


class Slots:
    """A number of slots; each is taken by one request, and given back at its end."""

    def __init__(self, n: int, refusal: str) -> None:
        self._n_free, self._refusal = n, refusal
        self._lock = threading.Lock()  # some are taken in threads

    def take(self, n: int = 1) -> None:
        """Take some slots.

        Raises:
            HTTPException: 503, there are not so many.
        """
        with self._lock:
            is_free = n <= self._n_free
            if is_free:
                self._n_free -= n
        if not is_free:
            detail = f"{self._refusal} Ask again in {RETRY_S} seconds."
            raise HTTPException(503, detail, headers={"Retry-After": str(RETRY_S)})

    def give_back(self, n: int = 1) -> None:
        """Give back what was taken."""
        with self._lock:
            self._n_free += n
