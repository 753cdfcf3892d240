"""Which languages a text may be in: by its script, and in Latin script by its commonest words.

Cheap and careful: it says nothing rather than something doubtful.
"""

from __future__ import annotations

import re

_MOST_WORDS = 200
_LEAST_HITS = 3
_LEAST_SHARE = 0.12
"""Of the different words, those that are among a language's commonest."""

_LETTERS = re.compile(r"[^\W\d_]")
_WORDS = re.compile(r"[^\W\d_]+")
_LATIN = re.compile(r"[A-Za-z\u00c0-\u024f]")

# Ranges of code points, and the languages that are written with them.
_SCRIPTS: list[tuple[re.Pattern[str], frozenset[str]]] = [
    (re.compile(r"[\u3040-\u30ff]"), frozenset({"ja"})),
    (re.compile(r"[\uac00-\ud7af\u1100-\u11ff]"), frozenset({"ko"})),
    (re.compile(r"[\u4e00-\u9fff\u3400-\u4dbf]"), frozenset({"zh", "ja"})),
    (re.compile(r"[\u0400-\u04ff]"), frozenset({"ru", "uk", "bg", "sr", "be", "mk", "kk", "ky", "mn", "tg"})),
    (re.compile(r"[\u0600-\u06ff]"), frozenset({"ar", "fa", "ur", "ps", "ku"})),
    (re.compile(r"[\u0590-\u05ff]"), frozenset({"he", "yi"})),
    (re.compile(r"[\u0370-\u03ff]"), frozenset({"el"})),
    (re.compile(r"[\u0e00-\u0e7f]"), frozenset({"th"})),
    (re.compile(r"[\u0900-\u097f]"), frozenset({"hi", "mr", "ne", "sa"})),
]
_HAN = 2
_SHARE = 0.5
"""Of the letters that must be of a script; kana beside Han tell Japanese by far fewer."""
_KANA_SHARE = 0.1

_COMMON = {
    "en": "the of and to in is that for it with was on are this what how you my please have be not from",
    "de": "der die das und ist ein eine nicht ich mit auf für den von zu wie sie es bitte dem wir auch oder",
    "fr": "le la les des est et une pas je vous dans pour que qui sur avec ce nous au du cette mais plus",
    "es": "el los las es una y que por para con del no se lo como está pero más cómo mi su al muy",
    "it": "il gli di che è una per non con sono del della questo come mi più nel alla anche ma le",
    "pt": "o os as um uma não que para com por do da em é você como mais seu sua no na dos isso",
    "nl": "de het een en van is niet ik dat op te voor met zijn aan wat hoe maar ook naar dit wij",
}
_BY_WORD: dict[str, list[str]] = {}
for _language, _words in _COMMON.items():
    for _word in _words.split():
        _BY_WORD.setdefault(_word, []).append(_language)


def of(text: str) -> frozenset[str]:
    """Primary subtags of BCP 47; empty where it does not show. Words tell it by statistics: good enough for a
    choice among several models, none to refuse a request for."""
    return _by_script(text, _SHARE) or _latin(text)


def surely(text: str) -> frozenset[str]:
    """Of a text that is in one script other than Latin and in nothing else; empty for any other: a request in
    one language may well be about a text in another."""
    return frozenset() if _LATIN.search(text) else _by_script(text, 1.0)


def _by_script(text: str, share: float) -> frozenset[str]:
    """By the first script that has `share` of the letters; kana beside Han by far fewer."""
    if text.isascii():
        return frozenset()
    letters = len(_LETTERS.findall(text))
    of_script = [len(script.findall(text)) for script, _ in _SCRIPTS]
    if of_script[0] >= max(2, _KANA_SHARE * letters) and (
        share < 1 or of_script[0] + of_script[_HAN] >= letters
    ):
        return _SCRIPTS[0][1]
    for count, (_, languages) in zip(of_script[1:], _SCRIPTS[1:], strict=True):
        if count >= max(2, share * letters):
            return languages
    return frozenset()


def _latin(text: str) -> frozenset[str]:
    hits = dict.fromkeys(_COMMON, 0)
    words = set(_WORDS.findall(text.lower())[:_MOST_WORDS])
    for word in words:
        for language in _BY_WORD.get(word, ()):
            hits[language] += 1
    first, second = sorted(hits.values(), reverse=True)[:2]
    if first < max(_LEAST_HITS, _LEAST_SHARE * len(words)) or first < 2 * second:
        return frozenset()
    return frozenset(language for language, n in hits.items() if n == first)
