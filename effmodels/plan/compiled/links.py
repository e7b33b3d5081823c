"""Transfers that are in flight together: those on a common link share it fairly, as packets that take turns do; others do not meet.

Fair is max-min: the users of the fullest link get equal parts of it, and what they leave on other links is for the rest. So n transfers
on the same links go on at 1 / n of their speed each. No work is lost or made: each transfer has a link that is full until it ends.
"""
import dataclasses
import math

_SAME = 1e-9  # relative: ends this close together are one, up to rounding


@dataclasses.dataclass(eq=False)
class Transfer:
    """A collective under way. left: seconds that it would still take alone."""

    links: frozenset
    left: float
    begun: float
    ended: float = math.inf

    @property
    def flight(self):
        """Seconds from start to end."""
        return self.ended - self.begun


class Links:
    """The links of one chip, at a time `now` in seconds."""

    def __init__(self):
        self.now, self.flying = 0.0, []

    def start(self, seconds, links):
        """The Transfer of this many seconds alone that starts now."""
        transfer = Transfer(frozenset(links), seconds, self.now)
        self.flying.append(transfer)
        return transfer

    def advance(self, until):
        """To a later time; transfers that get through are given their end."""
        while self.flying and self.now < until:
            self._next(until)
        self.now = max(self.now, until)

    def finish(self, transfer):
        """To the end of a transfer; seconds from now until then."""
        begun = self.now
        while transfer in self.flying:
            self._next(math.inf)
        return self.now - begun

    def _next(self, until):
        """To the next end of a transfer, but not past `until`."""
        rates = fair_rates([t.links for t in self.flying])
        ends = [self.now + t.left / rate for t, rate in zip(self.flying, rates)]
        then = min(until, *ends)
        for t, rate, end in zip(self.flying, rates, ends):
            t.left -= (then - self.now) * rate
            if end - then <= _SAME * (end - t.begun):
                t.left, t.ended = 0.0, then
        self.now, self.flying = then, [t for t in self.flying if math.isinf(t.ended)]


def fair_rates(transfers):
    """Share of its speed alone that each transfer gets, max-min fair, where each is the set of links that it keeps busy.

    >>> fair_rates([{"x+"}, {"x+", "y+"}, {"y+"}, {"y+"}, {"y+"}, {"z+"}])
    [0.75, 0.25, 0.25, 0.25, 0.25, 1.0]
    """
    rates, room = [1.0] * len(transfers), {link: 1.0 for links in transfers for link in links}
    waiting = list(range(len(transfers)))
    while True:
        users = {link: [i for i in waiting if link in transfers[i]] for link in room}
        shares = {link: room[link] / len(those) for link, those in users.items() if those}
        if not shares:
            return rates
        tightest = min(sorted(shares), key=shares.get)
        for i in users[tightest]:
            rates[i] = shares[tightest]
            room |= {link: room[link] - shares[tightest] for link in transfers[i]}
            waiting.remove(i)
