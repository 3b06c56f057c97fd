"""Runners in plain torch: `luthier.modeling.protocols.ModelRunner` on any architecture and device."""
