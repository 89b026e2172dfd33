"""The order of training sequences: a pure function of (seed, position), in constant memory.

Position ``p`` counts every sequence ever drawn. Nothing is shuffled in memory: a keyed Feistel network is a
permutation of ``0 .. 2^k - 1`` (Luby and Rackoff 1988), and walking its cycle until the value is below ``n`` makes it
a permutation of ``0 .. n - 1`` (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). So a saved position
is one integer, and the order depends neither on the number of processes nor on the size of a batch.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate

from llmkit.errors import ConfigError, DataError

BLOCK = 1024  # positions within which a mixture holds its weights exactly
_ROUNDS = 8
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_WEIGHT_UNIT = 1 << 32  # weights are kept as integer parts of this, so that positions never meet rounding
_CONCATENATED = -1  # streams of keys that belong to no source
_INSIDE_BLOCK = -2


def _mix(value: int) -> int:
    """A 64-bit hash of a 64-bit number: the finaliser of SplitMix64 (Steele, Lea and Flood 2014)."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


@lru_cache(maxsize=256)
def stream_keys(seed: int, epoch: int, stream: int) -> tuple[int, ...]:
    """The keys of a permutation: as many as there are triples, none like another."""
    state = 0
    for part in (seed, epoch, stream):
        state = _mix((state + part + _GOLDEN) & _MASK)
    return tuple(_mix((state + k * _GOLDEN) & _MASK) for k in range(1, _ROUNDS + 1))


def permute(index: int, n: int, keys: tuple[int, ...]) -> int:
    """Where ``index`` goes in the permutation of ``0 .. n - 1`` that ``keys`` name."""
    bits = max(2, (n - 1).bit_length())
    low_bits = bits // 2
    high_bits = bits - low_bits
    low_mask = (1 << low_bits) - 1
    while True:
        high, low = index >> low_bits, index & low_mask
        for key_even, key_odd in zip(keys[::2], keys[1::2], strict=True):
            high ^= _mix(low ^ key_even) >> (64 - high_bits)
            low ^= _mix(high ^ key_odd) >> (64 - low_bits)
        index = high << low_bits | low
        if index < n:
            return index


class SampleOrder:
    """Which source and row stands at a position.

    Without ``weights`` all sources are one: every row comes exactly once an epoch. With weights every block of 1024
    positions draws from each source in proportion to its weight, and each source goes round its own epochs.
    """

    def __init__(self, sizes: tuple[int, ...], weights: tuple[float, ...] | None, seed: int) -> None:
        self.sizes, self.seed = sizes, seed
        self.n_samples = sum(sizes)
        self._offsets = (0, *accumulate(sizes))
        self._parts = None if weights is None else _integer_weights(sizes, weights)
        if self.n_samples < 1:
            raise DataError("there is no training sequence", where="data.path", fix="give more text")

    def locate(self, position: int) -> tuple[int, int, int]:
        """(source, row, epoch of the source, from 0) at ``position``."""
        if self._parts is not None:
            return self._locate_in_mixture(position, self._parts)
        epoch, row = self._draw(position)
        source = bisect_right(self._offsets, row) - 1
        return source, row - self._offsets[source], epoch

    def sample_id(self, position: int) -> int:
        """The row's number over all sources."""
        source, row, _ = self.locate(position)
        return self._offsets[source] + row

    def epoch(self, position: int) -> float:
        """Epochs done once ``position`` sequences are drawn."""
        return position / self.n_samples

    def _draw(self, position: int) -> tuple[int, int]:
        """Epoch and row over all sources, where those are one."""
        return self._shuffled(position, self.n_samples, _CONCATENATED)

    def _shuffled(self, draw: int, size: int, stream: int) -> tuple[int, int]:
        """Epoch and row of the ``draw``-th sequence out of ``size``, each epoch in an order of its own."""
        epoch, index = divmod(draw, size)
        return epoch, permute(index, size, stream_keys(self.seed, epoch, stream))

    def _locate_in_mixture(self, position: int, parts: tuple[int, ...]) -> tuple[int, int, int]:
        block, index = divmod(position, BLOCK)
        index = permute(index, BLOCK, stream_keys(self.seed, block, _INSIDE_BLOCK))
        before = draws_before(block * BLOCK, parts)
        after = draws_before((block + 1) * BLOCK, parts)
        for source, (start, stop) in enumerate(zip(before, after, strict=True)):
            if index < stop - start:
                epoch, row = self._shuffled(start + index, self.sizes[source], source)
                return source, row, epoch
            index -= stop - start
        raise AssertionError("the draws of a block do not add up to its length")


@lru_cache(maxsize=64)
def draws_before(position: int, parts: tuple[int, ...]) -> tuple[int, ...]:
    """How many of the first ``position`` draws each source gets; the sum is ``position`` and no count ever falls.

    One source after another takes its share of what the earlier ones left, rounded down; rounding each source by
    itself would let a count step back.
    """
    counts, left, weight_left = [], position, sum(parts)
    for part in parts:
        counts.append(left * part // weight_left if weight_left else 0)
        left -= counts[-1]
        weight_left -= part
    return tuple(counts)


def _integer_weights(sizes: tuple[int, ...], weights: tuple[float, ...]) -> tuple[int, ...]:
    check_weights(weights, len(sizes))
    if any(weight > 0 and size < 1 for size, weight in zip(sizes, weights, strict=True)):
        empty = next(n for n, size in enumerate(sizes) if size < 1 and weights[n] > 0)
        what = f"source {empty} has a weight but no training sequence"
        raise DataError(what, where=f"data.path[{empty}]", fix="give it more text, or weight 0")
    parts = [round(weight / sum(weights) * _WEIGHT_UNIT) for weight in weights]
    return tuple(max(part, int(weight > 0)) for part, weight in zip(parts, weights, strict=True))


def check_weights(weights: tuple[float, ...] | list[float] | None, n_sources: int) -> None:
    """Raise for weights that do not describe a mixture of ``n_sources``."""
    if weights is None:
        return
    if len(weights) != n_sources:
        what = f"{len(weights)} weights for {n_sources} sources"
        raise ConfigError(what, where="data.weights", fix="give one weight for each item of data.path, or null")
    if not all(0 <= weight < float("inf") for weight in weights) or sum(weights) <= 0:
        what = f"weights must be finite, not negative, and not all zero: {list(weights)}"
        raise ConfigError(what, where="data.weights", fix="for example data.weights=[0.7,0.3]")
