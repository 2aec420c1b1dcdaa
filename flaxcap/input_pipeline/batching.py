"""The batch of each step: a function of the seed and the step's number.

A batch has I images and at most C captions of each, padded to one length. The captions of an image are dealt into
entries of at most C. Entries are sorted by length and dealt into a table of I columns:

    row of the table     = a batch; its bucket is the shortest that holds its longest caption
    column of the table  = an image's index in the batch, and so a device: an entry never leaves its column

An epoch shuffles each column among the rows of the same bucket. It then shuffles runs of rows of one bucket, which are
dispatched together. Every caption occurs once in an epoch, and padding is small. Each device needs only the images of
its own columns. A run can resume at any step, with any number of devices that divides I, without saved state.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from flaxcap.errors import UserError
from flaxcap.text.tokens import Tokens
from flaxcap.text.vocabulary import PAD


class Batch(NamedTuple):
    """Images with some of their captions."""

    rows_I: np.ndarray  # int32: rows of the store; -1: padding
    tokens_ICT: np.ndarray  # int32: <start>, words, <end>, <pad>; an absent caption is all <pad>


class Plan:
    """The batches of a split's captions, for every step of a run."""

    def __init__(
        self,
        tokens: Tokens,
        *,
        batch_images: int,
        captions_per_image: int,
        num_buckets: int,
        batches_per_dispatch: int = 1,
        seed: int = 0,
        skip: frozenset[int] | set[int] = frozenset(),
    ):
        """Deals the captions into batches.

        Args:
          tokens: all captions of the split.
          batch_images: images of a batch.
          captions_per_image: most captions of an image in a batch.
          num_buckets: most lengths that batches are padded to.
          batches_per_dispatch: most batches of one bucket that follow each other.
          seed: of the shuffling.
          skip: rows of the store without features.

        Raises:
          UserError: no caption is left.
        """
        self.tokens, self.batches_per_dispatch, self.seed = tokens, batches_per_dispatch, seed
        lengths = np.diff(tokens.starts)
        self.entries_UC = _entries(tokens.rows, captions_per_image, skip)
        if not len(self.entries_UC):
            raise UserError("no image with features has a caption; expected at least one")
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
        """The number of batches of an epoch."""
        return len(self.table_LI)

    @property
    def num_captions(self) -> int:
        """The number of captions of an epoch."""
        return int((self.entries_UC >= 0).sum())

    @property
    def padding(self) -> float:
        """The share of <pad> among an epoch's tokens."""
        _, captions = self.entries_UC.shape
        size = captions * self.table_LI.shape[1] * self.buckets[self.bucket_L].sum()
        present = self.entries_UC[self.entries_UC >= 0]
        return 1 - float(np.diff(self.tokens.starts)[present].sum() / size)

    def batch(self, step: int) -> Batch:
        """Returns the batch of a step, counted from the start of the run."""
        epoch, number = divmod(step, self.steps_per_epoch)
        table_LI, order_L = self._epoch(epoch)
        return self._batch(table_LI, int(order_L[number]))

    def dispatches(self, first: int, last: int, cuts: Iterable[int] = ()) -> Iterator[list[Batch]]:
        """Yields the batches of steps first … last-1 in lists of one bucket.

        A list has at most `batches_per_dispatch` batches. It ends before an epoch.

        Args:
          first: first step.
          last: step after the last.
          cuts: a list also ends before a step that is a multiple of one of these; 0 is ignored.
        """
        waiting: list[Batch] = []
        for step in range(first, last):
            batch = self.batch(step)
            new_epoch = step % self.steps_per_epoch == 0
            if waiting and (
                len(waiting) == self.batches_per_dispatch
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
        """Returns row `number` of the table, not shuffled: a batch for evaluation."""
        return self._batch(self.table_LI, number)

    def column_rows(self, first: int, last: int) -> np.ndarray:
        """Returns the store's rows that columns first … last-1 need in any epoch, ascending and distinct."""
        entries = self.table_LI[:, first:last]
        return np.unique(self.tokens.rows[self.entries_UC[entries[entries >= 0], 0]])

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the shuffled table of an epoch and the order of its rows, `order_L`; keeps the last epoch's."""
        if getattr(self, "_shuffled", (None,))[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            table_LI = self.table_LI.copy()
            for bucket in range(len(self.buckets)):
                same = np.flatnonzero(self.bucket_L == bucket)  # consecutive rows, as the table is sorted
                table_LI[same] = rng.permuted(table_LI[same], axis=0)
            runs = []
            for bucket in range(len(self.buckets)):
                same = rng.permutation(np.flatnonzero(self.bucket_L == bucket))
                size = self.batches_per_dispatch
                runs += [same[i : i + size] for i in range(0, len(same), size)]
            order_L = np.concatenate([runs[i] for i in rng.permutation(len(runs))])
            self._shuffled = epoch, table_LI, order_L
        return self._shuffled[1:]

    def _batch(self, table_LI: np.ndarray, number: int) -> Batch:
        """Returns row `number` of a table as a batch."""
        entries_I = table_LI[number]
        captions_IC = np.where(entries_I[:, None] >= 0, self.entries_UC[entries_I], -1)
        starts = self.tokens.starts
        present_IC = captions_IC >= 0
        lengths_IC = np.where(present_IC, starts[captions_IC + 1] - starts[captions_IC], 0)
        time_T = np.arange(int(self.buckets[self.bucket_L[number]]))
        real_ICT = time_T < lengths_IC[..., None]
        index_ICT = np.where(real_ICT, starts[captions_IC][..., None] + time_T, 0)
        tokens_ICT = np.where(real_ICT, self.tokens.ids[index_ICT], PAD)
        rows_I = np.where(entries_I >= 0, self.tokens.rows[self.entries_UC[entries_I, 0]], -1)
        return Batch(rows_I.astype(np.int32), tokens_ICT.astype(np.int32))


def _entries(rows: np.ndarray, size: int, skip: frozenset[int] | set[int]) -> np.ndarray:
    """Returns the caption numbers of each entry, int64 [U, size]; -1: padding.

    Args:
      rows: the store's row of each caption; never decreasing.
      size: most captions of an entry.
      skip: rows without entries.
    """
    numbers = np.flatnonzero(~np.isin(rows, list(skip)))
    rows = rows[numbers]
    first = np.searchsorted(rows, rows)  # number of the first caption of the same image
    rank = np.arange(len(rows)) - first  # of the caption among those of its image
    starts_entry = rank % size == 0
    entry = np.cumsum(starts_entry) - 1
    entries_UC = np.full((int(starts_entry.sum()), size), -1, np.int64)
    entries_UC[entry, rank % size] = numbers
    return entries_UC


def choose_buckets(lengths: np.ndarray, count: int) -> np.ndarray:
    """Returns at most `count` of the lengths, ascending, int64, that pad these lengths least.

    The choice is exact, by dynamic programming over the distinct lengths.
    """
    values, weights = np.unique(lengths, return_counts=True)
    n = len(values)
    count = min(count, n)
    total = np.concatenate([[0], np.cumsum(weights)])
    # best[k][j]: least padded size of the j shortest distinct lengths in k buckets
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
