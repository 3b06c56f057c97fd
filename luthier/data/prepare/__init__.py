"""From a checked file to prepared rows, and the order in which they are trained."""
