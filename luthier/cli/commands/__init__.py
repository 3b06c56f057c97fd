"""The commands of `luthier`, one file per noun. Imports that only one command needs are inside it."""
