"""Grammars that a text must follow: what was asked, compiled for a vocabulary, and matched token by token."""
