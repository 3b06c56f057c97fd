"""The bundled data set: support messages of an invented house, and how answers to them are scored."""
