"""How fast rows arrive: an exponentially smoothed rate, for the target batch of scheduling.py. No clock inside."""

from math import exp, sqrt


class ArrivalRate:
    """Rows per second over about the last `window_s`, with one standard deviation on top where caution is wanted.

    Counting is two additions on `n_rows` and `n_requests`, done by the owner itself, since it happens once a request;
    `update` turns the counts into a rate every few milliseconds. One owner mutates.

    Example:
        >>> rate = ArrivalRate(window_s=0.1)
        >>> for millisecond in range(1, 1001):
        ...     rate.n_rows += 4
        ...     rate.n_requests += 2
        ...     rate.update(millisecond / 1000)
        >>> round(rate.rows_per_s), rate.rows_per_request
        (4000, 2.0)
    """

    __slots__ = ("_mass", "_requests_per_s", "_rows_per_s", "_updated_s", "n_requests", "n_rows", "window_s")

    def __init__(self, window_s: float, now_s: float = 0.0) -> None:
        self.window_s = window_s
        self.n_rows = 0
        """Arrived since the last update."""
        self.n_requests = 0
        self._rows_per_s = 0.0
        self._requests_per_s = 0.0
        self._mass = 0.0  # how much of the window has been seen: corrects the start, when most of it is still empty
        self._updated_s = now_s

    def update(self, now_s: float) -> None:
        """Move to `now_s`, spreading what was counted evenly over the time since the last update."""
        elapsed_s = now_s - self._updated_s
        if elapsed_s <= 0.0:
            return
        kept = exp(-elapsed_s / self.window_s)
        new = (1.0 - kept) / elapsed_s
        self._rows_per_s = kept * self._rows_per_s + new * self.n_rows
        self._requests_per_s = kept * self._requests_per_s + new * self.n_requests
        self._mass = kept * self._mass + 1.0 - kept
        self._updated_s = now_s
        self.n_rows = self.n_requests = 0

    @property
    def rows_per_s(self) -> float:
        return self._rows_per_s / self._mass if self._mass else 0.0

    @property
    def rows_per_request(self) -> float:
        return self._rows_per_s / self._requests_per_s if self._requests_per_s > 0.0 else 1.0

    @property
    def high_rows_per_s(self) -> float:
        """The rate plus one standard deviation of its estimate, were arrivals Poisson and all of the mean size.

        An exponential window of length w weighs requests like 2 w seconds of plain counting, hence the variance
        rate * rows_per_request / (2 w).
        """
        rate = self.rows_per_s
        return rate + sqrt(rate * self.rows_per_request / (2.0 * self.window_s))
