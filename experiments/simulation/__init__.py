"""Routing traces made from nothing or read from public request traces, simulations of them, and their report."""
