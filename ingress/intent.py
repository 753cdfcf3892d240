"""What a text is about: scores by route from tables that were learned offline (`headrace routes learn`).

Static embeddings with a linear head are linear up to the mean, so the head is multiplied into the table of
embeddings when it is learned: what is left for a request is to look up its pieces and words, and to add. No
model is loaded, no numpy; a text takes some 0.1 ms.
"""

from __future__ import annotations

import array
import bisect
import math
import re
import sys
import zlib
from collections.abc import Sequence
from functools import lru_cache

from broker.routes import Learned
from broker.routes import Table as Layout

_HEAD, _TAIL = 700, 300
"""Characters that are looked at, from each end: what is asked stands before or after what it is asked of."""
_PIECE = 16
"""Characters of a piece, at most."""
_RUN = re.compile(r"\S{1,47}")
"""A word; what has no spaces is cut."""
_LOOKUPS = 1000
"""Of one text, with those in vain: what has no spaces, or is in no vocabulary, must not take longer than what
has words."""
_CACHED = 8192
"""Words of each router whose scores are kept."""

_START = "\u2581"
"""What the pieces that begin a word begin with."""
_FEATURES = re.compile(r"[^\W\d_]+|\d+|[^\w\s]")


def relevant(text: str) -> str:
    """What is looked at of a text; features are those of lower case."""
    return (text if len(text) <= _HEAD + _TAIL else f"{text[:_HEAD]} {text[-_TAIL:]}").lower()


def words(text: str) -> list[str]:
    """The different words of a relevant text, and its signs; a number is `#`."""
    return list(dict.fromkeys("#" if each.isdigit() else each for each in _FEATURES.findall(text)))


def runs(text: str) -> list[str]:
    """What `pieces` takes, of a relevant text."""
    return _RUN.findall(text)


def crc(feature: str) -> int:
    return zlib.crc32(feature.encode("utf-8", "surrogatepass"))


class Table:
    """Features' scores. `hashes` ascending uint32, `scores` rows x width int8."""

    def __init__(self, hashes: array.array[int], scores: array.array[int], width: int, scale: float) -> None:
        self._hashes = hashes
        self._scores = scores
        self._width = width
        self._scale = scale

    @classmethod
    def read(cls, layout: Layout, width: int, data: memoryview) -> Table:
        """Raises ValueError where the bytes are others than the layout says."""
        at = 4 * layout.rows
        hashes, scores = array.array("I"), array.array("b")
        hashes.frombytes(data[:at])
        scores.frombytes(data[at : at + layout.rows * width])
        if sys.byteorder == "big":
            hashes.byteswap()
        if hashes.itemsize != 4 or len(hashes) != layout.rows or len(scores) != layout.rows * width:
            raise ValueError("a table has another size than its layout")
        return cls(hashes, scores, width, layout.scale)

    @staticmethod
    def size(layout: Layout, width: int) -> int:
        return layout.rows * (4 + width)

    def row(self, feature: str) -> int:
        """Its number, -1 where it is unknown."""
        return self.at(crc(feature))

    def at(self, wanted: int) -> int:
        at = bisect.bisect_left(self._hashes, wanted)
        return at if at < len(self._hashes) and self._hashes[at] == wanted else -1

    def scores(self, row: int) -> list[float]:
        at = row * self._width
        return [score * self._scale for score in self._scores[at : at + self._width]]


def pieces(word: str, known: Table) -> tuple[list[int], int]:
    """The rows of a word's pieces, the longest known one first each time; characters of none are left out.
    And how many lookups it took."""
    letters = [letter.encode("utf-8", "surrogatepass") for letter in _START + word]
    found: list[int] = []
    at = looked_up = 0
    while at < len(letters):
        crcs = [0]  # of the pieces that begin here, by their length
        for letter in letters[at : at + _PIECE]:
            crcs.append(zlib.crc32(letter, crcs[-1]))
        row = -1
        while row < 0 and len(crcs) > 1:
            looked_up += 1
            row = known.at(crcs.pop())
        at += len(crcs)
        if row >= 0:
            found.append(row)
    return found, looked_up


class Router:
    """A learned router. Raises ValueError where its tables are others than it says."""

    def __init__(self, learned: Learned, tables: bytes) -> None:
        self.learned = learned
        width = len(learned.routes)
        data = memoryview(tables)
        at = Table.size(learned.pieces, width)
        if len(learned.bias) != width or len(data) != at + Table.size(learned.words, width):
            raise ValueError("the tables have another size than the router says")
        self._pieces = Table.read(learned.pieces, width, data[:at])
        self._words = Table.read(learned.words, width, data[at:])
        self._of_word = lru_cache(_CACHED)(self._sum)
        self._of_feature = lru_cache(_CACHED)(self._known)

    def scores(self, text: str) -> list[float]:
        """By route, in the order of `learned.routes`: about 1 for what is meant, about -1 for what is not."""
        text = relevant(text)
        total = [0.0] * len(self.learned.bias)
        found = 0
        looked_up = 0
        for word in runs(text):
            scores, count, cost = self._of_word(word)
            total = [a + b for a, b in zip(total, scores, strict=True)]
            found += count
            looked_up += cost
            if looked_up > _LOOKUPS:
                break
        total = [score / max(1, found) for score in total]
        features = words(text)
        share = 1 / math.sqrt(max(1, len(features)))
        for word in features:
            if (known := self._of_feature(word)) is not None:
                total = [a + share * b for a, b in zip(total, known, strict=True)]
        return [a + b for a, b in zip(self.learned.bias, total, strict=True)]

    def ranked(self, text: str, name: str) -> list[tuple[str, str]]:
        """Models in the order in which they should serve `text`, each with the reason."""
        routes = self.learned.routes
        scores = self.scores(text)
        order = sorted(range(len(routes)), key=lambda index: -scores[index])
        lead = _lead(scores, order)
        found = [
            (routes[index].model, f"{name}: route {routes[index].name}, score {scores[index]:.2f}")
            for index in order
        ]
        if lead < self.learned.margin:
            # No name: the route's model may be another tenant's.
            reason = f"{name}: default, the best leads by {lead:.2f} only, margin {self.learned.margin:.2f}"
            return [(self.learned.default, reason), *found]
        found[0] = (found[0][0], f"{found[0][1]}, ahead by {lead:.2f}")
        return [found[0], (self.learned.default, f"{name}: default"), *found[1:]]

    def route(self, text: str) -> str:
        """The name of the route that scores best, whatever its lead."""
        scores = self.scores(text)
        return self.learned.routes[max(range(len(scores)), key=scores.__getitem__)].name

    def _sum(self, word: str) -> tuple[list[float], int, int]:
        """A word's scores, summed; its pieces; what it cost, in lookups."""
        total = [0.0] * len(self.learned.bias)
        rows, looked_up = pieces(word, self._pieces)
        for row in rows:
            total = [a + b for a, b in zip(total, self._pieces.scores(row), strict=True)]
        return total, len(rows), looked_up

    def _known(self, word: str) -> list[float] | None:
        row = self._words.row(word)
        return None if row < 0 else self._words.scores(row)


def _lead(scores: Sequence[float], order: Sequence[int]) -> float:
    return scores[order[0]] - scores[order[1]] if len(order) > 1 else math.inf
