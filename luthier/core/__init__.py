"""What every part may know: settings, errors, ids, clock, states, specs, events."""
