"""The window into a running cluster: one snapshot, shown by the page at /dashboard and by `octavo top`."""
