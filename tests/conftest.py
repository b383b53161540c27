"""What every test counts on."""

import signal

# A shell's background job ignores Ctrl-C, and so would every process that a test starts to interrupt it.
signal.signal(signal.SIGINT, signal.default_int_handler)
