"""End a process: exit codes, requests to stop, final messages, the watchdog. And show its progress."""
