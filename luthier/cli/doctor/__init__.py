"""`luthier doctor`: checks of this machine and of the service, each with what to do. Changes nothing."""
