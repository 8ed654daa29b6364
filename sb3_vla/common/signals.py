"""Ending a command by Ctrl-C (SIGINT) or SIGTERM: at the next place from which it can go on, with a checkpoint."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from sb3_vla.common.errors import ExpectedError, RankLostError

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A signal ended a command.

    :param number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        #: what a shell says of a process that this signal ended: 130 or 143
        self.exit_code = 128 + number

    def __str__(self) -> str:
        name, cause = super().__str__(), self.__cause__
        if cause is None:
            return name
        first_line = (str(cause).splitlines() or [""])[0]
        return f"{name}, after which this happened: {type(cause).__name__}: {first_line}"


class StopRequest:
    """Whether a signal asked to stop.

    :ivar number: of the signal, or None.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    def common(self, gather: Callable[[int | None], Sequence[int | None]]) -> int | None:
        """The signal that any rank got, so that all of them stop at the same place; all must ask.

        :param gather: gives what each rank passes to it.
        """
        return next((number for number in gather(self.number) if number is not None), None)


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Raise :class:`Stopped` at once where SIGINT or SIGTERM arrives; in another thread than the first do nothing."""

    def stop(number: int, _: FrameType | None) -> None:
        raise Stopped(number)

    with _handling(stop):
        yield


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Note the first signal for a loop that asks now and then, and raise :class:`Stopped` at the second.

    An error that follows the first signal may be its consequence, as when the signal went to the workers too.

    :raises Stopped: in its place, with the error as its cause; one that tells of something else, such as a full disk,
        is raised itself.
    """
    request = StopRequest()

    def stop(number: int, _: FrameType | None) -> None:
        if request.number is not None:
            raise Stopped(number)
        request.number = number

    with _handling(stop):
        try:
            yield request
        except Exception as error:
            elsewhere = isinstance(error, ExpectedError) and not isinstance(error, RankLostError)
            if request.number is None or elsewhere:
                raise
            raise Stopped(request.number) from error


@contextmanager
def _handling(handler: signal._HANDLER) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    before = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
