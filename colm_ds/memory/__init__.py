"""Where memory goes: measured per phase of a step."""
