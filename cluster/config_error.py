"""What is raised for a configuration that cannot be; its own file, so that every part of the configuration can."""


class ConfigError(ValueError):
    """A configuration value that is out of its limits, or two that contradict each other. Names the field."""
