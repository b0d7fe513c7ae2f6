"""A mixer of one's own (`examples.additions` adds it as `model.mixer=retention`)."""
