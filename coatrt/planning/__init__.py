"""A configuration for a device."""
