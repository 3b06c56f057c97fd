"""The command `luthier`. It starts the other processes by command line and never imports them."""
