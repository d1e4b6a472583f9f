"""The folder that opens through both doors, and what its card knows."""
