"""Models in memory: base models, adapters and full models, their files and their budget."""
