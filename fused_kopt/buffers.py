"""Flat buffers: one 1-D tensor per slot and bucket, and the per-variable views that enter `weights`."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fused_kopt import layout
from fused_kopt.layout import Segment
from fused_kopt.slots import POSITION, Slot


class Bucket:
    """The variables of one launch: same device, same dtype.

    Variables are borrowed; slots are owned here, in `flat[name]` (1-D), or borrowed as well (`borrow`). `views[name][i]` is the slot
    of `variables[i]` in its shape, or None while Keras would not have created it yet; 1-D where GROUP elements share a value.
    """

    def __init__(
        self, device: torch.device, dtype: torch.dtype, stored: torch.dtype | None = None, policy: Any = None, part: int = 0
    ) -> None:
        self.device = device
        self.dtype = dtype
        self.compute = layout.compute_dtype(dtype)
        self.stored = stored or self.compute  # what slots are kept in where nothing else is said
        self.policy = policy  # what decided which slots there are (`fused_kopt.precision`)
        self.part = part  # launches of a step that are apart, so that transfers go on beside them
        self.kinds = {POSITION.name: (torch.int32, 0)}  # of its own slots: dtype, elements that share a value
        self.variables: list[Tensor] = []
        self.segments: list[Segment] = []
        self.flat: dict[str, Tensor] = {}
        self.views: dict[str, list[Tensor | None]] = {}
        self.index: dict[int, int] = {}
        self.tables: Any = None  # what executors keep between launches; None once the buffers moved

    @property
    def size(self) -> tuple[int, int]:
        """Elements, padding included, and variables."""
        return (self.segments[-1].end if self.segments else 0), len(self.segments)

    @property
    def key(self) -> tuple[torch.device, torch.dtype, Any, int]:
        """What its variables share."""
        return self.device, self.dtype, self.policy, self.part

    def grown(
        self, variables: Iterable[Tensor], slots: Iterable[Slot], numbers: Mapping[int, int] | None = None
    ) -> tuple[list[Tensor], list[Segment], dict[str, Tensor]]:
        """All that `adopt` needs to hold new variables and slots too. Allocates, publishes nothing.

        numbers: by id of a variable its segment's, where it is not the offset.
        """
        new = [v for v in variables if id(v) not in self.index]
        end = self.segments[-1].end if self.segments else 0
        segments = [s._replace(number=(numbers or {}).get(id(v))) for v, s in zip(new, layout.plan(new, end), strict=True)]
        total = segments[-1].end if segments else end
        flat = {}
        for slot in slots:
            self.kinds[slot.name] = slot.stored or self.stored, slot.group
            old = self.flat.get(slot.name)
            if not slot.group or (old is not None and old.numel() == total // slot.group):
                continue
            size = total // slot.group
            flat[slot.name] = torch.full((size,), slot.initial, dtype=slot.stored or self.stored, device=self.device)
            if old is not None:
                flat[slot.name][: old.numel()] = old
        return new, segments, flat

    def adopt(self, new: list[Tensor], segments: list[Segment], flat: Mapping[str, Tensor]) -> None:
        """Publish what `grown` allocated. Existing slot tensors stay the same objects, moved into the new buffers."""
        self.index.update({id(v): len(self.variables) + i for i, v in enumerate(new)})
        self.variables += new
        self.segments += segments
        self.flat.update(flat)
        for views in self.views.values():
            views += [None] * len(new)
        for name, buffer in flat.items():
            self._move(name, self.views.setdefault(name, [None] * len(self.variables)), buffer)
        if new or flat:
            self.tables = None

    def borrow(self, slots: Mapping[str, Iterable[Tensor]]) -> None:
        """Use slots that somebody else owns: by name one for each variable, in its segment's layout."""
        self.views = {name: list(views) for name, views in slots.items()}

    def kind(self, name: str) -> tuple[torch.dtype, int]:
        """A slot's dtype, and how many elements share one value: 0 for positions, which are counted and not stored."""
        return self.kinds.get(name, (self.stored, 1))

    def planes(self, names: Iterable[str]) -> tuple[tuple[torch.dtype, int], ...]:
        """The kinds of several slots."""
        return tuple(map(self.kind, names))

    def addresses(self, name: str) -> Any:
        """Where each variable's slot begins, int64 [variables]; of positions, the first one."""
        if not self.kind(name)[1]:
            return np.array([segment.first for segment in self.segments], dtype=np.int64)
        offsets = np.array([segment.offset for segment in self.segments], dtype=np.int64)
        if name in self.flat:
            return self.flat[name].data_ptr() + offsets // self.kind(name)[1] * self.flat[name].element_size()
        return np.array([0 if view is None else view.data_ptr() for view in self.views[name]], dtype=np.int64)

    def mark(self) -> tuple[int, dict[str, Tensor]]:
        """What `back_to` needs to undo an `adopt` that was interrupted."""
        return len(self.variables), dict(self.flat)

    def back_to(self, mark: tuple[int, dict[str, Tensor]]) -> None:
        """As it was at the mark; the old buffers still hold the slots' values."""
        count, self.flat = mark
        del self.variables[count:], self.segments[count:]
        self.index = {id(v): i for i, v in enumerate(self.variables)}
        self.views = {name: views[:count] for name, views in self.views.items() if name in self.flat}
        for name, views in self.views.items():
            self._move(name, views, self.flat[name])
        self.tables = None

    def _move(self, name: str, views: Iterable[Tensor | None], buffer: Tensor) -> None:
        for segment, view in zip(self.segments, views, strict=True):
            if view is not None:
                view.set_(buffer.untyped_storage(), *self._place(name, segment))

    def _place(self, name: str, segment: Segment) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        """Offset, shape and strides of a segment's slot in its flat buffer."""
        group = self.kind(name)[1]
        if group == 1:
            return segment.offset, segment.shape, segment.stride
        return segment.offset // group, (-(-segment.numel // group),), (1,)

    def view(self, name: str, index: int) -> Tensor:
        """The slot `name` of variable `index`, made visible on first use."""
        view = self.views[name][index]
        if view is None:
            offset, shape, stride = self._place(name, self.segments[index])
            view = self.flat[name].as_strided(shape, stride, offset)
            self.views[name][index] = view
        return view

    def __getstate__(self) -> dict[str, Any]:
        visible = {name: [view is not None for view in views] for name, views in self.views.items()}
        return {**self.__dict__, "views": visible, "index": None, "tables": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.variables:  # torch.load(map_location=...) moves the tensors
            self.device = self.variables[0].device
        self.index = {id(v): i for i, v in enumerate(self.variables)}
        visible, self.views = state["views"], {name: [None] * len(self.variables) for name in state["views"]}
        for name, flags in visible.items():
            for index in (i for i, flag in enumerate(flags) if flag):
                self.view(name, index)
