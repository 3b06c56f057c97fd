"""The steps of a run, with evaluations and what decides when it ends."""
