"""Where rows' segments lie in a pool of positions: first fit, neighbours merge when given back."""


class Segments:
    """The free parts of a pool, in order. Host facts only; nothing is moved, ever."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._free = [(0, size)] if size else []  # (start, size), sorted, no two of them touch

    @property
    def free(self) -> int:
        """Positions that nobody has."""
        return sum(size for _, size in self._free)

    def take(self, size: int) -> int | None:
        """Take a segment. Returns its start, or None if no free part is that large."""
        for index, (start, room) in enumerate(self._free):
            if room >= size:
                left = (start + size, room - size)
                self._free[index : index + 1] = [left] if left[1] else []
                return start
        return None

    def extend(self, start: int, size: int, wanted: int) -> bool:
        """Grow the segment at `start` from `size` to `wanted` where it lies, if there is room."""
        for index, (free, room) in enumerate(self._free):
            if free == start + size and room >= wanted - size:
                left = (start + wanted, room - (wanted - size))
                self._free[index : index + 1] = [left] if left[1] else []
                return True
        return size >= wanted

    def give(self, start: int, size: int) -> None:
        """Give back what lies at `start`: a segment, or its end."""
        if not size:
            return
        self._free.append((start, size))
        merged: list[tuple[int, int]] = []
        for free, room in sorted(self._free):
            if merged and sum(merged[-1]) == free:
                merged[-1] = (merged[-1][0], merged[-1][1] + room)
            else:
                assert not merged or sum(merged[-1]) < free, "given back twice"
                merged.append((free, room))
        self._free = merged
