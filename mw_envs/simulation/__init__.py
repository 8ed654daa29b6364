"""Simulators of tasks: placing a trial, stepping fast, and the cache of compiled scenes."""
