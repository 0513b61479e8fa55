"""Command line: flags, tables and exit codes."""
