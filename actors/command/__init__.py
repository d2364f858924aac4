"""What stands behind the command line: serve, status, chat, the demo model."""
