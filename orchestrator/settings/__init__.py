"""The settings of whole commands, a module a command: what flags and TOML presets fill in.

Flags have the names of the fields; a preset is TOML with one table a section. `tyro` builds the commands from these
classes, so a field's docstring is its ``--help``.
"""
