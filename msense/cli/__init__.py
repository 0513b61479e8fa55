"""The command line: flags, tables and exit codes."""
