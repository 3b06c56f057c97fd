"""Pages for people, and what they load; all of it is served from here."""
