"""What every part may know: settings, errors, ids, states, specs, events."""
