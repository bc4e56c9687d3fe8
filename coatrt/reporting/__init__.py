"""Reports: adapters and bundles as one HTML page with its figures."""
