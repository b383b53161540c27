"""What every test counts on."""

import signal

from tsconv.native.threads import wait_asleep

# A shell's background job ignores Ctrl-C, and so would every process that a test starts to interrupt it.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Tests take their time on a busy machine, but not all of it. What they start inherits this.
wait_asleep()
