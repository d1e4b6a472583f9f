"""Fetches what a recipe names and is not here, and checks that every image that its rows name is there."""
