"""The command ``sb3-vla``."""
