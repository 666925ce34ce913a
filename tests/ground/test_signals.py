"""Signals: one way out for Ctrl-C, SIGTERM and SIGHUP; handlers that are put back; pipes without a reader."""
import os
import signal
import threading

import pytest

from symbnn import signals
from symbnn.signals import Ended, end, ending, handled, noticing, output_is_closed, status_after


@pytest.fixture(autouse=True)
def heard(monkeypatch):
    """What reaches the handler that was there before; it does not end this process."""
    seen = []
    before = {number: signal.signal(number, lambda number, frame: seen.append(number))
              for number in signals.TERMINATING}
    yield seen
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", signals.TERMINATING)
def test_what_notices_finishes_and_hands_the_signal_on(heard, number):
    with noticing() as asked:
        assert not asked()
        signal.raise_signal(number)
        assert asked() and not heard
    assert heard == [number]


@pytest.mark.parametrize("number", signals.TERMINATING)
def test_what_ends_at_once_cleans_up_first(heard, number):
    left = []

    def work():
        with ending():
            try:
                signal.raise_signal(number)
            finally:
                left.append(list(heard))

    with pytest.raises(Ended) as ended:
        work()
    assert left == [[]] and heard == [number] and status_after(ended.value) == 128 + number


def test_ctrl_c_is_reported_and_not_handed_on(heard):
    with noticing() as asked:
        signal.raise_signal(signal.SIGINT)
    assert asked() and not heard and status_after(KeyboardInterrupt()) == 130


@pytest.mark.parametrize("first, second, raised", [
    (signal.SIGINT, signal.SIGTERM, Ended), (signal.SIGTERM, signal.SIGINT, KeyboardInterrupt),
])
def test_the_second_signal_ends_the_block(first, second, raised):
    def work():
        with noticing():
            signal.raise_signal(first)
            signal.raise_signal(second)
            pytest.fail("went on")

    with pytest.raises(raised):
        work()


def test_a_signal_that_is_ignored_stays_ignored(heard):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with noticing() as asked, ending():
        signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    assert not asked() and not heard


def test_threads_install_nothing(heard):
    before, seen = [signal.getsignal(number) for number in signals.TERMINATING], []

    def elsewhere():
        with noticing() as asked, ending(), handled(end, (signal.SIGINT,)):
            seen.append([signal.getsignal(number) for number in signals.TERMINATING] == before and not asked())

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [True]


def test_handlers_are_put_back_after_anything(heard):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    for block in (noticing, ending):
        with pytest.raises(OSError, match="disk"), block():
            raise OSError("disk")
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_pipe_without_a_reader_is_noticed_and_left(monkeypatch, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream:
        monkeypatch.setattr("sys.stdout", stream)
        stream.write("nobody reads this")
        assert output_is_closed()
        stream.write("nor this")
        assert not output_is_closed()
