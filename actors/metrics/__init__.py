"""What is measured of a cluster, as values; the front door shows them to Prometheus, the supervisor to Ray."""
