"""How a process ends: exit codes, requests to stop, last words, the watchdog."""
