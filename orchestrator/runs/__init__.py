"""Whole runs, from settings to published versions. Commands and sweeps call these; they print nothing."""
