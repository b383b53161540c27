"""`python -m tsconv` is `tsconv`."""

from tsconv.cli import main

main()
