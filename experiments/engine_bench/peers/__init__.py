"""Engines to compare with, each in a process of its own with its own libraries, spoken to in lines of JSON."""
