"""The training process of a job: started, supervised, its events stored, its output published."""
