"""The embedded default: images, questions and stand-in parts that the project generates."""
