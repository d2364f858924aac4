"""Spans of requests, where they are wanted: how they are made and sent, and nothing of what they say."""
