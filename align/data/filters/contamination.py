"""Find items of an evaluation set in other texts, by the share of an item's n-grams that a text contains.

Containment finds an item inside a long document, which a symmetric similarity does not, and a paraphrase with some
changed words, which long n-grams do not.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from align.data.filters.grams import CHARACTERS, WORDS, Hashes, gram_hashes, gram_size, units

SHORT = 8
"""Items with fewer n-grams count as contained only if all of them are: a few common words are no evidence."""


class Match(NamedTuple):
    """An item that a text contains.

    item: index of the item.
    share: share of the item's n-grams in the text, from 0 to 1.
    """

    item: int
    share: float


class ItemIndex:
    """Inverted index of the items of an evaluation set.

    items: texts. Items without a single n-gram are never found; `short_items` has their indices.
    """

    def __init__(self, items: Iterable[str]):
        found: dict[int, list[tuple[int, Hashes]]] = {WORDS: [], CHARACTERS: []}
        self.short_items: list[int] = []
        for number, item in enumerate(items):
            item_units = units(item)
            size = gram_size(item_units)
            grams = gram_hashes(item_units, size)
            if len(grams):
                found[size].append((number, grams))
            else:
                self.short_items.append(number)
        self._tables = [_Table(size, items_of_size) for size, items_of_size in found.items() if items_of_size]

    def best_match(self, text: str, threshold: float) -> Match | None:
        """The item with the largest contained share, if that share is at least `threshold`."""
        return max(self.matches(text, threshold), default=None, key=lambda match: match.share)

    def matches(self, text: str, threshold: float) -> list[Match]:
        """The items whose n-grams the text contains to at least the share `threshold`."""
        text_units = units(text)
        return [match for table in self._tables for match in table.matches(text_units, threshold)]

    @property
    def too_short(self) -> int:
        """Number of items without a single n-gram."""
        return len(self.short_items)


class _Table:
    """Items whose n-grams have the same number of units.

    keys [K]     distinct n-grams of all items, sorted
    starts [K+1] the items with key k are owners[starts[k] : starts[k + 1]]
    owners       positions of items
    sizes [N]    distinct n-grams per item
    """

    def __init__(self, size: int, items: list[tuple[int, Hashes]]):
        self.size = size
        self.numbers = [number for number, _ in items]
        self.sizes = np.array([len(grams) for _, grams in items])
        grams = np.concatenate([grams for _, grams in items])
        owners = np.repeat(np.arange(len(items)), self.sizes)
        order = np.argsort(grams, kind="stable")
        self.owners: npt.NDArray[np.int64] = owners[order]
        self.keys, first = np.unique(grams[order], return_index=True)
        self.starts = np.append(first, len(grams))

    def matches(self, text_units: list[str], threshold: float) -> list[Match]:
        grams = gram_hashes(text_units, self.size)
        places = np.searchsorted(self.keys, grams)
        known = places < len(self.keys)
        places = places[known][self.keys[places[known]] == grams[known]]
        if not len(places):
            return []
        owners = np.concatenate([self.owners[self.starts[place] : self.starts[place + 1]] for place in places])
        shared = np.bincount(owners, minlength=len(self.sizes))
        shares = shared / self.sizes
        shares[(self.sizes < SHORT) & (shared < self.sizes)] = 0.0
        return [Match(self.numbers[item], float(shares[item])) for item in np.flatnonzero(shares >= threshold)]
