"""(seed, step) -> batch: which images, which of their captions, padded to which length.

A batch is images, each with some of its captions. The captions of an image are dealt into entries of at most C;
entries are sorted by length and dealt into a table of I columns, so that

    row of the table     = a batch; its bucket is the shortest that holds its longest caption
    column of the table  = a place in the batch, and so a device: an entry never leaves its column

An epoch shuffles each column among the rows of the same bucket, then the rows, in runs of one bucket that a device
can be sent together. So every caption comes once an epoch, padding is small, each device ever needs only the images
of its own columns, and nothing has to be saved to go on at any step with any number of devices that divides I.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from flaxcap.errors import UserError
from flaxcap.text.vocabulary import PAD, Tokens


class Batch(NamedTuple):
    """Images with some of their captions."""

    rows_I: np.ndarray  # int32: rows of the store; -1 where a place stays empty
    tokens_ICT: np.ndarray  # int32: with <start> and <end>, <pad> after; an absent caption is all <pad>


class Plan:
    """The batches of a split's captions, for every step of a run."""

    def __init__(
        self,
        tokens: Tokens,
        *,
        batch_images: int,
        captions_per_image: int,
        num_buckets: int,
        run: int = 1,
        seed: int = 0,
        skip: frozenset[int] | set[int] = frozenset(),
    ):
        """`run`: batches of one bucket that follow each other; `skip`: rows of the store without features.

        UserError if no caption is left.
        """
        self.tokens, self.run, self.seed = tokens, run, seed
        lengths = np.diff(tokens.starts)
        self.entries_UC = _entries(tokens.rows, captions_per_image, skip)
        if not len(self.entries_UC):
            raise UserError("there is no image with features and a caption to make a batch of")
        longest_U = np.where(self.entries_UC >= 0, lengths[self.entries_UC], 0).max(1)
        self.buckets = choose_buckets(longest_U, num_buckets)

        order = np.argsort(longest_U, kind="stable")
        rows = -(-len(order) // batch_images)
        table = np.full(rows * batch_images, -1, np.int64)
        table[: len(order)] = order
        self.table_LI = table.reshape(rows, batch_images)
        longest_L = np.where(self.table_LI >= 0, longest_U[self.table_LI], 0).max(1)
        self.bucket_L = np.searchsorted(self.buckets, longest_L)

    @property
    def steps_per_epoch(self) -> int:
        return len(self.table_LI)

    @property
    def num_captions(self) -> int:
        return int((self.entries_UC >= 0).sum())

    @property
    def padding(self) -> float:
        """The share of an epoch's token places that hold <pad>."""
        _, captions = self.entries_UC.shape
        places = captions * self.table_LI.shape[1] * self.buckets[self.bucket_L].sum()
        present = self.entries_UC[self.entries_UC >= 0]
        return 1 - float(np.diff(self.tokens.starts)[present].sum() / places)

    def batch(self, step: int) -> Batch:
        """The batch of a step counted from the start of the run."""
        epoch, number = divmod(step, self.steps_per_epoch)
        table_LI, order_L = self._epoch(epoch)
        return self._batch(table_LI, int(order_L[number]))

    def dispatches(self, first: int, last: int, cuts: Iterable[int] = ()) -> Iterator[list[Batch]]:
        """The batches of steps first … last-1 in lists of one bucket, at most a run long.

        Each list ends before an epoch, and before a step that is a multiple of one of `cuts`.
        """
        waiting: list[Batch] = []
        for step in range(first, last):
            batch = self.batch(step)
            new_epoch = step % self.steps_per_epoch == 0
            if waiting and (
                len(waiting) == self.run
                or new_epoch
                or waiting[0].tokens_ICT.shape != batch.tokens_ICT.shape
                or any(cut and step % cut == 0 for cut in cuts)
            ):
                yield waiting
                waiting = []
            waiting.append(batch)
        if waiting:
            yield waiting

    def in_order(self, number: int) -> Batch:
        """The table's batch `number` as it stands, unshuffled: for evaluation."""
        return self._batch(self.table_LI, number)

    def column_rows(self, first: int, last: int) -> np.ndarray:
        """The store's rows that columns first … last-1 of the batches ever need, sorted, each once."""
        entries = self.table_LI[:, first:last]
        return np.unique(self.tokens.rows[self.entries_UC[entries[entries >= 0], 0]])

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if getattr(self, "_shuffled", (None,))[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            table_LI = self.table_LI.copy()
            for bucket in range(len(self.buckets)):
                same = np.flatnonzero(self.bucket_L == bucket)  # neighbours: the table is sorted
                table_LI[same] = rng.permuted(table_LI[same], axis=0)
            runs = []
            for bucket in range(len(self.buckets)):
                same = rng.permutation(np.flatnonzero(self.bucket_L == bucket))
                runs += [same[i : i + self.run] for i in range(0, len(same), self.run)]
            order_L = np.concatenate([runs[i] for i in rng.permutation(len(runs))])
            self._shuffled = epoch, table_LI, order_L
        return self._shuffled[1:]

    def _batch(self, table_LI: np.ndarray, number: int) -> Batch:
        entries_I = table_LI[number]
        captions_IC = np.where(entries_I[:, None] >= 0, self.entries_UC[entries_I], -1)
        starts = self.tokens.starts
        present_IC = captions_IC >= 0
        lengths_IC = np.where(present_IC, starts[captions_IC + 1] - starts[captions_IC], 0)
        time_T = np.arange(int(self.buckets[self.bucket_L[number]]))
        real_ICT = time_T < lengths_IC[..., None]
        places_ICT = np.where(real_ICT, starts[captions_IC][..., None] + time_T, 0)
        tokens_ICT = np.where(real_ICT, self.tokens.ids[places_ICT], PAD)
        rows_I = np.where(entries_I >= 0, self.tokens.rows[self.entries_UC[entries_I, 0]], -1)
        return Batch(rows_I.astype(np.int32), tokens_ICT.astype(np.int32))


def _entries(rows: np.ndarray, size: int, skip: frozenset[int] | set[int]) -> np.ndarray:
    """Caption numbers [U, size], -1 where an image has no more; `rows` do not decrease."""
    numbers = np.flatnonzero(~np.isin(rows, list(skip)))
    rows = rows[numbers]
    first = np.searchsorted(rows, rows)  # where this caption's image begins
    place = np.arange(len(rows)) - first
    starts_entry = place % size == 0
    entry = np.cumsum(starts_entry) - 1
    entries_UC = np.full((int(starts_entry.sum()), size), -1, np.int64)
    entries_UC[entry, place % size] = numbers
    return entries_UC


def choose_buckets(lengths: np.ndarray, count: int) -> np.ndarray:
    """The at most `count` lengths, ascending, that pad these lengths least: int64, the last is the longest.

    Exact, by dynamic programming over the distinct lengths.
    """
    values, weights = np.unique(lengths, return_counts=True)
    n = len(values)
    count = min(count, n)
    total = np.concatenate([[0], np.cumsum(weights)])
    # best[k][j]: the least padded size of the j shortest distinct lengths in k buckets
    best = np.full((count + 1, n + 1), np.inf)
    cut = np.zeros((count + 1, n + 1), np.int64)
    best[0, 0] = 0
    for k in range(1, count + 1):
        for j in range(1, n + 1):
            costs = best[k - 1, :j] + values[j - 1] * (total[j] - total[:j])
            cut[k, j] = np.argmin(costs)
            best[k, j] = costs[cut[k, j]]
    chosen, j = [], n
    for k in range(count, 0, -1):
        chosen.append(values[j - 1])
        j = cut[k, j]
    return np.array(chosen[::-1], np.int64)
