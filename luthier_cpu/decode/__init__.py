"""The runner of Llama-shaped models: packed weights, batches of any adapters, recorded steps."""
