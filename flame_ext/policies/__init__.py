"""The policies that the one MaxEnt loop can train."""
