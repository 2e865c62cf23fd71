"""The command line: parse, settle the settings, call a role's main or the client, turn the outcome into an exit code.

Owns words, flags, formats and exit codes. Never decides anything about a task, a node or a pool. Imports nothing heavy
before it is known which command runs: `llorch --help` must feel instant.
"""
