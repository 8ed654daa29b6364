"""Demonstrations: recorded from scripted experts, kept as LeRobot datasets, read into memory."""
