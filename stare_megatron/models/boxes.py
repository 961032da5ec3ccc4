"""Which part of which Hugging Face tensors a rank's Megatron-Core parameters are. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from stare_megatron.models.entries import ParameterEntry, parts, segments
from stare_megatron.models.shape import ModelShape, Split


@dataclass(frozen=True)
class Box:
    """A block of the Hugging Face tensor `name`: elements `begin[d]` up to, not including, `end[d]` of each dimension
    d."""

    name: str
    begin: tuple[int, ...]
    end: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(e - b for b, e in zip(self.begin, self.end, strict=True))

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def __str__(self) -> str:
        """As in `model.norm.weight[0:64]`."""
        return f"{self.name}[{', '.join(f'{b}:{e}' for b, e in zip(self.begin, self.end, strict=True))}]"

    def intersection(self, other: Box) -> Box | None:
        """What both hold; None where that is nothing."""
        if self.name != other.name:
            return None
        begin = tuple(map(max, self.begin, other.begin))
        end = tuple(map(min, self.end, other.end))
        if any(b >= e for b, e in zip(begin, end, strict=True)):
            return None
        return Box(self.name, begin, end)

    def within(self, outer: Box) -> tuple[slice, ...]:
        """Where this box, a part of `outer`, lies in a tensor that holds `outer`."""
        return tuple(slice(b - o, e - o) for b, e, o in zip(self.begin, self.end, outer.begin, strict=True))

    def rows(self, most: int) -> Iterator[Box]:
        """This box in blocks of whole rows, each of at most `most` elements, or of one row that has more."""
        step = max(1, most // max(1, math.prod(self.shape[1:])))
        for begin in range(self.begin[0], self.end[0], step):
            end = min(begin + step, self.end[0])
            yield Box(self.name, (begin, *self.begin[1:]), (end, *self.end[1:]))


@dataclass(frozen=True)
class Held:
    """`box` is the block of the same shape of a rank's parameter whose first element is at `corner`."""

    box: Box
    corner: tuple[int, ...]

    @property
    def where(self) -> tuple[slice, ...]:
        return tuple(slice(c, c + n) for c, n in zip(self.corner, self.box.shape, strict=True))


def held(entry: ParameterEntry, shape: ModelShape, expert: int, rank: int, size: int, rows: int) -> Iterator[Held]:
    """What rank `rank` of the `size` that split a parameter holds of its Hugging Face tensors; the rest of its tensor
    is padding.

    `expert`: its number in the whole model, 0 where the parameter is of none; `rows`: of the rank's tensor, padding
    included.
    """
    layout, wants = entry.tensor.layout, entry.wants(shape)
    names = entry.names(expert)
    if layout is Split.REPLICATED:
        yield _rows(names[0], wants[0], 0, wants[0][0], 0)
    elif layout in (Split.ROW, Split.EXPERT_ROW):
        out, columns = wants[0][0], wants[0][1] // size
        yield Held(Box(names[0], (0, rank * columns), (out, (rank + 1) * columns)), (0, 0))
    elif layout is Split.VOCAB:
        first, last = min(rank * rows, shape.vocab), min((rank + 1) * rows, shape.vocab)
        if first < last:
            yield _rows(names[0], wants[0], first, last, 0)
    elif layout is Split.QKV:
        own = sum(want[0] for want in wants) // size
        for s in segments(entry, shape):
            shared = s.shared(rank * own, (rank + 1) * own, of_mcore=True)
            if shared:
                low, high = shared
                yield _rows(names[s.part], wants[s.part], s.hf + low, s.hf + high, s.mcore + low - rank * own)
    else:
        for i, part in enumerate(parts(entry.tensor, shape)):
            own = part.rows // size
            first = part.first + rank * own
            yield _rows(names[part.tensor], wants[part.tensor], first, first + own, i * own)


def _rows(name: str, want: tuple[int, ...], first: int, last: int, row: int) -> Held:
    """Whole rows [first, last) of a tensor of shape `want`, which begin at row `row` of the rank's."""
    rest = want[1:]
    return Held(Box(name, (first, *(0 for _ in rest)), (last, *rest)), (row, *(0 for _ in rest)))
