"""One file per resource of the wire."""

from api.paths import let_ids_hold_slashes

let_ids_hold_slashes()
