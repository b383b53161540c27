"""What each command does, as functions; `tsconv.cli` parses their options and prints their results."""
