"""The embedded default: pictures, questions and stand-in parts that the project makes by itself."""
