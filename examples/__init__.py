"""Programs that show the service to a new user. They speak to it over HTTP, as any client would."""
