"""What every test counts on."""

import signal
import socket
from collections.abc import Iterator

import pytest

from tsconv.native.threads import wait_asleep

# A shell's background job ignores Ctrl-C, and so would every process that a test starts to interrupt it.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Tests take their time on a busy machine, but not all of it. What they start inherits this.
wait_asleep()


@pytest.fixture
def silent() -> Iterator[str]:
    """A server's address that nobody answers at: the port is taken, and not listened on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"
