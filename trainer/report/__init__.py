"""Shows runs, finished or not, as one HTML page: curves, data, scores, samples, environment."""
