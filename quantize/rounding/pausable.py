"""Forward passes that pause at chosen places inside a module, and go on one by one.

Rounding needs what one input group of a block reads in *all* micro-batches before it can set the group's weights, and
only then can the forward pass go on. Each micro-batch's forward runs in a thread of its own that pauses at the stops,
so nothing is computed twice and only what the forward itself still needs is in memory. Where that is too much, a
forward is ended at each stop and begun anew for the next. One thread runs at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["PausableForwards", "output_of", "run_until"]


class _Reached(Exception):
    """Ends a forward at a module."""

    def __init__(self, inputs: Tensor) -> None:
        super().__init__()
        self.inputs = inputs


def run_until(module: nn.Module, run: Callable[[], object]) -> Tensor:
    """Run a forward up to one module, and no further.

    Args:
        module: Where it ends; the forward calls it with its input as the first argument.
        run: The forward.

    Returns:
        The module's input. Hooks that the module had before have seen it too.
    """

    def stop(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        raise _Reached(args[0])

    handle = module.register_forward_pre_hook(stop)
    try:
        run()
    except _Reached as reached:
        return reached.inputs
    finally:
        handle.remove()
    raise AssertionError("the forward calls the module")


def output_of(name: str) -> str:
    """Return what the output of a submodule is tapped as; by its name alone its input is."""
    return f"{name} output"


class _Abandoned(BaseException):
    """Ends the forward of a thread whose result is not needed any more."""


class _Forward:
    """One forward and its thread."""

    def __init__(self, run: Callable[[], Tensor], passed: int = 0) -> None:
        self.passed = passed
        self.taps: dict[str, Tensor] = {}
        self.output: Tensor | None = None
        self.error: BaseException | None = None
        self._run = run
        self._may_go = threading.Semaphore(0)
        self._has_stopped = threading.Semaphore(0)
        self._abandoned = False
        self._thread = threading.Thread(target=self._work, daemon=True)

    def advance(self) -> None:
        """Run up to the next stop, or to the end."""
        if not self._thread.is_alive():
            self._thread.start()
        self._may_go.release()
        self._has_stopped.acquire()
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        """Pause, inside the thread, until ``advance`` is called again."""
        self._has_stopped.release()
        self._may_go.acquire()
        if self._abandoned:
            raise _Abandoned

    def abandon(self) -> None:
        """End the thread, wherever it is, and let go of what it made."""
        if self._thread.is_alive():
            self._abandoned = True
            self._may_go.release()
            self._thread.join()
        self.taps.clear()
        self.output = None

    def _work(self) -> None:
        self._may_go.acquire()
        try:
            with torch.no_grad():
                self.output = self._run()
        except _Abandoned:
            pass
        except BaseException as error:
            self.error = error
        finally:
            self._has_stopped.release()


class PausableForwards:
    """Forward passes of one module over several micro-batches, stop by stop."""

    def __init__(
        self,
        module: nn.Module,
        stops: Sequence[str],
        outputs: Sequence[str],
        runs: Sequence[Callable[[], Tensor]],
        *,
        keep_paused: bool = True,
    ) -> None:
        """Prepare the passes; nothing runs yet.

        Args:
            module: What ``runs`` call; its submodules are watched while the context lasts.
            stops: Submodules before which every pass stops, in the order in which the module calls them.
            outputs: Submodules whose output is tapped until the next stop; of several outputs the first.
            runs: One forward for each micro-batch.
            keep_paused: Whether all passes pause at a stop together; else only the latest does, and the others are run
                from their beginning again.
        """
        self._runs = tuple(runs)
        self._keep_paused = keep_paused
        self._passed = [0] * len(runs)
        self._forwards = [_Forward(run) for run in runs]
        self._current = self._forwards[0]
        self._module = module
        self._stops = tuple(stops)
        self._outputs = tuple(outputs)
        self._handles: list[Any] = []

    def __enter__(self) -> PausableForwards:
        """Start watching."""
        for name in self._stops:
            module = self._module.get_submodule(name)
            self._handles.append(module.register_forward_pre_hook(self._stop_at(name), with_kwargs=True))
        for name in self._outputs:
            self._handles.append(self._module.get_submodule(name).register_forward_hook(self._tap(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End passes that are still under way, and stop watching."""
        for forward in self._forwards:
            forward.abandon()
        for handle in self._handles:
            handle.remove()

    def advance(self, number: int) -> Mapping[str, Tensor]:
        """Run one pass up to its next stop.

        Args:
            number: Index of the micro-batch.

        Returns:
            Taps: the input of the submodule where the pass stopped, by its name, and the outputs since the last stop,
            by ``output_of`` their names; empty when the pass goes on. Whatever the pass raises is raised here.
        """
        if not self._keep_paused:
            self._current.abandon()
            self._forwards[number] = _Forward(self._runs[number], self._passed[number])
            self._passed[number] += 1
        self._current = self._forwards[number]
        self._current.advance()
        return self._current.taps

    def finish(self, number: int) -> Tensor:
        """Run one pass from its last stop to its end; returns its output."""
        self.advance(number)
        output = self._forwards[number].output
        assert output is not None, "the module did not stop as often as said"
        self._forwards[number].taps.clear()
        return output

    def _stop_at(self, name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            forward = self._current
            if forward.passed:  # its linears are rounded
                forward.passed -= 1
                forward.taps.clear()
                return
            forward.taps[name] = args[0] if args else kwargs["hidden_states"]
            forward.stop()
            forward.taps.clear()

        return hook

    def _tap(self, name: str) -> Any:
        def hook(_module: nn.Module, _args: tuple[Tensor, ...], output: Any) -> None:
            self._current.taps[output_of(name)] = output[0] if isinstance(output, tuple) else output

        return hook
