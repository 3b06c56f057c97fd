"""The Celery shell: takes jobs from Postgres and supervises the training child."""
