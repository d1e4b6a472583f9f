"""Any file to records."""
