"""Fuzzing of what users hand in and of what lies on their disks: clear errors, never a traceback or a wrong result."""
