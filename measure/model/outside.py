"""The weights of a skeleton outside of its blocks, read when a module is first called and let go afterwards.

What runs before the first block or after the last one differs from model to model: embeddings of tokens, positions or
layers, norms, projections, a tower that text never reaches. So nothing is listed: a module that is called gets its
weights. Of tables of embeddings only the rows that are asked for are put on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .skeleton import own_tensors, set_tensor

__all__ = ["OutsideWeights"]


class OutsideWeights:
    """Gives modules outside of the blocks their weights as they are called, while ``held``."""

    def __init__(
        self,
        model: nn.Module,
        blocks: str,
        read: Callable[[str], Tensor],
        place: Callable[[str, Tensor], Tensor],
    ) -> None:
        """Watch the modules; nothing is read.

        Args:
            model: The skeleton.
            blocks: Name of the list of decoder blocks.
            read: Returns a parameter or buffer by its full name, as it is stored.
            place: Brings it onto the device, in the dtype that it is used in.
        """
        self._read = read
        self._place = place
        self._tables: list[Mapping[str, Tensor]] = []  # one of every context that is entered
        self._empty: dict[nn.Module, tuple[str, dict[str, Tensor]]] = {}
        self._loaded: set[nn.Module] = set()
        self._blank = False
        self._stored_tables: dict[str, Tensor] = {}
        for name, module in model.named_modules():
            own = own_tensors(module)
            if not own or name == blocks or name.startswith(f"{blocks}."):
                continue
            self._empty[module] = (f"{name}." if name else "", own)
            if isinstance(module, nn.Embedding):
                module.padding_idx = None  # no row is without gradient
                module.register_forward_pre_hook(self._give_rows)
            else:
                module.register_forward_pre_hook(self._give_all)

    @contextmanager
    def held(self, tables: Mapping[str, Tensor] | None = None) -> Iterator[None]:
        """Let modules that are called have weights; all of them go when the outermost context ends.

        Args:
            tables: Embeddings to use instead of the model's own, by name of the module, shape (tokens, width).
        """
        self._tables.append(tables or {})
        try:
            yield
        finally:
            self._tables.pop()
            if not self._tables:
                self._let_go()

    @contextmanager
    def blank_tables(self) -> Iterator[None]:
        """Let embeddings be zero and read no table: what the model makes of them is thrown away."""
        self._blank = True
        try:
            yield
        finally:
            self._blank = False

    def load(self, module: nn.Module) -> None:
        """Give a module its weights before it is called; a context must be entered."""
        if module not in self._loaded:
            self._loaded.add(module)
            self._give(module, self._empty[module][1].keys())

    def _give_all(self, module: nn.Module, _args: Any) -> None:
        self.load(module)

    def _give_rows(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # Each token gets a row of its own, so that none shares its gradient.
        (ids, *rest) = args
        prefix, own = self._empty[module]
        self._loaded.add(module)
        if self._blank:
            zeros = torch.zeros(1, own["weight"].shape[1])
            set_tensor(module, "weight", self._place(f"{prefix}weight", zeros))
            return (torch.zeros_like(ids), *rest)
        table = self._tables[-1].get(prefix.removesuffix("."))
        if table is None:
            table = self._stored_tables.get(prefix)
        if table is None:
            table = self._stored_tables[prefix] = self._read(f"{prefix}weight")
        rows = self._place(f"{prefix}weight", table[ids.flatten().cpu()])
        module.register_parameter("weight", nn.Parameter(rows))
        self._give(module, own.keys() - {"weight"})
        return (torch.arange(ids.numel(), device=rows.device).view(ids.shape), *rest)

    def _give(self, module: nn.Module, names: Any) -> None:
        prefix = self._empty[module][0]
        for name in names:
            set_tensor(module, name, self._place(prefix + name, self._read(prefix + name)))

    def _let_go(self) -> None:
        for module in self._loaded:
            for name, empty in self._empty[module][1].items():
                set_tensor(module, name, empty)
        self._loaded.clear()
        self._stored_tables.clear()
