"""One file per resource of the API."""

from api.middleware import restore_slashes_in_parameters

restore_slashes_in_parameters()
