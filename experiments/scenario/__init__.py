"""Declarative scenarios: one YAML file says model, hosts, load, policies and faults; run simulated or live."""
