"""The language of natural text, told by its script."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable

#: Scripts written without spaces, by how the Unicode names of their characters begin: each character is a word.
_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA")


def script_words(language: str) -> Callable[[str], list[bool]]:
    """Tell words of natural text by the script they are written in, for ``language_consistency_reward``.

    A word is a run of letters and their marks, or a single ideograph or kana; numbers, signs and spaces are none.
    It is of the language if the name of each of its letters in Unicode begins with the script's. So this tells
    English from Chinese or Russian, the mixing that the reward is against, and not English from French.

    Args:
        language: As names in Unicode begin, in any case: ``"latin"``, ``"cyrillic"``, ``"cjk"``, ``"devanagari"``.

    Raises:
        ValueError: No letter's name begins so.
    """
    prefix = f"{language.upper()} "
    letters = (c for c in map(chr, range(0x20000)) if unicodedata.category(c)[0] == "L")
    if not any(unicodedata.name(c, "").startswith(prefix) for c in letters):
        raise ValueError(
            f"language: got {language!r}, want how names in Unicode begin, such as 'latin' or 'cyrillic'"
        )

    def words(text: str) -> list[bool]:
        found: list[bool] = []
        within = False
        for character in unicodedata.normalize("NFC", text):
            kind, name = unicodedata.category(character), unicodedata.name(character, "")
            if kind[0] == "M":  # a mark belongs to the letter before it
                continue
            if kind[0] == "L":
                ours = name.startswith(prefix)
                if within and not name.startswith(_UNSPACED):
                    found[-1] &= ours
                else:
                    found.append(ours)
            within = kind[0] == "L" and not name.startswith(_UNSPACED)
        return found

    return words
