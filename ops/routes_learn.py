"""From examples to a router: static embeddings and words into a linear head, and the head into tables.

The embeddings are those of a model2vec model with a Unigram vocabulary. A text's features are the mean of its
pieces' vectors, and its words; a ridge regression tells each route's texts from the others'. What depends on
the embeddings alone is then multiplied out: each piece keeps one score a route.
"""

from __future__ import annotations

import array
import importlib.metadata
import importlib.util
import math
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

from broker import routes
from ingress import intent
from ops.errors import RoutesError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Matrix = NDArray[np.float64]

PACKAGE = "tokenlearn-static-model"
_MODULE = "static_model"
_PIECES = 120_000
"""Pieces that are kept, the most frequent ones of a vocabulary that knows many languages."""
_EMBEDDING_SHARE = 0.1
"""Weight of a standardised embedding beside a word; chosen by cross-validation on examples/routes.toml."""
_RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0)
_FOLDS = 5


class Example(NamedTuple):
    text: str
    route: int


class Embeddings(NamedTuple):
    """A vocabulary's pieces, the most frequent first, with a vector each (pieces x dimensions)."""

    name: str
    pieces: list[str]
    vectors: Matrix


class Trained(NamedTuple):
    """`guesses`: for each example the route that a head learned from the others gives it."""

    learned: routes.Learned
    tables: bytes
    guesses: list[int]


def installed() -> Path | None:
    """Where the package's model lies; its code is not loaded."""
    spec = importlib.util.find_spec(_MODULE)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def embeddings(folder: Path) -> Embeddings:
    """Read `tokenizer.json` and `model.safetensors`. Raises RoutesError."""
    import numpy as np

    try:
        model = orjson.loads((folder / "tokenizer.json").read_bytes())["model"]
        raw = (folder / "model.safetensors").read_bytes()
        (size,) = struct.unpack_from("<Q", raw)
        head, data = orjson.loads(raw[8 : 8 + size]), raw[8 + size :]

        def tensor(name: str, dtype: str) -> Any:
            start, end = head[name]["data_offsets"]
            return np.frombuffer(data[start:end], dtype).reshape(head[name]["shape"])

        vectors = tensor("embeddings", "i1").astype(np.float64)
        mapping, weights = tensor("mapping", "<i8")[:_PIECES], tensor("weights", "<f4")[:_PIECES]
        pieces = [piece for piece, _ in model["vocab"][:_PIECES]]
        vectors = vectors[mapping] * weights[:, None].astype(np.float64)
    except (OSError, KeyError, ValueError, IndexError, TypeError, struct.error) as exc:
        raise RoutesError(f"{folder} holds no static model that can be read: {exc!r}") from exc
    version = importlib.metadata.version(PACKAGE) if folder == installed() else folder.name
    return Embeddings(f"{PACKAGE} {version}", pieces, vectors)


def train(
    name: str,
    default: str,
    margin: float,
    found: Sequence[routes.Route],
    examples: Sequence[Example],
    known: Embeddings | None,
) -> Trained:
    """A router for `found` routes. Without embeddings it knows the examples' words alone."""
    import numpy as np

    width = len(found)
    vocabulary = sorted({word for each in examples for word in intent.words(intent.relevant(each.text))})
    bags = np.stack([_bag(each.text, vocabulary) for each in examples])
    means, centre, spread = np.zeros((len(examples), 0)), np.zeros(0), 1.0
    order: list[int] = []
    if known is not None:
        order, lookup = _lookup(known.pieces)
        known = known._replace(vectors=known.vectors[order])
        means = np.stack([_mean(each.text, lookup, known.vectors) for each in examples])
        centre, spread = means.mean(0), float(means.std()) or 1.0
        means = _EMBEDDING_SHARE * (means - centre) / spread
    features = np.hstack([means, bags, np.ones((len(examples), 1))])
    targets = np.full((len(examples), width), -1.0)
    targets[np.arange(len(examples)), [each.route for each in examples]] = 1.0
    gram = features @ features.T
    meant = [each.route for each in examples]
    tried = [(_guessed(gram, targets, ridge), ridge) for ridge in _RIDGES]
    guesses, ridge = max(tried, key=lambda one: sum(a == b for a, b in zip(one[0], meant, strict=True)))
    head = features.T @ _solved(gram, targets, ridge)
    to_pieces, to_words, bias = head[: means.shape[1]], head[means.shape[1] : -1], head[-1]
    piece_scores, piece_hashes = np.zeros((0, width)), []
    if known is not None:
        to_pieces = _EMBEDDING_SHARE / spread * to_pieces
        bias = bias - centre @ to_pieces
        piece_scores, piece_hashes = known.vectors @ to_pieces, [intent.crc(known.pieces[i]) for i in order]
    pieces_layout, pieces_bytes = _table(piece_hashes, piece_scores)
    words_layout, words_bytes = _table([intent.crc(word) for word in vocabulary], to_words)
    learned = routes.Learned(
        name=name,
        default=default,
        margin=margin,
        routes=tuple(found),
        bias=tuple(float(each) for each in bias),
        pieces=pieces_layout,
        words=words_layout,
        chunks=0,
        store="",
        digest="",
        examples=len(examples),
        embeddings="" if known is None else known.name,
    )
    return Trained(learned, pieces_bytes + words_bytes, guesses)


def _lookup(pieces: Sequence[str]) -> tuple[list[int], intent.Table]:
    """Numbers of the pieces in the order of their hashes, and the table that finds them. Of pieces with the
    same hash the most frequent one stays."""
    by_hash = {intent.crc(piece): number for number, piece in reversed(list(enumerate(pieces)))}
    ordered = sorted(by_hash)
    hashes = array.array("I", ordered)
    return [by_hash[each] for each in ordered], intent.Table(hashes, array.array("b"), 0, 1.0)


def _mean(text: str, lookup: intent.Table, vectors: Matrix) -> Matrix:
    rows = [row for word in intent.runs(intent.relevant(text)) for row in intent.pieces(word, lookup)[0]]
    total: Matrix = vectors[rows].sum(0) / max(1, len(rows))
    return total


def _bag(text: str, vocabulary: Sequence[str]) -> Matrix:
    import numpy as np

    found = set(intent.words(intent.relevant(text)))
    bag: Matrix = np.array([float(word in found) for word in vocabulary]) / math.sqrt(max(1, len(found)))
    return bag


def _solved(gram: Matrix, targets: Matrix, ridge: float) -> Matrix:
    """Ridge regression in its dual form: examples are far fewer than features."""
    import numpy as np

    return np.asarray(np.linalg.solve(gram + ridge * np.eye(len(gram)), targets), dtype=np.float64)


def _guessed(gram: Matrix, targets: Matrix, ridge: float) -> list[int]:
    """By cross-validation."""
    import numpy as np

    numbers = np.arange(len(gram))
    guesses = np.zeros(len(gram), dtype=int)
    for fold in range(_FOLDS):
        out, rest = numbers[numbers % _FOLDS == fold], numbers[numbers % _FOLDS != fold]
        solved = _solved(gram[np.ix_(rest, rest)], targets[rest], ridge)
        guesses[out] = (gram[np.ix_(out, rest)] @ solved).argmax(1)
    return [int(each) for each in guesses]


def _table(hashes: Sequence[int], scores: Matrix) -> tuple[routes.Table, bytes]:
    import numpy as np

    first: dict[int, int] = {}
    for row, each in enumerate(hashes):
        first.setdefault(each, row)
    ordered = sorted(first)
    scores = scores[[first[each] for each in ordered]]
    scale = (float(np.abs(scores).max()) / 127 if scores.size else 0.0) or 1.0
    stored = array.array("I", ordered)
    if sys.byteorder == "big":
        stored.byteswap()
    table = routes.Table(rows=len(ordered), scale=scale)
    return table, stored.tobytes() + np.rint(scores / scale).astype(np.int8).tobytes()
